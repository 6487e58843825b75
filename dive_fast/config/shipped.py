"""The configs that are installed with the project."""

from importlib.util import find_spec
from pathlib import Path


def _folder() -> Path:
    spec = find_spec("dive_fast.launch")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "configs"


CONFIGS = _folder()
"""Folder of the shipped configs, in the package of launch scripts."""
