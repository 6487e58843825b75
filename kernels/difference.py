"""The average and pairwise vector loss in Triton: two launches forward, one backward, no gradient kept in between.

With u_j = unit(x_j) - teacher, v_j likewise for texts, N pairs over all ranks, decay a::

    c     = 1/N sum_j (u_j + v_j)/2         m = a m_prev + (1 - a) c
    L     = w_avl 1/N sum_j (|u_j - m|^2 + |v_j - m|^2) + w_pvl 1/N sum_j |u_j - v_j|^2

1. *Sums*: each program normalizes and subtracts some rows, and stores its own sum of (u + v)/2.
2. *Values*: each program adds the sums of all programs, which gives m, and processes its rows again; the last
   program to finish adds the partial losses of all. Over ranks the sums are gathered before this launch, the
   losses after it.
3. *Gradient*, in the backward, recomputed from the inputs. The upstream gradient is applied in fp32, before the
   result is rounded to the features' dtype, where it would underflow at |u| = 3e-3::

    dL/du_j = 2/N [ w_avl (u_j - m - (1 - a)(c - m)) + w_pvl (u_j - v_j) ]

   The term with c is the batch's share of m: dm = -4 w_avl (c - m), of which each u_j and v_j gets (1 - a)/(2N).
   It is left out when m is a constant (``mean_gradient=False``). The normalization's backward is that of
   :mod:`dive_fast.kernels.contrastive`. Teachers and m_prev get no gradient.

Rows are divided by their norm, correctly rounded: differences of 1e-3 inherit the rounding of unit rows.
"""

import itertools
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels import direct, primitives, process_group

# Most programs of the forward kernels: each one reads the sums of all.
_PROGRAMS = tl.constexpr(128)
_NUM_WARPS = 8
# Predictions for an H200: seconds of a program for one block of rows, bytes/s of all reads from the L2 cache. The
# programs of the gradient read nothing of one another.
_BLOCK_SECONDS, _CACHE_RATE, _GRADIENT_PROGRAMS = 8e-7, 6.5e12, 4 * 132


class ForwardConstants(NamedTuple):
    """Constants of the method that are compiled into the forward kernels."""

    DECAY: float
    GROWTH: float
    AVERAGE_WEIGHT: float
    PAIRWISE_WEIGHT: float


class GradientConstants(NamedTuple):
    """Constants of the method that are compiled into the gradient kernels; ``WEIGHT`` multiplies the loss."""

    WEIGHT: float
    AVERAGE_WEIGHT: float
    PAIRWISE_WEIGHT: float
    MEAN_GRADIENT: bool


class Options(NamedTuple):
    """Options of the loss, as users pass them."""

    decay: float
    average_weight: float
    pairwise_weight: float
    mean_gradient: bool

    def for_forward(self) -> ForwardConstants:
        """Constants of :func:`values_block`; ``1 - decay`` is rounded once, not twice."""
        return ForwardConstants(
            float(self.decay), 1.0 - self.decay, float(self.average_weight), float(self.pairwise_weight)
        )

    def for_gradient(self, weight: float) -> GradientConstants:
        """Constants of :func:`difference_gradient_block`."""
        return GradientConstants(
            float(weight), float(self.average_weight), float(self.pairwise_weight), self.mean_gradient
        )


class Shape(NamedTuple):
    """Sizes of one call: ``rows`` (B) of this rank, ``total`` (N) over all ranks, ``width`` (D) columns."""

    rows: int
    total: int
    width: int
    dtype: torch.dtype


class Geometry(NamedTuple):
    """Launch parameters and sizes of the state, for one shape."""

    block: primitives.RowBlock
    sums_programs: int
    values_programs: int
    gradient_programs: int
    state_sizes: tuple[int, ...]
    acc: Any  # Triton's dtype
    acc_dtype: torch.dtype


class Inputs(NamedTuple):
    """Features and unit teacher rows of this rank's pairs, ``(B, D)`` each, dense."""

    image: Tensor
    text: Tensor
    image_teacher: Tensor
    text_teacher: Tensor


class State(NamedTuple):
    """Views of the tensor that holds all small buffers of a call; the backward reads ``average``."""

    average: Tensor  # (2, D): m, (1 - a)(c - m)
    sums: Tensor  # (sums_programs, D): sum of (u + v)/2 over the rows of each program
    partials: Tensor  # (4, values_programs): average loss, pairwise loss, |u|, |v|, summed over rows


class Buffers(NamedTuple):
    """Memory that the second launch reads and writes."""

    sums: Tensor  # (num_sums, D): those of the state; over ranks, one row of each rank
    average: Tensor  # (2, D)
    partials: Tensor  # (4, programs)
    results: Tensor  # (D + 4,): m, average loss, pairwise loss, mean |u|, mean |v|; the joint step's has one more
    loss: Tensor  # ()


class Gradients(NamedTuple):
    """Gradients of both feature matrices, ``(B, D)``."""

    image: Tensor
    text: Tensor


def shape_of(image: Tensor, group: str) -> Shape:
    """Sizes of a call, from this rank's features, as plain integers."""
    rows, width = map(int, image.shape)
    return Shape(rows, rows * process_group.world_size(group), width, image.dtype)


@lru_cache
def geometry(shape: Shape) -> Geometry:
    """Launch parameters and sizes of the state."""
    block = primitives.row_block(shape.width)
    blocks = primitives.divide_up(shape.rows, block.ROWS)
    sums_programs, values_programs = _forward_programs(blocks, 4 * shape.width)
    return Geometry(
        block=block,
        sums_programs=sums_programs,
        values_programs=values_programs,
        gradient_programs=min(blocks, _GRADIENT_PROGRAMS),
        state_sizes=primitives.aligned((2 * shape.width, sums_programs * shape.width, 4 * values_programs)),
        acc=primitives.acc_dtype(shape.dtype),
        acc_dtype=primitives.compute_dtype(shape.dtype),
    )


def _forward_programs(blocks: int, row_bytes: int) -> tuple[int, int]:
    """Numbers of programs of the sums and of the values that are predicted to take the least time.

    More programs have fewer blocks of rows each, but every program of the values reads the sums of all.
    """
    candidates = [min(blocks, _PROGRAMS.value >> shift) for shift in range(4)]

    def seconds(programs: tuple[int, int]) -> float:
        in_turn = sum(primitives.divide_up(blocks, count) for count in programs)
        return in_turn * _BLOCK_SECONDS + programs[0] * programs[1] * row_bytes / _CACHE_RATE

    return min(itertools.product(candidates, repeat=2), key=seconds)


@triton.jit
def _row_range(pid, programs, B, ROWS: tl.constexpr):
    """First row of a program, and the row after its last: contiguous rows, a multiple of the block."""
    share = tl.cdiv(tl.cdiv(B, ROWS), programs) * ROWS
    return pid * share, tl.minimum((pid + 1) * share, B)


@triton.jit
def _load_rows(matrix, row0, end, D, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows ``row0 ... row0 + ROWS`` of a ``(..., D)`` matrix, zeros from row ``end`` on and beyond the width."""
    o_row = row0 + tl.arange(0, ROWS)
    o_column = tl.arange(0, WIDTH)
    m_row = (o_row < end)[:, None] & (o_column < D)[None, :]
    return tl.load(matrix + o_row.to(tl.int64)[:, None] * D + o_column[None, :], mask=m_row, other=0.0)


@triton.jit
def _difference_rows(features, teacher, row0, end, D, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """``z = x / max(|x|, 1e-12)``, ``u = z - teacher`` and ``|x|`` of a block of rows; 0 outside of the matrix."""
    ROWS: tl.constexpr = BLOCK.ROWS
    WIDTH: tl.constexpr = BLOCK.WIDTH
    b_x = _load_rows(features, row0, end, D, ROWS, WIDTH).to(ACC)
    b_norm = primitives.row_norms(b_x)
    b_length = tl.broadcast_to(primitives.clamp_norms(b_norm)[:, None], [ROWS, WIDTH])
    b_z = primitives.divide(b_x, b_length)
    return b_z, b_z - _load_rows(teacher, row0, end, D, ROWS, WIDTH), b_norm


@triton.jit
def sums_block(
    pid,
    programs,
    inputs,
    sums,  # (programs, D)
    B,
    D,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``sum_j (u_j + v_j)/2`` over this program's rows, in ascending order."""
    WIDTH: tl.constexpr = BLOCK.WIDTH
    b_acc = tl.zeros([WIDTH], ACC)
    begin, end = _row_range(pid, programs, B, BLOCK.ROWS)
    for row0 in range(begin, end, BLOCK.ROWS):
        _, b_u, _ = _difference_rows(inputs.image, inputs.image_teacher, row0, end, D, BLOCK, ACC)
        _, b_v, _ = _difference_rows(inputs.text, inputs.text_teacher, row0, end, D, BLOCK, ACC)
        b_acc += tl.sum((b_u + b_v) * 0.5, axis=0)
    o_column = tl.arange(0, WIDTH)
    tl.store(sums + pid.to(tl.int64) * D + o_column, b_acc, mask=o_column < D)


@triton.jit
def values_block(
    pid,
    programs,
    inputs,
    previous,  # (D,): m_prev
    buffers,  # sums are (num_sums, D)
    B,
    N,
    D,
    num_sums,
    CONSTANTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """The average vector ``m = a m_prev + (1 - a) c`` with ``c = sums / N``, and the program's partial sums.

    These are ``sum_j |u_j - m|^2 + |v_j - m|^2``, ``sum_j |u_j - v_j|^2``, ``sum_j |u_j|`` and ``sum_j |v_j|``.
    Every program adds all sums in the same order, so that all have the same m without another launch.
    """
    ROWS: tl.constexpr = BLOCK.ROWS
    WIDTH: tl.constexpr = BLOCK.WIDTH
    SUMS: tl.constexpr = 16384 // WIDTH
    o_column = tl.arange(0, WIDTH)
    b_center = tl.zeros([WIDTH], ACC)
    for sum0 in range(0, num_sums, SUMS):
        b_center += tl.sum(_load_rows(buffers.sums, sum0, num_sums, D, SUMS, WIDTH), axis=0)
    b_center = b_center / N.to(ACC)
    b_previous = tl.load(previous + o_column, mask=o_column < D, other=0.0)
    b_m = b_previous * CONSTANTS.DECAY + b_center * CONSTANTS.GROWTH
    if pid == 0:
        tl.store(buffers.average + o_column, b_m, mask=o_column < D)
        tl.store(buffers.average + D + o_column, (b_center - b_m) * CONSTANTS.GROWTH, mask=o_column < D)
        tl.store(buffers.results + o_column, b_m, mask=o_column < D)

    b_average_loss = tl.zeros([ROWS], ACC)
    b_pairwise_loss = tl.zeros([ROWS], ACC)
    b_image_norm = tl.zeros([ROWS], ACC)
    b_text_norm = tl.zeros([ROWS], ACC)
    begin, end = _row_range(pid, programs, B, ROWS)
    for row0 in range(begin, end, ROWS):
        _, b_u, _ = _difference_rows(inputs.image, inputs.image_teacher, row0, end, D, BLOCK, ACC)
        _, b_v, _ = _difference_rows(inputs.text, inputs.text_teacher, row0, end, D, BLOCK, ACC)
        m_row = row0 + tl.arange(0, ROWS) < end
        b_u_to_m, b_v_to_m = b_u - b_m[None, :], b_v - b_m[None, :]
        b_squares = tl.sum(b_u_to_m * b_u_to_m + b_v_to_m * b_v_to_m, axis=1)
        b_average_loss += tl.where(m_row, b_squares, 0.0)
        b_pairwise_loss += tl.sum((b_u - b_v) * (b_u - b_v), axis=1)
        b_image_norm += primitives.row_norms(b_u)
        b_text_norm += primitives.row_norms(b_v)
    tl.store(buffers.partials + pid, tl.sum(b_average_loss, axis=0))
    tl.store(buffers.partials + programs + pid, tl.sum(b_pairwise_loss, axis=0))
    tl.store(buffers.partials + 2 * programs + pid, tl.sum(b_image_norm, axis=0))
    tl.store(buffers.partials + 3 * programs + pid, tl.sum(b_text_norm, axis=0))


@triton.jit
def finish_difference(buffers, B, D, programs, CONSTANTS: tl.constexpr, ACC: tl.constexpr):
    """The loss ``w_avl L_avl + w_pvl L_pvl`` of this rank's rows from the partial sums of all programs.

    Writes the parts too. One program adds in a fixed order, so that the result does not depend on which program it
    is.
    """
    average_loss = _total(buffers.partials, programs) / B.to(ACC)
    pairwise_loss = _total(buffers.partials + programs, programs) / B.to(ACC)
    p_parts = buffers.results + D
    tl.store(p_parts, average_loss)
    tl.store(p_parts + 1, pairwise_loss)
    tl.store(p_parts + 2, _total(buffers.partials + 2 * programs, programs) / B.to(ACC))
    tl.store(p_parts + 3, _total(buffers.partials + 3 * programs, programs) / B.to(ACC))
    return average_loss * CONSTANTS.AVERAGE_WEIGHT + pairwise_loss * CONSTANTS.PAIRWISE_WEIGHT


@triton.jit
def _total(partials, programs):
    """Sum over programs, ``(programs,) -> ()``."""
    o_program = tl.arange(0, _PROGRAMS)
    # From the cache that all programs share: this program's own may hold stale values.
    b_partial = tl.load(partials + o_program, mask=o_program < programs, other=0.0, cache_modifier=".cg")
    return tl.sum(b_partial, axis=0)


@triton.jit
def difference_gradient_block(
    pid,
    programs,
    inputs,
    average,  # (2, D): m, (1 - a)(c - m)
    upstream,
    gradients,
    B,
    D,
    CONSTANTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient of the program's rows, ``du_j = 2/B [w_avl (u_j - m') + w_pvl (u_j - v_j)]`` and ``dv_j`` likewise.

    ``m' = m + (1 - a)(c - m)``, or m if it is a constant. No program reads what another one writes.
    """
    ROWS: tl.constexpr = BLOCK.ROWS
    WIDTH: tl.constexpr = BLOCK.WIDTH
    o_column = tl.arange(0, WIDTH)
    b_m = tl.load(average + o_column, mask=o_column < D, other=0.0)
    if CONSTANTS.MEAN_GRADIENT:
        b_m = b_m + tl.load(average + D + o_column, mask=o_column < D, other=0.0)
    # On W ranks the features' gradients are W times those of the global loss, which turns 2/N into 2/B.
    scale = tl.load(upstream).to(ACC) * CONSTANTS.WEIGHT * 2.0 / B.to(ACC)
    begin, end = _row_range(pid, programs, B, ROWS)
    for row0 in range(begin, end, ROWS):
        b_z, b_u, b_x_norm = _difference_rows(inputs.image, inputs.image_teacher, row0, end, D, BLOCK, ACC)
        b_t, b_v, b_y_norm = _difference_rows(inputs.text, inputs.text_teacher, row0, end, D, BLOCK, ACC)
        b_pair = (b_u - b_v) * CONSTANTS.PAIRWISE_WEIGHT
        m_column = (o_column < D)[None, :]
        b_dz = tl.where(m_column, (b_u - b_m[None, :]) * CONSTANTS.AVERAGE_WEIGHT + b_pair, 0.0)
        b_dt = tl.where(m_column, (b_v - b_m[None, :]) * CONSTANTS.AVERAGE_WEIGHT - b_pair, 0.0)
        _store_gradient(gradients.image, b_z, b_dz, b_x_norm, scale, row0, end, D, BLOCK)
        _store_gradient(gradients.text, b_t, b_dt, b_y_norm, scale, row0, end, D, BLOCK)


@triton.jit
def _store_gradient(gradient, b_z, b_dz, b_norm, scale, row0, end, D, BLOCK: tl.constexpr):
    """``dx = scale (dz - z (z . dz)) / max(|x|, 1e-12)`` of a block of rows."""
    ROWS: tl.constexpr = BLOCK.ROWS
    WIDTH: tl.constexpr = BLOCK.WIDTH
    # Below the clamp z is linear in x, and no component is projected out.
    b_radial = tl.where(b_norm < primitives.CLAMP, 0.0, tl.sum(b_z * b_dz, axis=1))
    b_dx = b_dz - b_z * b_radial[:, None]
    b_dx *= primitives.divide(tl.broadcast_to(scale, [ROWS]), primitives.clamp_norms(b_norm))[:, None]
    o_row = row0 + tl.arange(0, ROWS)
    o_column = tl.arange(0, WIDTH)
    o_gradient = o_row.to(tl.int64)[:, None] * D + o_column[None, :]
    m_store = (o_row < end)[:, None] & (o_column < D)[None, :]
    tl.store(gradient + o_gradient, primitives.round_to(b_dx, gradient.dtype.element_ty), mask=m_store)


# Launched kernels


@triton.jit(do_not_specialize=["B"])
def sums_kernel(
    inputs,
    sums,
    ticket,  # (): finished programs of the next launch
    B,
    D,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``x, y -> sums of (u + v)/2``: :func:`sums_block`."""
    pid = tl.program_id(0)
    sums_block(pid, tl.num_programs(0), inputs, sums, B, D, BLOCK, ACC)
    if pid == 0:
        tl.store(ticket, 0)


@triton.jit(do_not_specialize=["B", "N", "num_sums"])
def values_kernel(
    inputs,
    previous,
    buffers,
    ticket,
    B,
    N,
    D,
    num_sums,
    CONSTANTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``x, y, sums -> m, L``: :func:`values_block`, then :func:`finish_difference` in the last program."""
    programs = tl.num_programs(0)
    values_block(
        tl.program_id(0), programs, inputs, previous, buffers, B, N, D, num_sums, CONSTANTS, BLOCK, ACC
    )  # fmt: skip
    if primitives.is_last(ticket, programs):
        value = finish_difference(buffers, B, D, programs, CONSTANTS, ACC)
        tl.store(buffers.loss, value)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["upstream"])
def difference_gradient_kernel(
    inputs,
    average,
    upstream,
    gradients,
    B,
    D,
    CONSTANTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``x, y, m -> dL/dx, dL/dy``: :func:`difference_gradient_block`."""
    difference_gradient_block(
        tl.program_id(0), tl.num_programs(0), inputs, average, upstream, gradients, B, D, CONSTANTS, BLOCK, ACC
    )  # fmt: skip


# Host


def allocate(shape: Shape, num_results: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialized results of the user and state."""
    plan = geometry(shape)
    results = primitives.empty(num_results, dtype=plan.acc_dtype, device=device)
    return results, primitives.empty(sum(plan.state_sizes), dtype=plan.acc_dtype, device=device)


def gather_sums(sums: Tensor, plan: Geometry, width: int, group: str) -> tuple[Tensor, int]:
    """The sums that the values add, and their number: one row of each rank, or those of this rank's programs."""
    if process_group.world_size(group) == 1:
        return sums, plan.sums_programs
    of_rank = sums[: plan.sums_programs * width].view(-1, width).sum(0)
    sums = process_group.gather(of_rank, group)
    return sums, len(sums)


def parts_of(results: Tensor, width: int) -> Tensor:
    """Average loss, pairwise loss, mean |u| and mean |v|, ``(4,)``."""
    return results[width : width + 4]


def loss_of(parts: Tensor, options: Options) -> Tensor:
    """The global loss from its parts, averaged over all ranks."""
    return options.average_weight * parts[0] + options.pairwise_weight * parts[1]


def launch_forward(
    image: Tensor,
    text: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    average_vector: Tensor,
    decay: float,
    average_weight: float,
    pairwise_weight: float,
    mean_gradient: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the other results ``(D + 4,)`` (see :class:`Buffers`), and the :class:`State` as one tensor."""
    options = Options(decay, average_weight, pairwise_weight, mean_gradient)
    shape = shape_of(image, group)
    plan, device = geometry(shape), image.device
    results, buffer = allocate(shape, shape.width + 4, device)
    loss = primitives.empty(dtype=plan.acc_dtype, device=device)
    ticket = primitives.empty(dtype=torch.int32, device=device)
    state = State._make(buffer.split_with_sizes(plan.state_sizes))
    inputs = Inputs(*map(primitives.dense, (image, text, image_teacher, text_teacher)))
    constants = {"BLOCK": plan.block, "ACC": plan.acc, "num_warps": _NUM_WARPS}
    primitives.launch(
        sums_kernel, plan.sums_programs, inputs, state.sums, ticket, shape.rows, shape.width, **constants
    )
    sums, num_sums = gather_sums(state.sums, plan, shape.width, group)
    primitives.launch(
        values_kernel,
        plan.values_programs,
        *(inputs, primitives.dense(average_vector)),
        *(Buffers(sums, state.average, state.partials, results, loss), ticket),
        *(shape.rows, shape.total, shape.width, num_sums),
        CONSTANTS=options.for_forward(),
        **constants,
    )
    if shape.rows != shape.total:
        parts = parts_of(results, shape.width)
        parts.copy_(process_group.gather(parts, group).mean(0))
        loss = loss_of(parts, options)
    return loss, results, buffer


forward = torch.library.custom_op("dive_fast::difference_loss", launch_forward, mutates_args=())


@forward.register_fake
def _(image: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, group = arguments
    shape = shape_of(image, group)
    results, buffer = allocate(shape, shape.width + 4, image.device)
    return primitives.empty(dtype=results.dtype, device=image.device), results, buffer


def launch_backward(
    upstream: Tensor,
    image: Tensor,
    text: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    state: Tensor,
    decay: float,
    average_weight: float,
    pairwise_weight: float,
    mean_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of both feature matrices."""
    options = Options(decay, average_weight, pairwise_weight, mean_gradient)
    inputs = Inputs(*map(primitives.dense, (image, text, image_teacher, text_teacher)))
    gradients = allocate_gradients(image)
    launch_gradient(upstream, 1.0, inputs, state, options, gradients)
    return gradients.image, gradients.text


backward = torch.library.custom_op("dive_fast::difference_loss_backward", launch_backward, mutates_args=())


@backward.register_fake
def _(upstream: Tensor, image: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    gradients = allocate_gradients(image)
    return gradients.image, gradients.text


def allocate_gradients(image: Tensor) -> Gradients:
    """Uninitialized gradients of the features."""
    return Gradients(*(primitives.empty(*image.shape, dtype=image.dtype, device=image.device) for _ in range(2)))


def launch_gradient(
    upstream: Tensor, weight: float, inputs: Inputs, average: Tensor, options: Options, gradients: Gradients
) -> None:
    """Writes the gradients of ``weight * loss``, in one launch; ``average`` begins with those of the state."""
    shape = shape_of(inputs.image, "")
    plan = geometry(shape)
    primitives.launch(
        difference_gradient_kernel,
        plan.gradient_programs,
        *(inputs, average, upstream, gradients, shape.rows, shape.width),
        CONSTANTS=options.for_gradient(weight),
        BLOCK=plan.block,
        ACC=plan.acc,
        num_warps=_NUM_WARPS,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, image_teacher, text_teacher, _, *options, _ = inputs
    _, results, state = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(results, state)
    ctx.save_for_backward(image, text, image_teacher, text_teacher, state)
    ctx.options = options


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * 10
    run = direct.first_order(launch_backward, backward, upstream)
    return *run(upstream, *ctx.saved_tensors, *ctx.options), *([None] * 8)


forward.register_autograd(_backward, setup_context=_setup_context)
apply = direct.differentiable(launch_forward, _backward, _setup_context)
