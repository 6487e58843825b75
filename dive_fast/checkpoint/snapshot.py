"""The state of a run as a checkpoint stores it: tensors copied to the host, and JSON values."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dive_fast.checkpoint import zero_state
from dive_fast.checkpoint.export import full_state
from dive_fast.checkpoint.manifest import AVERAGE, FIXED, OBJECTIVE, PROJECTION, RANDOM, TEACHER, WEIGHTS
from dive_fast.engine.step import Engine
from dive_fast.identity import Identity


class RunRecord(NamedTuple):
    """The properties of a run that each of its checkpoints stores."""

    run: str
    """Id of the run (:mod:`dive_fast.checkpoint.lineage`)."""
    total_steps: int = 0
    """Steps of the complete run, over which the learning rate's schedule extends."""
    identity: Identity = {}  # noqa: RUF012 - never changed
    start: Path | None = None
    """The checkpoint that the run started from, which is never removed."""


def copy_tensors(engine: Engine) -> dict[str, Tensor]:
    """The tensors that this rank writes, copied to the CPU; all ranks call it.

    Tuned parameters are assigned to ranks in turn, so that all ranks write about the same amount.
    """
    return dict(_copies(engine))


def trainer_state(
    engine: Engine, step: int, validation: dict[str, Any], metrics: dict[str, Any], record: RunRecord
) -> dict[str, Any]:
    """The content of ``trainer.json``: all state except tensors.

    Args:
        validation: state of validation, which :func:`dive_fast.checkpoint.resume.load_checkpoint` returns.
        metrics: the latest metrics, which it returns too.
        record: properties of the run.
    """
    return {
        "run": record.run,
        "total_steps": record.total_steps,
        "step": step,
        "updates": zero_state.num_updates(engine),
        "loss_scale": engine.scale.state_dict(),
        "validation": validation,
        "metrics": metrics,
    }


def _copies(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    ranks = engine.ranks
    for index, parameter in enumerate(zero_state.gather(engine)):
        if index % ranks.world_size == ranks.rank:
            yield f"{WEIGHTS}/{parameter.name}", _copy_to_cpu(parameter.weights)
            for key, moment in parameter.moments.items():
                yield f"{key}/{parameter.name}", _copy_to_cpu(moment)
    tuned = {name for name, _ in zero_state.tuned_parameters(engine)}
    for name, tensor in full_state(engine, without=tuned | zero_state.not_stored(engine)).items():
        yield f"{FIXED}/{name}", tensor.clone()
    # On all ranks: its checksums are sums over them.
    projected = {} if engine.projection is None else engine.projection.state()
    if ranks.is_main:
        for kind, state in ((OBJECTIVE, engine.method.state()), (PROJECTION, projected)):
            for name, tensor in state.items():
                yield f"{kind}/{name}", _copy_to_cpu(tensor)
    for kind, holder in ((TEACHER, engine.teacher), (AVERAGE, engine.average)):
        for index, (name, tensor) in enumerate(() if holder is None else holder.state()):
            if index % ranks.world_size == ranks.rank:
                yield f"{kind}/{name}", _copy_to_cpu(tensor)
    yield f"{RANDOM}/cpu/{ranks.rank}", torch.get_rng_state()
    if ranks.device.type == "cuda":
        yield f"{RANDOM}/cuda/{ranks.rank}", torch.cuda.get_rng_state(ranks.device)


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    """A copy in pageable memory: page-locked memory is faster to copy to, but torch never releases it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
