"""What `blastdoor serve` runs: the gateway behind uvicorn, its settings, its page of status, its metrics."""
