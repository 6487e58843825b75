"""The complete training state, one parameter at a time, independent of the number of ranks and the ZeRO stage.

DeepSpeed's own checkpoints store each rank's partition as a pickle, so they fit one number of ranks and one stage.
Here the weights and moments of each parameter are full tensors, gathered and scattered by DeepSpeed's accessors.
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

from dive_fast.engine.optimizer import MOMENTUM
from dive_fast.engine.step import Engine
from dive_fast.model.towers import HEAD

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter."""


def state_keys(engine: Engine) -> tuple[str, ...]:
    """Keys of the optimizer's state of a parameter: its moments, and what a projection adds."""
    if isinstance(_torch_optimizer(engine), torch.optim.SGD):
        return (MOMENTUM,)
    return MOMENTS if engine.projection is None else (*MOMENTS, *engine.projection.states.keys)


class ParameterState(NamedTuple):
    """A tuned parameter and its state in the optimizer: full tensors in fp32, on the parameter's device."""

    name: str
    weights: Tensor
    moments: dict[str, Tensor]
    """By the names of :func:`state_keys`; zeros before the first update."""


def gather(engine: Engine) -> Iterator[ParameterState]:
    """Yields the state of each tuned parameter in turn; all ranks iterate over all of them."""
    _link_moments(engine)
    keys = state_keys(engine)
    for name, parameter in tuned_parameters(engine):
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            weights = safe_get_full_fp32_param(parameter)
            moments = {key: _moment(engine, parameter, key) for key in keys}
        else:
            weights, state = parameter.detach(), _torch_optimizer(engine).state.get(parameter, {})
            moments = {key: state.get(key, torch.zeros_like(weights)) for key in keys}
        yield ParameterState(name, weights.reshape(full_shape(parameter)), moments)


def scatter(engine: Engine, read: Callable[[str], ParameterState], updates: int) -> None:
    """Replaces the weights and moments of all tuned parameters; all ranks call it.

    Args:
        read: returns a parameter's state by name; called on every rank, for each parameter in turn.
        updates: number of updates that the optimizer has made, for its bias correction.
    """
    _prepare_optimizer(engine, updates)
    for name, parameter in tuned_parameters(engine):
        stored = read(name)
        if hasattr(parameter, "ds_id"):
            # DeepSpeed's accessors of full tensors ignore padding, so each rank sets its own partition.
            safe_set_local_fp32_param(parameter, _partition(parameter, stored.weights))
            parameter.ds_tensor.data.copy_(_partition(parameter, stored.weights))
            for key, moment in stored.moments.items():
                safe_set_local_optimizer_state(parameter, _partition(parameter, moment), key)
            continue
        with torch.no_grad():
            parameter.copy_(stored.weights)
        if hasattr(parameter, "_hp_mapping"):
            safe_set_full_fp32_param(parameter, stored.weights)
            for key, moment in stored.moments.items():
                safe_set_full_optimizer_state(parameter, moment, key)
        else:
            state = _torch_optimizer(engine).state[parameter]
            for key, moment in stored.moments.items():
                state[key].copy_(moment)


def tuned_parameters(engine: Engine) -> Iterator[tuple[str, Any]]:
    """The parameters that are trained, with their names."""
    return ((name, p) for name, p in engine.towers.named_parameters() if p.requires_grad)


def not_stored(engine: Engine) -> set[str]:
    """Names of weights and buffers that checkpoints leave out.

    With adapters or learned prompts, these are the frozen ones of both towers: those of the pre-trained model,
    whose digest is in the identity of the run.
    """
    if engine.towers.adapters is None and engine.towers.prompts is None:
        return set()
    tuned = {name for name, _ in tuned_parameters(engine)}
    return {name for name in engine.towers.state_dict() if name not in tuned and not name.startswith(HEAD)}


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the full parameter, also where ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def num_updates(engine: Engine) -> int:
    """The number of updates that the optimizer has made, without skipped steps; 0 for SGD, which counts none."""
    state = _torch_optimizer(engine).state
    return int(next(iter(state.values())).get("step", 0)) if state else 0


def _moment(engine: Engine, parameter: nn.Parameter, key: str) -> Tensor:
    zero = engine.deepspeed.optimizer
    flat = zero.single_partition_of_fp32_groups if hasattr(zero, "single_partition_of_fp32_groups") else ()
    if flat and not zero.optimizer.state.get(flat[0]):
        return torch.zeros(full_shape(parameter), device=engine.ranks.device)
    return safe_get_full_optimizer_state(parameter, key).reshape(full_shape(parameter))


def _link_moments(engine: Engine) -> None:
    """Makes the moments of every parameter group available to DeepSpeed's accessors.

    ZeRO 1 and 2 link them once, after the first step of the first group, when a second group has none yet.
    """
    zero = engine.deepspeed.optimizer
    flats = getattr(zero, "single_partition_of_fp32_groups", ())
    if len(flats) > 1 and all(zero.optimizer.state.get(flat) for flat in flats):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _prepare_optimizer(engine: Engine, updates: int) -> None:
    """Creates the optimizer state that the first update would create."""
    zero, optimizer = engine.deepspeed.optimizer, _torch_optimizer(engine)
    if isinstance(optimizer, torch.optim.SGD):
        return  # its momentum exists from the start, and ZeRO does not partition it
    if hasattr(zero, "single_partition_of_fp32_groups"):
        flats = zero.single_partition_of_fp32_groups
    elif hasattr(zero, "fp32_partitioned_groups_flat"):
        flats = zero.fp32_partitioned_groups_flat
    else:
        flats = [parameter for _, parameter in tuned_parameters(engine)]
    for flat in flats:
        state = optimizer.state[flat]
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(flat, requires_grad=False)
        old = state.get("step")
        state["step"] = torch.tensor(float(updates), device=flat.device) if not isinstance(old, int) else updates
    if engine.projection is not None:
        engine.projection.states.link()
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def _torch_optimizer(engine: Engine) -> Any:
    """The torch optimizer, which ZeRO may wrap."""
    return getattr(engine.deepspeed.optimizer, "optimizer", engine.deepspeed.optimizer)


def _partition(parameter: Any, full: Tensor) -> Tensor:
    """This rank's partition of a parameter under ZeRO-3, padded as DeepSpeed pads it."""
    size = parameter.ds_tensor.numel()
    flat = full.flatten()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    padded = flat.new_zeros(size * world_size)
    padded[: flat.numel()] = flat
    return padded[rank * size : (rank + 1) * size]
