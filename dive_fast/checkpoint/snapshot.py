"""The state of a run as a checkpoint stores it: tensors on the host and numbers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dive_fast.checkpoint import zero_state as state
from dive_fast.checkpoint.export import full_state
from dive_fast.checkpoint.manifest import FIXED, OBJECTIVE, RANDOM, WEIGHTS
from dive_fast.engine.step import Engine
from dive_fast.identity import Identity


def tensors(engine: Engine) -> dict[str, Tensor]:
    """What this rank writes, copied to the CPU; all ranks call it.

    Tuned parameters are dealt out to the ranks in turn, so that all write about as much.
    """
    return dict(_tensors(engine))


class RunRecord(NamedTuple):
    """What a checkpoint says of the run that wrote it."""

    run: str
    """Id of the run (:mod:`dive_fast.checkpoint.lineage`)."""
    total_steps: int = 0
    """Of the whole run, which the learning rate's schedule ends with."""
    identity: Identity = {}  # noqa: RUF012 - never changed
    start: Path | None = None
    """The checkpoint that the run began from, which stays."""


def trainer(
    engine: Engine, step: int, validation: dict[str, Any], metrics: dict[str, Any], record: RunRecord
) -> dict[str, Any]:
    """What is no tensor, for ``trainer.json``.

    Args:
        validation: what evaluations so far have found, for :func:`load` to give back.
        metrics: the newest ones, likewise.
        record: of the run.
    """
    return {
        "run": record.run,
        "total_steps": record.total_steps,
        "step": step,
        "updates": state.updates_of(engine),
        "loss_scale": engine.scale.state_dict(),
        "validation": validation,
        "metrics": metrics,
    }


def _tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    ranks = engine.ranks
    for place, found in enumerate(state.gathered(engine)):
        if place % ranks.world_size == ranks.rank:
            yield f"{WEIGHTS}/{found.name}", _on_cpu(found.weights)
            for key, moment in found.moments.items():
                yield f"{key}/{found.name}", _on_cpu(moment)
    tuned = {name for name, _ in state.tuned(engine)}
    for name, tensor in full_state(engine, without=tuned).items():
        yield f"{FIXED}/{name}", tensor.clone()
    if ranks.is_main:
        for name, tensor in engine.objective.state_dict().items():
            yield f"{OBJECTIVE}/{name}", _on_cpu(tensor)
    yield f"{RANDOM}/cpu/{ranks.rank}", torch.get_rng_state()
    if ranks.device.type == "cuda":
        yield f"{RANDOM}/cuda/{ranks.rank}", torch.cuda.get_rng_state(ranks.device)


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy in pageable memory: page-locked memory is faster to copy to, but torch never gives it back."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
