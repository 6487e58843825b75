"""Random numbers as pure functions of a seed and a position."""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Draw(IntEnum):
    """Purposes of random numbers; each purpose has a separate stream."""

    CROP = 0
    PROMPT = 1
    ORDER = 2
    AUDIT = 3
    RANDOM_TEXT = 4
    SECOND_PROMPT = 5
    FLIP = 6
    CAPTION = 7
    BALANCE = 8
    WINDOW = 9
    PERTURBATION = 10
    CURVATURE_LABEL = 11


def stream(seed: int, purpose: Draw, first: int, second: int = 0) -> np.random.Generator:
    """The generator of one purpose at one position, e.g. for the crop of sample ``first`` in view ``second``."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, first, second]))


def uniforms(seed: int, purpose: Draw, firsts: ArrayLike, seconds: ArrayLike, count: int) -> NDArray[np.float64]:
    """The first ``count`` numbers of ``stream(...).random(count)`` at many positions, ``(N, count)``, bit for bit.

    One Philox generator for each position costs ten times as much.

    Args:
        firsts, seconds: ``(N,)`` each.
    """
    blocks = np.arange(1, -(-count // 4) + 1, dtype=np.uint64)
    first, second = (np.asarray(positions, np.uint64)[:, None] for positions in (firsts, seconds))
    counter = [*np.broadcast_arrays(blocks[None], np.uint64(0), first, second)]
    keys = [seed, int(purpose)]
    for _ in range(_ROUNDS):
        (high_0, low_0), (high_2, low_2) = _product(counter[0], _FACTORS[0]), _product(counter[2], _FACTORS[1])
        key_0, key_1 = map(np.uint64, keys)
        counter = [high_2 ^ counter[1] ^ key_0, low_2, high_0 ^ counter[3] ^ key_1, low_0]
        keys = [(key + step) % 2**64 for key, step in zip(keys, _KEY_STEPS, strict=True)]
    numbers = np.stack(counter, axis=-1).reshape(len(first), -1)[:, :count]
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


# Philox 4x64 with 10 rounds (Salmon et al. 2011), which NumPy's generator implements.
_ROUNDS = 10
_FACTORS = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_KEY_STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


def _product(values: NDArray[np.uint64], factor: np.uint64) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The upper and lower 64 bits of products of 64-bit integers."""
    low, high = values & _LOW, values >> _HALF
    factor_low, factor_high = factor & _LOW, factor >> _HALF
    first_cross, second_cross = low * factor_high, high * factor_low
    carry = (low * factor_low >> _HALF) + (first_cross & _LOW) + (second_cross & _LOW)
    upper = high * factor_high + (first_cross >> _HALF) + (second_cross >> _HALF) + (carry >> _HALF)
    return upper, values * factor
