"""Resuming a run: finding a complete checkpoint and loading it into the engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from dive_fast.checkpoint import lineage, zero_state
from dive_fast.checkpoint.manifest import (
    AVERAGE,
    FIXED,
    FOLDER,
    OBJECTIVE,
    PROJECTION,
    RANDOM,
    TEACHER,
    WEIGHTS,
    CorruptCheckpointError,
    FormatError,
    Tensors,
    describe_file,
    list_checkpoints,
    missing_file,
    read_manifest,
    read_trainer,
)
from dive_fast.checkpoint.zero_state import ParameterState
from dive_fast.distributed import Ranks
from dive_fast.engine.step import Engine
from dive_fast.errors import ConfigError


def find_checkpoint(resume: str, folder: Path, ranks: Ranks) -> Path | None:
    """The verified checkpoint that ``train.resume`` selects; None to start from the beginning.

    All ranks call it. ``auto`` considers the checkpoints of the folder's current run only
    (:mod:`dive_fast.checkpoint.lineage`); it skips a corrupt one and reports it.

    Raises:
        ConfigError: a named checkpoint is missing or incomplete, all checkpoints of ``auto`` are corrupt, or one
            has another format.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return _named_checkpoint(Path(resume), f"train.resume = {resume}", ranks)
    errors: list[CorruptCheckpointError] = []
    candidates: list[tuple[Path, str | None]] = []
    start = None
    with ranks.raise_on_all(ConfigError):
        if ranks.is_main:
            current = lineage.read(folder)
            candidates = _of_run(list_checkpoints(folder), current)
            start = None if current is None else current.start
    candidates, start = ranks.broadcast((candidates, start))
    for path, missing in reversed(candidates):
        try:
            if missing is not None:
                raise CorruptCheckpointError(f"{path}: {missing}")
            verify(path, ranks)
        except CorruptCheckpointError as error:
            ranks.print(f"skipped a corrupt checkpoint: {error}")
            errors.append(error)
        else:
            return path
    if errors:
        raise ConfigError(
            f"all checkpoints in {folder} are corrupt ({errors[0]}); set train.resume=never to start over"
        )
    if start is not None:
        return _named_checkpoint(Path(start), f"{folder}: the run started from {start}", ranks)
    return None


def _named_checkpoint(path: Path, source: str, ranks: Ranks) -> Path:
    """Verifies a checkpoint given by its path; ``source`` says in messages where the path comes from."""
    with ranks.raise_on_all(ConfigError):
        if (missing := missing_file(path)) is not None:
            raise ConfigError(f"{source}: not a complete checkpoint ({missing}){_checkpoints_nearby(path)}")
    verify(path, ranks)
    return path


def _checkpoints_nearby(path: Path) -> str:
    """The end of a message that names checkpoints, where a path leads to a run or to its folder of checkpoints."""
    nearby = [each for folder in (path, path / FOLDER, path.parent) for each in list_checkpoints(folder)]
    if nearby:
        return f"; checkpoints there: {nearby[0] if len(nearby) == 1 else f'{nearby[0]} to {nearby[-1].name}'}"
    return "; expected auto, never, or a folder such as runs/a/checkpoints/step00001000"


def _of_run(paths: list[Path], current: lineage.Lineage | None) -> list[tuple[Path, str | None]]:
    """Checkpoints of the current run, each with the reason why it is incomplete.

    A corrupt one whose run cannot be read is included: it may belong to the run.
    """
    candidates: list[tuple[Path, str | None, str | None]] = []
    for path in paths:
        run = None
        try:
            if (missing := missing_file(path)) is None:
                run = read_trainer(path)["run"]
        except CorruptCheckpointError as error:
            missing = str(error)
        except FormatError:
            if current is None:
                raise
            continue  # it belongs to an older run, which the current one replaces
        candidates.append((path, missing, run))
    newest_run = next((run for *_, run in reversed(candidates) if run), None)
    expected = newest_run if current is None else current.run
    return [(path, missing) for path, missing, run in candidates if run in (expected, None)]


def verify(checkpoint: Path, ranks: Ranks) -> None:
    """Compares each file with its checksum in the manifest; all ranks call it, each reads its share.

    Raises:
        CorruptCheckpointError: a file differs.
    """
    with ranks.raise_on_all(CorruptCheckpointError):
        files = read_manifest(checkpoint)["files"]
        for name in sorted(files)[ranks.rank :: ranks.world_size]:
            try:
                actual = describe_file(checkpoint / name)
            except OSError as error:
                raise CorruptCheckpointError(f"{checkpoint / name}: {error.strerror}") from error
            if actual != files[name]:
                raise CorruptCheckpointError(
                    f"{checkpoint / name}: changed since it was written; remove {checkpoint}"
                )


def load_checkpoint(engine: Engine, checkpoint: Path) -> Mapping[str, Any]:
    """Loads a checkpoint into the engine; returns the content of its ``trainer.json``, ``step`` included.

    All ranks call it. Their number and the ZeRO stage may differ from those of the run that wrote it.

    Args:
        checkpoint: result of :func:`find_checkpoint`.

    Raises:
        ConfigError: the checkpoint belongs to another model or objective, or other parameters are tuned.
    """
    ranks = engine.ranks
    # A collective operation, which an error on one rank must not skip.
    projected = {} if engine.projection is None else engine.projection.state()
    with ranks.raise_on_all(ConfigError):
        numbers, stored = read_trainer(checkpoint), Tensors(checkpoint)
        tuned = {name: tuple(zero_state.full_shape(p)) for name, p in zero_state.tuned_parameters(engine)}
        keys = zero_state.state_keys(engine)
        for kind in (WEIGHTS, *keys):
            _require_equal_shapes(checkpoint, tuned, stored.shapes(kind))
        state = engine.towers.state_dict(keep_vars=True)
        left_out = tuned.keys() | zero_state.not_stored(engine)
        fixed = {
            name: tuple(zero_state.full_shape(tensor)) for name, tensor in state.items() if name not in left_out
        }
        _require_equal_shapes(checkpoint, fixed, stored.shapes(FIXED))
        states = {OBJECTIVE: engine.method.state()}
        for kind, holder in ((TEACHER, engine.teacher), (AVERAGE, engine.average)):
            states[kind] = {} if holder is None else dict(holder.state())
        for kind, tensors in states.items():
            if stored.shapes(kind) != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
                raise ConfigError(
                    f"{checkpoint}: belongs to another objective; start a new run, or set train.output"
                )
        if stored.shapes(PROJECTION) != {name: tuple(tensor.shape) for name, tensor in projected.items()}:
            raise ConfigError(f"{checkpoint}: belongs to another projection; start a new run, or set train.output")

    def read(name: str) -> ParameterState:
        moments = {key: stored.read(key, name, ranks.device) for key in keys}
        return ParameterState(name, stored.read(WEIGHTS, name, ranks.device), moments)

    zero_state.scatter(engine, read, numbers["updates"])
    for name in fixed:
        _set_fixed(state[name], stored.read(FIXED, name, ranks.device))
    for kind, tensors in states.items():
        for name, tensor in tensors.items():
            tensor.copy_(stored.read(kind, name, ranks.device))
    if engine.projection is not None:
        state = {name: stored.read(PROJECTION, name, ranks.device) for name in projected}
        engine.projection.load(state, numbers["updates"])
    # Ranks that did not exist when the checkpoint was written keep the random state from their seed.
    on_cpu, random = torch.device("cpu"), stored.shapes(RANDOM)
    if (name := f"cpu/{ranks.rank}") in random:
        torch.set_rng_state(stored.read(RANDOM, name, on_cpu))
    if ranks.device.type == "cuda" and (name := f"cuda/{ranks.rank}") in random:
        torch.cuda.set_rng_state(stored.read(RANDOM, name, on_cpu), ranks.device)
    engine.scale.load_state_dict(numbers["loss_scale"])
    engine.set_step(numbers["step"])
    return numbers


def _require_equal_shapes(
    checkpoint: Path, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
) -> None:
    for name in sorted(expected.keys() | stored.keys()):
        if expected.get(name) != stored.get(name):
            here, there = expected.get(name, "missing"), stored.get(name, "missing")
            raise ConfigError(
                f"{checkpoint}: belongs to another model, or other parameters are tuned: {name} is {here} here "
                f"and {there} in the checkpoint; start a new run, or set train.output"
            )


def _set_fixed(tensor: Any, value: Tensor) -> None:
    """Sets a buffer or a parameter that is not tuned."""
    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0, enabled=hasattr(tensor, "ds_id")):
        if not hasattr(tensor, "ds_id") or torch.distributed.get_rank() == 0:
            with torch.no_grad():
                tensor.copy_(value)
