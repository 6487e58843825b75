"""The current run of a folder, which its checkpoints belong to.

``checkpoints/run.json`` names the folder's current run by a random id, and every checkpoint names the run that
wrote it. ``train.resume = auto`` considers checkpoints of the current run only: after ``never`` the older ones
stay on the disk until the new run has a checkpoint, but nothing resumes from them once the new id is written.
"""

import json
import secrets
import shutil
from pathlib import Path
from typing import NamedTuple

from dive_fast.config import recorded
from dive_fast.errors import ConfigError
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import read_json

FILE = "run.json"
REPLACED = "replaced"
"""Folder inside the run folder for the files of an older run, until the new run has a checkpoint."""
RUN_FILES = (
    "best",
    "latest",
    "metrics.jsonl",
    "model.safetensors",
    "open_clip_config.json",
    "head.safetensors",
    "moving_teacher.safetensors",
    "ema.safetensors",
    "ema_head.safetensors",
    "adapter.safetensors",
    "prompts.safetensors",
    "audit.json",
    "report.md",
    "report.json",
    "report.png",
    "projection.png",
    "README.md",
    "nonfinite",
    "trace.json.gz",
    "config.json",
    "tracking",
)
"""Names in a run folder that belong to one run. Teacher cache and evaluations have identities of their own."""


class Lineage(NamedTuple):
    """The current run of a folder."""

    run: str
    """Random id of the run."""
    start: str | None = None
    """Path of the checkpoint that the run started from; None if it started from the pre-trained model."""
    is_begun: bool = True
    """Whether all files of an older run have been moved away."""


def read(checkpoints: Path) -> Lineage | None:
    """The current run of a folder of checkpoints; None if no run has started.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = checkpoints / FILE
    try:
        content = read_json(path)
        run, start, is_begun = (content[name] for name in Lineage._fields)
        if type(run) is not str or type(start) not in (str, type(None)) or type(is_begun) is not bool:
            raise ValueError("its values have unexpected types")
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise ConfigError(f"{checkpoints}: not a folder; remove or rename it") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{path}: cannot read which run the checkpoints belong to: {error}; remove it to resume from the "
            "newest checkpoint there"
        ) from error
    return Lineage(run, start, is_begun)


def begin(folder: Path, checkpoints: Path, start: Path | None = None, keep: bool = False) -> Lineage:
    """Starts a new run in a folder; the first rank calls it. A kill at any point leaves the new or the old run.

    Args:
        start: the checkpoint that the run starts from.
        keep: files in the folder belong to the new run too, as when a run returns to one of its own earlier steps.

    Raises:
        ConfigError: the folder holds files with these names that no run has written.
    """
    foreign = [] if keep or _has_run(folder, checkpoints) else [folder / name for name in RUN_FILES]
    if names := [path.name for path in foreign if path.exists()]:
        raise ConfigError(
            f"train.output = {folder} holds {', '.join(names)}, which no run has written and a run would replace: "
            "name another folder, or move them away"
        )
    lineage = Lineage(secrets.token_hex(8), None if start is None else str(start.resolve()), is_begun=keep)
    _write(checkpoints, lineage)
    return lineage if keep else complete(folder, checkpoints, lineage)


def _has_run(folder: Path, checkpoints: Path) -> bool:
    """Whether a run of any version has written into a folder before."""
    if (checkpoints / FILE).exists() or any(checkpoints.glob("step*")):
        return True
    try:
        # The checkpoints may have been removed.
        return recorded.is_recorded(read_json(folder / recorded.FILE))
    except (OSError, ValueError, AttributeError):
        return False


def resume(checkpoints: Path, run: str) -> Lineage:
    """Names the current run of a folder without ``run.json``, such as a copy of the checkpoints alone."""
    lineage = Lineage(run)
    _write(checkpoints, lineage)
    return lineage


def complete(folder: Path, checkpoints: Path, lineage: Lineage) -> Lineage:
    """Moves the files of an older run away, including those that a kill during :func:`begin` left."""
    replaced = folder / REPLACED
    for path in (folder / name for name in RUN_FILES):
        if not path.exists() and not path.is_symlink():
            continue
        replaced.mkdir(exist_ok=True)
        if (replaced / path.name).exists():
            # The file belongs to a run that ended before its first checkpoint: the run before it is kept.
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        else:
            path.rename(replaced / path.name)
    lineage = lineage._replace(is_begun=True)
    _write(checkpoints, lineage)
    return lineage


def remove_replaced(folder: Path) -> None:
    """Removes the files of an older run, once the current run has a checkpoint."""
    shutil.rmtree(folder / REPLACED, ignore_errors=True)


def _write(checkpoints: Path, lineage: Lineage) -> None:
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_atomic(checkpoints / FILE, (json.dumps(lineage._asdict(), indent=2) + "\n").encode())
