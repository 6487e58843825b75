"""The moving averages of many tensors in Triton: one launch for all of them, one pass over their memory.

::

    psi <- psi + w (theta - psi)        w = 0 changes no bit, whatever theta is

psi and theta are read once and psi is written once, 12 bytes an element. The kernel finds the tensors in a
table of addresses, with a row for each piece of at most :data:`_PIECE` elements; a program computes one piece.
No program reads what another writes, so that results do not depend on their order.

The table is valid as long as no tensor moves: the host compares addresses at each call, and builds the table
again if one has changed, e.g. after ZeRO has moved parameters to another buffer.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels import primitives

_NUM_WARPS = 8
# Elements of a program: four loads of 16 bytes from each tensor in each thread.
_PIECE = 4096
# Bytes to which vector loads need addresses aligned.
_ALIGNMENT = 16
_BYTES = 4


@triton.jit
def _move(average, value, b_rate, o_piece, m_piece):
    """``psi + w (theta - psi)`` of one piece, or of the elements of a mask."""
    b_average = tl.load(average + o_piece, mask=m_piece)
    b_value = tl.load(value + o_piece, mask=m_piece)
    tl.store(average + o_piece, b_average + b_rate * (b_value - b_average), mask=m_piece)


@triton.jit(do_not_specialize_on_alignment=["rate"])
def moving_average_kernel(
    table,  # (pieces, 3) int64: address of psi, address of theta, number of elements
    rate,  # (): w
    ALIGNED: tl.constexpr,
    PIECE: tl.constexpr,
):
    """``psi <- psi + w (theta - psi)`` for one piece."""
    b_rate = tl.load(rate)
    if b_rate != 0.0:
        row = table + tl.program_id(0).to(tl.int64) * 3
        average = tl.load(row).to(tl.pointer_type(tl.float32))
        value = tl.load(row + 1).to(tl.pointer_type(tl.float32))
        count = tl.load(row + 2)
        if ALIGNED:
            average = tl.multiple_of(average, 16)
            value = tl.multiple_of(value, 16)
        o_piece = tl.arange(0, PIECE)
        # Without a mask, a thread loads 16 bytes at a time.
        if count == PIECE:
            _move(average, value, b_rate, o_piece, None)
        else:
            _move(average, value, b_rate, o_piece, o_piece < count)


# Host


def addresses_of(averages: Sequence[Tensor], values: Sequence[Tensor]) -> list[int]:
    """The addresses of all tensors, averages first."""
    return [tensor.data_ptr() for tensors in (averages, values) for tensor in tensors]


class Table:
    """Addresses of pairs of tensors on their device, in pieces."""

    def __init__(self, averages: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Copies the addresses to the device.

        Args:
            averages, values: pairs of contiguous fp32 tensors of equal shape on one device; the caller keeps them.
        """
        self.addresses = addresses_of(averages, values)
        pairs = zip(self.addresses[: len(averages)], self.addresses[len(averages) :], strict=True)
        pieces = [
            _pieces(average, value, tensor.numel())
            for (average, value), tensor in zip(pairs, averages, strict=True)
        ]
        self.rows = torch.from_numpy(np.concatenate(pieces)).to(averages[0].device)
        """``(pieces, 3)`` int64, as the kernel reads them."""
        self.is_aligned = all(address % _ALIGNMENT == 0 for address in self.addresses)

    def is_valid(self, averages: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
        """Whether the tensors are still where they were."""
        return self.addresses == addresses_of(averages, values)


def _pieces(average: int, value: int, count: int) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
    starts = np.arange(0, count, _PIECE, dtype=np.int64)
    sizes = np.minimum(count - starts, _PIECE)
    return np.stack([average + _BYTES * starts, value + _BYTES * starts, sizes], axis=1)


def launch(table: Table, rate: Tensor) -> None:
    """Moves all averages of the table, in one launch.

    Args:
        rate: w, ``()`` or ``(1,)`` fp32, on the device of the tensors.
    """
    if len(table.rows):
        primitives.launch(
            moving_average_kernel,
            len(table.rows),
            *(table.rows, rate),
            ALIGNED=table.is_aligned,
            PIECE=_PIECE,
            num_warps=_NUM_WARPS,
        )


def launch_once(averages: list[Tensor], values: list[Tensor], rate: Tensor) -> None:
    """Moves averages by a table for this call alone."""
    launch(Table(averages, values), rate)


operator = torch.library.custom_op("dive_fast::move_averages", launch_once, mutates_args=("averages",))


@operator.register_fake
def _(averages: list[Tensor], values: list[Tensor], rate: Tensor) -> None:
    return None
