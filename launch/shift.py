"""Measures the shift of sets from a training set: ``dive-fast shift``, as a script for launchers."""

import sys

from dive_fast.commands.shift import main

if __name__ == "__main__":
    sys.exit(main())
