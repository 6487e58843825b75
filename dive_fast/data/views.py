"""Which crop of which image: a pure function of (seed, sample, view).

Random numbers are counter-based (Philox): what a sample gets depends on no other sample, worker or rank.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF


class Draw(IntEnum):
    """What random numbers are drawn for; each purpose has a stream of its own."""

    CROP = 0
    PROMPT = 1
    ORDER = 2


def stream(seed: int, purpose: Draw, first: int, second: int = 0) -> np.random.Generator:
    """The random numbers of one purpose at one point, e.g. the crop of sample ``first`` in view ``second``."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, first, second]))


@dataclass(frozen=True)
class Crop:
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


TRAIN_SCALE = (0.9, 1.0)
ASPECT_RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10


def random_crop(
    size: tuple[int, int], seed: int, sample: int, view: int, scale: tuple[float, float] = TRAIN_SCALE
) -> Crop:
    """The random resized crop of one view of one sample, distributed as torchvision's ``RandomResizedCrop``.

    Area and (log-uniform) aspect ratio are drawn until the crop fits, at most ten times; after that the largest
    central crop within the aspect range is taken.

    Args:
        size: (height, width) of the image in pixels.
        scale: range of the crop's share of the area; open_clip trains with 0.9 to 1.
    """
    height, width = size
    draws: NDArray[np.float64] = stream(seed, Draw.CROP, sample, view).random((ATTEMPTS, 4))
    low, high = (math.log(ratio) for ratio in ASPECT_RATIO)
    for area_draw, ratio_draw, top_draw, left_draw in draws.tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        ratio = math.exp(low + (high - low) * ratio_draw)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(top_draw * (height - crop_height + 1))
            left = int(left_draw * (width - crop_width + 1))
            return Crop(top, left, crop_height, crop_width)
    if width / height < ASPECT_RATIO[0]:
        crop_height, crop_width = min(height, round(width / ASPECT_RATIO[0])), width
    elif width / height > ASPECT_RATIO[1]:
        crop_height, crop_width = height, min(width, round(height * ASPECT_RATIO[1]))
    else:
        crop_height, crop_width = height, width
    return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


@dataclass(frozen=True)
class Preprocess:
    """What a model wants of its images: open_clip's preprocess config."""

    size: tuple[int, int]
    """(height, width) in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize_mode: str
    fill_color: int = 0
    """Of the borders that resize mode `longest` adds."""

    @classmethod
    def of(cls, visual: object) -> "Preprocess":
        """Reads it off an open_clip image tower (``model.visual``)."""
        config = PreprocessCfg(**visual.preprocess_cfg)  # type: ignore[attr-defined]
        height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
        return cls(
            (height, width),
            tuple(config.mean),
            tuple(config.std),
            config.interpolation,
            config.resize_mode,
            config.fill_color,
        )

    def train(self, image: Image.Image, crop: Crop) -> Tensor:
        """``(3, H, W)`` fp32: the crop, resized, as RGB, normalised, in open_clip's order of operations."""
        image = image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
        resample = Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC
        image = image.resize(self.size[::-1], resample).convert("RGB")
        normalised: Tensor = TF.normalize(TF.to_tensor(image), self.mean, self.std)
        return normalised

    def eval(self, image: Image.Image) -> Tensor:
        """``(3, H, W)`` fp32: open_clip's own evaluation transform."""
        config = PreprocessCfg(
            size=self.size,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            resize_mode=self.resize_mode,
            fill_color=self.fill_color,
        )
        transformed: Tensor = image_transform_v2(config, is_train=False)(image)
        return transformed
