"""The host's view of its worker processes: who holds which, who waits, what they may use, how they start and end."""
