"""Compares embeddings before and after fine-tuning: ``dive-fast geometry``, as a script for launchers."""

import sys

from dive_fast.commands.geometry import main

if __name__ == "__main__":
    sys.exit(main())
