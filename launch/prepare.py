"""Prepares a data set: the command ``dive-fast prepare``, as a script for launchers."""

import sys

from dive_fast.commands.prepare import main

if __name__ == "__main__":
    sys.exit(main())
