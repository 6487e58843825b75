"""PIL's resize of 8-bit images as compiled code that releases the interpreter's lock, several times as fast.

Each output pixel is a weighted sum of the input pixels within the filter's support, which grows with the scale
when an image shrinks (antialiasing). Rows are resized first, then columns, with 8-bit values in between; weights
are 22-bit integers. Sums of integers do not depend on their order, so that the result equals PIL's bit for bit.
Since PIL 13, columns come first where the height shrinks by more than twice as many pixels as the width.

Both passes add contiguous vectors, which the compiler turns into vector instructions. For the first one, bands of
rows are transposed.
"""

import math
from functools import cache
from importlib import metadata
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dive_fast.data.transforms import Crop, View

_BITS = 32 - 8 - 2
"""Fractional bits of a weight: a weight may slightly exceed 1, and its product with 8 bits must fit into 32."""
_BAND = 32
"""Rows that are transposed at a time: at 500 columns they fill 48 kB of cache."""
_compiled = numba.njit(nogil=True, cache=True, fastmath=False, boundscheck=False)


def view_pixels(image: NDArray[np.uint8], view: View, pixels: NDArray[np.uint8]) -> None:
    """Writes a view of an image.

    Args:
        image: ``(h, w, 3)``, contiguous.
        pixels: ``(H, W, 3)``, contiguous, the output.
    """
    # Compiled for read-only memory alone, and not once more for memory that may be written.
    image.flags.writeable = False
    crop = view.crop
    _resize(
        image.reshape(len(image), -1),
        (crop.top, crop.left, crop.height, crop.width),
        view.resized,
        view.offset,
        pixels.reshape(len(pixels), -1),
        view.resampling == Image.Resampling.BILINEAR,
        _resizes_tall_images_first_by_columns(),
    )
    if crop.is_flipped:
        pixels[:] = pixels[:, ::-1].copy()


@cache
def equals_pil() -> bool:
    """Whether views of a few images equal those of the installed PIL bit for bit; a later PIL may differ."""
    noise = np.random.default_rng(0)
    for height, width in ((70, 50), (50, 70), (90, 20), (20, 90), (30, 30), (80, 48)):
        image = noise.integers(0, 256, (height, width, 3), np.uint8)
        pixels = np.empty((32, 48, 3), np.uint8)
        for resampling in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR):
            view = View(Crop(0, 0, height, width), (32, 48), (0, 0), (32, 48), resampling)
            expected = np.asarray(Image.fromarray(image).resize((48, 32), resampling))
            view_pixels(image, view, pixels)
            if not np.array_equal(pixels, expected):
                return False
    return True


@cache
def _resizes_tall_images_first_by_columns() -> bool:
    return int(metadata.version("pillow").split(".")[0]) >= 13


@_compiled
def _resize(
    image: Any, crop: Any, resized: Any, offset: Any, pixels: Any, bilinear: bool, tall_by_columns: bool
) -> None:
    """The part of ``crop`` of an image, resized to ``resized``, that begins at ``offset``.

    Args:
        image: ``(h, 3 w)``; ``pixels``: ``(H, 3 W)``, the output.
        crop: top, left, height, width.
        resized, offset: (height, width) and (top, left).
        bilinear: whether to use the triangle filter instead of the bicubic one with a = -1/2.
        tall_by_columns: whether PIL resizes columns before rows where they shrink more.
    """
    top, left, height, width = crop
    rows, columns = pixels.shape[0], pixels.shape[1] // 3
    row_weights = _weights(height, resized[0], offset[0], rows, bilinear)
    column_weights = _weights(width, resized[1], offset[1], columns, bilinear)
    keeps_rows, keeps_columns = width == resized[1], height == resized[0]
    if keeps_columns:
        _resize_rows(image, left, top + offset[0], column_weights, keeps_rows, offset[1], pixels)
    elif tall_by_columns and height - resized[0] > 2 * max(width - resized[1], 0):
        short = np.empty((rows, 3 * width), np.uint8)
        _resize_columns(image, 3 * left, top, row_weights, short)
        _resize_rows(short, 0, 0, column_weights, keeps_rows, offset[1], pixels)
    else:
        firsts, counts, _ = row_weights
        narrow = np.empty((firsts[-1] + counts[-1] - firsts[0], pixels.shape[1]), np.uint8)
        _resize_rows(image, left, top + firsts[0], column_weights, keeps_rows, offset[1], narrow)
        _resize_columns(narrow, 0, -firsts[0], row_weights, pixels)


@_compiled
def _resize_rows(image: Any, left: int, top: int, filters: Any, keeps: bool, offset: int, narrow: Any) -> None:
    """Resizes the rows from ``top`` on, each of which begins at pixel ``left``, or cuts them at ``offset``."""
    if keeps:
        start = 3 * (left + offset)
        narrow[:] = image[top : top + narrow.shape[0], start : start + narrow.shape[1]]
        return
    firsts, counts, weights = filters
    columns = firsts.shape[0]
    start = firsts[0]
    width = firsts[-1] + counts[-1] - start
    band = np.empty((width, 3 * _BAND), np.uint8)
    narrow_band = np.empty((columns, 3 * _BAND), np.uint8)
    sums = np.empty(3 * _BAND, np.int32)
    for first in range(0, narrow.shape[0], _BAND):
        rows = min(_BAND, narrow.shape[0] - first)
        for r in range(rows):
            row = image[top + first + r]
            for x in range(width):
                for c in range(3):
                    band[x, c * _BAND + r] = row[3 * (left + start + x) + c]
        for x in range(columns):
            sums[:] = np.int32(1 << (_BITS - 1))
            for k in range(counts[x]):
                _add(sums, band[firsts[x] - start + k], weights[x, k])
            _round(sums, narrow_band[x])
        for r in range(rows):
            row = narrow[first + r]
            for x in range(columns):
                for c in range(3):
                    row[3 * x + c] = narrow_band[x, c * _BAND + r]


@_compiled
def _resize_columns(image: Any, left: int, top: int, filters: Any, short: Any) -> None:
    """Resizes columns; row 0 of the filter is row ``top`` of the image, and ``left`` counts values, not pixels."""
    firsts, counts, weights = filters
    width = short.shape[1]
    sums = np.empty(width, np.int32)
    for y in range(short.shape[0]):
        sums[:] = np.int32(1 << (_BITS - 1))
        for k in range(counts[y]):
            _add(sums, image[top + firsts[y] + k, left : left + width], weights[y, k])
        _round(sums, short[y])


@_compiled
def _add(sums: Any, values: Any, weight: Any) -> None:
    for i in range(sums.shape[0]):
        sums[i] += np.int32(values[i]) * weight


@_compiled
def _round(sums: Any, values: Any) -> None:
    for i in range(sums.shape[0]):
        values[i] = np.uint8(min(max(sums[i] >> _BITS, 0), 255))


@_compiled
def _weights(size: int, resized: int, offset: int, count: int, bilinear: bool) -> Any:
    """First input pixel, number of input pixels and weights, for output pixels from ``offset`` on."""
    scale = size / resized
    filter_scale = max(scale, 1.0)
    support = (1.0 if bilinear else 2.0) * filter_scale
    max_count = math.ceil(support) * 2 + 1
    firsts = np.empty(count, np.int64)
    counts = np.empty(count, np.int64)
    weights = np.zeros((count, max_count), np.int32)
    exact = np.empty(max_count, np.float64)
    for x in range(count):
        center = (offset + x + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        n = min(int(center + support + 0.5), size) - first
        total = 0.0
        for k in range(n):
            exact[k] = _filter((k + first - center + 0.5) * (1.0 / filter_scale), bilinear)
            total += exact[k]
        for k in range(n):
            weight = exact[k] / total if total != 0.0 else exact[k]
            weights[x, k] = int(math.copysign(0.5, weight) + weight * (1 << _BITS))
        firsts[x], counts[x] = first, n
    return firsts, counts, weights


@_compiled
def _filter(x: float, bilinear: bool) -> float:
    x = abs(x)
    if bilinear:
        return 1.0 - x if x < 1.0 else 0.0
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return 0.0
