"""`python -m transport.cli`, where the command itself is not on the PATH."""

from transport.cli import main

main()
