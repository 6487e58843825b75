"""GPUs as their data sheets have them."""

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """What a plan and a benchmark hold a step to."""

    memory: int
    """Bytes."""
    half: float
    """Dense 16-bit FLOP/s of the matrix units, with fp32 sums."""
    single: float
    """fp32 FLOP/s, without matrix units."""


GPUS = {
    "h100": Gpu(int(79.1 * 2**30), 989e12, 67e12),
    "h200": Gpu(int(139.7 * 2**30), 989e12, 67e12),
    "a100": Gpu(int(79.1 * 2**30), 312e12, 19.5e12),
}
"""SXM modules. Memory is the least total that CUDA reports for them; what the context and workspaces take of it is
part of a plan's estimates (:mod:`dive_fast.planner.plan`)."""

_SOLD_AS = {"H100 80GB HBM3": "h100", "H200": "h200", "A100-SXM4-80GB": "a100"}


def sold_as(name: str, memory: int | None = None) -> str | None:
    """The name in :data:`GPUS` of a whole GPU, by what its driver calls it; None for others, rated otherwise.

    Args:
        memory: bytes that the device has, if known. A slice of a GPU (MIG) may bear the name of the whole.
    """
    # By whole words: a GH200 is not an H200.
    found = next(
        (gpu for part, gpu in _SOLD_AS.items() if re.search(rf"(?<!\w){re.escape(part)}(?!\w)", name)), None
    )
    if found is None or "MIG" in name or (memory is not None and memory < 0.9 * GPUS[found].memory):
        return None
    return found
