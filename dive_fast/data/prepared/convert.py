"""Converts a raw image to the JPEG that a prepared set stores."""

import io
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from PIL import Image

from dive_fast.data.decode import (
    UNDECODABLE,
    decode,
    open_image,
    to_8_bits,
    undecodable_reason,
    unsupported_reason,
)
from dive_fast.data.prepared.raw import UnusableError

MAX_JPEG_SIDE = 65_500
"""Maximum side of a JPEG in pixels."""

LEAST_ASPECT_RATIO = 3 / 4
"""Of random crops (:data:`dive_fast.data.transforms.ASPECT_RATIO`)."""


@dataclass(frozen=True)
class Options:
    """Options of a preparation; they identify the prepared set."""

    container: Literal["tar", "beton"] = "tar"
    """File format of the images: webdataset tars or FFCV's beton."""
    max_side: int | None = 512
    """Maximum shorter side in pixels; larger images are resized. None: no image is resized."""
    min_side: int = 8
    """Minimum shorter side in pixels; smaller images are left out."""
    quality: int = 95
    """JPEG quality of re-encoded images."""
    shard_samples: int = 2000
    """Number of raw samples per shard."""
    tokenizer: str | None = None
    """open_clip model whose tokenizer encodes the texts; None: no tokens are stored."""


def side_for(size: int, crop_share: float) -> int:
    """The shorter side of stored images, in pixels, of which no random crop is enlarged; a multiple of 32.

    The crop that is enlarged most is that of a square image with an aspect ratio of 3 : 4.

    Args:
        size: side of a model's images.
        crop_share: smallest share of an image's area that a crop covers.
    """
    return 32 * math.ceil(size / math.sqrt(crop_share * LEAST_ASPECT_RATIO) / 32)


class Converted(NamedTuple):
    """A JPEG that every loader can read."""

    jpeg: bytes
    height: int
    width: int
    reason: str
    """Why the image was re-encoded; empty if it was not."""


def convert(image: bytes | Image.Image, options: Options) -> Converted:
    """Converts an image to a JPEG; a suitable JPEG keeps its bytes.

    Raises:
        UnusableError: the image cannot be decoded, is too small, or is too large for a JPEG.
    """
    data, picture, reason = _decode(image)
    width, height = picture.size
    shorter, longer = sorted((width, height))
    if shorter < options.min_side:
        raise UnusableError(f"a side shorter than {options.min_side} pixels")
    scale = 1.0 if options.max_side is None else min(1.0, options.max_side / shorter)
    if longer * scale > MAX_JPEG_SIDE:
        raise UnusableError(f"a side longer than {MAX_JPEG_SIDE} pixels")
    if scale == 1.0 and not reason:
        return Converted(data, height, width, "")
    if scale < 1.0:
        reason = "larger"
        width, height = round(width * scale), round(height * scale)
    buffer = io.BytesIO()
    try:
        picture = picture.convert("RGB")
        if scale < 1.0:
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        picture.save(buffer, "JPEG", quality=options.quality)
    except UNDECODABLE as error:
        raise UnusableError(f"{picture.mode} pixels cannot be encoded as JPEG") from error
    return Converted(buffer.getvalue(), height, width, reason)


def _decode(image: bytes | Image.Image) -> tuple[bytes, Image.Image, str]:
    """The bytes of an encoded image, the picture as RGB or grey, and why the bytes do not suit every loader."""
    try:
        if isinstance(image, Image.Image):
            return b"", to_8_bits(image), "decoded"
        return image, decode(image), unsupported_reason(open_image(image), image)
    except UNDECODABLE as error:
        raise UnusableError(undecodable_reason(error)) from error
