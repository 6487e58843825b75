"""The batches that every loader returns.

Inside of a loader their images are pixels, ``(B, H, W, 3)`` uint8.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """The distinct texts of a batch, and the text of each pair by index."""

    tokens: Tensor
    """``(U, context)`` int64: the distinct token rows, padded to the context length."""
    index: Tensor
    """``(B,)`` int64: the row of ``tokens`` of each pair."""
    length: int
    """Tokens up to the end-of-text token of the longest row, inclusive; a causal tower can drop the rest."""

    def to(self, device: torch.device) -> "Text":
        """The same texts on another device."""
        return replace(self, tokens=_copy(self.tokens, device), index=_copy(self.index, device))

    def pin(self) -> "Text":
        """The same texts in page-locked memory."""
        return replace(self, tokens=self.tokens.pin_memory(), index=self.index.pin_memory())


@dataclass(frozen=True)
class TargetBatch:
    """Labelled images with the prompts drawn for them; ``B`` is this rank's share of the batch."""

    images: Tensor
    """``(B, 3, H, W)`` fp32 or fp16, normalised for the model."""
    text: Text
    labels: Tensor
    """``(B,)`` int64; -1 where the data has prompts but no classes."""
    sample: Tensor
    """``(B,)`` int64: indices of the samples in their data set."""
    keys: tuple[str, ...]
    """Names of the samples in their data set, for messages."""
    second_text: Text | None = None
    """The second prompts, for methods that need them."""

    def to(self, device: torch.device) -> "TargetBatch":
        """The batch on another device."""
        images, labels, sample = (_copy(tensor, device) for tensor in (self.images, self.labels, self.sample))
        second = None if self.second_text is None else self.second_text.to(device)
        return replace(
            self, images=images, text=self.text.to(device), labels=labels, sample=sample, second_text=second
        )

    def pin_memory(self) -> "TargetBatch":
        """The batch in page-locked memory."""
        images, labels, sample = (tensor.pin_memory() for tensor in (self.images, self.labels, self.sample))
        second = None if self.second_text is None else self.second_text.pin()
        return replace(self, images=images, text=self.text.pin(), labels=labels, sample=sample, second_text=second)


@dataclass(frozen=True)
class ReferenceBatch:
    """Image-caption pairs; ``B`` is this rank's share of the batch."""

    images: Tensor
    """``(B, 3, H, W)`` fp32 or fp16, normalised for the model."""
    text: Text
    sample: Tensor
    """``(B,)`` int64 on the CPU: indices of the pairs in their data set. With ``view``, they index the teacher."""
    view: Tensor
    """``(B,)`` int64 on the CPU: the number of the view among the fixed views of its pair."""
    keys: tuple[str, ...]
    """Names of the pairs in their data set, for messages."""
    caption: Tensor | None = None
    """``(B,)`` int64 on the CPU: the number of the caption among those of its image; None: each image has one."""

    def to(self, device: torch.device) -> "ReferenceBatch":
        """The batch on another device; ``sample``, ``view`` and ``caption`` stay on the CPU."""
        return replace(self, images=_copy(self.images, device), text=self.text.to(device))

    def pin_memory(self) -> "ReferenceBatch":
        """The batch in page-locked memory."""
        return replace(self, images=self.images.pin_memory(), text=self.text.pin())


@dataclass(frozen=True)
class EvaluationBatch:
    """Labelled images in the evaluation view."""

    images: Tensor
    """``(B, 3, H, W)``, normalised for the model."""
    labels: Tensor
    """``(B,)`` int64."""

    def to(self, device: torch.device) -> "EvaluationBatch":
        """The batch on another device."""
        return replace(self, images=_copy(self.images, device), labels=_copy(self.labels, device))

    def pin_memory(self) -> "EvaluationBatch":
        """The batch in page-locked memory."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
