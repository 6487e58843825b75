"""Cheap checks before a model is built: the weights exist, and results can be written."""

import os
from pathlib import Path

from dive_fast.errors import ConfigError

MODEL = "model.safetensors"
"""Name of the exported weights in a run folder."""


def find_weights(weights: Path | None, option: str, run: Path) -> Path:
    """The checkpoint that a command uses: the value of its option, by default the run's exported weights.

    Args:
        weights: value of the option; None if it is not set.
        option: name of the option, for messages, e.g. ``--weights``.

    Raises:
        ConfigError: the file or folder does not exist.
    """
    if weights is not None:
        if not weights.exists():
            raise ConfigError(f"{option} {weights}: no such file or folder")
        return weights
    exported = run / MODEL
    if not exported.is_file():
        raise ConfigError(f"{exported} is missing: train first, or name other weights by {option}")
    return exported


def check_output(folder: Path) -> None:
    """Checks that results can be written to a folder, which need not exist yet; creates nothing.

    Raises:
        ConfigError: the folder, or its nearest existing parent, is not a folder or not writable.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"{folder}: results cannot be written there: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: results cannot be written there: no permission to write to {existing}")
