"""The shared part of methods that learn the context of class prompts and tune no weight of the towers."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dive_fast.config.section import Positive, Section
from dive_fast.errors import ConfigError
from dive_fast.kernels.naive import unit
from dive_fast.kernels.precision import product
from dive_fast.methods.method import Group, Loss, Setting, Start, TargetLoss, TeacherOutputs, over_ranks
from dive_fast.model.features import Outputs
from dive_fast.model.learned_prompts import (
    PLACEHOLDER,
    ClassTokens,
    LearnedPrompts,
    NameAttention,
    check_text_tower,
    initial_context,
    tokenize_classes,
)

if TYPE_CHECKING:
    from dive_fast.model.towers import Towers


class PromptOptions(Section):
    """Options of the context."""

    context: Annotated[str, Field(min_length=1)] | Positive = "a photo of a"
    """Start of the context: a phrase, whose token embeddings it begins with, as many as the phrase has tokens; or
    a number, for as many random vectors."""


class PromptLearning(TargetLoss):
    """Cross-entropy of class probabilities by learned prompts, and a term that keeps to the hand-made prompt.

    ::

        t_c  = unit g([start] P_c E_c . [end])            g the frozen text tower, P_c the learned context
        p(c) = softmax_c(s unit(f(x)) . t_c)              f the frozen image tower, s the frozen logit scale
        loss = cross-entropy + distillation_weight distance

    The features of all classes are computed in every step, for the classes that each rank is dealt. A subclass
    may add attention to the context, and a distance from the embeddings t0 of the hand-made prompts.
    """

    needs_texts = False
    needs_classes = True
    needs_prompts = True
    has_distance: ClassVar[bool] = False
    """Whether the loss has a distance, which needs the embeddings of the hand-made prompts."""
    classes: ClassTokens
    """Tokens of the target's classes, set by :meth:`start`."""

    def __init__(self, options: Section, setting: Setting) -> None:
        """Takes the options and the seed of random starts."""
        super().__init__(options, setting)
        self.options: Any = options
        self.seed = setting.seed
        self._hand: Tensor | None = None

    def start(self, start: Start) -> None:
        """Tokenises the classes, and embeds the hand-made prompts for the distance.

        Raises:
            ConfigError: the text tower or its tokenizer does not fit.
        """
        assert start.towers is not None
        check_text_tower(start.towers)
        context = self.options.context
        phrase = " ".join([PLACEHOLDER] * context) if isinstance(context, int) else context.strip()
        classes = tokenize_classes(start.tokenizer, start.pooled_at, start.class_names, phrase)
        if isinstance(context, int) and classes.context_tokens != context:
            raise ConfigError(
                f"objective.context = {context}: the tokenizer of this model makes {classes.context_tokens} "
                f"tokens of {context} placeholders; set a phrase"
            )
        self.classes, self._phrase = classes, phrase
        if self.has_distance:
            texts = [template(name) for name in start.class_names for template in start.templates]
            rows = start.embed_texts(texts)
            self._hand = unit(rows.view(len(start.class_names), len(start.templates), -1).mean(1))

    def learned_prompts(self, towers: "Towers") -> nn.Module:
        """The context at its start, on the device of the towers."""
        context = initial_context(towers, self.classes, isinstance(self.options.context, int), self.seed)
        return LearnedPrompts(context, self._phrase, self.attention(context.shape[1])).to(context.device)

    def attention(self, width: int) -> NameAttention | None:
        """The attention of the context to class names; None: all classes share the context.

        Args:
            width: d, of the text tower.
        """
        return None

    def tunes(self, parameter: str) -> bool:
        """Only the prompts are trained."""
        return parameter.startswith("prompts.")

    def loss(
        self, outputs: Outputs, labels: Tensor, group: Group = None, teacher: TeacherOutputs | None = None
    ) -> Loss:
        """The cross-entropy and the weighted distance."""
        assert outputs.classes is not None
        image, classes, scale = unit(outputs.image), unit(outputs.classes), outputs.logit_scale
        logits = scale * product(image, classes)
        loss = over_ranks(nn.functional.cross_entropy(logits, labels), group)
        metrics = {"cross_entropy": loss.detach()}
        if not self.has_distance:
            return Loss(loss, metrics)
        assert self._hand is not None, "start comes before the first step"
        hand = self._hand.to(classes.device)
        with torch.no_grad():
            hand_logits = scale * product(image, hand)
        distance = self.distance(logits, hand_logits, classes, hand, group)
        loss = loss + self.options.distillation_weight * distance
        return Loss(loss, metrics | {"prompt_distance": distance.detach()})

    def distance(self, logits: Tensor, hand_logits: Tensor, classes: Tensor, hand: Tensor, group: Group) -> Tensor:
        """The distance from the hand-made prompts, ``()``.

        Args:
            logits, hand_logits: ``(B, C)`` of this rank's images, by the learned and the hand-made prompts.
            classes, hand: ``(C, D)`` unit rows, by the same prompts; equal on all ranks.
        """
        raise NotImplementedError
