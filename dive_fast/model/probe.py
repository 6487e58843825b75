"""A batch on which an exported model is compared with the original, before it gets its name."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dive_fast.data.text_tokenizer import Tokenizer
from dive_fast.model.towers import Towers, unit

TOLERANCE = 1e-5
"""Largest difference of unit features, and of logits relative to their scale."""
_TEXTS = ["a photo of a cat.", "two dogs", "a", "a blurry picture of the red car in front of a house"]


@dataclass(frozen=True)
class Probe:
    """Inputs, and the outputs of the original model in fp32."""

    images: Tensor
    """``(N, 3, H, W)``, normalised."""
    tokens: Tensor
    """``(N, context)``."""
    image_features: Tensor
    """Unit rows, ``(N, D)``."""
    text_features: Tensor
    """Unit rows, ``(N, D)``."""
    logits: Tensor
    """``(N, N)``, images by texts, with scale and bias."""
    scale: float
    """The logit scale."""


@torch.no_grad()
def measure(towers: Towers, tokenizer: Tokenizer) -> Probe:
    """Embeds the probe with towers in evaluation mode, without a bound of the logit scale."""
    shape = (len(_TEXTS), 3, *towers.preprocess.size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tokens = tokenizer(_TEXTS)
    image, text = unit(towers.encode_image(images)), unit(towers.encode_text(tokens))
    scale = float(towers.logit_scale.exp())
    bias = 0.0 if towers.logit_bias is None else float(towers.logit_bias)
    return Probe(images, tokens, image, text, scale * image @ text.T + bias, scale)


def difference(probe: Probe, image: Tensor, text: Tensor, logits: Tensor) -> float:
    """The largest difference of unit features, and of logits relative to the larger of their scale and 1."""
    of_logits = (logits - probe.logits).abs().max() / max(1.0, probe.scale)
    of_features = [(image - probe.image_features).abs().max(), (text - probe.text_features).abs().max()]
    return float(torch.stack([*of_features, of_logits]).max())


def picture(size: tuple[int, int]) -> Image.Image:
    """A smooth picture, three times as wide as high, larger than a model's images of this (height, width)."""
    coarse = np.random.default_rng(0).integers(0, 256, (3, 9, 3), dtype=np.uint8)
    height = max(size) + 20
    return Image.fromarray(coarse).resize((3 * height, height), Image.Resampling.BICUBIC)
