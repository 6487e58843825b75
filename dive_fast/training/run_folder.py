"""The run folder: shared by all ranks, and claimed for a run that starts or resumes in it."""

import socket
import time
from pathlib import Path

from dive_fast import locks
from dive_fast.checkpoint import lineage, manifest
from dive_fast.checkpoint.resume import find_checkpoint
from dive_fast.checkpoint.snapshot import RunRecord
from dive_fast.config.schema import TrainConfig
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError
from dive_fast.identity import Identity
from dive_fast.training.run_identity import check_resumable, check_settings, report_resumed

SHARED_SECONDS = 60.0
"""Time until a file that one machine has written must be visible on all others."""


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Validates that all ranks see the run folder that rank 0 has locked; all ranks call it.

    Raises:
        ConfigError: a rank sees another folder, or none.
    """
    path = folder / locks.FILE
    content = ranks.broadcast(locks.holder_name() if ranks.is_main else None)
    deadline = time.monotonic() + SHARED_SECONDS
    with ranks.raise_on_all(ConfigError):
        # Not on rank 0: it would lose the lock by closing the file.
        while not ranks.is_main and (not path.is_file() or path.read_text() != content):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"rank {ranks.rank} on {socket.gethostname()} does not see what rank 0 writes to {folder}: "
                    "train.output has to be a folder that all machines share"
                )
            time.sleep(0.5)


def find_resumable(train: TrainConfig, folder: Path, config: Identity, ranks: Ranks) -> Path | None:
    """Finds the checkpoint to resume from, before the data is opened; all ranks call it.

    Args:
        config: the part of the run's identity that stands in its config.

    Returns:
        The verified checkpoint, or None for a new run.

    Raises:
        ConfigError: there is no such checkpoint, or it is of a run with other settings.
    """
    checkpoint = find_checkpoint(train.resume, folder / manifest.FOLDER, ranks)
    with ranks.raise_on_all(ConfigError):
        if checkpoint is not None and ranks.is_main:
            check_settings(checkpoint, manifest.read_identity(checkpoint), config)
    return checkpoint


def start_or_resume(
    train: TrainConfig,
    folder: Path,
    checkpoint: Path | None,
    identity: Identity,
    total_steps: int,
    steps_per_epoch: int,
    ranks: Ranks,
) -> RunRecord:
    """Validates the checkpoint to resume from and claims the folder; all ranks call it.

    Args:
        checkpoint: result of :func:`find_resumable`.

    Returns:
        The run's record for its own checkpoints.

    Raises:
        ConfigError: the checkpoint is of another run or beyond this one's end, or the folder cannot be claimed.
    """
    checkpoints = folder / manifest.FOLDER
    with ranks.raise_on_all(ConfigError):
        if checkpoint is not None and ranks.is_main:
            trainer = manifest.read_trainer(checkpoint)
            differences = check_resumable(checkpoint, manifest.read_identity(checkpoint), identity)
            step = trainer["step"]
            if step > total_steps:
                raise ConfigError(
                    f"{checkpoint} is after step {step}, beyond the {total_steps} steps of this config: raise "
                    "train.epochs or train.max_steps, set train.output to another folder, or train.resume=never "
                    "to train again here"
                )
            totals = trainer["total_steps"], total_steps
            report_resumed(differences, checkpoint, step, train, totals, steps_per_epoch)
    with ranks.raise_on_all(ConfigError):
        run = _claim(folder, checkpoints, train.resume, checkpoint) if ranks.is_main else None
    run = ranks.broadcast(run)
    return RunRecord(run.run, total_steps, identity, None if run.start is None else Path(run.start))


def _claim(folder: Path, checkpoints: Path, resume: str, checkpoint: Path | None) -> lineage.Lineage:
    """The run that the folder's checkpoints will belong to; rank 0 calls it."""
    present = None if resume == "never" else lineage.read(checkpoints)
    try:
        if checkpoint is None:
            if present is None:
                return lineage.begin(folder, checkpoints)
        else:
            run = manifest.read_trainer(checkpoint)["run"]
            if resume != "auto":
                is_same = present is not None and (
                    run == present.run or present.start == str(checkpoint.resolve())
                )
                return lineage.begin(folder, checkpoints, checkpoint, keep=is_same)
            if present is None:
                return lineage.resume(checkpoints, run)
        assert present is not None
        return present if present.is_begun else lineage.complete(folder, checkpoints, present)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot move the files of an older run away: {error}") from error
