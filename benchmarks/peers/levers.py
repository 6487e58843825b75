"""DiVE as published with the engine's optimizations (levers) as flags, to measure each of them alone."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dive_fast import kernels
from dive_fast.data.batch import Text
from dive_fast.data.prompts import pack
from dive_fast.model import fast_blocks
from dive_fast.model.towers import Towers, unit
from dive_fast.model.transformer_blocks import compile_blocks
from peers.dive_published import difference_losses
from peers.flyp import Flyp, Inputs, contrastive_loss

Rows = tuple[Tensor, Tensor]
"""Rows ``(B', D)`` of images and of texts."""


class Prepared(NamedTuple):
    """Batches of a step with texts from :meth:`Levers.text`."""

    target_images: Tensor
    target_text: Text
    reference_images: Tensor
    reference_text: Text
    teacher: Rows | None = None
    """Unit rows of the reference batch by the frozen model, for ``cached_teacher``."""


class Levers(NamedTuple):
    """Differences of the engine from the published step; none changes the gradients."""

    half_precision: bool = False
    """fp16 autocast of the tuned towers, with loss scaling. The teacher stays in fp32, as in the engine."""
    sequential: bool = False
    """Backward of the target half before the forward of the reference half."""
    cached_teacher: bool = False
    """The frozen embeddings are inputs."""
    trimmed_text: bool = False
    """Texts are cut to the longest of the batch."""
    distinct_texts: bool = False
    """Each distinct text of the batch is encoded once."""
    fused_losses: bool = False
    """The losses by the Triton kernels."""
    fast_blocks: bool = False
    """The tuned towers' blocks with fused kernels, the last one for the pooled token alone."""
    compiled_blocks: bool = False
    """The tuned towers' blocks by torch.compile."""

    def prepare(self, inputs: Inputs, teacher: Rows | None = None) -> Prepared:
        """Prepares a step's batches; in training, a loader does this in advance.

        Args:
            teacher: unit rows of the reference batch by the frozen model; used with ``cached_teacher``.
        """
        target, reference = (self.text(tokens) for tokens in (inputs.target_tokens, inputs.reference_tokens))
        rows = teacher if self.cached_teacher else None
        return Prepared(inputs.target_images, target, inputs.reference_images, reference, rows)

    def text(self, tokens: Tensor) -> Text:
        """Packs token rows ``(B, context)``."""
        text = pack(tokens, "argmax")
        length = text.length if self.trimmed_text else tokens.shape[1]
        if self.distinct_texts:
            return Text(text.tokens, text.index, length)
        return Text(tokens, torch.arange(len(tokens), device=tokens.device), length)


class DiveWithLevers(Flyp):
    """The published step with levers; with all of them it computes what the engine does."""

    def __init__(
        self,
        model: Towers,
        teacher: Towers | None,
        levers: Levers,
        *,
        weight: float = 1000.0,
        decay: float = 0.99,
        **recipe: Any,
    ) -> None:
        """Takes over towers on their device.

        Args:
            teacher: a copy of the towers; None with ``cached_teacher``, for which batches have rows.
            recipe: keyword arguments of :class:`Flyp`.
        """
        super().__init__(model, **recipe)
        model.autocast = torch.float16 if levers.half_precision else None
        if levers.fast_blocks:
            fast_blocks.install(model)
        if levers.compiled_blocks:
            compile_blocks(model)
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.levers, self.weight, self.decay = levers, weight, decay
        self.average_vector = model.logit_scale.detach().new_zeros(model.visual.output_dim)
        self.scaler = torch.amp.GradScaler(model.logit_scale.device.type, enabled=levers.half_precision)

    def step(self, inputs: Prepared) -> dict[str, Tensor]:  # type: ignore[override]
        """One update."""
        self.optimizer.zero_grad()
        frozen = self.frozen_rows(inputs)
        target = partial(self.target_loss, inputs.target_images, inputs.target_text)
        reference = partial(self.reference_loss, inputs.reference_images, inputs.reference_text, frozen)
        halves = [target, reference] if self.levers.sequential else [lambda: target() + reference()]
        total = torch.zeros_like(self.average_vector[0])
        for half in halves:
            loss = half()
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.finish()
        return {"loss": total}

    @torch.no_grad()
    def frozen_rows(self, inputs: Prepared) -> Rows:
        """Unit rows of the reference batch by the frozen model."""
        if inputs.teacher is not None:
            return inputs.teacher
        assert self.teacher is not None
        image, text = self.teacher.encode_pairs(inputs.reference_images, inputs.reference_text)
        return unit(image), unit(text)

    def target_loss(self, images: Tensor, text: Text) -> Tensor:
        """The contrastive loss."""
        features, scale = self.model.encode_pairs(images, text), self.model.logit_scale.exp()
        if self.levers.fused_losses:
            return kernels.contrastive_loss(*features, scale, backend="triton")
        return contrastive_loss(*map(unit, features), scale)

    def reference_loss(self, images: Tensor, text: Text, frozen: Rows) -> Tensor:
        """The weighted difference losses; updates the average vector."""
        features = self.model.encode_pairs(images, text)
        if self.levers.fused_losses:
            fused = kernels.difference_loss(
                *features, *frozen, self.average_vector, decay=self.decay, backend="triton"
            )
            self.average_vector = fused.average_vector
            return self.weight * fused.loss
        tuned = map(unit, features)
        average, pairwise, average_vector = difference_losses(*tuned, *frozen, self.average_vector, self.decay)
        self.average_vector = average_vector.detach()
        return self.weight * (average + pairwise)
