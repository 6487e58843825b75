"""ContCoOp (arXiv 2412.20895), reconstructed: a learned context that attends to the tokens of the class name."""

from torch import Tensor

from dive_fast.config.section import NonNegativeFloat, Positive
from dive_fast.kernels.naive import kl_divergence
from dive_fast.methods.method import Group, Preset, over_ranks
from dive_fast.methods.prompt_learning import PromptLearning, PromptOptions
from dive_fast.model.learned_prompts import AttendsTo, NameAttention


class ContCoOp(PromptLearning):
    """Cross-entropy with a context that depends on the class, and the divergence from the hand-made prompt.

    ::

        P_c  = V + Attn(LN(V) W_q, LN(E_c) W_k, LN(E_c) W_v) W_o        W_o = 0 at the start
        loss = cross-entropy + distillation_weight mean_i KL(p0_i || p_i)

    E_c are the token embeddings of the class name by the present model, p0 the probabilities by the hand-made
    prompts of ``data.target.templates``.

    This is a reconstruction: of the paper its abstract and introduction were read. They name prompts that an
    attention layer in front of the text encoder integrates with class embeddings, and a distillation of zero-shot
    knowledge. The residual, the layer norms without gains, keys from the name's tokens, the heads, W_o = 0, the
    direction of the divergence and its weight are this project's choices.
    """

    name, title = "contcoop", "ContCoOp"
    has_distance = True

    class Options(PromptOptions):
        """Options of the context, the attention and the divergence."""

        heads: Positive = 8
        """Heads of the attention; they divide the width of the text tower."""
        attends_to: AttendsTo = "name"
        """`name`: the context attends to the tokens of the class name. `context_and_name`: to itself too, as in a
        self-attention over both of which the outputs of the context are kept."""
        residual: bool = True
        """Add the context to its attention. `false`: the attention alone, whose output begins at random."""
        distillation_weight: NonNegativeFloat = 1.0
        """Factor on the divergence; a reconstruction: the paper's value was not read."""

    def attention(self, width: int) -> NameAttention:
        """The attention to the class names."""
        options = self.options
        return NameAttention(width, options.heads, options.residual, self.seed, options.attends_to)

    def distance(self, logits: Tensor, hand_logits: Tensor, classes: Tensor, hand: Tensor, group: Group) -> Tensor:
        """The mean divergence over all ranks' images."""
        return over_ranks(kl_divergence(hand_logits.log_softmax(1), logits.log_softmax(1)), group)


PRESETS = (
    Preset(
        "contcoop",
        "ContCoOp",
        "A learned context that attends to the tokens of the class name + distillation_weight * divergence from "
        "the probabilities by the hand-made prompts; a reconstruction (arXiv 2412.20895).",
        "contcoop",
        None,
        "#b5654a",
    ),
)
