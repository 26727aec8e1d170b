"""`python -m transport.cli`, where the command itself is not on the PATH."""

import os
import sys

from transport.cli import main

if sys.path and os.path.realpath(sys.path[0]) not in map(os.path.realpath, [*sys.path[1:], f"{__file__}/../../.."]):
    del sys.path[
        0
    ]  # the working directory, which `-m` has put there: it is the app's, and only the workers' to look in
main()
