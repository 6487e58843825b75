"""Parameter groups of torch's AdamW under ZeRO 0 to 2, as :class:`dive_fast.projections.flat_group.FlatGroup`.

ZeRO 1 and 2 call the optimizer once for each group, whose only tensor is this rank's flat fp32 part. DeepSpeed
then gathers the parts, so that changes made by a hook reach all ranks. ZeRO-0 calls it once with all parameters.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dive_fast.projections.flat_group import FlatGroup, Segment


class States:
    """Further state of the optimizer, a tensor for each of its parameters, by keys of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Starts without state."""
        self._optimizer = optimizer
        self._tensors: dict[str, dict[Tensor, Tensor]] = {}

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys, in order of their creation."""
        return tuple(self._tensors)

    def zeros(self, key: str, parameter: Tensor) -> Tensor:
        """Allocates the state of a parameter of the optimizer, of its shape."""
        state = torch.zeros_like(parameter, requires_grad=False)
        self._tensors.setdefault(key, {})[parameter] = state
        return state

    def tensors(self) -> Iterator[Tensor]:
        """All tensors."""
        for tensors in self._tensors.values():
            yield from tensors.values()

    def link(self) -> None:
        """Adds the tensors to the optimizer's state, where DeepSpeed's accessors read them.

        Not before the optimizer has created its own state: it does so for a parameter only if there is none.
        """
        for key, tensors in self._tensors.items():
            for parameter, tensor in tensors.items():
                if self._optimizer.state.get(parameter):
                    self._optimizer.state[parameter][key] = tensor


def flat_groups(
    engine: Any, optimizer: torch.optim.Optimizer, towers: nn.Module, states: States
) -> list[tuple[int, FlatGroup]]:
    """The groups of the optimizer, each with the id of its first tensor.

    Args:
        engine: DeepSpeed's, at ZeRO 0 to 2.
        optimizer: torch's fused AdamW inside it.
    """
    names = {id(parameter): name for name, parameter in towers.named_parameters()}
    is_partitioned = engine.zero_optimization_stage() > 0
    return _partitioned(engine, names, states) if is_partitioned else _replicated(optimizer, names, states)


def _replicated(
    optimizer: torch.optim.Optimizer, names: dict[int, str], states: States
) -> list[tuple[int, FlatGroup]]:
    """Groups under ZeRO-0: every parameter is one segment."""
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        parameters = list(group["params"])
        segments = [Segment(names[id(p)], 0, p.detach().view(-1), _gradient(p, slice(None))) for p in parameters]

        def new_state(key: str, parameters: list[Tensor] = parameters) -> list[Tensor]:
            return [states.zeros(key, parameter).view(-1) for parameter in parameters]

        shapes = {names[id(p)]: p.shape for p in parameters}
        device = parameters[0].device
        groups.append((id(parameters[0]), FlatGroup(index, shapes, segments, device, lambda _: None, new_state)))
    return groups


def _partitioned(engine: Any, names: dict[int, str], states: States) -> list[tuple[int, FlatGroup]]:
    """Groups under ZeRO 1 and 2: segments from DeepSpeed's table of fragments."""
    zero, groups = engine.optimizer, []
    for index, (parameters, flat) in enumerate(
        zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
    ):
        segments, pieces = [], []
        for parameter in parameters:
            if (mapping := parameter._hp_mapping) is None:
                continue
            in_part, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
            piece = slice(in_part.start, in_part.start + in_part.numel)
            weights, gradient = flat.detach()[piece], _gradient(flat, piece)
            segments.append(Segment(names[id(parameter)], in_parameter.start, weights, gradient))
            pieces.append(piece)

        def new_state(key: str, flat: Tensor = flat, pieces: list[slice] = pieces) -> list[Tensor]:
            state = states.zeros(key, flat)
            return [state[piece] for piece in pieces]

        shapes = {names[id(parameter)]: parameter.shape for parameter in parameters}
        reduce = _sum_over(zero.real_dp_process_group[index])
        groups.append((id(flat), FlatGroup(index, shapes, segments, flat.device, reduce, new_state)))
    return groups


def _gradient(holder: Tensor, piece: slice) -> Callable[[], Tensor | None]:
    return lambda: None if holder.grad is None else holder.grad.view(-1)[piece]


def _sum_over(group: Any) -> Callable[[Tensor], None]:
    def reduce(tensor: Tensor) -> None:
        if dist.get_world_size(group) > 1:
            dist.all_reduce(tensor, group=group)

    return reduce
