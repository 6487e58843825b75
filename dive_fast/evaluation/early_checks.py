"""Cheap checks before a model is built: the weights exist, and results can be written."""

import os
from pathlib import Path

from dive_fast.config.schema import ModelConfig
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


def check_tuned(model: ModelConfig, run: Path, weights: Path | None, output: Path | None) -> tuple[Path, Path]:
    """The weights and the output folder of a command on a run's weights, after all of these checks.

    Args:
        run: the run folder, which both default to.
        weights, output: values of ``--weights`` and ``--output``.

    Raises:
        ConfigError: as :func:`find_weights`, :func:`check_output` and :func:`dive_fast.model.towers.check`.
    """
    from dive_fast.model import towers  # imports open_clip, which takes seconds

    path = find_weights(weights, "--weights", run)
    folder = output or run
    check_output(folder)
    towers.check(model)
    return path, folder
