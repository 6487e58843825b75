"""All that a loader may hand out, whichever loader it is."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """The texts of a batch, each distinct one once."""

    tokens: Tensor
    """``(U, context)`` int64: the distinct token rows, padded to the context length."""
    index: Tensor
    """``(B,)`` int64: the row of ``tokens`` that each pair has."""
    length: int
    """Tokens of the longest row, its end-of-text token included: a causal tower may cut the rest."""

    def to(self, device: torch.device) -> "Text":
        return replace(self, tokens=_copy(self.tokens, device), index=_copy(self.index, device))

    def pin(self) -> "Text":
        return replace(self, tokens=self.tokens.pin_memory(), index=self.index.pin_memory())


@dataclass(frozen=True)
class TargetBatch:
    """Labelled images with the prompts drawn for them; ``B`` is this rank's share of the batch."""

    images: Tensor
    """``(B, 3, H, W)`` fp32 or fp16, normalised as the model wants them."""
    text: Text
    labels: Tensor
    """``(B,)`` int64; -1 where the data has prompts but no classes."""
    sample: Tensor
    """``(B,)`` int64: the index of each sample in its data set."""
    keys: tuple[str, ...]
    """Each sample's name in its data set, for messages."""

    def to(self, device: torch.device) -> "TargetBatch":
        images, labels, sample = (_copy(tensor, device) for tensor in (self.images, self.labels, self.sample))
        return replace(self, images=images, text=self.text.to(device), labels=labels, sample=sample)

    def pin_memory(self) -> "TargetBatch":
        images, labels, sample = (tensor.pin_memory() for tensor in (self.images, self.labels, self.sample))
        return replace(self, images=images, text=self.text.pin(), labels=labels, sample=sample)


@dataclass(frozen=True)
class ReferenceBatch:
    """Image-caption pairs; ``B`` is this rank's share of the batch."""

    images: Tensor
    """``(B, 3, H, W)`` fp32 or fp16, normalised as the model wants them."""
    text: Text
    sample: Tensor
    """``(B,)`` int64 on the CPU: each pair's index in its data set; with ``view`` it addresses the teacher."""
    view: Tensor
    """``(B,)`` int64 on the CPU: which of the pair's fixed views this is."""
    keys: tuple[str, ...]
    """Each pair's name in its data set, for messages."""

    def to(self, device: torch.device) -> "ReferenceBatch":
        return replace(self, images=_copy(self.images, device), text=self.text.to(device))

    def pin_memory(self) -> "ReferenceBatch":
        return replace(self, images=self.images.pin_memory(), text=self.text.pin())


@dataclass(frozen=True)
class EvaluationBatch:
    """Labelled images in the evaluation view."""

    images: Tensor
    """``(B, 3, H, W)``, normalised as the model wants them."""
    labels: Tensor
    """``(B,)`` int64."""

    def to(self, device: torch.device) -> "EvaluationBatch":
        return replace(self, images=_copy(self.images, device), labels=_copy(self.labels, device))

    def pin_memory(self) -> "EvaluationBatch":
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
