"""From the bytes of an image file to 8-bit pixels: one road for raw data, preparation, and every loader."""

import io
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset(
    # torchvision's IMG_EXTENSIONS (a test compares them), and GIF
    {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
)
"""The suffixes of the files that are read as images."""
# fmt: off
OTHER_IMAGE_SUFFIXES = frozenset({
    ".apng", ".arw", ".avif", ".avifs", ".bpg", ".cr2", ".cr3", ".dib", ".dng", ".emf", ".eps", ".exr", ".fit",
    ".fits", ".hdr", ".heic", ".heif", ".hif", ".icns", ".ico", ".j2k", ".jfif", ".jif", ".jp2", ".jpe",
    ".jpf", ".jpx", ".jxl", ".nef", ".orf", ".pbm", ".pcx", ".pef", ".pfm", ".pict", ".pnm", ".psd", ".raf",
    ".raw", ".rw2", ".sgi", ".svg", ".svgz", ".tga", ".wmf", ".xbm", ".xpm",
})
# fmt: on
"""Suffixes of images that are not read; a file that has one is a sample which is left out."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "MPO", "AVIF", "TIFF", "JPEG2000", "PPM", "DIB", "ICO", "TGA")
"""What a file may be, whatever its suffix says. PIL knows more, and gives PostScript to Ghostscript, a program."""
UNDECODABLE = (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises for bytes that are no image."""


class UnknownWhiteError(ValueError):
    """Pixels of 32 bits in a range whose white is not known."""


_BEGINNINGS = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  "),
    *(b"\xff\x0a", b"\0\0\0\x0cJXL "),
)


def looks_like_image(beginning: bytes) -> bool:
    """Whether a file with this beginning (12 bytes are enough) is an image, whatever it is called."""
    if beginning[:2] == b"BM" and beginning[6:10] != bytes(4):  # a text may begin with BM
        return False
    is_riff = beginning[:4] == b"RIFF" and beginning[8:12] == b"WEBP"
    is_heif = beginning[4:8] == b"ftyp" and beginning[8:12] in (b"heic", b"heix", b"mif1", b"avif", b"avis")
    return is_riff or is_heif or beginning.startswith(_BEGINNINGS)


def decode(data: bytes) -> Image.Image:
    """The (first) picture of an image file, as 8-bit RGB or grey (modes ``RGB`` and ``L``).

    Raises:
        UNDECODABLE: the bytes are no whole image, or its pixels have no agreed white.
    """
    image = opened(data)
    image.load()
    return eight_bits(image)


def decode_error_message(error: Exception) -> str:
    """What :func:`decode` has raised, in words for a user."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image, or of a format that is not read"
    return str(error) or type(error).__name__


def opened(data: bytes) -> Image.Image:
    """An image file as PIL opens it, not yet decoded."""
    return Image.open(io.BytesIO(data), formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def eight_bits(image: Image.Image) -> Image.Image:
    """A picture of any mode as ``RGB`` or ``L``, before anything is resized.

    16 bits keep their upper 8, as PIL reads 48-bit colour; PIL's own conversion would cut at 255, which is white.
    Palettes become colours first: PIL resizes palette indices by the nearest one. Transparency is dropped.

    Raises:
        UnknownWhiteError: 32-bit pixels reach beyond 0 to 255, or floating point ones only to 1: what is white,
            the file does not say.
    """
    if image.mode in ("RGB", "L"):
        return image
    # PIL has 16-bit greys as I;16, but those of PGM as I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return _with_info(Image.fromarray(grey), image)
    if image.mode in ("I", "F"):
        pixels = np.asarray(image)
        low, high = float(pixels.min()), float(pixels.max())
        in_range = low >= 0 and high <= 255  # a NaN is not
        if not in_range or (image.mode == "F" and 0 < high <= 1):
            raise UnknownWhiteError(
                f"32-bit pixels from {low:g} to {high:g}, none of which is known to be white; save it with 8 or 16"
            )
    if image.mode in ("La", "RGBa"):  # PIL converts these to one mode alone
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the colours are the same, and PIL does not warn
    return _with_info(image.convert("RGB"), image)


def _with_info(converted: Image.Image, image: Image.Image) -> Image.Image:
    converted.format = image.format
    return converted


def unsupported_reason(image: Image.Image, data: bytes) -> str:
    """Why not every loader decodes a file as PIL does; empty: they do.

    Args:
        image: the file as PIL opened it, not converted.
        data: its bytes.
    """
    if image.format != "JPEG":
        return str(image.format)
    if image.mode not in ("RGB", "L"):
        return f"{image.mode} JPEG"
    if image.mode == "RGB" and image.info.get("adobe_transform") == 0:
        return "RGB JPEG without YCbCr"
    # Behind the end some cameras write a few more bytes.
    return "" if b"\xff\xd9" in data[-64:] else "JPEG without end"


def undecodable_reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, FileNotFoundError | PermissionError):
        return "cannot be read"
    if isinstance(error, UnknownWhiteError):
        return "32-bit pixels without a known white"
    return "too many pixels" if isinstance(error, Image.DecompressionBombError) else "a broken image"
