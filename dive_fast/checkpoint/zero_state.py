"""The whole state of training, one parameter at a time: the same whatever the ranks and the ZeRO stage.

DeepSpeed's own checkpoints hold each rank's partition as a pickle, so they fit one number of ranks and one stage.
Here each parameter's weights and moments are whole tensors, gathered and dealt out by DeepSpeed's accessors.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from dive_fast.engine.step import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW."""


class Trained(NamedTuple):
    """A tuned parameter with the optimizer's moments of it, whole, fp32, on its device."""

    name: str
    weights: Tensor
    moments: dict[str, Tensor]
    """By the names of :data:`MOMENTS`; zeros before the first update."""


def gathered(engine: Engine) -> Iterator[Trained]:
    """Every tuned parameter in turn; all ranks go through all of them."""
    _link_moments(engine)
    for name, parameter in tuned(engine):
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            weights = safe_get_full_fp32_param(parameter)
            moments = {key: _moment(engine, parameter, key) for key in MOMENTS}
        else:
            weights, state = parameter.detach(), _inner(engine).state.get(parameter, {})
            moments = {key: state.get(key, torch.zeros_like(weights)) for key in MOMENTS}
        yield Trained(name, weights.reshape(shape_of(parameter)), moments)


def put(engine: Engine, read: Callable[[str], Trained], updates: int) -> None:
    """Replaces all weights and moments; all ranks call it.

    Args:
        read: a parameter's state by its name; called on every rank, for each in turn.
        updates: that the optimizer has made, for its bias correction.
    """
    _prepare(engine, updates)
    for name, parameter in tuned(engine):
        found = read(name)
        if hasattr(parameter, "ds_id"):
            # DeepSpeed's accessors of whole tensors know no padding: each rank sets its own part.
            safe_set_local_fp32_param(parameter, _part(parameter, found.weights))
            parameter.ds_tensor.data.copy_(_part(parameter, found.weights))
            for key, moment in found.moments.items():
                safe_set_local_optimizer_state(parameter, _part(parameter, moment), key)
            continue
        with torch.no_grad():
            parameter.copy_(found.weights)
        if hasattr(parameter, "_hp_mapping"):
            safe_set_full_fp32_param(parameter, found.weights)
            for key, moment in found.moments.items():
                safe_set_full_optimizer_state(parameter, moment, key)
        else:
            state = _inner(engine).state[parameter]
            for key, moment in found.moments.items():
                state[key].copy_(moment)


def tuned(engine: Engine) -> Iterator[tuple[str, Any]]:
    """Parameters that are trained, by name."""
    return ((name, p) for name, p in engine.towers.named_parameters() if p.requires_grad)


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter, though ZeRO-3 has cut it up."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _moment(engine: Engine, parameter: nn.Parameter, key: str) -> Tensor:
    zero = engine.deepspeed.optimizer
    flat = zero.single_partition_of_fp32_groups if hasattr(zero, "single_partition_of_fp32_groups") else ()
    if flat and not zero.optimizer.state.get(flat[0]):
        return torch.zeros(shape_of(parameter), device=engine.ranks.device)
    return safe_get_full_optimizer_state(parameter, key).reshape(shape_of(parameter))


def _link_moments(engine: Engine) -> None:
    """Lets DeepSpeed's accessors find the moments of every parameter group.

    ZeRO 1 and 2 link them once, after the first step of the first group, when a second group has none yet.
    """
    zero = engine.deepspeed.optimizer
    flats = getattr(zero, "single_partition_of_fp32_groups", ())
    if len(flats) > 1 and all(zero.optimizer.state.get(flat) for flat in flats):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _prepare(engine: Engine, updates: int) -> None:
    """Gives the optimizer the state that its first update would make."""
    zero, inner = engine.deepspeed.optimizer, _inner(engine)
    if hasattr(zero, "single_partition_of_fp32_groups"):
        flats = zero.single_partition_of_fp32_groups
    elif hasattr(zero, "fp32_partitioned_groups_flat"):
        flats = zero.fp32_partitioned_groups_flat
    else:
        flats = [parameter for _, parameter in tuned(engine)]
    for flat in flats:
        state = inner.state[flat]
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(flat, requires_grad=False)
        old = state.get("step")
        state["step"] = torch.tensor(float(updates), device=flat.device) if not isinstance(old, int) else updates
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def _inner(engine: Engine) -> Any:
    """Torch's optimizer, inside ZeRO's or alone."""
    return getattr(engine.deepspeed.optimizer, "optimizer", engine.deepspeed.optimizer)


def _part(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's partition of a parameter under ZeRO-3, padded as DeepSpeed pads it."""
    size = parameter.ds_tensor.numel()
    flat = whole.flatten()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    padded = flat.new_zeros(size * world_size)
    padded[: flat.numel()] = flat
    return padded[rank * size : (rank + 1) * size]


def updates_of(engine: Engine) -> int:
    """Updates that the optimizer has made; steps that were skipped are none."""
    state = _inner(engine).state
    return int(next(iter(state.values()))["step"]) if state else 0
