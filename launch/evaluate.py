"""Evaluates a model: the command ``dive-fast evaluate``, as a script for launchers."""

import sys

from dive_fast.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
