"""Sums over the rows of a matrix in a fixed order, as gradients of biases and of a norm's parameters need them.

A kernel that processes rows gives each program a contiguous range of them. The program adds its rows in registers
and stores one row of partial sums; a second, small launch adds the rows of all programs. The number of programs
depends on the sizes alone, never on the device, so that the result has the same bits everywhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels import primitives

# Block of partial sums that one program adds at a time: 64 bytes of a row, and many rows, to hide the latency.
_ROWS = 256
_COLUMNS = 16
_NUM_WARPS = 8


class RowSplit(NamedTuple):
    """``programs`` programs with ``share`` rows each; the last one may have fewer. Without rows there are none."""

    programs: int
    share: int


def split_rows(rows: int, block_rows: int, max_programs: int) -> RowSplit:
    """Distributes rows in blocks of ``block_rows`` evenly over at most ``max_programs`` programs."""
    blocks = primitives.divide_up(rows, block_rows)
    share = block_rows * max(1, primitives.divide_up(blocks, max(1, max_programs)))
    return RowSplit(primitives.divide_up(rows, share), share)


@triton.jit
def store_partial_sum(partials, pid, sums, index, b_sum, o_column, width):
    """Stores sum number ``index`` of ``sums`` of this program into ``partials``, ``(programs, sums, width)``."""
    o_partial = (pid.to(tl.int64) * sums + index) * width + o_column
    tl.store(partials + o_partial, b_sum, mask=o_column < width)


@triton.jit(do_not_specialize=["programs"])
def column_sums_kernel(
    partials,  # (programs, sums, W)
    sums,  # tuple of (W,)
    programs,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``sums_kw = sum_p partials_pkw``: each program adds some columns of one sum."""
    blocks = tl.cdiv(width, COLUMNS)
    index = tl.program_id(0) // blocks
    o_column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    m_column = o_column < width
    b_acc = tl.zeros([ROWS, COLUMNS], partials.dtype.element_ty)
    for row0 in range(0, programs, ROWS):
        o_row = row0 + tl.arange(0, ROWS)
        o_partial = (o_row.to(tl.int64)[:, None] * len(sums) + index) * width + o_column[None, :]
        b_acc += tl.load(partials + o_partial, mask=(o_row < programs)[:, None] & m_column[None, :], other=0.0)
    b_sum = tl.sum(b_acc, axis=0)
    for k in tl.static_range(len(sums)):
        if index == k:
            tl.store(sums[k] + o_column, primitives.round_to(b_sum, sums[k].dtype.element_ty), mask=m_column)


def launch_column_sums(partials: Tensor, dtypes: Sequence[torch.dtype | None]) -> list[Tensor]:
    """Adds ``(programs, sums, W)`` over programs: one ``(W,)`` for each dtype that is not None."""
    programs, _, width = partials.shape
    sums = tuple(
        primitives.empty(width, dtype=dtype, device=partials.device) for dtype in dtypes if dtype is not None
    )
    primitives.launch(
        column_sums_kernel,
        len(sums) * primitives.divide_up(width, _COLUMNS),
        *(partials, sums, programs, width),
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=_NUM_WARPS,
    )
    return list(sums)
