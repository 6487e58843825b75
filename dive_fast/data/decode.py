"""Decodes image files to 8-bit RGB or grey, in the same way for raw data, preparation and every loader."""

import io
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset(
    # torchvision's IMG_EXTENSIONS, which a test compares, and GIF.
    {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
)
"""Suffixes of files that are read as images."""
# fmt: off
OTHER_IMAGE_SUFFIXES = frozenset({
    ".apng", ".arw", ".avif", ".avifs", ".bpg", ".cr2", ".cr3", ".dib", ".dng", ".emf", ".eps", ".exr", ".fit",
    ".fits", ".hdr", ".heic", ".heif", ".hif", ".icns", ".ico", ".j2k", ".jfif", ".jif", ".jp2", ".jpe",
    ".jpf", ".jpx", ".jxl", ".nef", ".orf", ".pbm", ".pcx", ".pef", ".pfm", ".pict", ".pnm", ".psd", ".raf",
    ".raw", ".rw2", ".sgi", ".svg", ".svgz", ".tga", ".wmf", ".xbm", ".xpm",
})
# fmt: on
"""Suffixes of image formats that are not read; a file with one counts as a skipped sample."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "MPO", "AVIF", "TIFF", "JPEG2000", "PPM", "DIB", "ICO", "TGA")
"""PIL formats that are decoded, whatever the suffix. Others are refused: PIL runs Ghostscript for PostScript."""
UNDECODABLE = (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Exceptions that PIL raises for invalid image data."""


class UnknownWhiteError(ValueError):
    """32-bit pixels lie in a range whose white level is unknown."""


_SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  "),
    *(b"\xff\x0a", b"\0\0\0\x0cJXL "),
)


def looks_like_image(beginning: bytes) -> bool:
    """Whether the first bytes of a file (12 suffice) are those of an image, whatever its name."""
    if beginning[:2] == b"BM" and beginning[6:10] != bytes(4):  # text can begin with BM
        return False
    is_riff = beginning[:4] == b"RIFF" and beginning[8:12] == b"WEBP"
    is_heif = beginning[4:8] == b"ftyp" and beginning[8:12] in (b"heic", b"heix", b"mif1", b"avif", b"avis")
    return is_riff or is_heif or beginning.startswith(_SIGNATURES)


def decode(data: bytes) -> Image.Image:
    """Decodes the first picture of an image file to 8-bit RGB or grey (modes ``RGB`` and ``L``).

    Raises:
        UNDECODABLE: the bytes are not a complete image, or the white level of its pixels is unknown.
    """
    image = open_image(data)
    image.load()
    return to_8_bits(image)


def decode_error_message(error: Exception) -> str:
    """A user-facing description of an exception that :func:`decode` raised."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or in an unsupported format"
    return str(error) or type(error).__name__


def open_image(data: bytes) -> Image.Image:
    """Opens an image file with PIL without decoding it."""
    return Image.open(io.BytesIO(data), formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Converts a picture of any mode to ``RGB`` or ``L``; call it before resizing.

    16-bit values keep their upper 8 bits, as PIL reads 48-bit colour; PIL's own conversion would clip them at 255,
    which is white. Palettes become colours, since PIL resizes palette indices by nearest neighbour. Alpha is
    dropped.

    Raises:
        UnknownWhiteError: 32-bit pixels exceed the range 0 to 255, or floating point pixels do not exceed 1: the
            file does not define white.
    """
    if image.mode in ("RGB", "L"):
        return image
    # PIL opens 16-bit grey as I;16, but that of PGM as I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return _with_format(Image.fromarray(grey), image)
    if image.mode in ("I", "F"):
        pixels = np.asarray(image)
        low, high = float(pixels.min()), float(pixels.max())
        in_range = low >= 0 and high <= 255  # false for NaN
        if not in_range or (image.mode == "F" and 0 < high <= 1):
            raise UnknownWhiteError(
                f"32-bit pixels from {low:g} to {high:g} have an unknown white level; save it with 8 or 16 bits"
            )
    if image.mode in ("La", "RGBa"):  # PIL converts each of these to a single other mode
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours, without PIL's warning
    return _with_format(image.convert("RGB"), image)


def _with_format(converted: Image.Image, image: Image.Image) -> Image.Image:
    converted.format = image.format
    return converted


def unsupported_reason(image: Image.Image, data: bytes) -> str:
    """Why some loader would decode a file differently from PIL; empty if none would.

    Args:
        image: the file as PIL opened it, not yet converted.
        data: its bytes.
    """
    if image.format != "JPEG":
        return str(image.format)
    if image.mode not in ("RGB", "L"):
        return f"{image.mode} JPEG"
    if image.mode == "RGB" and image.info.get("adobe_transform") == 0:
        return "RGB JPEG without YCbCr"
    # Some cameras append a few bytes after the end marker.
    return "" if b"\xff\xd9" in data[-64:] else "JPEG without end"


def undecodable_reason(error: Exception) -> str:
    """A short reason, shared by many samples, for an exception that :func:`decode` raised."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, FileNotFoundError | PermissionError):
        return "cannot be read"
    if isinstance(error, UnknownWhiteError):
        return "32-bit pixels without a known white"
    return "too many pixels" if isinstance(error, Image.DecompressionBombError) else "a broken image"
