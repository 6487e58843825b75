"""Projects tuned weights towards the pre-trained ones: ``dive-fast tpgm``, as a script for launchers."""

import sys

from dive_fast.commands.tpgm import main

if __name__ == "__main__":
    sys.exit(main())
