"""Checks that cost nothing, made before a model is built: weights are there, results can be written."""

import os
from pathlib import Path

from dive_fast.errors import ConfigError

MODEL = "model.safetensors"
"""Exported weights, in the folder of a run."""


def find_weights(given: Path | None, option: str, run: Path) -> Path:
    """The checkpoint that a command is to use: the one its option names, or else the run's exported weights.

    Args:
        option: of the command, for messages: ``--weights``.

    Raises:
        ConfigError: there is no such file or folder.
    """
    if given is not None:
        if not given.exists():
            raise ConfigError(f"{option} {given}: no such file or folder")
        return given
    found = run / MODEL
    if not found.is_file():
        raise ConfigError(f"{found} is missing: train first, or name other weights by {option}")
    return found


def check_output(folder: Path) -> None:
    """Whether results can be written to a folder, which may not exist yet; nothing is made.

    Raises:
        ConfigError: it, or what it would lie in, is not a folder or cannot be written to.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"{folder}: results cannot be written there: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: results cannot be written there: no permission to write to {there}")
