"""Random numbers as pure functions of a seed and a position."""

from enum import IntEnum

import numpy as np


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


def stream(seed: int, purpose: Draw, first: int, second: int = 0) -> np.random.Generator:
    """The generator of one purpose at one position, e.g. for the crop of sample ``first`` in view ``second``."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, first, second]))
