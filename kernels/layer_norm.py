"""Residual addition and layer norm in Triton, one pass each way.

Each row, with c = branch + branch_bias, everything in fp32::

    s = round(x + c)                                the residual stream, in the dtype of x
    mu = mean(s)     r = 1 / sqrt(mean((s - mu)^2) + eps)     h = (s - mu) r      y = round(h weight + bias)

The mean comes first and then the centered squares, from registers, so that no digits cancel. With the gradients ds
of s and dy of y, and g = dy weight::

    dx = dc = (g - mean(g) - h mean(g h)) r + ds
    dbranch_bias = column sums of dx      dweight = column sums of dy h      dbias = column sums of dy

The forward reads x and branch and writes s and y; the backward reads s, dy and ds and writes dx, and dbranch only
if its dtype differs. Between them only s, mu and r are kept. Sums of columns add fp32 values, those of
``dbranch_bias`` before dx is rounded.

A program holds complete rows in registers and iterates over its range of rows; the loads of its next rows (two
stages) are under way while it reduces the current ones.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels import column_sums, direct, primitives

# Most programs of a launch. The backward has fewer, because each of them writes three rows of partial sums.
_FORWARD_PROGRAMS = 4224
_BACKWARD_PROGRAMS = 1056


class Sums(NamedTuple):
    """Which column sums the backward computes; they are stored in this order."""

    BRANCH_BIAS: bool
    WEIGHT: bool
    BIAS: bool


@triton.jit
def _load_row(vector, o_column, width, ACC: tl.constexpr):
    """A vector over columns, ``(W,)``, zeros beyond the width."""
    return tl.load(vector + o_column, mask=o_column < width, other=0.0).to(ACC)[None, :]


@triton.jit(
    do_not_specialize=["rows", "share"],
    do_not_specialize_on_alignment=["branch_bias", "weight", "bias", "mean", "reciprocal"],
)
def layer_norm_kernel(
    x,  # (R, W)
    branch,  # (R, W) or None
    branch_bias,  # (W,) or None
    weight,  # (W,)
    bias,  # (W,)
    total,  # (R, W): s, or None without a branch
    normed,  # (R, W): y
    mean,  # (R,): mu
    reciprocal,  # (R,): r
    rows,
    width,
    share,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``s = x + branch + branch_bias`` and ``y = (s - mu) r weight + bias``."""
    ROWS: tl.constexpr = BLOCK.ROWS
    WIDTH: tl.constexpr = BLOCK.WIDTH
    o_column = tl.arange(0, WIDTH)
    m_column = o_column < width
    b_weight = _load_row(weight, o_column, width, ACC)
    b_bias = _load_row(bias, o_column, width, ACC)
    if branch_bias is not None:
        b_branch_bias = _load_row(branch_bias, o_column, width, ACC)
    b_one = tl.full([ROWS], 1.0, ACC)
    b_width = b_one * width
    end = tl.minimum((tl.program_id(0) + 1) * share, rows)
    for row0 in tl.range(tl.program_id(0) * share, end, ROWS, num_stages=2):
        o_row = row0 + tl.arange(0, ROWS)
        m_row = o_row < end
        o_x = o_row.to(tl.int64)[:, None] * width + o_column[None, :]
        m_x = m_row[:, None] & m_column[None, :]
        b_s = tl.load(x + o_x, mask=m_x, other=0.0).to(ACC)
        if branch is not None:
            b_s += tl.load(branch + o_x, mask=m_x, other=0.0).to(ACC)
            if branch_bias is not None:
                b_s += b_branch_bias
            b_total = primitives.round_to(b_s, total.dtype.element_ty)
            tl.store(total + o_x, b_total, mask=m_x)
            b_s = b_total.to(ACC)
        b_mean = primitives.divide(tl.sum(b_s, axis=1), b_width)
        b_centered = tl.where(m_column[None, :], b_s - b_mean[:, None], 0.0)
        b_variance = primitives.divide(tl.sum(b_centered * b_centered, axis=1), b_width)
        b_reciprocal = primitives.divide(b_one, primitives.square_root(b_variance + EPS))
        b_y = b_centered * b_reciprocal[:, None] * b_weight + b_bias
        tl.store(normed + o_x, primitives.round_to(b_y, normed.dtype.element_ty), mask=m_x)
        tl.store(mean + o_row, b_mean, mask=m_row)
        tl.store(reciprocal + o_row, b_reciprocal, mask=m_row)


@triton.jit(
    do_not_specialize=["rows", "share"],
    do_not_specialize_on_alignment=["weight", "mean", "reciprocal"],
)
def layer_norm_gradient_kernel(
    total,  # (R, W): s
    mean,  # (R,): mu
    reciprocal,  # (R,): r
    weight,  # (W,)
    dnormed,  # (R, W): dy
    dtotal,  # (R, W): ds, or None
    dx,  # (R, W)
    dbranch,  # (R, W), or None if it is dx
    partials,  # (programs, number of sums, W), or None
    rows,
    width,
    share,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``dx = (g - mean(g) - h mean(g h)) r + ds`` with ``g = dy weight``; column sums of dx, dy h and dy."""
    ROWS: tl.constexpr = BLOCK.ROWS
    WIDTH: tl.constexpr = BLOCK.WIDTH
    pid = tl.program_id(0)
    o_column = tl.arange(0, WIDTH)
    m_column = o_column < width
    b_weight = _load_row(weight, o_column, width, ACC)
    b_width = tl.full([ROWS], 1.0, ACC) * width
    b_branch_bias_sum = tl.zeros([ROWS, WIDTH], ACC)
    b_weight_sum = tl.zeros([ROWS, WIDTH], ACC)
    b_bias_sum = tl.zeros([ROWS, WIDTH], ACC)
    end = tl.minimum((pid + 1) * share, rows)
    for row0 in tl.range(pid * share, end, ROWS, num_stages=2):
        o_row = row0 + tl.arange(0, ROWS)
        m_row = o_row < end
        o_x = o_row.to(tl.int64)[:, None] * width + o_column[None, :]
        m_x = m_row[:, None] & m_column[None, :]
        b_s = tl.load(total + o_x, mask=m_x, other=0.0).to(ACC)
        b_dy = tl.load(dnormed + o_x, mask=m_x, other=0.0).to(ACC)
        b_mean = tl.load(mean + o_row, mask=m_row, other=0.0)
        b_reciprocal = tl.load(reciprocal + o_row, mask=m_row, other=0.0)
        # Beyond the width g is 0, and behind the last row everything is.
        b_h = (b_s - b_mean[:, None]) * b_reciprocal[:, None]
        b_g = b_dy * b_weight
        b_g_mean = primitives.divide(tl.sum(b_g, axis=1), b_width)
        b_gh_mean = primitives.divide(tl.sum(b_g * b_h, axis=1), b_width)
        b_dx = (b_g - b_g_mean[:, None] - b_h * b_gh_mean[:, None]) * b_reciprocal[:, None]
        if dtotal is not None:
            b_dx += tl.load(dtotal + o_x, mask=m_x, other=0.0).to(ACC)
        tl.store(dx + o_x, primitives.round_to(b_dx, dx.dtype.element_ty), mask=m_x)
        if dbranch is not None:
            tl.store(dbranch + o_x, primitives.round_to(b_dx, dbranch.dtype.element_ty), mask=m_x)
        if SUMS.BRANCH_BIAS:
            b_branch_bias_sum += b_dx
        if SUMS.WEIGHT:
            b_weight_sum += b_dy * b_h
        if SUMS.BIAS:
            b_bias_sum += b_dy
    count: tl.constexpr = SUMS.BRANCH_BIAS + SUMS.WEIGHT + SUMS.BIAS
    if SUMS.BRANCH_BIAS:
        b_sum = tl.sum(b_branch_bias_sum, axis=0)
        column_sums.store_partial_sum(partials, pid, count, 0, b_sum, o_column, width)
    if SUMS.WEIGHT:
        b_sum = tl.sum(b_weight_sum, axis=0)
        column_sums.store_partial_sum(partials, pid, count, SUMS.BRANCH_BIAS, b_sum, o_column, width)
    if SUMS.BIAS:
        b_sum = tl.sum(b_bias_sum, axis=0)
        column_sums.store_partial_sum(partials, pid, count, count - 1, b_sum, o_column, width)


# Host


class _Rows(NamedTuple):
    """Sizes of a launch."""

    rows: int
    width: int
    split: column_sums.RowSplit
    constants: dict[str, Any]


def _rows_of(x: Tensor, max_programs: int) -> _Rows:
    width = x.shape[-1]
    rows = x.numel() // width
    block = primitives.row_block(width)
    # At most four warps share a row of 1024; wider rows would need most of a thread's registers.
    num_warps = 4 if block.WIDTH <= 1024 else 8
    constants = {"BLOCK": block, "ACC": primitives.acc_dtype(x.dtype), "num_warps": num_warps}
    return _Rows(rows, width, column_sums.split_rows(rows, block.ROWS, max_programs), constants)


class _Norm(NamedTuple):
    """Outputs of the forward; ``total`` is None without a branch."""

    total: Tensor | None
    normed: Tensor
    mean: Tensor
    reciprocal: Tensor


def _allocate(x: Tensor, has_branch: bool, dtype: torch.dtype) -> _Norm:
    statistics = [
        primitives.empty(*x.shape[:-1], dtype=primitives.compute_dtype(x.dtype), device=x.device) for _ in range(2)
    ]
    return _Norm(
        primitives.empty(*x.shape, dtype=x.dtype, device=x.device) if has_branch else None,
        primitives.empty(*x.shape, dtype=dtype, device=x.device),
        *statistics,
    )


def _launch_forward(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> _Norm:
    rows, width, split, constants = _rows_of(x, _FORWARD_PROGRAMS)
    outputs = _allocate(x, branch is not None, dtype)
    if rows:
        primitives.launch(
            layer_norm_kernel,
            split.programs,
            *(primitives.dense(x), None if branch is None else primitives.dense(branch)),
            *(None if branch_bias is None else branch_bias.contiguous(), weight.contiguous(), bias.contiguous()),
            *outputs,
            *(rows, width, split.share),
            EPS=eps,
            **constants,
        )
    return outputs


def launch_sum_and_norm(
    x: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x + branch + branch_bias``, its norm, and each row's mean and reciprocal deviation, in one launch."""
    total, *others = _launch_forward(x, branch, branch_bias, weight, bias, eps, dtype)
    assert total is not None
    return total, *others  # type: ignore[return-value]


def launch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x, and each row's mean and reciprocal deviation, in one launch."""
    _, *outputs = _launch_forward(x, None, None, weight, bias, eps, dtype)
    return tuple(outputs)  # type: ignore[return-value]


def launch_backward(
    total: Tensor,
    mean: Tensor,
    reciprocal: Tensor,
    weight: Tensor,
    dnormed: Tensor,
    dtotal: Tensor | None,
    branch_dtype: torch.dtype | None,
    branch_bias_sum: torch.dtype | None,
    weight_sum: torch.dtype | None,
    bias_sum: torch.dtype | None,
) -> list[Tensor]:
    """``[dx]``, dbranch if it has a dtype, and each column sum that has one; one or two launches."""
    rows, width, split, constants = _rows_of(total, _BACKWARD_PROGRAMS)
    gradients = _allocate_gradients(total, branch_dtype)
    dtypes = branch_bias_sum, weight_sum, bias_sum
    needed = Sums(*(dtype is not None for dtype in dtypes))
    partials = None
    if any(needed):
        partials = primitives.empty(split.programs, sum(needed), width, dtype=mean.dtype, device=total.device)
    if rows:
        primitives.launch(
            layer_norm_gradient_kernel,
            split.programs,
            *(primitives.dense(total), mean, reciprocal, weight.contiguous(), primitives.dense(dnormed)),
            *(None if dtotal is None else primitives.dense(dtotal), gradients[0]),
            *(gradients[1] if len(gradients) > 1 else None, partials, rows, width, split.share),
            SUMS=needed,
            **constants,
        )
    if partials is None:
        return gradients
    return [
        *gradients,
        *column_sums.launch_column_sums(partials, [dtype for dtype in dtypes if dtype is not None]),
    ]


def _allocate_gradients(total: Tensor, branch_dtype: torch.dtype | None) -> list[Tensor]:
    dtypes = [total.dtype] if branch_dtype is None else [total.dtype, branch_dtype]
    return [primitives.empty(*total.shape, dtype=dtype, device=total.device) for dtype in dtypes]


forward = torch.library.custom_op("dive_fast::add_layer_norm", launch_sum_and_norm, mutates_args=())
norm_forward = torch.library.custom_op("dive_fast::layer_norm", launch_norm, mutates_args=())
backward = torch.library.custom_op("dive_fast::layer_norm_backward", launch_backward, mutates_args=())


@forward.register_fake
def _(
    x: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    return tuple(_allocate(x, True, dtype))  # type: ignore[arg-type]


@norm_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(_allocate(x, False, dtype)[1:])  # type: ignore[arg-type]


@backward.register_fake
def _(
    total: Tensor,
    mean: Tensor,
    reciprocal: Tensor,
    weight: Tensor,
    dnormed: Tensor,
    dtotal: Tensor | None,
    branch_dtype: torch.dtype | None,
    *sums: torch.dtype | None,
) -> list[Tensor]:
    width, device = total.shape[-1], total.device
    columns = [primitives.empty(width, dtype=dtype, device=device) for dtype in sums if dtype is not None]
    return _allocate_gradients(total, branch_dtype) + columns


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, branch_bias, weight, bias, *_ = inputs
    total, _, mean, reciprocal = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, reciprocal)
    ctx.save_for_backward(total, mean, reciprocal, weight)
    ctx.branch_dtype = branch.dtype
    ctx.sum_dtypes = None if branch_bias is None else branch_bias.dtype, weight.dtype, bias.dtype


def _backward(ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dnormed is None:
        return _addition_backward(ctx, dtotal)
    total, mean, reciprocal, weight = ctx.saved_tensors
    _, for_branch, *for_sums = ctx.needs_input_grad[:5]
    branch_dtype = ctx.branch_dtype if for_branch and ctx.branch_dtype != total.dtype else None
    sum_dtypes = [dtype if needed else None for dtype, needed in zip(ctx.sum_dtypes, for_sums)]
    run = direct.first_order(launch_backward, backward, dnormed, total)
    dx, *others = run(total, mean, reciprocal, weight, dnormed, dtotal, branch_dtype, *sum_dtypes)
    dbranch = dx if branch_dtype is None else others.pop(0)
    sums = [None if dtype is None else others.pop(0) for dtype in sum_dtypes]
    return dx, dbranch, *sums, None, None


def _addition_backward(ctx: Any, dtotal: Tensor | None) -> tuple[Any, ...]:
    """The backward where nothing depends on the norm."""
    if dtotal is None:
        return (None,) * 7
    dbranch_bias = None
    if ctx.needs_input_grad[2]:
        rows = dtotal.flatten(0, -2) if dtotal.ndim > 1 else dtotal[None]
        dbranch_bias = rows.sum(0, dtype=primitives.compute_dtype(dtotal.dtype)).to(ctx.sum_dtypes[0])
    return dtotal, dtotal.to(ctx.branch_dtype), dbranch_bias, None, None, None, None


forward.register_autograd(_backward, setup_context=_setup_context)
_apply = direct.differentiable(launch_sum_and_norm, _backward, _setup_context)


class _InputAndNorm(torch.autograd.Function):
    # The input is an output too, so that its gradient arrives here and is added in the same pass. A custom op
    # cannot return its input.
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        normed, mean, reciprocal = _norm(x, weight, bias, eps, dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean, reciprocal, weight)
        ctx.sum_dtypes = weight.dtype, bias.dtype
        return x.view_as(x), normed

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None
    ) -> tuple[Any, ...]:
        if dnormed is None:
            return dtotal, None, None, None, None
        x, mean, reciprocal, weight = ctx.saved_tensors
        sum_dtypes = [
            dtype if needed else None for dtype, needed in zip(ctx.sum_dtypes, ctx.needs_input_grad[1:3])
        ]
        run = direct.first_order(launch_backward, backward, dnormed, x)
        dx, *others = run(x, mean, reciprocal, weight, dnormed, dtotal, None, None, *sum_dtypes)
        sums = [None if dtype is None else others.pop(0) for dtype in sum_dtypes]
        return dx, *sums, None, None


def _norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x and each row's mean and reciprocal deviation, without a gradient."""
    run = launch_norm if direct.is_eager(x, weight, bias) else norm_forward
    return run(x, weight, bias, eps, dtype)  # type: ignore[no-any-return, operator]


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``x + branch + branch_bias`` and its norm, with their gradient; arguments are checked by the caller."""
    if branch is None:
        if torch.is_grad_enabled():
            return _InputAndNorm.apply(x, weight, bias, eps, dtype)  # type: ignore[no-any-return, no-untyped-call]
        return x, _norm(x, weight, bias, eps, dtype)[0]
    tensors = [tensor for tensor in (x, branch, branch_bias, weight, bias) if tensor is not None]
    run = _apply if direct.is_eager(*tensors) else forward
    total, normed, _, _ = run(x, branch, branch_bias, weight, bias, eps, dtype)
    return total, normed
