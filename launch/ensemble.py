"""Interpolates between weights before and after fine-tuning: ``dive-fast ensemble``, as a script for launchers."""

import sys

from dive_fast.commands.ensemble import main

if __name__ == "__main__":
    sys.exit(main())
