"""Memory and peak arithmetic of GPUs, from their data sheets."""

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """Limits that plans and benchmarks compare a step with."""

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
"""SXM modules. Memory is the smallest total that CUDA reports for them; a plan's estimates
(:mod:`dive_fast.planner.plan`) include the part that the context and workspaces take."""

_DRIVER_NAMES = {"H100 80GB HBM3": "h100", "H200": "h200", "A100-SXM4-80GB": "a100"}


def gpu_key(name: str, memory: int | None = None) -> str | None:
    """The key in :data:`GPUS` of the device that its driver calls ``name``; None for a GPU without figures.

    Args:
        memory: bytes of the device, if known. A slice of a GPU (MIG) may have the name of the full GPU.
    """
    # Complete words only: a GH200 is not an H200.
    gpu = next(
        (key for part, key in _DRIVER_NAMES.items() if re.search(rf"(?<!\w){re.escape(part)}(?!\w)", name)), None
    )
    if gpu is None or "MIG" in name or (memory is not None and memory < 0.9 * GPUS[gpu].memory):
        return None
    return gpu
