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
    strength: ClassVar[str | None] = None
    """The number in ``AnchoredGroup.measures`` that says how strongly the rule acts, for metrics and figures."""

    layout: Layout = Layout()
    """What a group keeps and sums for the rule."""

    class Options(Section):
        """No options."""

    def __init__(self, options: Section) -> None:
        """Reads the rule's validated options."""

    def before_step(self, group: AnchoredGroup) -> None:
        """Changes gradients in place; they are still multiplied by ``group.gradient_scale``."""

    def after_step(self, group: AnchoredGroup) -> None:
        """Changes weights in place. A skipped update has left weights and moments as they were."""
