"""Fine-tunes CLIP: the command ``dive-fast train``, as a script for launchers."""

import sys

from dive_fast.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
