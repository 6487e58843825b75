"""The pieces of one parameter group that this rank updates."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """The piece of one parameter that this rank updates."""

    name: str
    """Name of the parameter in the towers."""
    start: int
    """Index of the piece's first element in the flattened parameter."""
    weights: Tensor
    """``(n,)`` fp32, a view of the weights that the optimizer updates; changed in place."""
    gradient: Callable[[], Tensor | None]
    """Returns ``(n,)``, a view of the gradient, which is multiplied by ``FlatGroup.gradient_scale`` before the
    optimizer's step and divided by it after; None where the parameter has no gradient."""


@dataclass
class FlatGroup:
    """One parameter group on this rank.

    ZeRO 1 and 2 keep the fp32 weights of a group as one flat tensor, of which each rank has a part. The parts
    ignore tensor boundaries: a rank can hold no piece of a tensor, a piece that begins within a row, or padding.
    """

    index: int
    """Index of the group in the optimizer; every rank has the same groups in the same order."""
    shapes: dict[str, torch.Size]
    """Shapes of all parameters of the group by name, in order; this rank may hold no piece of one."""
    segments: list[Segment]
    device: torch.device
    reduce: Callable[[Tensor], None]
    """Sums a tensor over the ranks that share the parameters, in place; does nothing where each has them all."""
    new_state: Callable[[str], list[Tensor]]
    """Allocates zeros as state of the optimizer under a key, by which checkpoints save it; ``(n,)`` a segment."""
    gradient_scale: Tensor = field(default_factory=lambda: torch.ones(()))
    """``()``, loss scale times the divisor of clipping."""
    skipped: Tensor = field(default_factory=lambda: torch.zeros(()))
    """``()``, 1 where this update is skipped, otherwise 0."""
    learning_rate: float = 0.0
    """Learning rate of this update."""
