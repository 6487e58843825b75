"""Embeds the reference set: the command ``dive-fast cache``, as a script for launchers."""

import sys

from dive_fast.commands.cache import main

if __name__ == "__main__":
    sys.exit(main())
