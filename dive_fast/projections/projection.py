"""The interface of a method in weight space: a rule around the optimizer's step, for each parameter group.

Every tuned tensor W has an anchor W0, its value before the first update, and a deviation d = W - W0. A rule is one
class in one file of this folder. It sees a :class:`~dive_fast.projections.anchored_group.AnchoredGroup`, which has
sums over complete tensors, whatever piece of them this rank updates, and changes gradients or weights along d.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from dive_fast.config.section import Section

if TYPE_CHECKING:
    from dive_fast.projections.anchored_group import AnchoredGroup


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


class Projection:
    """A rule; its state is in the groups, so that checkpoints fit any number of ranks."""

    name: ClassVar[str]
    """Name in ``projection.name``."""
    title: ClassVar[str]
    """Name in figures and tables."""
    summary: ClassVar[str]
    """One sentence for the configuration reference."""
    values: ClassVar[tuple[str, ...]] = ()
    """Names of the rule's numbers for each tensor, kept in ``AnchoredGroup.values`` and saved in checkpoints."""
    keeps_rows: ClassVar[bool] = False
    """Whether a number of each row is kept from one update to the next, in ``AnchoredGroup.row_norms``."""
    strength: ClassVar[str | None] = None
    """The number in ``AnchoredGroup.measures`` that says how strongly the rule acts, for metrics and figures."""

    class Options(Section):
        """No options."""

    def __init__(self, options: Section) -> None:
        """Reads the rule's validated options."""

    @property
    def by_rows(self) -> bool:
        """Whether sums are those of rows (all dimensions but the first) instead of complete tensors."""
        return False

    @property
    def keeps_previous(self) -> bool:
        """Whether the deviation of the previous update is kept, one more fp32 copy of the weights."""
        return False

    def before_step(self, group: "AnchoredGroup") -> None:
        """Changes gradients in place; they are still multiplied by ``group.gradient_scale``."""

    def after_step(self, group: "AnchoredGroup") -> None:
        """Changes weights in place. A skipped update has left weights and moments as they were."""
