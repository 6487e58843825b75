"""One raw image -> the JPEG that a prepared set stores."""

import io
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

LARGEST_SIDE = 65_500
"""Pixels a JPEG may have on a side."""


@dataclass(frozen=True)
class Options:
    """What the prepared set is to be; a set made with other options is another set."""

    container: Literal["tar", "beton"] = "tar"
    max_side: int | None = 512
    """Images whose shorter side is longer are resized so that it is this long; None: none are."""
    min_side: int = 8
    """Images whose shorter side is shorter are left out."""
    quality: int = 95
    """Of the JPEGs that are encoded anew."""
    shard_samples: int = 2000
    """Samples of the raw set that a shard is made from."""
    tokenizer: str | None = None
    """open_clip model whose tokens of the texts are stored."""


class Converted(NamedTuple):
    """An image as every loader can read it."""

    jpeg: bytes
    height: int
    width: int
    reason: str
    """Why it was encoded anew; empty: it was not."""


def convert(image: bytes | Image.Image, options: Options) -> Converted:
    """A JPEG of an image, its own bytes if they will do.

    Raises:
        UnusableError: it cannot be decoded, is too small, or too large for a JPEG.
    """
    data, picture, reason = _decoded(image)
    width, height = picture.size
    shorter, longer = sorted((width, height))
    if shorter < options.min_side:
        raise UnusableError(f"a side shorter than {options.min_side} pixels")
    scale = 1.0 if options.max_side is None else min(1.0, options.max_side / shorter)
    if longer * scale > LARGEST_SIDE:
        raise UnusableError(f"a side longer than {LARGEST_SIDE} pixels")
    if scale == 1.0 and not reason:
        return Converted(data, height, width, "")
    if scale < 1.0:
        reason = "larger"
        width, height = round(width * scale), round(height * scale)
    content = io.BytesIO()
    try:
        picture = picture.convert("RGB")
        if scale < 1.0:
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        picture.save(content, "JPEG", quality=options.quality)
    except UNDECODABLE as error:
        raise UnusableError(f"{picture.mode} pixels become no JPEG") from error
    return Converted(content.getvalue(), height, width, reason)


def _decoded(image: bytes | Image.Image) -> tuple[bytes, Image.Image, str]:
    """The file's bytes, if there is one; the picture as RGB or grey; why not every loader decodes the file."""
    try:
        if isinstance(image, Image.Image):
            return b"", to_8_bits(image), "decoded"
        return image, decode(image), unsupported_reason(open_image(image), image)
    except UNDECODABLE as error:
        raise UnusableError(undecodable_reason(error)) from error
