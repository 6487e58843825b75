"""Memory, peak arithmetic and reachable rates of GPUs.

Data sheets give memory, peaks and the bandwidth of memory. The reachable rates of an H200 are assumptions from
public measurements of cuBLAS, FlashAttention and copies on Hopper; this project has measured none of them. Those
of the other GPUs are the H200's in proportion to the data sheets, which is an assumption as well.
"""

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """Limits and reachable rates that plans and benchmarks compare a step with."""

    memory: int
    """Bytes."""
    half: float
    """Dense 16-bit FLOP/s of the matrix units, with fp32 sums."""
    single: float
    """fp32 FLOP/s, without matrix units."""
    half_product: float
    """FLOP/s of large 16-bit matrix products with long sums."""
    half_attention: float
    """FLOP/s of 16-bit attention with heads of width 64, forward and backward."""
    single_product: float
    """FLOP/s of fp32 products and attention."""
    copy: float
    """Bytes/s, read and written, of a large copy."""
    elementwise: float
    """Bytes/s, read and written, of large element-wise kernels."""

    def product_rate(self, reduction: int) -> float:
        """FLOP/s of a 16-bit matrix product whose sums have ``reduction`` terms."""
        return self.half_product * reduction / (reduction + HALF_RATE_REDUCTION)


HALF_RATE_REDUCTION = 144
"""Terms of a sum at which a 16-bit product has half of the rate of long sums: the start and end of each tile take
as long as its sums. It makes an H200 reach 645 TFLOP/s at 640 terms; 600 to 690 are reported for 512 to 768."""


def _gpu(memory: float, half: float, single: float, bandwidth: float) -> Gpu:
    """A GPU by its data sheet, with the H200's assumed rates in proportion.

    Args:
        memory: GiB.
        half: TFLOP/s.
        single: TFLOP/s.
        bandwidth: TB/s.
    """
    arithmetic, memory_share = half / 989, bandwidth / 4.8
    return Gpu(
        memory=int(memory * 2**30),
        half=half * 1e12,
        single=single * 1e12,
        half_product=790e12 * arithmetic,
        half_attention=214e12 * arithmetic,
        single_product=0.75 * single * 1e12,
        copy=4.3e12 * memory_share,
        elementwise=4.1e12 * memory_share,
    )


GPUS = {
    "h100": _gpu(79.1, 989, 67, 3.35),
    "h200": _gpu(139.7, 989, 67, 4.8),
    "a100": _gpu(79.1, 312, 19.5, 2.04),
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
