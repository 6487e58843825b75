"""FLYP's recipe as published: contrastive fine-tuning in fp32, eager, with all 77 tokens.

A fair competitor: it follows the recipe and does nothing else that costs time.

- Precision is PyTorch's default, which FLYP does not change: TF32 off in matrix products, on in the one
  convolution.
- Texts are neither trimmed nor de-duplicated; both matrices of logits are materialized; autograd differentiates
  ``F.normalize``.
- AdamW is torch's default (`foreach` on a GPU); every parameter decays; neither gradients nor the logit scale are
  clipped.
- Gradients are freed before a step, not zeroed. A step never waits for the device: losses are returned as tensors.
- There is no ``DataParallel``, which only calls the model on one device.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset


class Inputs(NamedTuple):
    """Batches on the device: images ``(B, 3, H, W)``, tokens ``(B, 77)`` int64. FLYP uses only the target's."""

    target_images: Tensor
    target_tokens: Tensor
    reference_images: Tensor
    reference_tokens: Tensor


class Flyp:
    """Model, optimizer and schedule of a run on one device."""

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.1,
        warmup_steps: int = 500,
    ) -> None:
        """Takes over an open_clip model on its device; defaults are Table 11's for ImageNet."""
        self.model: Any = model.train()
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay
        )
        schedule = cosine_with_warmup(warmup_steps, total_steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)

    def step(self, inputs: Inputs) -> dict[str, Tensor]:
        """One update; returns the losses, ``()`` each on the device."""
        self.optimizer.zero_grad()
        losses = self.losses(inputs)
        losses["loss"].backward()
        self.optimizer.step()
        self.finish()
        return {name: value.detach() for name, value in losses.items()}

    def losses(self, inputs: Inputs) -> dict[str, Tensor]:
        """``loss`` with its graph, and its parts."""
        return {"loss": contrastive_loss(*self.model(inputs.target_images, inputs.target_tokens))}

    def finish(self) -> None:
        """Advances the schedule after an update."""
        self.schedule.step()


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Eq. 1 on unit rows ``(B, D)``; samples of one class count as negatives of each other."""
    logits_per_image = logit_scale * image @ text.T
    logits_per_text = logit_scale * text @ image.T
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


def cosine_with_warmup(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Factor on the peak learning rate: linear warm-up, then a cosine to 0."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


class FlypDataset(Dataset[Any]):
    """Image files with torchvision's transforms and captions tokenized one by one, as FLYP reads its CSV."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        self.transform = open_clip.image_transform(224, is_train=True, mean=mean, std=std)
        self.tokenizer = open_clip.get_tokenizer("ViT-B-16")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(Image.open(self.files[index])), self.tokenizer([f"a photo of thing {index}."])[0]
