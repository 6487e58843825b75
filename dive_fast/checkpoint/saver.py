"""Writing checkpoints while the run goes on.

The loop copies the state to the host and goes on; a thread of each rank writes its file. Once all ranks have voted
theirs written (:mod:`dive_fast.fault_tolerance.consensus`), a thread of the first one writes the manifest, gives the folder
its name, moves ``latest`` to it, and removes old checkpoints. What fails before that leaves older ones alone.
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
    fingerprint,
    is_whole,
    path_of,
    run_of,
    step_of,
    written_checkpoints,
)
from dive_fast.checkpoint.snapshot import RunRecord, tensors, trainer
from dive_fast.config.schema import TrainConfig
from dive_fast.distributed import Ranks
from dive_fast.engine.step import Engine
from dive_fast.errors import AllRanksError
from dive_fast.fault_tolerance.consensus import Votes
from dive_fast.identity import Identity
from dive_fast.io.atomic_files import atomic_path, write_atomic

LATEST = "latest"
"""A file beside the checkpoints with the name of the newest."""


class SaveError(AllRanksError):
    """A checkpoint could not be written; the message is one line, and older checkpoints are as they were."""


class Saver:
    """One save is under way at most; every rank knows of the same."""

    def __init__(self, engine: Engine, folder: Path, options: TrainConfig, record: RunRecord) -> None:
        """Saves nothing yet.

        Args:
            folder: of the checkpoints, which all ranks share; it lies in the run folder.
            record: of the run.
        """
        self._engine, self._folder, self._options, self._record = engine, folder, options, record
        self._number = 0
        self._underway: _Save | None = None
        self.newest: int | None = None
        """The step of the checkpoint that was last made whole here."""
        if engine.ranks.is_main:
            # Of runs that were killed while they wrote.
            for left_behind in folder.glob(".step*.*"):
                shutil.rmtree(left_behind, ignore_errors=True)

    def save(
        self,
        step: int,
        validation: dict[str, Any],
        metrics: dict[str, Any],
        *,
        first: Callable[[], None] = lambda: None,
        must: bool = False,
    ) -> None:
        """Copies the state after ``step`` steps and begins to write it; all ranks call it.

        Args:
            validation, metrics: as :func:`dive_fast.checkpoint.snapshot.trainer` has them.
            first: what the first rank has to write before; the save fails with it.
            must: a failure is raised whatever ``train.on_save_error`` says.

        Raises:
            SaveError: it could not be begun, or the former save failed.
        """
        self.finish()
        engine, path = self._engine, path_of(self._folder, step)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with engine.ranks.raise_on_all(SaveError), _as_save_error(partial, engine.ranks.rank):
                if engine.ranks.is_main:
                    first()
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
        except SaveError as error:
            self._failed(error, must)
            return
        self._number += 1
        numbers = trainer(engine, step, validation, metrics, self._record)
        self._underway = _Save(
            self._number,
            path,
            partial,
            engine.ranks,
            tensors(engine),
            numbers if engine.ranks.is_main else None,
            self._record.identity,
        )
        self._underway.write()

    def votes(self) -> Votes:
        """Of this rank, on the save under way."""
        if (save := self._underway) is None:
            return Votes(unwritten=-self._number, committed=self._number)
        return Votes(
            failed=save.number if save.error is not None else 0,
            unwritten=-save.number if save.is_written else 1 - save.number,
            committed=save.number if save.is_committed else 0,
        )

    def heard(self, agreed: Votes) -> None:
        """Goes on with the save under way as all ranks have agreed.

        Raises:
            SaveError: it failed, and ``train.on_save_error`` is ``stop``.
        """
        save = self._underway
        if save is None:
            return
        if agreed.failed == save.number:
            self.finish()
        elif agreed.committed == save.number:
            self._underway, self.newest = None, step_of(save.path)
        elif -agreed.unwritten == save.number and self._engine.ranks.is_main and not save.is_being_committed:
            save.commit(self._removed(save))

    def finish(self, *, must: bool = False) -> None:
        """Waits until what is under way is whole under its name; all ranks call it.

        Args:
            must: as for :meth:`save`.

        Raises:
            SaveError: it failed.
        """
        if (save := self._underway) is None:
            return
        self._underway, ranks = None, self._engine.ranks
        try:
            with ranks.raise_on_all(SaveError), _as_save_error(save.partial, ranks.rank):
                save.join()
            with ranks.raise_on_all(SaveError), _as_save_error(save.partial, ranks.rank):
                if ranks.is_main and not save.is_committed:
                    save.commit(self._removed(save))
                    save.join()
            self.newest = step_of(save.path)
        except SaveError as error:
            if ranks.is_main:
                shutil.rmtree(save.partial, ignore_errors=True)
            self._failed(error, must)

    def _failed(self, error: SaveError, must: bool) -> None:
        if must or self._options.on_save_error == "stop":
            raise error
        self._engine.ranks.print(f"warning: {error}; the run goes on from memory, as train.on_save_error says")

    def _removed(self, save: "_Save") -> Callable[[list[Path]], list[Path]]:
        """Which of all checkpoints go, once this save is whole."""
        options = self._options
        best = save.numbers["validation"]["best_step"] if options.keep_best and save.numbers is not None else None

        def removed(written: list[Path]) -> list[Path]:
            # Those of an older run, which this one has taken the place of; of its own the damaged ones.
            runs = {path: run_of(path) for path in written}
            own = [path for path in written if runs[path] == self._record.run and path <= save.path]
            own = [path for path in own if is_whole(path)]
            kept = own[-options.keep_last :] + [path for path in own if step_of(path) == best]
            kept += [path for path in written if path.resolve() == self._record.start]
            return [path for path in written if path not in kept and runs[path] is not None]

        return removed


class _Save:
    """One checkpoint on its way to the disk."""

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
        """Starts with this rank's file."""
        self._start(self._write)

    def commit(self, removed: Callable[[list[Path]], list[Path]]) -> None:
        """Starts to make it whole, once all ranks' files are there, and to remove what is to go."""
        self.is_being_committed = True
        self._start(lambda: self._commit(removed))

    def join(self) -> None:
        """Waits for what was started.

        Raises:
            Exception: whatever went wrong in it.
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
        name = _of_rank(self._ranks.rank)
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
            _to_disk(path)
        # For the first rank, who puts them into the manifest.
        found = {name: fingerprint(path) for name, path in files.items()}
        (self.partial / f"{name}.json").write_text(json.dumps(found))
        self.is_written = True

    def _commit(self, removed: Callable[[list[Path]], list[Path]]) -> None:
        files: dict[str, Any] = {}
        world_size = self._ranks.world_size
        # By name: a listing of a shared folder may be older than what other machines have written.
        for note in [self.partial / f"{_of_rank(rank)}.json" for rank in range(world_size)]:
            files |= json.loads(note.read_text())
            note.unlink()
        manifest = {"format": FORMAT, "ranks": world_size, "files": files}
        (self.partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        _to_disk(self.partial / MANIFEST)
        _to_disk(self.partial)
        replaced = self.path.with_name(f".{self.path.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.path.exists():
            self.path.replace(replaced)
        self.partial.replace(self.path)
        _to_disk(self.path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        write_atomic(self.path.with_name(LATEST), f"{self.path.name}\n".encode())
        for old in removed(written_checkpoints(self.path.parent)):
            _remove(old)
        remove_replaced(self.path.parent.parent)
        self.is_committed = True


def _of_rank(rank: int) -> str:
    return f"rank{rank:05d}"


def _remove(old: Path) -> None:
    # First out of sight, then gone: a kill in between leaves nothing that looks usable, and the next run removes
    # the rest. Somebody who still reads it, on a network's file system, is no reason to call a save failed.
    removed = old.with_name(f".{old.name}.removed")
    with suppress(OSError):
        old.replace(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _as_save_error(path: Path, rank: int) -> Iterator[None]:
    """Whatever goes wrong inside is a :class:`SaveError` that names the rank."""
    try:
        yield
    except Exception as error:
        raise SaveError(f"rank {rank} cannot write checkpoint {path}: {error}") from error
