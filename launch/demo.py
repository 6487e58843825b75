"""Runs the demo: the command ``dive-fast demo``, as a script for launchers."""

import sys

from dive_fast.commands.demo import main

if __name__ == "__main__":
    sys.exit(main())
