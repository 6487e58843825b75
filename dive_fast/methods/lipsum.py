"""Lipsum-FT (Nam et al. 2024, arXiv 2404.00860): cross-entropy, and logits of random texts kept as they are."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dive_fast.config.section import NonNegativeFloat, Positive, Section
from dive_fast.data.batch import Text
from dive_fast.data.prompts import text_length
from dive_fast.data.random_streams import Draw, stream
from dive_fast.errors import ConfigError
from dive_fast.kernels.naive import unit
from dive_fast.kernels.precision import product
from dive_fast.methods.linear_head import CrossEntropy
from dive_fast.methods.method import Group, HeadOptions, Loss, Preset, Setting, Start, TeacherOutputs, over_ranks
from dive_fast.model.features import Outputs

PROBES = ["", "a", "a photo of a dog."]
"""Texts that show which tokens a tokenizer puts before and after a text."""


class Lipsum(CrossEntropy):
    """Cross-entropy of the head, and the squared change of the logits of M random texts at each image.

    ::

        loss = cross-entropy + distillation_weight mean_i 1 / (2 M) |s0 R (f_i - f0_i)|^2

    f, f0 unit rows of the images by the tuned and the frozen tower; R ``(M, D)`` unit embeddings of this step's
    random texts; s0 the pre-trained logit scale. The text tower is frozen. The paper's formula is without s0; its
    code, whose weight is 1, has it. The head is that of ``cross_entropy``, which includes s0 in its weights; the
    code scales the logits of a head of unit rows instead.
    """

    name, title = "lipsum", "Lipsum"
    teacher = "frozen"

    class Options(HeadOptions):
        """Options of the head and of the random texts."""

        distillation_weight: NonNegativeFloat = 1.0
        """Factor on the squared change of the random texts' logits."""
        random_texts: Positive = 80
        """M, random texts of each step."""
        random_tokens: Positive = 8
        """Random tokens of each text, between the start token and the end token."""

    def __init__(self, options: Section, setting: Setting) -> None:
        """Takes the weight and the seed of the random tokens."""
        super().__init__(options, setting)
        assert isinstance(options, self.Options)
        self.options, self.seed = options, setting.seed
        self._texts: RandomTexts | None = None

    def start(self, start: Start) -> None:
        """Finds the tokens from which random texts are drawn."""
        self._texts = RandomTexts(start, self.options.random_tokens)

    def teacher_texts(self) -> Text | None:
        """The random texts of this step."""
        if not self.options.distillation_weight:
            return None
        assert self._texts is not None, "start comes before the first step"
        return self._texts.draw(self.options.random_texts, self.seed, self.step)

    def loss(
        self, outputs: Outputs, labels: Tensor, group: Group = None, teacher: TeacherOutputs | None = None
    ) -> Loss:
        """The cross-entropy and the weighted distillation."""
        cross_entropy = super().loss(outputs, labels, group)
        if not self.options.distillation_weight:
            return cross_entropy
        assert teacher is not None and teacher.part_text is not None
        # The difference of features comes before the product, in which rounding would exceed it.
        change = teacher.logit_scale * product(unit(outputs.image) - teacher.image, teacher.part_text)
        loss = over_ranks(change.square().mean() / 2, group)
        metrics = {**cross_entropy.metrics, "random_text_loss": loss.detach()}
        return Loss(cross_entropy.loss + self.options.distillation_weight * loss, metrics)


class RandomTexts:
    """Texts of uniform random tokens between a tokenizer's start token, if it has one, and its end token."""

    def __init__(self, start: Start, count: int) -> None:
        """Finds the tokens around a text in the tokenizer's output.

        Args:
            count: random tokens of a text.

        Raises:
            ConfigError: the text tower does not read its feature at the end token, the tokenizer does not end all
                texts alike, the context is too short, or there are no tokens to draw.
        """
        if start.pooled_at is None:
            raise ConfigError(
                "model.name: this text tower does not read its feature at an end token, so that random tokens "
                "between a start and an end token are not a text for it; lipsum needs a causal text tower"
            )
        self.count = count
        rows = start.tokenizer(PROBES)
        ends = [text_length(row[None], start.pooled_at) - 1 for row in rows]
        empty: list[int] = rows[0].tolist()
        self._before, self._after = empty[: ends[0]], empty[ends[0] :]
        end = self._after[0]
        for row, last in zip(rows.tolist(), ends, strict=True):
            if row[: len(self._before)] != self._before or row[last] != end or last < len(self._before):
                raise ConfigError(
                    "model.name: the tokenizer of this model does not begin and end all texts with the same "
                    "tokens; lipsum cannot tell where random tokens belong"
                )
        self.length = len(self._before) + count + 1
        if self.length > len(empty):
            raise ConfigError(
                f"objective.random_tokens = {count}: with start and end a text has {self.length} tokens, more "
                f"than the model's context of {len(empty)}"
            )
        # A tower that pools at the largest token would read a random token that is not below the end token.
        last_token = end if start.pooled_at == "argmax" else start.vocabulary
        tokens = np.arange(min(last_token, start.vocabulary))
        self._tokens: NDArray[Any] = tokens[~np.isin(tokens, [*self._before, end])]
        if not len(self._tokens):
            raise ConfigError("model.name: this model has no tokens below its end token; lipsum has none to draw")

    def draw(self, texts: int, seed: int, step: int) -> Text:
        """The texts of a step, a pure function of (seed, step)."""
        numbers = stream(seed, Draw.RANDOM_TEXT, step).integers(0, len(self._tokens), (texts, self.count))
        context = len(self._before) + len(self._after)
        rows = np.empty((texts, context + self.count), dtype=np.int64)
        rows[:, : len(self._before)] = self._before
        rows[:, len(self._before) : self.length - 1] = self._tokens[numbers]
        rows[:, self.length - 1 :] = self._after
        return Text(torch.from_numpy(rows[:, :context].copy()), torch.arange(texts), self.length)


PRESETS = (
    Preset(
        "lipsum",
        "Lipsum-FT",
        "Cross-entropy of a linear head + distillation_weight * half the mean squared change of random texts' "
        "logits (arXiv 2404.00860, as in its code); the text tower is frozen.",
        "lipsum",
        None,
        "#4fb0a5",
        fixed={"probe": False},
        hidden=("probe_epochs", "probe_learning_rate"),
    ),
)
