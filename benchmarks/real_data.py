"""Folder of real images (README.md, "Data")."""

import os
from pathlib import Path

DATA = Path(os.environ.get("DIVE_TEST_DATA", Path(__file__).parents[2] / "shared/data"))
