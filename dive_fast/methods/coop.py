"""CoOp (Zhou et al. 2022, arXiv 2109.01134): a learned context in front of class names, shared by all classes."""

from dive_fast.methods.method import Preset
from dive_fast.methods.prompt_learning import PromptLearning, PromptOptions


class CoOp(PromptLearning):
    """Cross-entropy of class probabilities by prompts with a learned context."""

    name, title = "coop", "CoOp"
    loss_metric = "cross_entropy"

    class Options(PromptOptions):
        """Options of the context."""


PRESETS = (
    Preset(
        "coop",
        "CoOp",
        "Learns context vectors in front of the class name by the cross-entropy of the class prompts; both towers "
        "are frozen (arXiv 2109.01134).",
        "coop",
        None,
        "#7a9e9f",
    ),
)
