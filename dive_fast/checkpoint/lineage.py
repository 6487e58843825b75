"""Which run the checkpoints of a folder belong to.

``checkpoints/run.json`` names the folder's present run by a random id, and every checkpoint names the run that
wrote it. ``train.resume = auto`` considers the present run's checkpoints alone: after ``never`` the older ones
stay on the disk until the new run has one of its own, but once the id is written nothing resumes from them.
"""

import json
import secrets
import shutil
from pathlib import Path
from typing import NamedTuple

from dive_fast.errors import ConfigError
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import read_json

FILE = "run.json"
REPLACED = "replaced"
"""Folder in the run folder with what an older run has left, until the new run has a checkpoint."""
LEFT_BY_RUNS = (
    "best",
    "latest",
    "metrics.jsonl",
    "model.safetensors",
    "open_clip_config.json",
    "head.safetensors",
    "audit.json",
    "nonfinite",
    "trace.json.gz",
    "config.json",
    "tensorboard",
    "csv_monitor",
)
"""Names in a run folder of what belongs to one run. Teacher cache and evaluations have identities of their own."""

PROVENANCE = ("config", "versions", "device", "commit")
"""Keys by which a run's ``config.json`` is known from that of other tools, models of Hugging Face say."""


class Lineage(NamedTuple):
    """The present run of a folder."""

    run: str
    """Its random id."""
    start: str | None = None
    """The checkpoint, by its path, that the run began from; None: from the pre-trained model."""
    is_begun: bool = True
    """Whether everything of an older run is out of the way."""


def read(checkpoints: Path) -> Lineage | None:
    """The present run of a folder of checkpoints; None where no run has begun.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = checkpoints / FILE
    try:
        found = read_json(path)
        run, start, is_begun = (found[name] for name in Lineage._fields)
        if type(run) is not str or type(start) not in (str, type(None)) or type(is_begun) is not bool:
            raise ValueError("its values have other types")
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise ConfigError(f"{checkpoints}: it is not a folder; remove or rename it") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{path}: cannot read which run the checkpoints belong to: {error}; remove it to resume from the "
            "newest checkpoint there"
        ) from error
    return Lineage(run, start, is_begun)


def begin(folder: Path, checkpoints: Path, start: Path | None = None, keep: bool = False) -> Lineage:
    """Gives a run folder a new run; the first rank calls it. A kill at any point leaves the new or the old run.

    Args:
        start: the checkpoint that it begins from.
        keep: what is in the folder belongs to the new run too, as where a run goes back to a step of its own.

    Raises:
        ConfigError: the folder holds files of these names that no run has written.
    """
    foreign = [] if keep or _is_of_a_run(folder, checkpoints) else [folder / name for name in LEFT_BY_RUNS]
    if names := [path.name for path in foreign if path.exists()]:
        raise ConfigError(
            f"train.output = {folder} holds {', '.join(names)}, which no run has written and a run would replace: "
            "name another folder, or move them away"
        )
    found = Lineage(secrets.token_hex(8), None if start is None else str(start.resolve()), is_begun=keep)
    _write(checkpoints, found)
    return found if keep else complete(folder, checkpoints, found)


def _is_of_a_run(folder: Path, checkpoints: Path) -> bool:
    """Whether a run has written into a folder before, of whatever version."""
    if (checkpoints / FILE).exists() or any(checkpoints.glob("step*")):
        return True
    try:
        # Where the checkpoints were removed.
        return set(PROVENANCE) <= read_json(folder / "config.json").keys()
    except (OSError, ValueError, AttributeError):
        return False


def resume(checkpoints: Path, run: str) -> Lineage:
    """Names the present run of a folder whose ``run.json`` is gone, as in a copy of its checkpoints alone."""
    found = Lineage(run)
    _write(checkpoints, found)
    return found


def complete(folder: Path, checkpoints: Path, found: Lineage) -> Lineage:
    """Puts what an older run has left out of the way, or what a kill in :func:`begin` has left of that."""
    aside = folder / REPLACED
    for path in (folder / name for name in LEFT_BY_RUNS):
        if not path.exists() and not path.is_symlink():
            continue
        aside.mkdir(exist_ok=True)
        if (aside / path.name).exists():
            # Of a run that was begun and ended before its first checkpoint: the one before it is what is kept.
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        else:
            path.rename(aside / path.name)
    found = found._replace(is_begun=True)
    _write(checkpoints, found)
    return found


def remove_replaced(folder: Path) -> None:
    """Removes what an older run has left, once the present one has a checkpoint."""
    shutil.rmtree(folder / REPLACED, ignore_errors=True)


def _write(checkpoints: Path, lineage: Lineage) -> None:
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_atomic(checkpoints / FILE, (json.dumps(lineage._asdict(), indent=2) + "\n").encode())
