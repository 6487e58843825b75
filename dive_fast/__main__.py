"""``python -m dive_fast`` is the console command ``dive-fast``."""

import sys

from dive_fast.commands.console import main

if __name__ == "__main__":
    sys.exit(main())
