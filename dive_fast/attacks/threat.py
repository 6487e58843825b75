"""The threat model: how far an attack may change an image, and the steps that stay within it."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dive_fast.kernels import pgd_start, pgd_step
from dive_fast.kernels.backend import Backend
from dive_fast.kernels.naive_attacks import uniform

Norm = Literal["linf", "l2"]
Model = Callable[[Tensor], Tensor]
"""Images ``(B, 3, H, W)`` in [0, 1] -> logits ``(B, C)``; the normalisation of images is part of the model."""
SMALLEST = 1e-12
"""Smallest length that a gradient or a change is divided by."""


class Threat(NamedTuple):
    """All images in [0, 1] whose distance to the clean image is at most ``eps``."""

    norm: Norm
    """Distance: ``linf`` the largest change of a value, ``l2`` the Euclidean length of the change."""
    eps: float
    """On the scale of images in [0, 1]: 4 / 255 for the usual L-infinity attack."""
    backend: Backend = "auto"
    """Of steps and random starts in L-infinity; the bits are the same."""

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """The images, ``(B, 3, H, W)``, moved back into the allowed distance and into [0, 1]."""
        change = images - clean
        if self.norm == "linf":
            change = change.clamp(-self.eps, self.eps)
        else:
            change = change * (self.eps / _lengths(change).clamp(min=SMALLEST)).clamp(max=1.0)
        return (clean + change).clamp(0.0, 1.0)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The direction of length 1 in which the loss rises fastest."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / _lengths(gradient).clamp(min=SMALLEST)

    def step(self, images: Tensor, clean: Tensor, gradient: Tensor, size: float | Tensor) -> Tensor:
        """The images after a step in the steepest direction, moved back.

        Args:
            size: length of the step: a number, or ``(B,)`` fp32, one for each image.
        """
        if self.norm == "linf":
            return pgd_step(images, clean, gradient, size, self.eps, self.backend)
        if isinstance(size, Tensor):
            size = size[:, None, None, None]
        return self.project(images + size * self.steepest(gradient), clean)

    def random_start(self, clean: Tensor, samples: Tensor, seed: int, step: int = 0) -> Tensor:
        """:meth:`start` with noise by sample, ``(B,)``: :func:`dive_fast.kernels.naive_attacks.uniform`."""
        if self.norm == "linf":
            return pgd_start(clean, samples, self.eps, seed, step, self.backend)
        return self.start(clean, uniform(samples, clean.shape[1:], seed, step))

    def start(self, clean: Tensor, noise: Tensor | None) -> Tensor:
        """A random image of the threat model: uniform in the L-infinity ball, on the sphere in L2.

        Args:
            noise: numbers in (-1, 1), the images' shape; None starts at the clean images.
        """
        if noise is None:
            return clean.clone()
        return self.project(clean + self.eps * (noise if self.norm == "linf" else self.steepest(noise)), clean)


class Gradient(NamedTuple):
    """The cross-entropy of each sample, and its gradient by the image."""

    loss: Tensor
    """``(B,)`` fp32."""
    images: Tensor
    """``(B, 3, H, W)`` fp32; 0 where it is not finite."""
    is_right: Tensor
    """``(B,)`` bool: the largest logit is the label's."""
    is_finite: Tensor
    """``(B,)`` bool: loss and gradient are finite."""


def gradient(model: Model, images: Tensor, labels: Tensor, rows: Tensor | None = None) -> Gradient:
    """The cross-entropy at the images and its gradient by them.

    Losses are summed, not averaged, so that a sample's gradient does not depend on its batch and does not
    underflow in half precision. Parameters get no ``grad``, and hooks on their gradients stay silent.

    Args:
        images: ``(B, 3, H, W)`` fp32 in [0, 1].
        labels: ``(B,)`` int64.
        rows: ``(N,)`` int64, the samples that the model computes; others have the loss -inf and the gradient 0.
            None: all.
    """
    if rows is not None:
        part = gradient(model, images[rows], labels[rows])
        filled = (
            part.loss.new_full((len(images),), -torch.inf),
            torch.zeros_like(images),
            torch.zeros_like(labels, dtype=torch.bool),
            torch.ones_like(labels, dtype=torch.bool),
        )
        return Gradient(
            *(tensor.index_copy_(0, rows, values) for tensor, values in zip(filled, part, strict=True))
        )
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        logits = model(images).float()
        loss = F.cross_entropy(logits, labels, reduction="none")
        (by_images,) = torch.autograd.grad(loss.sum(), images)
    loss, logits = loss.detach(), logits.detach()
    is_finite = loss.isfinite() & by_images.isfinite().flatten(1).all(1)
    by_images = torch.where(is_finite[:, None, None, None], by_images, 0.0)
    return Gradient(loss, by_images, logits.argmax(1) == labels, is_finite)


class Attacked(NamedTuple):
    """The result of an attack."""

    images: Tensor
    """``(B, 3, H, W)``: the images with the highest loss that were tried, wrongly classified ones first. The clean
    image where a loss or gradient was not finite."""
    loss: Tensor
    """``(B,)``: the cross-entropy of ``images``."""
    is_robust: Tensor
    """``(B,)`` bool: every image that was tried is classified rightly."""
    is_finite: Tensor
    """``(B,)`` bool: all losses and gradients were finite; such a sample that was not counts as not robust."""


class Best:
    """The best images so far of an attack: the highest loss, wrongly classified ones first."""

    def __init__(self, clean: Tensor) -> None:
        """Starts with the clean images; nothing is known of them."""
        count = len(clean)
        self._clean = self.images = clean
        self.loss = clean.new_full((count,), -torch.inf)
        self.is_robust = torch.ones(count, dtype=torch.bool, device=clean.device)
        self.is_finite = torch.ones_like(self.is_robust)
        self._is_attacked = torch.ones_like(self.is_robust)

    def stop_at_success(self) -> Tensor:
        """Ends the attack on samples that are not robust; returns the others, ``(N,)`` int64."""
        self._is_attacked = self.is_robust
        return self._is_attacked.nonzero().flatten()

    def update(self, images: Tensor, tried: Gradient) -> None:
        """Takes over images that are better than those before; :meth:`judge` is part of it."""
        is_wrong = ~tried.is_right
        is_higher = torch.where(is_wrong == ~self.is_robust, tried.loss > self.loss, is_wrong & self.is_robust)
        is_better = self._is_attacked & tried.is_finite & is_higher
        self.images = torch.where(is_better[:, None, None, None], images, self.images)
        self.loss = torch.where(is_better, tried.loss, self.loss)
        self.judge(tried)

    def judge(self, tried: Gradient) -> None:
        """Notes which samples are still robust and finite, without images and losses."""
        self.is_finite = self.is_finite & (tried.is_finite | ~self._is_attacked)
        self.is_robust = self.is_robust & tried.is_right & tried.is_finite

    def result(self) -> Attacked:
        """The result of the attack."""
        images = torch.where(self.is_finite[:, None, None, None], self.images, self._clean)
        return Attacked(images, self.loss, self.is_robust, self.is_finite)


def _lengths(change: Tensor) -> Tensor:
    return change.flatten(1).norm(dim=1)[:, None, None, None]
