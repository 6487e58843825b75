"""Average and pairwise vector loss in Triton: two launches forward, one backward, no gradient kept between.

With u_j = unit(x_j) - teacher, v_j likewise for texts, N pairs over all ranks, decay a::

    c     = 1/N sum_j (u_j + v_j)/2         m = a m_prev + (1 - a) c
    L     = w_avl 1/N sum_j (|u_j - m|^2 + |v_j - m|^2) + w_pvl 1/N sum_j |u_j - v_j|^2

1. *Sums*: each program normalises and subtracts some rows, and stores its own sum of (u + v)/2.
2. *Values*: each program adds all those sums, so that it knows m, and goes over some rows again; the last one to
   finish adds the parts of all. Over ranks the sums are gathered before and the parts after.
3. *Gradient*, in the backward, from the inputs once more, with the upstream gradient applied in fp32 before
   anything is rounded to the features' dtype, where it would underflow at |u| = 3e-3::

    dL/du_j = 2/N [ w_avl (u_j - m - (1 - a)(c - m)) + w_pvl (u_j - v_j) ]

   The term with c is the batch's share of m: dm = -4 w_avl (c - m), of which each u_j and v_j gets (1 - a)/(2N).
   It is left out when m is a constant (``mean_gradient=False``). Then through the normalisation as in
   :mod:`dive_fast.kernels.contrastive`. Teachers and m_prev get no gradient.

Normalising divides by the norm, correctly rounded: differences of 1e-3 inherit the rounding of unit rows.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels import primitives, process_group

# Programs of the row kernels at most: enough to fill a GPU, few since each reads the sums of all.
_PROGRAMS = tl.constexpr(128)
_PROGRAMS_OF_SMALL_BATCH = 64
_SMALL_BATCH = 4096
_NUM_WARPS = 8


class Options(NamedTuple):
    """Constants of the method, compiled into the kernels."""

    decay: float
    average_weight: float
    pairwise_weight: float
    mean_gradient: bool

    def constants(self) -> dict[str, Any]:
        """As the kernels name them; ``1 - decay`` is rounded once, not twice."""
        return {
            "DECAY": float(self.decay),
            "GROWTH": 1.0 - self.decay,
            "AVERAGE_WEIGHT": float(self.average_weight),
            "PAIRWISE_WEIGHT": float(self.pairwise_weight),
        }


class Shape(NamedTuple):
    """Of one call: B rows of this rank, N over all ranks, D columns."""

    rows: int
    total: int
    width: int
    dtype: torch.dtype

    @property
    def programs(self) -> int:
        """Programs of each of the three kernels."""
        most = _PROGRAMS_OF_SMALL_BATCH if self.rows <= _SMALL_BATCH else _PROGRAMS.value
        return min(triton.cdiv(self.rows, primitives.row_block(self.width)["ROWS"]), most)


def shape_of(image: Tensor, group: str) -> Shape:
    """Sizes from this rank's features."""
    rows, width = image.shape
    return Shape(rows, rows * process_group.world_size(group), width, image.dtype)


# One program's share of the rows: contiguous, a whole number of blocks.


@triton.jit
def _share(pid, programs, B, ROWS: tl.constexpr):
    share = tl.cdiv(tl.cdiv(B, ROWS), programs) * ROWS
    return pid * share, tl.minimum((pid + 1) * share, B)


@triton.jit
def _load_rows(matrix, row0, end, D, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = row0 + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < end)[:, None] & (column < D)[None, :]
    return tl.load(matrix + row.to(tl.int64)[:, None] * D + column[None, :], mask=inside, other=0.0)


@triton.jit
def _differences(features, teacher, row0, end, D, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """Unit rows, difference vectors, and what F.normalize divides by; zeros beyond the edge."""
    x = _load_rows(features, row0, end, D, ROWS, WIDTH).to(ACC)
    norm = primitives.norms(x)
    z = primitives.divide(x, tl.broadcast_to(primitives.clamped(norm)[:, None], [ROWS, WIDTH]))
    return z, z - _load_rows(teacher, row0, end, D, ROWS, WIDTH), norm


@triton.jit
def sums_block(
    pid,
    programs,
    image,
    text,
    image_teacher,
    text_teacher,
    sums,  # (programs, D)
    B,
    D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    acc = tl.zeros([WIDTH], ACC)
    begin, end = _share(pid, programs, B, ROWS)
    for row0 in range(begin, end, ROWS):
        _, u, _ = _differences(image, image_teacher, row0, end, D, ROWS, WIDTH, ACC)
        _, v, _ = _differences(text, text_teacher, row0, end, D, ROWS, WIDTH, ACC)
        acc += tl.sum((u + v) * 0.5, axis=0)
    column = tl.arange(0, WIDTH)
    tl.store(sums + pid.to(tl.int64) * D + column, acc, mask=column < D)


@triton.jit
def values_block(
    pid,
    programs,
    image,
    text,
    image_teacher,
    text_teacher,
    previous,
    sums,  # (num_sums, D)
    average,  # (2, D): m, and (1 - a)(c - m)
    partials,  # (4, programs)
    B,
    N,
    D,
    num_sums,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    DECAY: tl.constexpr,
    GROWTH: tl.constexpr,
    ACC: tl.constexpr,
):
    PARTS: tl.constexpr = 16384 // WIDTH
    column = tl.arange(0, WIDTH)
    center = tl.zeros([WIDTH], ACC)
    for part in range(0, num_sums, PARTS):
        center += tl.sum(_load_rows(sums, part, num_sums, D, PARTS, WIDTH), axis=0)
    center = center / N.to(ACC)
    m = tl.load(previous + column, mask=column < D, other=0.0) * DECAY + center * GROWTH
    if pid == 0:
        tl.store(average + column, m, mask=column < D)
        tl.store(average + D + column, (center - m) * GROWTH, mask=column < D)

    average_loss = tl.zeros([ROWS], ACC)
    pairwise_loss = tl.zeros([ROWS], ACC)
    image_norm = tl.zeros([ROWS], ACC)
    text_norm = tl.zeros([ROWS], ACC)
    begin, end = _share(pid, programs, B, ROWS)
    for row0 in range(begin, end, ROWS):
        _, u, _ = _differences(image, image_teacher, row0, end, D, ROWS, WIDTH, ACC)
        _, v, _ = _differences(text, text_teacher, row0, end, D, ROWS, WIDTH, ACC)
        inside = row0 + tl.arange(0, ROWS) < end
        to_m = tl.sum((u - m[None, :]) * (u - m[None, :]) + (v - m[None, :]) * (v - m[None, :]), axis=1)
        average_loss += tl.where(inside, to_m, 0.0)
        pairwise_loss += tl.sum((u - v) * (u - v), axis=1)
        image_norm += primitives.norms(u)
        text_norm += primitives.norms(v)
    tl.store(partials + pid, tl.sum(average_loss, axis=0))
    tl.store(partials + programs + pid, tl.sum(pairwise_loss, axis=0))
    tl.store(partials + 2 * programs + pid, tl.sum(image_norm, axis=0))
    tl.store(partials + 3 * programs + pid, tl.sum(text_norm, axis=0))


@triton.jit
def finish_difference(
    partials,
    parts,  # (4,): average loss, pairwise loss, mean |u|, mean |v| of this rank
    B,
    programs,
    AVERAGE_WEIGHT: tl.constexpr,
    PAIRWISE_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Loss of this rank's rows, from all programs' partial sums, in an order that does not vary."""
    average_loss = _total(partials, programs) / B.to(ACC)
    pairwise_loss = _total(partials + programs, programs) / B.to(ACC)
    tl.store(parts, average_loss)
    tl.store(parts + 1, pairwise_loss)
    tl.store(parts + 2, _total(partials + 2 * programs, programs) / B.to(ACC))
    tl.store(parts + 3, _total(partials + 3 * programs, programs) / B.to(ACC))
    return average_loss * AVERAGE_WEIGHT + pairwise_loss * PAIRWISE_WEIGHT


@triton.jit
def _total(partials, programs):
    program = tl.arange(0, _PROGRAMS)
    # From the cache that all programs share: this one's own may hold what was there before.
    part = tl.load(partials + program, mask=program < programs, other=0.0, cache_modifier=".cg")
    return tl.sum(part, axis=0)


@triton.jit
def difference_gradient_block(
    pid,
    programs,
    image,
    text,
    image_teacher,
    text_teacher,
    average,
    upstream,
    image_gradient,  # (B, D)
    text_gradient,
    B,
    D,
    WEIGHT: tl.constexpr,
    AVERAGE_WEIGHT: tl.constexpr,
    PAIRWISE_WEIGHT: tl.constexpr,
    MEAN_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    column = tl.arange(0, WIDTH)
    m = tl.load(average + column, mask=column < D, other=0.0)
    if MEAN_GRADIENT:
        m = m + tl.load(average + D + column, mask=column < D, other=0.0)
    # On W ranks the features' gradients are W times those of the global loss, so N is B here.
    scale = tl.load(upstream).to(ACC) * WEIGHT * 2.0 / B.to(ACC)
    begin, end = _share(pid, programs, B, ROWS)
    for row0 in range(begin, end, ROWS):
        z, u, x_norm = _differences(image, image_teacher, row0, end, D, ROWS, WIDTH, ACC)
        t, v, y_norm = _differences(text, text_teacher, row0, end, D, ROWS, WIDTH, ACC)
        pair = (u - v) * PAIRWISE_WEIGHT
        inside = (column < D)[None, :]
        dz = tl.where(inside, (u - m[None, :]) * AVERAGE_WEIGHT + pair, 0.0)
        dt = tl.where(inside, (v - m[None, :]) * AVERAGE_WEIGHT - pair, 0.0)
        _store_gradient(image_gradient, z, dz, x_norm, scale, row0, end, D, ROWS, WIDTH)
        _store_gradient(text_gradient, t, dt, y_norm, scale, row0, end, D, ROWS, WIDTH)


@triton.jit
def _store_gradient(gradient, z, dz, norm, scale, row0, end, D, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    # Below the clamp z is linear in x and nothing is projected out.
    along = tl.where(norm < primitives.CLAMP, 0.0, tl.sum(z * dz, axis=1))
    dx = (dz - z * along[:, None]) * primitives.divide(tl.broadcast_to(scale, [ROWS]), primitives.clamped(norm))[
        :, None
    ]
    row = row0 + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    place = row.to(tl.int64)[:, None] * D + column[None, :]
    inside = (row < end)[:, None] & (column < D)[None, :]
    tl.store(gradient + place, primitives.rounded(dx, gradient.dtype.element_ty), mask=inside)


# Launches


@triton.jit(do_not_specialize=["B"])
def sums_kernel(
    image,
    text,
    image_teacher,
    text_teacher,
    sums,
    ticket,  # (): programs of the next launch that are done
    B,
    D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    sums_block(pid, tl.num_programs(0), image, text, image_teacher, text_teacher, sums, B, D, ROWS, WIDTH, ACC)
    if pid == 0:
        tl.store(ticket, 0)


@triton.jit(do_not_specialize=["B", "N", "num_sums"])
def values_kernel(
    image,
    text,
    image_teacher,
    text_teacher,
    previous,
    sums,
    average,
    partials,
    parts,
    loss,
    ticket,
    B,
    N,
    D,
    num_sums,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    DECAY: tl.constexpr,
    GROWTH: tl.constexpr,
    AVERAGE_WEIGHT: tl.constexpr,
    PAIRWISE_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
):
    programs = tl.num_programs(0)
    values_block(
        tl.program_id(0), programs, image, text, image_teacher, text_teacher, previous, sums, average, partials,
        B, N, D, num_sums, ROWS, WIDTH, DECAY, GROWTH, ACC,
    )  # fmt: skip
    if primitives.is_last(ticket, programs):
        value = finish_difference(partials, parts, B, programs, AVERAGE_WEIGHT, PAIRWISE_WEIGHT, ACC)
        tl.store(loss, value)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["upstream"])
def difference_gradient_kernel(
    image,
    text,
    image_teacher,
    text_teacher,
    average,
    upstream,
    image_gradient,
    text_gradient,
    B,
    D,
    WEIGHT: tl.constexpr,
    AVERAGE_WEIGHT: tl.constexpr,
    PAIRWISE_WEIGHT: tl.constexpr,
    MEAN_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    difference_gradient_block(
        tl.program_id(0), tl.num_programs(0), image, text, image_teacher, text_teacher, average, upstream,
        image_gradient, text_gradient, B, D, WEIGHT, AVERAGE_WEIGHT, PAIRWISE_WEIGHT, MEAN_GRADIENT, ROWS, WIDTH,
        ACC,
    )  # fmt: skip


# Host


class Buffers(NamedTuple):
    """What a call allocates; the backward needs ``average``."""

    sums: Tensor  # (programs, D)
    average: Tensor  # (2, D)
    partials: Tensor  # (4, programs)
    parts: Tensor  # (4,)
    loss: Tensor  # ()


def buffers(shape: Shape, image: Tensor) -> Buffers:
    """Outputs and scratch of the forward, unwritten."""
    dtype = primitives.computing_dtype(image.dtype)
    sizes = (shape.programs, shape.width), (2, shape.width), (4, shape.programs), (4,), ()
    return Buffers(*(primitives.empty(*size, dtype=dtype, device=image.device) for size in sizes))


def gather_sums(sums: Tensor, group: str) -> Tensor:
    """One row of sums per rank, unless this rank is alone: ``(programs, D) -> (W, D)``."""
    return sums if process_group.world_size(group) == 1 else process_group.gather(sums.sum(0), group)


def loss_of(parts: Tensor, options: Options) -> Tensor:
    """The loss from its parts over all ranks."""
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
    """Loss, its parts with mean |u| and |v|, and the average vector with what its gradient needs."""
    options = Options(decay, average_weight, pairwise_weight, mean_gradient)
    shape = shape_of(image, group)
    made = buffers(shape, image)
    inputs = [primitives.dense(tensor) for tensor in (image, text, image_teacher, text_teacher)]
    constants = {**primitives.row_block(shape.width), "ACC": primitives.acc(shape.dtype), "num_warps": _NUM_WARPS}
    ticket = primitives.empty(dtype=torch.int32, device=image.device)
    primitives.launch(
        sums_kernel, shape.programs, *inputs, made.sums, ticket, shape.rows, shape.width, **constants
    )
    sums = gather_sums(made.sums, group)
    primitives.launch(
        values_kernel,
        shape.programs,
        *(
            *inputs,
            primitives.dense(average_vector),
            sums,
            made.average,
            made.partials,
            made.parts,
            made.loss,
            ticket,
        ),
        *(shape.rows, shape.total, shape.width, len(sums)),
        **options.constants(),
        **constants,
    )
    if process_group.world_size(group) == 1:
        return made.loss, made.parts, made.average
    parts = process_group.gather(made.parts, group).mean(0)
    return loss_of(parts, options), parts, made.average


forward = torch.library.custom_op("dive_fast::difference_loss", launch_forward, mutates_args=())


@forward.register_fake
def _(image: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    made = buffers(shape_of(image, ""), image)
    return made.loss, made.parts, made.average


def launch_backward(
    upstream: Tensor,
    image: Tensor,
    text: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    average: Tensor,
    decay: float,
    average_weight: float,
    pairwise_weight: float,
    mean_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of both feature matrices."""
    options = Options(decay, average_weight, pairwise_weight, mean_gradient)
    return gradient(upstream, 1.0, image, text, image_teacher, text_teacher, average, options)


backward = torch.library.custom_op("dive_fast::difference_loss_backward", launch_backward, mutates_args=())


@backward.register_fake
def _(upstream: Tensor, image: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return gradients(image)


def gradients(image: Tensor) -> tuple[Tensor, Tensor]:
    """Unwritten gradients of the features."""
    return tuple(primitives.empty(*image.shape, dtype=image.dtype, device=image.device) for _ in range(2))  # type: ignore[return-value]


def gradient(
    upstream: Tensor,
    weight: float,
    image: Tensor,
    text: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    average: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``weight * loss``, in one launch."""
    shape = shape_of(image, "")
    made = gradients(image)
    inputs = [primitives.dense(tensor) for tensor in (image, text, image_teacher, text_teacher)]
    primitives.launch(
        difference_gradient_kernel,
        shape.programs,
        *(*inputs, average, upstream, *made, shape.rows, shape.width),
        **gradient_constants(weight, options),
        **primitives.row_block(shape.width),
        ACC=primitives.acc(shape.dtype),
        num_warps=_NUM_WARPS,
    )
    return made


def gradient_constants(weight: float, options: Options) -> dict[str, Any]:
    """Constants of :func:`difference_gradient_block`."""
    return {
        "WEIGHT": float(weight),
        "AVERAGE_WEIGHT": float(options.average_weight),
        "PAIRWISE_WEIGHT": float(options.pairwise_weight),
        "MEAN_GRADIENT": options.mean_gradient,
    }


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, image_teacher, text_teacher, _, *options, _ = inputs
    _, parts, average = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(parts, average)
    ctx.save_for_backward(image, text, image_teacher, text_teacher, average)
    ctx.options = options


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * 10
    return *backward(upstream, *ctx.saved_tensors, *ctx.options), *([None] * 8)


forward.register_autograd(_backward, setup_context=_setup_context)
