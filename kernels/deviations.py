"""Sums over deviations from anchors, and their addition to gradients or weights, in Triton.

::

    d = W - W0                                           rounded to fp32
    sums:  <g, d>, <d, d>, <g, g>, <g, p>, <p, p>, sum |d|           by slot, in fp64
    add:   x <- x + c d,  p <- d                         x: gradients g or weights W; c by slot, 0 changes no bit

The kernels find the tensors in a table of addresses, with a row for each run of at most 1,024 or 4,096 elements
of one slot; a program computes one run. The number of launches does not depend on the number of tensors:

    sums   :func:`deviation_sums_kernel` stores partial sums of each run; :func:`slot_sums_kernel` adds those of
           each slot, which are next to each other, in a fixed order. Each tensor that is used is read once.
    add    :func:`add_deviations_kernel`; a second launch, that of the sums, if it also sums d^2. Reads W, W0 and
           g, writes g (or W) and p, once each. Runs with c = 0 are skipped unless p or the squares need them.

Weights, anchors and p stay where they are. Gradients move at each step: their addresses are in a small table,
with a number for each piece, which the host copies again when they have changed, without waiting for the device.
A gradient that is None has the address 0.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels import primitives
from dive_fast.kernels.slots import Slots

# Bytes to which vector loads need addresses aligned, and elements between such addresses.
_ALIGNMENT, _VECTOR = 16, 4
_BYTES = 4
# Columns of the table: see `Table`.
_COLUMNS = tl.constexpr(7)


class RunSize(NamedTuple):
    """Most elements of a run, and warps of the program that computes it."""

    elements: int
    num_warps: int


# Four loads of 16 bytes from each tensor in each thread; rows of matrices, which are slots of FTP, are shorter.
_LONG, _SHORT = RunSize(4096, 8), RunSize(1024, 4)
# Slots whose runs are this long on average have long runs.
_MIN_LONG = 2048


class SlotBlock(NamedTuple):
    """Slots whose partial sums a program adds, and partial sums of each slot that it loads at a time."""

    SLOTS: int
    PARTIALS: int


# Few slots with many runs, such as tensors, or many slots with few, such as rows.
_FEW_SLOTS, _MANY_SLOTS = SlotBlock(1, 1024), SlotBlock(128, 4)
_MAX_FEW = 16
_SLOT_WARPS = 4


class Columns(NamedTuple):
    """The column of each sum, or -1 for a sum that is not computed."""

    gd: int
    dd: int
    gg: int
    gp: int
    pp: int
    d1: int


@triton.jit
def _load(pointer, o_run, m_run):
    """One run, or the elements of a mask and zeros. Without a mask, a thread loads 16 bytes at a time."""
    if m_run is None:
        return tl.load(pointer + o_run)
    else:
        return tl.load(pointer + o_run, mask=m_run, other=0.0)


@triton.jit
def _pointer(address, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _gradient_address(gradients, row):
    """Address of the run's gradient, or 0 if there is none."""
    address = tl.load(gradients + tl.load(row + 5))
    return tl.where(address == 0, address, address + 4 * tl.load(row + 3))


@triton.jit
def _store_sums(row, gradient, p_sum, stride, o_run, m_run, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Stores the sums of one run; the address of its gradient may be 0."""
    # All loads come before the first sum, at which warps wait for each other.
    if COLUMNS.gd >= 0 or COLUMNS.dd >= 0 or COLUMNS.d1 >= 0:
        weight, anchor = _pointer(tl.load(row), ALIGNED), _pointer(tl.load(row + 1), ALIGNED)
        b_d = (_load(weight, o_run, m_run) - _load(anchor, o_run, m_run)).to(tl.float64)
    if COLUMNS.gp >= 0 or COLUMNS.pp >= 0:
        b_p = _load(_pointer(tl.load(row + 2), ALIGNED), o_run, m_run).to(tl.float64)
    if COLUMNS.gd >= 0 or COLUMNS.gg >= 0 or COLUMNS.gp >= 0:
        has_gradient = gradient != 0
        m_gradient = tl.broadcast_to(gradient, o_run.shape) != 0
        if m_run is not None:
            m_gradient = m_gradient & m_run
        b_g = _load(_pointer(gradient, ALIGNED), o_run, m_gradient).to(tl.float64)
        # Without a gradient 0, also if the deviations are not finite.
        if COLUMNS.gd >= 0:
            tl.store(p_sum + COLUMNS.gd * stride, tl.where(has_gradient, tl.sum(b_g * b_d, axis=0), 0.0))
        if COLUMNS.gg >= 0:
            tl.store(p_sum + COLUMNS.gg * stride, tl.sum(b_g * b_g, axis=0))
        if COLUMNS.gp >= 0:
            tl.store(p_sum + COLUMNS.gp * stride, tl.where(has_gradient, tl.sum(b_g * b_p, axis=0), 0.0))
    if COLUMNS.dd >= 0:
        tl.store(p_sum + COLUMNS.dd * stride, tl.sum(b_d * b_d, axis=0))
    if COLUMNS.pp >= 0:
        tl.store(p_sum + COLUMNS.pp * stride, tl.sum(b_p * b_p, axis=0))
    if COLUMNS.d1 >= 0:
        tl.store(p_sum + COLUMNS.d1 * stride, tl.sum(tl.abs(b_d), axis=0))


@triton.jit
def _add(row, target, b_c, is_added, is_stored, p_square, o_run, m_run, ALIGNED: tl.constexpr):
    """``x <- x + c d``, ``p <- d`` and ``sum d^2`` of one run; without a target, x is W."""
    weight, anchor = _pointer(tl.load(row), ALIGNED), _pointer(tl.load(row + 1), ALIGNED)
    b_weight = _load(weight, o_run, m_run)
    b_d = b_weight - _load(anchor, o_run, m_run)
    b_exact = b_d.to(tl.float64)
    if is_added:
        if target is None:
            tl.store(weight + o_run, (b_weight.to(tl.float64) + b_c * b_exact).to(tl.float32), mask=m_run)
        else:
            gradient = _pointer(target, ALIGNED)
            b_gradient = _load(gradient, o_run, m_run).to(tl.float64)
            tl.store(gradient + o_run, (b_gradient + b_c * b_exact).to(tl.float32), mask=m_run)
    if is_stored:
        tl.store(_pointer(tl.load(row + 2), ALIGNED) + o_run, b_d, mask=m_run)
    if p_square is not None:
        tl.store(p_square, tl.sum(b_exact * b_exact, axis=0))


# Launched kernels


@triton.jit
def deviation_sums_kernel(
    table,  # (runs, 7) int64: see Table
    gradients,  # (pieces,) int64: addresses, or None if no sum has g
    partials,  # (columns, runs) fp64
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Partial sums of one run."""
    pid = tl.program_id(0).to(tl.int64)
    row = table + pid * _COLUMNS
    stride = tl.num_programs(0).to(tl.int64)
    count = tl.load(row + 4)
    gradient = count
    if gradients is not None:
        gradient = _gradient_address(gradients, row)
    o_run = tl.arange(0, ELEMENTS)
    if count == ELEMENTS:
        _store_sums(row, gradient, partials + pid, stride, o_run, None, COLUMNS, ALIGNED)
    else:
        _store_sums(row, gradient, partials + pid, stride, o_run, o_run < count, COLUMNS, ALIGNED)


@triton.jit(do_not_specialize=["runs", "slots", "columns"])
def slot_sums_kernel(
    partials,  # (columns, runs) fp64
    offsets,  # (slots + 1,) int64: the runs of slot s are those from offsets[s] to offsets[s + 1]
    sums,  # (slots, columns) fp64
    runs,
    slots,
    columns,
    BLOCK: tl.constexpr,
):
    """``sums_sk = sum_r partials_kr`` over the runs of each slot: each program adds one column of some slots."""
    SLOTS: tl.constexpr = BLOCK.SLOTS
    PARTIALS: tl.constexpr = BLOCK.PARTIALS
    pid = tl.program_id(0)
    column = (pid % columns).to(tl.int64)
    o_slot = (pid // columns).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    m_slot = o_slot < slots
    b_begin = tl.load(offsets + o_slot, mask=m_slot, other=0)
    b_count = tl.load(offsets + o_slot + 1, mask=m_slot, other=0) - b_begin
    p_partial = partials + column * runs + b_begin[:, None]
    b_acc = tl.zeros([SLOTS, PARTIALS], tl.float64)
    for partial0 in range(0, tl.max(b_count, axis=0), PARTIALS):
        o_partial = partial0 + tl.arange(0, PARTIALS)[None, :]
        b_acc += tl.load(p_partial + o_partial, mask=o_partial < b_count[:, None], other=0.0)
    tl.store(sums + o_slot * columns + column, tl.sum(b_acc, axis=1), mask=m_slot)


@triton.jit(do_not_specialize_on_alignment=["coefficients", "skipped"])
def add_deviations_kernel(
    table,  # (runs, 7) int64: see Table
    gradients,  # (pieces,) int64: addresses, or None to change the weights
    coefficients,  # (slots,) fp64
    skipped,  # (): other than 0 if p has to stay; or None
    partials,  # (runs,) fp64, or None
    PREVIOUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """``x <- x + c d``, ``p <- d``, and partial sums of ``d^2``, for one run."""
    pid = tl.program_id(0).to(tl.int64)
    row = table + pid * _COLUMNS
    b_c = tl.load(coefficients + tl.load(row + 6))
    is_added = b_c != 0.0
    target = None
    if gradients is not None:
        target = _gradient_address(gradients, row)
        is_added = is_added & (target != 0)
    is_stored = PREVIOUS
    if skipped is not None:
        is_stored = tl.load(skipped) == 0.0
    is_needed = is_added | is_stored
    p_square = None
    if partials is not None:
        p_square = partials + pid
        is_needed = True
    if is_needed:
        count = tl.load(row + 4)
        o_run = tl.arange(0, ELEMENTS)
        if count == ELEMENTS:
            _add(row, target, b_c, is_added, is_stored, p_square, o_run, None, ALIGNED)
        else:
            _add(row, target, b_c, is_added, is_stored, p_square, o_run, o_run < count, ALIGNED)


# Host


class Runs(NamedTuple):
    """Runs of elements of one piece and one slot, ``(runs,)`` int64 each, sorted by slot."""

    offset: Any
    """Index of the first element in the piece."""
    count: Any
    piece: Any
    slot: Any


def find_runs(slots: Slots, sizes: Sequence[int], max_elements: int) -> Runs:
    """All elements of the pieces in runs of at most ``max_elements``; pieces of a slot stay in their order."""
    parts = [
        np.zeros((4, 0), np.int64),
        *(_runs_of_piece(slots, piece, size, max_elements) for piece, size in enumerate(sizes) if size),
    ]
    runs = np.concatenate(parts, axis=1)
    return Runs(*runs[:, np.argsort(runs[3], kind="stable")])


def _runs_of_piece(slots: Slots, piece: int, size: int, max_elements: int) -> Any:
    start, length = slots.start[piece], slots.length[piece]
    row = np.arange(start // length, (start + size - 1) // length + 1, dtype=np.int64)
    begin, end = np.maximum(row * length - start, 0), np.minimum((row + 1) * length - start, size)
    runs = -(-(end - begin) // max_elements)
    of_row = np.repeat(np.arange(len(row)), runs)
    number = np.arange(len(of_row)) - np.repeat(np.cumsum(runs) - runs, runs)
    offset = begin[of_row] + number * max_elements
    count = np.minimum(end[of_row] - offset, max_elements)
    return np.stack([offset, count, np.full_like(offset, piece), slots.first[piece] + row[of_row]])


class Table:
    """Addresses of the runs of weights, anchors and previous deviations, on their device."""

    def __init__(
        self,
        slots: Slots,
        sizes: Sequence[int],
        weights: Sequence[Tensor],
        anchors: Sequence[Tensor],
        previous: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        """Copies the addresses to the device.

        Args:
            sizes: number of elements of each piece.
            weights, anchors, previous: W, W0 and p, ``(n_k,)`` fp32 each, contiguous, on the device; the caller
                keeps them. No tensors: the kernels will not use them.
        """
        num_rows = sum(
            (start + size - 1) // length - start // length + 1
            for start, length, size in zip(slots.start, slots.length, sizes, strict=True)
            if size
        )
        self.run_size = _LONG if sum(sizes) >= _MIN_LONG * num_rows else _SHORT
        runs = find_runs(slots, sizes, self.run_size.elements)
        bases = [_addresses(tensors, len(sizes)) for tensors in (weights, anchors, previous)]
        rows = [base[runs.piece] + _BYTES * runs.offset for base in bases]
        columns = [*rows, runs.offset, runs.count, runs.piece, runs.slot]
        self.rows = to_device(np.stack(columns, axis=1), device)
        """``(runs, 7)`` int64: addresses of W, W0 and p, offset in the piece, elements, piece, slot."""
        offsets = np.searchsorted(runs.slot, np.arange(slots.count + 1))
        self.offsets = to_device(offsets.astype(np.int64), device)
        """``(S + 1,)`` int64: the runs of slot s are those from ``offsets[s]`` to ``offsets[s + 1]``."""
        self.slots, self.num_runs = slots.count, len(runs.slot)
        most = int(np.diff(offsets).max(initial=0))
        self.block = _MANY_SLOTS if most <= _MAX_FEW else _FEW_SLOTS
        self.is_aligned = not (runs.offset % _VECTOR).any() and not any(
            (base % _ALIGNMENT).any() for base in bases
        )


class Gradients:
    """Addresses of gradients on their device, one for each piece and 0 for None."""

    def __init__(self, device: torch.device) -> None:
        """Copies no address yet."""
        self.rows: Tensor | None = None
        """``(pieces,)`` int64."""
        self.is_aligned = True
        self._addresses: list[int] = []
        self._device = device

    def update(self, gradients: Sequence[Tensor | None]) -> None:
        """Copies the addresses to the device if one of them has changed.

        Args:
            gradients: ``(n_k,)`` fp32 each, contiguous, or None; the caller keeps them until the kernels have run.
        """
        addresses = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        if self.rows is None or addresses != self._addresses:
            self._addresses = addresses
            self.rows = to_device(np.array(addresses, np.int64), self._device)
            self.is_aligned = all(address % _ALIGNMENT == 0 for address in addresses)


def to_device(array: Any, device: torch.device) -> Tensor:
    """A copy of an array on a device; the host does not wait for it."""
    tensor = torch.from_numpy(array)
    # PyTorch keeps the pinned memory until the copy has ended.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _addresses(tensors: Sequence[Tensor], count: int) -> Any:
    return np.array([tensor.data_ptr() for tensor in tensors] or [0] * count, np.int64)


def columns_of(products: str) -> Columns:
    """Columns of sums whose names are separated by blanks."""
    names = products.split()
    return Columns(*(names.index(name) if name in names else -1 for name in Columns._fields))


def launch_sums(table: Table, gradients: Gradients | None, products: str) -> Tensor:
    """Sums of products by slot, ``(S, number of products)`` fp64, in two launches.

    Args:
        gradients: addresses of g; None if no product has g.
        products: names separated by blanks, each once.
    """
    columns, device = columns_of(products), table.rows.device
    count = len(products.split())
    if not table.num_runs:
        return torch.zeros(table.slots, count, dtype=torch.float64, device=device)
    partials = primitives.empty(count, table.num_runs, dtype=torch.float64, device=device)
    primitives.launch(
        deviation_sums_kernel,
        table.num_runs,
        *(table.rows, None if gradients is None else gradients.rows, partials),
        COLUMNS=columns,
        ALIGNED=table.is_aligned and (gradients is None or gradients.is_aligned),
        ELEMENTS=table.run_size.elements,
        num_warps=table.run_size.num_warps,
    )
    return _launch_slot_sums(table, partials)


def launch_add(
    table: Table,
    gradients: Gradients | None,
    coefficients: Tensor,
    skipped: Tensor | None,
    has_previous: bool,
    with_squares: bool,
) -> Tensor:
    """Adds ``c d`` to the gradients, or to the weights if they are None, in one launch, or two with squares.

    Args:
        coefficients: c, ``(S,)`` fp64.
        skipped: ``()`` or ``(1,)`` fp32, or None.
        has_previous: whether p becomes d.

    Returns:
        Sums of ``d^2`` before the addition, ``(S,)`` fp64, or ``(0,)`` without squares.
    """
    device, partials = table.rows.device, None
    if not table.num_runs:
        return torch.zeros(table.slots if with_squares else 0, dtype=torch.float64, device=device)
    if with_squares:
        partials = primitives.empty(1, table.num_runs, dtype=torch.float64, device=device)
    primitives.launch(
        add_deviations_kernel,
        table.num_runs,
        *(table.rows, None if gradients is None else gradients.rows, coefficients),
        *(skipped if has_previous else None, partials),
        PREVIOUS=has_previous,
        ALIGNED=table.is_aligned and (gradients is None or gradients.is_aligned),
        ELEMENTS=table.run_size.elements,
        num_warps=table.run_size.num_warps,
    )
    if partials is None:
        return primitives.empty(0, dtype=torch.float64, device=device)
    return _launch_slot_sums(table, partials).view(-1)


def _launch_slot_sums(table: Table, partials: Tensor) -> Tensor:
    """Adds ``(columns, runs)`` over the runs of each slot: ``(S, columns)``."""
    columns = len(partials)
    sums = primitives.empty(table.slots, columns, dtype=torch.float64, device=partials.device)
    primitives.launch(
        slot_sums_kernel,
        primitives.divide_up(table.slots, table.block.SLOTS) * columns,
        *(partials, table.offsets, sums, table.num_runs, table.slots, columns),
        BLOCK=table.block,
        num_warps=_SLOT_WARPS,
    )
    return sums


# Custom operators, which find their tensors in a table for one call


def launch_sums_once(
    weights: list[Tensor],
    anchors: list[Tensor],
    previous: list[Tensor],
    gradients: list[Tensor],
    pieces: list[int],
    products: str,
    count: int,
    first: list[int],
    start: list[int],
    length: list[int],
    sizes: list[int],
    device: torch.device,
) -> Tensor:
    """Sums of products by slot; tensors that no product has are left out.

    Args:
        pieces: for each gradient, the number of its piece.
        count, first, start, length: see :class:`Slots`.
        sizes: number of elements of each piece.
    """
    slots = Slots(count, tuple(first), tuple(start), tuple(length))
    table = Table(slots, sizes, weights, anchors, previous, device)
    has_gradients = "g" in products
    return launch_sums(
        table, _gradients(gradients, pieces, len(sizes), device) if has_gradients else None, products
    )


def launch_add_to_gradients_once(
    gradients: list[Tensor],
    pieces: list[int],
    weights: list[Tensor],
    anchors: list[Tensor],
    previous: list[Tensor],
    coefficients: Tensor,
    skipped: Tensor | None,
    with_squares: bool,
    count: int,
    first: list[int],
    start: list[int],
    length: list[int],
) -> Tensor:
    """Adds ``c d`` to gradients; see :func:`launch_add` and :func:`launch_sums_once`."""
    slots = Slots(count, tuple(first), tuple(start), tuple(length))
    table = Table(slots, list(map(len, weights)), weights, anchors, previous, coefficients.device)
    addresses = _gradients(gradients, pieces, len(weights), coefficients.device)
    return launch_add(table, addresses, coefficients, skipped, bool(previous), with_squares)


def launch_add_to_weights_once(
    weights: list[Tensor],
    anchors: list[Tensor],
    previous: list[Tensor],
    coefficients: Tensor,
    skipped: Tensor | None,
    with_squares: bool,
    count: int,
    first: list[int],
    start: list[int],
    length: list[int],
) -> Tensor:
    """Adds ``c d`` to weights; see :func:`launch_add` and :func:`launch_sums_once`."""
    slots = Slots(count, tuple(first), tuple(start), tuple(length))
    table = Table(slots, list(map(len, weights)), weights, anchors, previous, coefficients.device)
    return launch_add(table, None, coefficients, skipped, bool(previous), with_squares)


def _gradients(gradients: list[Tensor], pieces: list[int], count: int, device: torch.device) -> Gradients:
    by_piece = dict(zip(pieces, gradients, strict=True))
    addresses = Gradients(device)
    addresses.update([by_piece.get(piece) for piece in range(count)])
    return addresses


sums = torch.library.custom_op("dive_fast::deviation_sums", launch_sums_once, mutates_args=())
add_to_gradients = torch.library.custom_op(
    "dive_fast::add_deviations_to_gradients", launch_add_to_gradients_once, mutates_args=("gradients", "previous")
)
add_to_weights = torch.library.custom_op(
    "dive_fast::add_deviations_to_weights", launch_add_to_weights_once, mutates_args=("weights", "previous")
)


@sums.register_fake
def _(
    weights: list[Tensor],
    anchors: list[Tensor],
    previous: list[Tensor],
    gradients: list[Tensor],
    pieces: list[int],
    products: str,
    count: int,
    first: list[int],
    start: list[int],
    length: list[int],
    sizes: list[int],
    device: torch.device,
) -> Tensor:
    return primitives.empty(count, len(products.split()), dtype=torch.float64, device=device)


@add_to_gradients.register_fake
def _(
    gradients: list[Tensor],
    pieces: list[int],
    weights: list[Tensor],
    anchors: list[Tensor],
    previous: list[Tensor],
    coefficients: Tensor,
    skipped: Tensor | None,
    with_squares: bool,
    count: int,
    *others: list[int],
) -> Tensor:
    return primitives.empty(count if with_squares else 0, dtype=torch.float64, device=coefficients.device)


@add_to_weights.register_fake
def _(
    weights: list[Tensor],
    anchors: list[Tensor],
    previous: list[Tensor],
    coefficients: Tensor,
    skipped: Tensor | None,
    with_squares: bool,
    count: int,
    *others: list[int],
) -> Tensor:
    return primitives.empty(count if with_squares else 0, dtype=torch.float64, device=coefficients.device)
