"""Adversarial images for methods that train on them: PGD at the weights of the step."""

from collections.abc import Callable

import torch
from torch import Tensor

from dive_fast.attacks.pgd import pgd
from dive_fast.attacks.threat import Threat
from dive_fast.config.section import NonNegative, NonNegativeFloat, Section
from dive_fast.kernels.backend import Backend
from dive_fast.methods.method import Group, ImageInfo, Start, over_ranks


class AttackOptions(Section):
    """Options of the attack on training images."""

    attack_eps: NonNegativeFloat = 4.0
    """Largest change of a pixel, in units of 1/255 (L-infinity)."""
    attack_step: NonNegativeFloat = 1.0
    """Change of a pixel in each step of PGD, in units of 1/255."""
    attack_steps: NonNegative = 10
    """Steps of PGD, a forward and a backward each; 0 leaves images clean."""


class ImageAttack:
    """PGD in L-infinity on normalised images, from a random start that depends on seed, step and sample alone."""

    def __init__(self, options: AttackOptions, seed: int) -> None:
        """Takes the options; the preprocessing follows by :meth:`start`."""
        self.options, self.seed = options, seed
        self._mean_and_std: tuple[tuple[float, ...], tuple[float, ...]] | None = None
        self._finite: list[Tensor] = []

    def start(self, start: Start) -> None:
        """Takes the normalisation of images."""
        assert start.towers is not None
        preprocess = start.towers.preprocess
        self._mean_and_std = preprocess.mean, preprocess.std

    def __call__(
        self,
        images: Tensor,
        logits: Callable[[Tensor], Tensor],
        info: ImageInfo,
        step: int,
        backend: Backend = "auto",
    ) -> Tensor:
        """The attacked images, ``(B, 3, H, W)`` fp32, normalised; clean ones where a gradient is not finite.

        Args:
            images: ``(B, 3, H, W)``, normalised.
            logits: normalised images -> logits ``(B, C)``.
            step: number of steps before the present one.
            backend: of the steps of PGD.
        """
        assert self._mean_and_std is not None, "start comes before the first step"
        assert info.labels is not None
        if not self.options.attack_steps or not self.options.attack_eps:
            return images
        mean, std = (
            images.new_tensor(values, dtype=torch.float32)[:, None, None] for values in self._mean_and_std
        )
        pixels = (images.float() * std + mean).clamp(0.0, 1.0)
        threat = Threat("linf", self.options.attack_eps / 255, backend)
        attacked = pgd(
            lambda pixels: logits((pixels - mean) / std),
            pixels,
            info.labels,
            threat,
            steps=self.options.attack_steps,
            step_size=self.options.attack_step / 255,
            start=threat.random_start(pixels, info.samples, self.seed, step),
            keep_best=False,
        )
        self._finite.append(attacked.is_finite)
        is_finite = attacked.is_finite[:, None, None, None]
        return torch.where(is_finite, (attacked.images - mean) / std, images.float())

    def metrics(self, group: Group) -> dict[str, Tensor]:
        """The share of images that were left clean since the last call, over all ranks."""
        if not self._finite:
            return {}
        finite, self._finite = torch.cat(self._finite), []
        return {"attack_failures": over_ranks(1 - finite.float().mean(), group)}


class FrozenHead:
    """A loss whose head stays the zero-shot one: unit embeddings of the class prompts times the logit scale."""

    def tunes(self, parameter: str) -> bool:
        """Whether the parameter is trained: all but the head's."""
        return not parameter.startswith(HEAD)


HEAD = "head."
"""Prefix of the head's parameter names."""
