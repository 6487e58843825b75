"""Measures a device's peak rates, in the same run as the losses that are compared with them."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from losses import DEVICE, LEAVES, Case

ROUNDS = 10
PRODUCT, COPIED = (8192, 2**30) if DEVICE.type == "cuda" else (256, 2**20)
"""Rows of a square product; bytes of a copy."""
TEACHER_BYTES = 4


class Ceiling(NamedTuple):
    """Peak rates of the device, measured with PyTorch."""

    flop_per_second: float
    """FLOP/s of a matrix product in the features' dtype, by cuBLAS on a GPU; a multiply-add is two."""
    bytes_per_second: float
    """Bytes/s read and written by a copy in the device's memory."""

    def seconds(self, case: Case, dtype: torch.dtype) -> float:
        """Lower bound on a case's time: the longer of its arithmetic and its memory traffic, without repetition.

        The contrastive loss has three products of 2 B^2 D: the logits, and from their gradient that of each side.
        Features, teachers and gradients are moved once; intermediate results stay on the chip.
        """
        matrix = case.batch * case.width
        halves = {"contrastive", "difference"} if case.operation == "joint" else {case.operation}
        features = sum("features" in name for name in LEAVES[case.operation])
        flop = 3 * 2 * case.batch * matrix if "contrastive" in halves else 0
        traffic = 2 * features * dtype.itemsize * matrix  # features read, gradients written
        if "difference" in halves:
            traffic += 2 * TEACHER_BYTES * matrix
        return max(flop / self.flop_per_second, traffic / self.bytes_per_second)


def measure(dtype: torch.dtype) -> Ceiling:
    """Measures the median rates of products and copies on this device."""
    left, right = (torch.randn(PRODUCT, PRODUCT, device=DEVICE).to(dtype) for _ in range(2))
    source = torch.zeros(COPIED, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    product = torch.empty_like(left)
    return Ceiling(
        2 * PRODUCT**3 / _seconds(lambda: torch.mm(left, right, out=product)),
        2 * COPIED / _seconds(lambda: target.copy_(source)),
    )


def _seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first call selects an algorithm
