"""Parameter groups of torch's AdamW under ZeRO 0 to 2, as :class:`dive_fast.methods.projection.FlatGroup`.

ZeRO 1 and 2 call the optimizer once for each group, whose only tensor is this rank's flat fp32 part. DeepSpeed
then gathers the parts, so that changes made by a hook reach all ranks. ZeRO-0 calls it once with all parameters.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dive_fast.methods.projection import FlatGroup, Projection, Segment


def register_projections(
    engine: Any, optimizer: torch.optim.Optimizer, towers: nn.Module, projections: Sequence[Projection]
) -> None:
    """Registers projections to run before and after each step of the optimizer.

    Args:
        engine: DeepSpeed's, at ZeRO 0 to 2.
        optimizer: torch's fused AdamW inside it; it has ``grad_scale`` and ``found_inf`` before each step.
    """
    names = {id(parameter): name for name, parameter in towers.named_parameters()}
    is_partitioned = engine.zero_optimization_stage() > 0
    groups = _partitioned_groups(engine, names) if is_partitioned else _replicated_groups(optimizer, names)
    for projection in projections:
        projection.start([group for _, group in groups])

    def current_groups(optimizer: Any) -> Iterator[FlatGroup]:
        updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for first, group in groups:
            if first in updated:
                group.gradient_scale, group.skipped = optimizer.grad_scale, optimizer.found_inf
                yield group

    @torch.no_grad()
    def before(optimizer: Any, *_: Any) -> None:
        for group in current_groups(optimizer):
            for projection in projections:
                projection.before_step(group)

    @torch.no_grad()
    def after(optimizer: Any, *_: Any) -> None:
        for group in current_groups(optimizer):
            for projection in projections:
                projection.after_step(group)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _replicated_groups(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> list[tuple[int, FlatGroup]]:
    """Groups under ZeRO-0, with the id of each group's first tensor; every parameter is one segment."""
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        segments = [
            Segment(names[id(p)], p.shape, 0, p.detach().view(-1), _gradient(p, slice(None)))
            for p in group["params"]
        ]
        parameter_names = tuple(segment.name for segment in segments)
        groups.append((id(group["params"][0]), FlatGroup(index, parameter_names, segments, lambda _: None)))
    return groups


def _partitioned_groups(engine: Any, names: dict[int, str]) -> list[tuple[int, FlatGroup]]:
    """Groups under ZeRO 1 and 2, with the id of each flat part: segments from DeepSpeed's table of fragments."""
    zero, groups = engine.optimizer, []
    for index, (parameters, flat) in enumerate(
        zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
    ):
        segments = []
        for parameter in parameters:
            if (mapping := parameter._hp_mapping) is None:
                continue
            in_part, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
            piece = slice(in_part.start, in_part.start + in_part.numel)
            weights, gradient = flat.detach()[piece], _gradient(flat, piece)
            segments.append(Segment(names[id(parameter)], parameter.shape, in_parameter.start, weights, gradient))
        parameter_names = tuple(names[id(parameter)] for parameter in parameters)
        group = zero.real_dp_process_group[index]
        groups.append((id(flat), FlatGroup(index, parameter_names, segments, _sum_over(group))))
    return groups


def _gradient(holder: Tensor, piece: slice) -> Callable[[], Tensor | None]:
    return lambda: None if holder.grad is None else holder.grad.view(-1)[piece]


def _sum_over(group: Any) -> Callable[[Tensor], None]:
    def reduce(tensor: Tensor) -> None:
        if dist.get_world_size(group) > 1:
            dist.all_reduce(tensor, group=group)

    return reduce
