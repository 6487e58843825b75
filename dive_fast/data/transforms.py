"""Which crop of which image: a pure function of (seed, sample, view).

Random numbers are counter-based (Philox): what a sample gets depends on no other sample, worker or rank.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose
from torchvision.transforms import functional as TF

from dive_fast.data.random_streams import Draw, stream


@dataclass(frozen=True)
class Crop:
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class View:
    """What of an image becomes a model's input, for loaders that decode by themselves.

    First ``crop`` is cut out, then ``region`` of it is resized to the model's size.
    """

    crop: Crop
    region: tuple[float, float, float, float]
    """(top, left, bottom, right) in pixels of the crop. The filter sees the pixels beyond it, as it does where
    an image is resized whole and then cropped."""


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

    @property
    def resampling(self) -> Image.Resampling:
        """The filter; always with antialiasing."""
        return Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC

    def transform(self, image: Image.Image, crop: Crop | None) -> Image.Image:
        """The RGB image in the model's size that is left of an image, in open_clip's order of operations.

        Args:
            crop: resized to the model's size; None takes the evaluation view.
        """
        if crop is None:
            return self._evaluation(image)
        image = image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
        return image.resize(self.size[::-1], self.resampling).convert("RGB")

    def to_tensor(self, image: Image.Image) -> Tensor:
        """``(3, H, W)`` fp32: what :meth:`cut` left, normalised."""
        normalised: Tensor = TF.normalize(TF.to_tensor(image), self.mean, self.std)
        return normalised

    @cached_property
    def _evaluation(self) -> Compose:
        """open_clip's own evaluation transform, without the last two operations: to tensor, normalise."""
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
        """The view that :meth:`cut` takes with a crop."""
        return View(crop, (0.0, 0.0, float(crop.height), float(crop.width)))

    def eval_view(self, size: tuple[int, int]) -> View:
        """The view that :meth:`cut` takes without one, of an image of ``size`` (height, width).

        Resizing the whole image and cropping its centre is resizing the part of it that ends up in the centre.

        Raises:
            ValueError: resize mode `longest` adds borders, which no view describes.
        """
        height, width = size
        whole = Crop(0, 0, height, width)
        if self.resize_mode == "squash":
            return self.train_view(whole)
        if self.resize_mode != "shortest":
            raise ValueError(f"resize_mode {self.resize_mode} has no view")
        resized = self._shortest(size)
        top, left = (round((long - short) / 2) for long, short in zip(resized, self.size, strict=True))
        vertical, horizontal = height / resized[0], width / resized[1]
        bottom, right = top + self.size[0], left + self.size[1]
        return View(whole, (top * vertical, left * horizontal, bottom * vertical, right * horizontal))

    def _shortest(self, size: tuple[int, int]) -> tuple[int, int]:
        """What open_clip resizes an image to before it crops the centre."""
        height, width = size
        wanted_height, wanted_width = self.size
        if wanted_height == wanted_width:  # torchvision's Resize: the longer side is cut to whole pixels
            if width <= height:
                return int(wanted_height * height / width), wanted_width
            return wanted_height, int(wanted_width * width / height)
        ratio = min(height / wanted_height, width / wanted_width)  # ResizeKeepRatio: rounded
        return round(height / ratio), round(width / ratio)


def normalise(pixels: Tensor, preprocess: Preprocess, dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    """``(B, H, W, 3)`` uint8 -> ``(B, 3, H, W)`` normalised, on the device that they are on.

    In fp32 operation by operation as torchvision does; then rounded to ``dtype``.
    """
    shape = (3, 1, 1)
    mean, std = (
        torch.tensor(values, device=pixels.device).view(shape) for values in (preprocess.mean, preprocess.std)
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
    return images.div_(255).sub_(mean).div_(std).to(dtype)
