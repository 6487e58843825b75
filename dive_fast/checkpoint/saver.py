"""Asynchronous checkpoint saving.

The loop copies the state to the host and continues; a thread of each rank writes that rank's file. When all ranks
have voted that theirs are written (:mod:`dive_fast.fault_tolerance.consensus`), a thread of the first rank writes
the manifest, gives the folder its final name, updates ``latest``, and removes old checkpoints. A failure before
that leaves older checkpoints unchanged.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dive_fast.checkpoint.lineage import remove_replaced
from dive_fast.checkpoint.manifest import (
    FORMAT,
    IDENTITY,
    MANIFEST,
    TRAINER,
    checkpoint_path,
    describe_file,
    is_complete,
    list_checkpoints,
    run_id,
    step_number,
)
from dive_fast.checkpoint.snapshot import RunRecord, copy_tensors, trainer_state
from dive_fast.config.schema import TrainConfig
from dive_fast.distributed import Ranks
from dive_fast.engine.step import Engine
from dive_fast.errors import AllRanksError
from dive_fast.fault_tolerance.consensus import Votes
from dive_fast.identity import Identity
from dive_fast.io.atomic_files import atomic_path, write_atomic

LATEST = "latest"
"""File next to the checkpoints with the name of the newest one."""


class SaveError(AllRanksError):
    """A checkpoint could not be written; the message is one line, and older checkpoints are unchanged."""


class Saver:
    """Writes checkpoints, at most one at a time; every rank knows which save is in progress."""

    def __init__(self, engine: Engine, folder: Path, options: TrainConfig, record: RunRecord) -> None:
        """Removes unfinished checkpoints of killed runs; saves nothing yet.

        Args:
            folder: folder of the checkpoints inside the run folder, shared by all ranks.
            record: properties of the run, stored in each checkpoint.
        """
        self._engine, self._folder, self._options, self._record = engine, folder, options, record
        self._number = 0
        self._in_progress: _Save | None = None
        self.newest: int | None = None
        """Step of the last checkpoint that was completed here."""
        if engine.ranks.is_main:
            for unfinished in folder.glob(".step*.*"):
                shutil.rmtree(unfinished, ignore_errors=True)

    def save(
        self,
        step: int,
        validation: dict[str, Any],
        metrics: dict[str, Any],
        *,
        before_write: Callable[[], None] = lambda: None,
        required: bool = False,
    ) -> None:
        """Copies the state after ``step`` steps and starts to write it; all ranks call it.

        Args:
            validation, metrics: as for :func:`dive_fast.checkpoint.snapshot.trainer_state`.
            before_write: called on the first rank before anything is written; if it fails, the save fails.
            required: raise on failure, whatever ``train.on_save_error`` says.

        Raises:
            SaveError: the save could not be started, or the previous one failed.
        """
        self.finish()
        engine, path = self._engine, checkpoint_path(self._folder, step)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with engine.ranks.raise_on_all(SaveError), _as_save_error(partial, engine.ranks.rank):
                if engine.ranks.is_main:
                    before_write()
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
        except SaveError as error:
            self._handle_failure(error, required)
            return
        self._number += 1
        numbers = trainer_state(engine, step, validation, metrics, self._record)
        self._in_progress = _Save(
            self._number,
            path,
            partial,
            engine.ranks,
            copy_tensors(engine),
            numbers if engine.ranks.is_main else None,
            self._record.identity,
        )
        self._in_progress.write()

    def votes(self) -> Votes:
        """The votes of this rank on the save in progress."""
        if (save := self._in_progress) is None:
            return Votes(unwritten=-self._number, committed=self._number)
        return Votes(
            failed=save.number if save.error is not None else 0,
            unwritten=-save.number if save.is_written else 1 - save.number,
            committed=save.number if save.is_committed else 0,
        )

    def advance(self, decision: Votes) -> None:
        """Advances the save in progress by what all ranks have decided.

        Raises:
            SaveError: the save failed, and ``train.on_save_error`` is ``stop``.
        """
        save = self._in_progress
        if save is None:
            return
        if decision.failed == save.number:
            self.finish()
        elif decision.committed == save.number:
            self._in_progress, self.newest = None, step_number(save.path)
        elif -decision.unwritten == save.number and self._engine.ranks.is_main and not save.is_being_committed:
            save.commit(self._outdated_by(save))

    def finish(self, *, required: bool = False) -> None:
        """Waits until the save in progress is complete under its final name; all ranks call it.

        Args:
            required: as for :meth:`save`.

        Raises:
            SaveError: the save failed.
        """
        if (save := self._in_progress) is None:
            return
        self._in_progress, ranks = None, self._engine.ranks
        try:
            with ranks.raise_on_all(SaveError), _as_save_error(save.partial, ranks.rank):
                save.join()
            with ranks.raise_on_all(SaveError), _as_save_error(save.partial, ranks.rank):
                if ranks.is_main and not save.is_committed:
                    save.commit(self._outdated_by(save))
                    save.join()
            self.newest = step_number(save.path)
        except SaveError as error:
            if ranks.is_main:
                shutil.rmtree(save.partial, ignore_errors=True)
            self._handle_failure(error, required)

    def _handle_failure(self, error: SaveError, required: bool) -> None:
        if required or self._options.on_save_error == "stop":
            raise error
        self._engine.ranks.print(f"warning: {error}; training continues, as train.on_save_error says")

    def _outdated_by(self, save: "_Save") -> Callable[[list[Path]], list[Path]]:
        """Returns a function that selects the checkpoints to remove once ``save`` is complete."""
        options = self._options
        best = save.numbers["validation"]["best_step"] if options.keep_best and save.numbers is not None else None

        def outdated(checkpoints: list[Path]) -> list[Path]:
            # All checkpoints of an older run, which this one replaces, and the corrupt ones of this run.
            runs = {path: run_id(path) for path in checkpoints}
            usable = [path for path in checkpoints if runs[path] == self._record.run and path <= save.path]
            usable = [path for path in usable if is_complete(path)]
            kept = usable[-options.keep_last :] + [path for path in usable if step_number(path) == best]
            kept += [path for path in checkpoints if path.resolve() == self._record.start]
            return [path for path in checkpoints if path not in kept and runs[path] is not None]

        return outdated


class _Save:
    """One checkpoint while it is written."""

    def __init__(
        self,
        number: int,
        path: Path,
        partial: Path,
        ranks: Ranks,
        tensors: dict[str, Tensor],
        numbers: dict[str, Any] | None,
        identity: Identity,
    ) -> None:
        self.number, self.path, self.partial, self.numbers = number, path, partial, numbers
        self.is_written = self.is_committed = self.is_being_committed = False
        self.error: Exception | None = None
        self._ranks, self._tensors, self._identity = ranks, tensors, identity
        self._thread: threading.Thread | None = None

    def write(self) -> None:
        """Starts to write this rank's file."""
        self._start(self._write)

    def commit(self, outdated: Callable[[list[Path]], list[Path]]) -> None:
        """Starts to complete the checkpoint, once the files of all ranks exist, and to remove outdated ones."""
        self.is_being_committed = True
        self._start(lambda: self._commit(outdated))

    def join(self) -> None:
        """Waits for the thread that was started last.

        Raises:
            Exception: the error of that thread.
        """
        if self._thread is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error

    def _start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except Exception as error:
                self.error = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        name = _rank_name(self._ranks.rank)
        file = self.partial / f"{name}.safetensors"
        with atomic_path(file) as partial:
            save_file(self._tensors, partial)
        self._tensors = {}
        files = {file.name: file}
        if self.numbers is not None:
            files[TRAINER] = self.partial / TRAINER
            files[TRAINER].write_text(json.dumps(self.numbers, indent=2) + "\n")
            files[IDENTITY] = self.partial / IDENTITY
            files[IDENTITY].write_text(json.dumps(self._identity, indent=2) + "\n")
        for path in files.values():
            _fsync(path)
        # The first rank merges these notes into the manifest.
        note = {name: describe_file(path) for name, path in files.items()}
        (self.partial / f"{name}.json").write_text(json.dumps(note))
        self.is_written = True

    def _commit(self, outdated: Callable[[list[Path]], list[Path]]) -> None:
        files: dict[str, Any] = {}
        world_size = self._ranks.world_size
        # By name: a listing of a shared folder may be older than files that other machines have written.
        for note in [self.partial / f"{_rank_name(rank)}.json" for rank in range(world_size)]:
            files |= json.loads(note.read_text())
            note.unlink()
        manifest = {"format": FORMAT, "ranks": world_size, "files": files}
        (self.partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        _fsync(self.partial / MANIFEST)
        _fsync(self.partial)
        replaced = self.path.with_name(f".{self.path.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.path.exists():
            self.path.replace(replaced)
        self.partial.replace(self.path)
        _fsync(self.path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        write_atomic(self.path.with_name(LATEST), f"{self.path.name}\n".encode())
        for checkpoint in outdated(list_checkpoints(self.path.parent)):
            _remove(checkpoint)
        remove_replaced(self.path.parent.parent)
        self.is_committed = True


def _rank_name(rank: int) -> str:
    return f"rank{rank:05d}"


def _remove(checkpoint: Path) -> None:
    # Renamed first: a kill in between leaves nothing that looks usable, and the next run removes the rest. A
    # process that still reads it, on a network file system, must not make the save fail.
    removed = checkpoint.with_name(f".{checkpoint.name}.removed")
    with suppress(OSError):
        checkpoint.replace(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _as_save_error(path: Path, rank: int) -> Iterator[None]:
    """Turns any exception inside into a :class:`SaveError` that names the rank."""
    try:
        yield
    except Exception as error:
        raise SaveError(f"rank {rank} cannot write checkpoint {path}: {error}") from error
