"""The HTTP/1.1 front of `blastdoor serve`: connections read and answered by callbacks of one asyncio loop."""
