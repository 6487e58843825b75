"""The interface of a projection: a change of gradients and weights around the optimizer's step.

ZeRO 1 and 2 keep the fp32 weights of a parameter group as one flat tensor, of which each rank has a part. The
parts ignore tensor boundaries: a rank can hold no piece of a tensor, a piece that begins within a row, or padding
at the end. A :class:`FlatGroup` lists the pieces, so that a projection is written once for ZeRO 0, 1 and 2.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """The piece of one parameter that this rank updates."""

    name: str
    """Name of the parameter in the towers."""
    shape: torch.Size
    """Shape of the complete parameter."""
    start: int
    """Index of the piece's first element in the flattened parameter."""
    weights: Tensor
    """``(n,)`` fp32, a view of the weights that the optimizer updates; changed in place."""
    gradient: Callable[[], Tensor | None]
    """Returns ``(n,)``, a view of the gradient, which :meth:`Projection.before_step` sees multiplied by
    ``FlatGroup.gradient_scale``; None where the parameter has no gradient."""


@dataclass
class FlatGroup:
    """The pieces of one parameter group on this rank, in the order of the parameters."""

    index: int
    """Index of the group in the optimizer; every rank has the same groups in the same order."""
    names: tuple[str, ...]
    """Names of all parameters of the group, of which this rank may hold none."""
    segments: list[Segment]
    reduce: Callable[[Tensor], None]
    """Sums a tensor over the ranks that share the parameters, in place; does nothing where each has them all."""
    gradient_scale: Tensor = field(default_factory=lambda: torch.ones(()))
    """``()``, loss scale times the divisor of clipping."""
    skipped: Tensor = field(default_factory=lambda: torch.zeros(()))
    """``()``, 1 where this update is skipped, otherwise 0."""


class Projection:
    """Hooks around the step of torch's fused AdamW; both are called once for each parameter group."""

    def start(self, groups: list[FlatGroup]) -> None:
        """Called once, before the first step and before a checkpoint is loaded, e.g. to copy an anchor."""

    def before_step(self, group: FlatGroup) -> None:
        """Changes gradients in place; they are still multiplied by ``group.gradient_scale``."""

    def after_step(self, group: FlatGroup) -> None:
        """Changes weights in place. A skipped update has left weights and moments as they were."""
