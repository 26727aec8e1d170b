"""What `blastdoor serve` runs: the front with its pools, settings, the page of status, metrics."""
