"""Resuming from a checkpoint: finding a complete one and loading it into the engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from dive_fast.checkpoint import lineage
from dive_fast.checkpoint import zero_state as state
from dive_fast.checkpoint.manifest import (
    FIXED,
    FOLDER,
    OBJECTIVE,
    RANDOM,
    WEIGHTS,
    DamagedError,
    FormatError,
    Tensors,
    fingerprint,
    read_manifest,
    read_trainer,
    written_checkpoints,
)
from dive_fast.checkpoint.manifest import missing_file as missing_file
from dive_fast.checkpoint.zero_state import MOMENTS, Trained
from dive_fast.distributed import Ranks
from dive_fast.engine.step import Engine
from dive_fast.errors import ConfigError


def find_checkpoint(resume: str, folder: Path, ranks: Ranks) -> Path | None:
    """The checkpoint that ``train.resume`` stands for, read through and whole; None to start from the beginning.

    All ranks call it. ``auto`` considers the checkpoints of the folder's present run alone
    (:mod:`dive_fast.checkpoint.lineage`), passes over a damaged one and reports it.

    Raises:
        ConfigError: a named checkpoint is not there or not whole; all that ``auto`` finds are damaged; or it has
            another format.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return _named(Path(resume), f"train.resume = {resume}", ranks)
    damaged: list[DamagedError] = []
    candidates: list[tuple[Path, str | None]] = []
    start = None
    with ranks.raise_on_all(ConfigError):
        if ranks.is_main:
            present = lineage.read(folder)
            candidates = _of_run(written_checkpoints(folder), present)
            start = None if present is None else present.start
    candidates, start = ranks.broadcast((candidates, start))
    for path, missing in reversed(candidates):
        try:
            if missing is not None:
                raise DamagedError(f"{path}: {missing}")
            verify(path, ranks)
        except DamagedError as error:
            ranks.print(f"passed over: {error}")
            damaged.append(error)
        else:
            return path
    if damaged:
        raise ConfigError(
            f"all checkpoints in {folder} are damaged ({damaged[0]}); train.resume=never trains from the beginning"
        )
    if start is not None:
        return _named(Path(start), f"{folder}: the run began from {start}", ranks)
    return None


def _named(path: Path, what: str, ranks: Ranks) -> Path:
    with ranks.raise_on_all(ConfigError):
        if (missing := missing_file(path)) is not None:
            raise ConfigError(f"{what}: no whole checkpoint there ({missing}){_nearby(path)}")
    verify(path, ranks)
    return path


def _nearby(path: Path) -> str:
    """The end of a message that names checkpoints, where a path leads to a run or to the folder of them."""
    found = [each for folder in (path, path / FOLDER, path.parent) for each in written_checkpoints(folder)]
    if found:
        return f"; there is {found[0] if len(found) == 1 else f'{found[0]} to {found[-1].name}'}"
    return "; expected auto, never, or a folder such as runs/a/checkpoints/step00001000"


def _of_run(paths: list[Path], present: lineage.Lineage | None) -> list[tuple[Path, str | None]]:
    """Those of the present run with what each lacks; a damaged one that does not say whose it is may be."""
    found: list[tuple[Path, str | None, str | None]] = []
    for path in paths:
        run = None
        try:
            if (missing := missing_file(path)) is None:
                run = read_trainer(path)["run"]
        except DamagedError as error:
            missing = str(error)
        except FormatError:
            if present is None:
                raise
            continue  # of an older run, which the present one takes the place of
        found.append((path, missing, run))
    own = present.run if present is not None else next((run for *_, run in reversed(found) if run), None)
    return [(path, missing) for path, missing, run in found if run in (own, None)]


def verify(checkpoint: Path, ranks: Ranks) -> None:
    """Holds each file to the manifest's checksum; all ranks call it, each reads its share.

    Raises:
        DamagedError: a file is another.
    """
    with ranks.raise_on_all(DamagedError):
        files = read_manifest(checkpoint)["files"]
        for name in sorted(files)[ranks.rank :: ranks.world_size]:
            try:
                found = fingerprint(checkpoint / name)
            except OSError as error:
                raise DamagedError(f"{checkpoint / name}: {error.strerror}") from error
            if found != files[name]:
                raise DamagedError(f"{checkpoint / name}: changed since it was written; remove {checkpoint}")


def load_checkpoint(engine: Engine, checkpoint: Path) -> Mapping[str, Any]:
    """Goes on from a checkpoint; returns what :func:`trainer` has put into it, its ``step`` for one.

    All ranks call it. They may be another number of ranks, at another ZeRO stage, than those that wrote it.

    Args:
        checkpoint: as :func:`find` found it.

    Raises:
        ConfigError: the checkpoint is of another model, or other parameters are tuned.
    """
    ranks = engine.ranks
    with ranks.raise_on_all(ConfigError):
        numbers, stored = read_trainer(checkpoint), Tensors(checkpoint)
        wanted = {name: tuple(state.shape_of(parameter)) for name, parameter in state.tuned(engine)}
        for kind in (WEIGHTS, *MOMENTS):
            _same_parameters(checkpoint, wanted, stored.shapes(kind))
        own = engine.towers.state_dict(keep_vars=True)
        fixed = {name: tuple(state.shape_of(tensor)) for name, tensor in own.items() if name not in wanted}
        _same_parameters(checkpoint, fixed, stored.shapes(FIXED))
        average = {name: tuple(tensor.shape) for name, tensor in engine.objective.state_dict().items()}
        if stored.shapes(OBJECTIVE) != average:
            raise ConfigError(f"{checkpoint}: of another objective; start a new run, or set train.output")

    def read(name: str) -> Trained:
        moments = {key: stored.read(key, name, ranks.device) for key in MOMENTS}
        return Trained(name, stored.read(WEIGHTS, name, ranks.device), moments)

    state.put(engine, read, numbers["updates"])
    for name in fixed:
        _fix(own[name], stored.read(FIXED, name, ranks.device))
    engine.objective.load_state_dict({name: stored.read(OBJECTIVE, name, ranks.device) for name in average})
    # Ranks that were not there when it was written keep what their seed gave them.
    on_cpu, random = torch.device("cpu"), stored.shapes(RANDOM)
    if (name := f"cpu/{ranks.rank}") in random:
        torch.set_rng_state(stored.read(RANDOM, name, on_cpu))
    if ranks.device.type == "cuda" and (name := f"cuda/{ranks.rank}") in random:
        torch.cuda.set_rng_state(stored.read(RANDOM, name, on_cpu), ranks.device)
    engine.scale.load_state_dict(numbers["loss_scale"])
    engine.at_step(numbers["step"])
    return numbers


def _same_parameters(
    checkpoint: Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            here, there = wanted.get(name, "not there"), found.get(name, "not there")
            raise ConfigError(
                f"{checkpoint}: of another model, or other parameters are tuned: {name} is {here} here and "
                f"{there} in the checkpoint; start a new run, or set train.output"
            )


def _fix(tensor: Any, value: Tensor) -> None:
    """Sets a buffer, or a parameter that is not tuned."""
    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0, enabled=hasattr(tensor, "ds_id")):
        if not hasattr(tensor, "ds_id") or torch.distributed.get_rank() == 0:
            with torch.no_grad():
                tensor.copy_(value)
