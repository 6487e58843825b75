"""PIL's resize of 8-bit images as compiled code that releases the interpreter's lock.

Each output pixel is a weighted sum of the input pixels within the filter's support, which grows with the scale
when an image shrinks (antialiasing). Rows are resized first, then columns, with 8-bit values in between; weights
are 22-bit integers. The result equals PIL's bit for bit, except for some tall images, whose columns PIL 13 resizes
first.
"""

import math
from typing import Any

import numba
import numpy as np

_BITS = 32 - 8 - 2
"""Fractional bits of a weight: a weight may slightly exceed 1, and its product with 8 bits must fit into 32."""
_compiled = numba.njit(nogil=True, cache=True, fastmath=False)


@_compiled
def resize(image: Any, region: Any, resized: Any, bilinear: bool) -> None:
    """Resizes a region of an image like ``PIL.Image.resize(box=region)``.

    Args:
        image: ``(h, w, 3)`` uint8.
        region: top, left, bottom, right in (fractional) pixels; the filter reads pixels beyond it.
        resized: ``(H, W, 3)`` uint8, the output.
        bilinear: whether to use the triangle filter instead of the bicubic one with a = -1/2.
    """
    height, width = image.shape[:2]
    first_row, row_counts, row_weights = _weights(height, region[0], region[2], resized.shape[0], bilinear)
    first_column, column_counts, column_weights = _weights(width, region[1], region[3], resized.shape[1], bilinear)
    top = first_row[0]
    bottom = first_row[-1] + row_counts[-1]
    narrow = np.empty((bottom - top, resized.shape[1], 3), np.uint8)
    half = np.int32(1 << (_BITS - 1))
    if region[1] == 0 and region[3] == width and width == resized.shape[1]:
        narrow[:] = image[top:bottom]
    else:
        for y in range(bottom - top):
            row = image[top + y]
            for x in range(resized.shape[1]):
                red = green = blue = half
                start = first_column[x]
                for k in range(column_counts[x]):
                    weight = column_weights[x, k]
                    red += row[start + k, 0] * weight
                    green += row[start + k, 1] * weight
                    blue += row[start + k, 2] * weight
                narrow[y, x, 0] = _clipped(red)
                narrow[y, x, 1] = _clipped(green)
                narrow[y, x, 2] = _clipped(blue)
    if region[0] == 0 and region[2] == height and height == resized.shape[0]:
        resized[:] = narrow
        return
    sums = np.empty((resized.shape[1], 3), np.int32)
    for y in range(resized.shape[0]):
        sums[:] = half
        for k in range(row_counts[y]):
            weight = row_weights[y, k]
            row = narrow[first_row[y] - top + k]
            for x in range(resized.shape[1]):
                for c in range(3):
                    sums[x, c] += row[x, c] * weight
        for x in range(resized.shape[1]):
            for c in range(3):
                resized[y, x, c] = _clipped(sums[x, c])


@_compiled
def _clipped(total: Any) -> Any:
    return np.uint8(min(max(total >> _BITS, 0), 255))


@_compiled
def _weights(size: int, start: float, end: float, resized: int, bilinear: bool) -> Any:
    """First input pixel, number of input pixels and weights, for each output pixel."""
    scale = (end - start) / resized
    filter_scale = max(scale, 1.0)
    support = (1.0 if bilinear else 2.0) * filter_scale
    max_count = math.ceil(support) * 2 + 1
    firsts = np.empty(resized, np.int64)
    counts = np.empty(resized, np.int64)
    weights = np.zeros((resized, max_count), np.int32)
    exact = np.empty(max_count, np.float64)
    for x in range(resized):
        center = start + (x + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        count = min(int(center + support + 0.5), size) - first
        total = 0.0
        for k in range(count):
            exact[k] = _filter((k + first - center + 0.5) * (1.0 / filter_scale), bilinear)
            total += exact[k]
        for k in range(count):
            weight = exact[k] / total if total != 0.0 else exact[k]
            weights[x, k] = int(math.copysign(0.5, weight) + weight * (1 << _BITS))
        firsts[x], counts[x] = first, count
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
