"""KgCoOp (Yao et al. 2023, arXiv 2303.13283): CoOp, with class features that stay near the hand-made prompt's."""

from torch import Tensor

from dive_fast.config.section import NonNegativeFloat
from dive_fast.methods.method import Group, Preset
from dive_fast.methods.prompt_learning import PromptLearning, PromptOptions


class KgCoOp(PromptLearning):
    """CoOp's cross-entropy, and the distance of class features from those of the hand-made prompts.

    ::

        loss = cross-entropy + distillation_weight (1 - mean_c t_c . t0_c)

    t0_c is the unit mean of the unit embeddings of class c in ``data.target.templates``.
    """

    name, title = "kgcoop", "KgCoOp"
    has_distance = True

    class Options(PromptOptions):
        """Options of the context and of the distance."""

        distillation_weight: NonNegativeFloat = 8.0
        """Factor on the distance."""

    def distance(self, logits: Tensor, hand_logits: Tensor, classes: Tensor, hand: Tensor, group: Group) -> Tensor:
        """One minus the mean cosine, equal on all ranks."""
        return 1 - (classes * hand).sum(1).mean()


PRESETS = (
    Preset(
        "kgcoop",
        "KgCoOp",
        "CoOp + distillation_weight * distance of class features from those of the hand-made prompts (arXiv "
        "2303.13283).",
        "kgcoop",
        None,
        "#5b7fa6",
    ),
)
