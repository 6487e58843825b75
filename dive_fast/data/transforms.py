"""Image crops and preprocessing: random crops are a pure function of (seed, sample, view).

Random numbers are counter-based (Philox): the crop of a sample does not depend on other samples, workers or ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose
from torchvision.transforms import functional as TF

from dive_fast.data.random_streams import Draw, stream, uniforms


@dataclass(frozen=True)
class Crop:
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int
    is_flipped: bool = False
    """Whether the resized crop is mirrored from left to right."""


@dataclass(frozen=True)
class View:
    """The part of an image that becomes a model's input, for loaders with their own decoder.

    The loader crops the image to ``crop``, resizes the crop to ``resized``, cuts out the part of ``size`` at
    ``offset``, and mirrors it if the crop is flipped.
    """

    crop: Crop
    resized: tuple[int, int]
    """(height, width) in pixels."""
    offset: tuple[int, int]
    """(top, left) in pixels of the resized crop."""
    size: tuple[int, int]
    """(height, width) of the view."""
    resampling: Image.Resampling
    """PIL's resize filter."""

    @property
    def region(self) -> tuple[float, float, float, float]:
        """(top, left, bottom, right) of the view in pixels of the crop.

        Resizing this region gives the same view, if the filter reads pixels beyond it.
        """
        vertical, horizontal = self.crop.height / self.resized[0], self.crop.width / self.resized[1]
        (top, left), (height, width) = self.offset, self.size
        return top * vertical, left * horizontal, (top + height) * vertical, (left + width) * horizontal


TRAIN_SCALE = (0.9, 1.0)
"""Fractions of an image's area that training crops cover, as in open_clip."""
ASPECT_RATIO = (3 / 4, 4 / 3)
"""Aspect ratios (width / height) of random crops."""
ATTEMPTS = 10
"""Random crops that are drawn before the central crop is used."""


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images."""

    crop_scale: tuple[float, float] = TRAIN_SCALE
    """Range of a crop's fraction of the image's area."""
    horizontal_flip: float = 0.0
    """Probability that an image is mirrored from left to right."""

    def crop(
        self, size: tuple[int, int], seed: int, sample: int, epoch: int, draws: NDArray[np.float64] | None = None
    ) -> Crop:
        """The crop of an image of ``size`` (height, width): a pure function of (seed, sample, epoch)."""
        crop = random_crop(size, seed, sample, epoch, self.crop_scale, draws)
        # A stream of its own, so that the crops do not depend on the probability.
        is_flipped = bool(self.horizontal_flip) and (
            float(stream(seed, Draw.FLIP, sample, epoch).random()) < self.horizontal_flip
        )
        return replace(crop, is_flipped=is_flipped)


def random_crop(
    size: tuple[int, int],
    seed: int,
    sample: int,
    view: int,
    scale: tuple[float, float] = TRAIN_SCALE,
    draws: NDArray[np.float64] | None = None,
) -> Crop:
    """The random crop of one view of one sample, with the distribution of torchvision's ``RandomResizedCrop``.

    Area and (log-uniform) aspect ratio are drawn until the crop fits, at most :data:`ATTEMPTS` times; then the
    result is the largest central crop within the aspect range.

    Args:
        size: (height, width) of the image in pixels.
        scale: range of the crop's fraction of the image's area; open_clip trains with 0.9 to 1.
        draws: the crop's row of :func:`crop_draws`; None: drawn here.
    """
    height, width = size
    if draws is None:
        draws = stream(seed, Draw.CROP, sample, view).random((ATTEMPTS, 4))
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


def crop_draws(seed: int, samples: Sequence[int], views: Sequence[int]) -> NDArray[np.float64]:
    """The random numbers of many crops, ``(N, ATTEMPTS, 4)``."""
    return uniforms(seed, Draw.CROP, samples, views, ATTEMPTS * 4).reshape(-1, ATTEMPTS, 4)


@dataclass(frozen=True)
class Preprocess:
    """A model's image preprocessing: open_clip's preprocess config. Its repr is part of stored identities."""

    size: tuple[int, int]
    """(height, width) in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize_mode: str
    fill_color: int = 0
    """Pixel value of the borders that resize mode `longest` adds."""

    @classmethod
    def of(cls, visual: object) -> "Preprocess":
        """The preprocessing of an open_clip image tower (``model.visual``)."""
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

    @property
    def resampling(self) -> Image.Resampling:
        """PIL's resize filter, which always has antialiasing."""
        return Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC

    def transform(self, image: Image.Image, crop: Crop | None) -> Image.Image:
        """Crops and resizes an image to the model's size, as RGB, in open_clip's order of operations.

        Args:
            crop: the part to resize; None takes the evaluation view.
        """
        if crop is None:
            return self._evaluation(image)
        image = image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
        resized = image.resize(self.size[::-1], self.resampling).convert("RGB")
        return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.is_flipped else resized

    def to_tensor(self, image: Image.Image) -> Tensor:
        """The normalised tensor, ``(3, H, W)`` fp32, of an image that :meth:`transform` returned."""
        normalised: Tensor = TF.normalize(TF.to_tensor(image), self.mean, self.std)
        return normalised

    @cached_property
    def _evaluation(self) -> Compose:
        """open_clip's evaluation transform without its last two operations, to tensor and normalise."""
        config = PreprocessCfg(
            size=self.size,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            resize_mode=self.resize_mode,
            fill_color=self.fill_color,
        )
        return Compose(image_transform_v2(config, is_train=False).transforms[:-2])

    def train_view(self, crop: Crop) -> View:
        """The view of :meth:`transform` with this crop."""
        return View(crop, self.size, (0, 0), self.size, self.resampling)

    def eval_view(self, size: tuple[int, int]) -> View:
        """The view of :meth:`transform` without a crop, for an image of ``size`` (height, width).

        Raises:
            ValueError: resize mode `longest` adds borders, which a view cannot describe.
        """
        height, width = size
        full = Crop(0, 0, height, width)
        if self.resize_mode == "squash":
            return self.train_view(full)
        if self.resize_mode != "shortest":
            raise ValueError(f"resize_mode {self.resize_mode} has no view")
        resized = self._shortest(size)
        top, left = (round((long - short) / 2) for long, short in zip(resized, self.size, strict=True))
        # open_clip's ResizeKeepRatio, for views that are not square, does not get the interpolation of the config.
        resampling = self.resampling if self.size[0] == self.size[1] else Image.Resampling.BICUBIC
        return View(full, resized, (top, left), self.size, resampling)

    def _shortest(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size to which open_clip resizes an image before it crops the centre."""
        height, width = size
        target_height, target_width = self.size
        if target_height == target_width:  # torchvision's Resize rounds the longer side down
            if width <= height:
                return int(target_height * height / width), target_width
            return target_height, int(target_width * width / height)
        ratio = min(height / target_height, width / target_width)  # ResizeKeepRatio rounds to nearest
        return round(height / ratio), round(width / ratio)
