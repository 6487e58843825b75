"""Sums over deviations ``d = W - W0`` from anchors, and their addition to other tensors, in plain PyTorch.

The reference of :mod:`dive_fast.kernels.deviations`, and the path of CPUs. Differences are rounded to fp32 once,
products and sums are fp64: a product of two fp32 numbers is exact. The work is split into blocks, so that fp64
copies stay in the processor's caches. Nothing waits for the device.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dive_fast.kernels.slots import Block, Slots

Product = Literal["gd", "dd", "gg", "gp", "pp", "d1"]
"""Name of a sum: ``<g, d>``, ``<d, d>``, ``<g, g>``, ``<g, p>``, ``<p, p>`` or ``sum |d|``."""

# Elements of a block: 256 KiB of fp64 on a CPU; on other devices, few launches.
_CPU_BLOCK = 1 << 15
_DEVICE_BLOCK = 1 << 24


def sums(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    slots: Slots,
    products: Sequence[Product],
    gradients: Sequence[Tensor | None],
    previous: Sequence[Tensor] | None,
    device: torch.device,
) -> Tensor:
    """Sums of products by slot, ``(S, len(products))`` fp64; a gradient that is None adds nothing.

    Args:
        weights, anchors, gradients, previous: W, W0, g and p, ``(n_k,)`` fp32 each.
        device: device of the tensors, of which there may be none.
    """
    result = torch.zeros(slots.count, len(products), dtype=torch.float64, device=device)
    letters = set("".join(products)) - {"1"}
    for piece, (weight, anchor) in enumerate(zip(weights, anchors, strict=True)):
        gradient = gradients[piece]
        for block in slots.blocks(piece, len(weight), _block_elements(device)):
            values: dict[str, Tensor] = {}
            if "d" in letters:
                values["d"] = (_matrix(weight, block) - _matrix(anchor, block)).double()
            if "g" in letters and gradient is not None:
                values["g"] = _matrix(gradient, block).double()
            if "p" in letters and previous is not None:
                values["p"] = _matrix(previous[piece], block).double()
            for index, product in enumerate(products):
                if "g" in product and gradient is None:
                    continue
                left, right = product[0], product[1]
                terms = values["d"].abs() if right == "1" else values[left] * values[right]
                result[block.slot : block.slot + block.rows, index] += terms.sum(1)
    return result


def add(
    targets: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    slots: Slots,
    coefficients: Tensor,
    previous: Sequence[Tensor] | None,
    skipped: Tensor | None,
    with_squares: bool,
) -> Tensor | None:
    """``target += c d`` in place, in fp64 rounded once; a target keeps its bits where c is 0, whatever d is.

    Args:
        targets: gradients, of which some may be None, or the weights themselves.
        weights, anchors: W and W0, ``(n_k,)`` fp32 each.
        coefficients: c, ``(S,)``.
        previous: p, which becomes d (that before the addition), or None.
        skipped: ``()`` or ``(1,)``; p keeps its bits unless it is 0.

    Returns:
        ``(S,)`` fp64, the sums of ``d^2`` before the addition, or None.
    """
    device = coefficients.device
    squares = torch.zeros(slots.count, dtype=torch.float64, device=device) if with_squares else None
    coefficients = coefficients.double().reshape(-1, 1)
    is_skipped = None if skipped is None else skipped.reshape(()) != 0
    for piece, (weight, anchor) in enumerate(zip(weights, anchors, strict=True)):
        target = targets[piece]
        for block in slots.blocks(piece, len(weight), _block_elements(device)):
            rows = slice(block.slot, block.slot + block.rows)
            difference = _matrix(weight, block) - _matrix(anchor, block)
            exact = difference.double()
            if squares is not None:
                squares[rows] += (exact * exact).sum(1)
            if previous is not None:
                kept = _matrix(previous[piece], block)
                kept.copy_(difference if is_skipped is None else torch.where(is_skipped, kept, difference))
            if target is not None:
                changed, factor = _matrix(target, block), coefficients[rows]
                total = exact.mul_(factor).add_(changed).float()
                changed.copy_(torch.where(factor == 0, changed, total))
    return squares


def _matrix(piece: Tensor, block: Block) -> Tensor:
    """A view of the block."""
    return piece[block.offset : block.offset + block.rows * block.columns].view(block.rows, block.columns)


def _block_elements(device: torch.device) -> int:
    return _CPU_BLOCK if device.type == "cpu" else _DEVICE_BLOCK
