"""Bytes on the pipes: frames, messages, headers, and the state table of a response. No I/O, nothing of a process."""
