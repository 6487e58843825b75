"""The interface of a method in weight space: a rule around the optimizer's step, for each parameter group.

Every tuned tensor W has an anchor W0, its value before the first update, and a deviation d = W - W0. A rule is one
class in one file of this folder. It sees an :class:`AnchoredGroup`, which has sums over complete tensors, whatever
piece of them this rank updates, and changes gradients or weights along d.
"""

from typing import ClassVar

from dive_fast.config.section import Section
from dive_fast.projections.anchored_group import AnchoredGroup, Layout


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

    @property
    def layout(self) -> Layout:
        """What a group keeps and sums for the rule."""
        return Layout(self.values, self.by_rows, self.keeps_previous, self.keeps_rows)

    def before_step(self, group: AnchoredGroup) -> None:
        """Changes gradients in place; they are still multiplied by ``group.gradient_scale``."""

    def after_step(self, group: AnchoredGroup) -> None:
        """Changes weights in place. A skipped update has left weights and moments as they were."""
