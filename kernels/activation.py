"""The activation of an MLP in Triton, together with the bias of the layer before it: one pass each way.

With z = x + bias, all three activations are ``z g(z)`` with a gate g between 0 and 1::

    quick_gelu    g = sigmoid(1.702 z)                                  g' = 1.702 g (1 - g)
    gelu          g = (1 + erf(z / sqrt 2)) / 2                         g' = exp(-z^2 / 2) / sqrt(2 pi)
    gelu_tanh     g = sigmoid(v),  v = sqrt(8 / pi) (z + 0.044715 z^3)  g' = v' g (1 - g)

    y = z g      dx = dy (g + z g')      dbias = column sums of dx

The last gate is ``(1 + tanh(v / 2)) / 2``, written without the cancellation at negative z. All is computed in
fp32; ``y`` and ``dx`` are rounded once, and ``dbias`` adds the values of dx before they are rounded. The forward
reads x and writes y; the backward reads x and dy and writes dx. Infinite inputs behave as in PyTorch's modules:
``-inf`` gives NaN, because the product is ``-inf * 0``.

A program works on a block of columns, whose bias it reads once, and iterates over its rows.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels import column_sums, direct, primitives

_NUM_WARPS = 4
# Most programs of a launch: a few waves on the largest GPUs, and few enough that partial sums cost little.
_MAX_PROGRAMS = 4096

# v = _LINEAR z + _CUBIC z^3 in the gate of gelu_tanh.
_LINEAR = tl.constexpr(math.sqrt(8 / math.pi))
_CUBIC = tl.constexpr(0.044715 * math.sqrt(8 / math.pi))


class Block(NamedTuple):
    """Elements that a program holds in registers at a time: with 16 bits, two loads of 16 bytes in each thread."""

    ROWS: int
    COLUMNS: int


_BLOCK = Block(8, 256)


@triton.jit
def _gate_and_slope(b_z, KIND: tl.constexpr):
    """The gate ``g(z)`` and its derivative ``g'(z)``."""
    if KIND == "quick_gelu":
        b_gate, b_slope = _sigmoid_and_slope(b_z * 1.702)
        return b_gate, 1.702 * b_slope
    elif KIND == "gelu":
        b_gate = 0.5 * (1.0 + tl.erf(b_z * 0.7071067811865476))
        return b_gate, 0.3989422804014327 * tl.exp(-0.5 * b_z * b_z)
    else:
        b_square = b_z * b_z
        b_gate, b_slope = _sigmoid_and_slope(b_z * (_LINEAR + _CUBIC * b_square))
        return b_gate, (_LINEAR + 3.0 * _CUBIC * b_square) * b_slope


@triton.jit
def _sigmoid_and_slope(b_x):
    """``s = sigmoid(x)`` and ``s (1 - s)`` from ``exp(-|x|)``: nothing overflows, no digits of 1 - s cancel."""
    b_exp = tl.exp(-tl.abs(b_x))
    b_reciprocal = 1.0 / (1.0 + b_exp)
    b_product = b_exp * b_reciprocal
    return tl.where(b_x < 0.0, b_product, b_reciprocal), b_product * b_reciprocal


@triton.jit
def _columns(pid, width, COLUMNS: tl.constexpr):
    """The columns of a program and the number of its range of rows; neighbours have the same rows."""
    blocks = tl.cdiv(width, COLUMNS)
    return pid % blocks * COLUMNS + tl.arange(0, COLUMNS), pid // blocks


@triton.jit
def _load_bias(bias, o_column, width, ACC: tl.constexpr):
    """The bias of these columns, zeros without a bias."""
    if bias is None:
        return tl.zeros(o_column.shape, ACC)
    else:
        return tl.load(bias + o_column, mask=o_column < width, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["rows", "share"], do_not_specialize_on_alignment=["bias"])
def activation_kernel(
    x,  # (R, W)
    bias,  # (W,) or None
    y,  # (R, W)
    rows,
    width,
    share,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``y = z g(z)`` with ``z = x + bias``."""
    ROWS: tl.constexpr = BLOCK.ROWS
    COLUMNS: tl.constexpr = BLOCK.COLUMNS
    o_column, part = _columns(tl.program_id(0), width, COLUMNS)
    b_bias = _load_bias(bias, o_column, width, ACC)[None, :]
    end = tl.minimum((part + 1) * share, rows)
    for row0 in range(part * share, end, ROWS):
        o_row = row0 + tl.arange(0, ROWS)
        o_x = o_row.to(tl.int64)[:, None] * width + o_column[None, :]
        m_x = (o_row < end)[:, None] & (o_column < width)[None, :]
        b_z = tl.load(x + o_x, mask=m_x, other=0.0).to(ACC) + b_bias
        b_gate, _ = _gate_and_slope(b_z, KIND)
        tl.store(y + o_x, primitives.round_to(b_z * b_gate, y.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["rows", "share"], do_not_specialize_on_alignment=["bias"])
def activation_gradient_kernel(
    gradient,  # (R, W): dL/dy
    x,  # (R, W)
    bias,  # (W,) or None
    dx,  # (R, W)
    partials,  # (ranges of rows, 1, W): sums of dx, or None
    rows,
    width,
    share,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``dx = dy (g + z g')``, and its column sums over the program's rows."""
    ROWS: tl.constexpr = BLOCK.ROWS
    COLUMNS: tl.constexpr = BLOCK.COLUMNS
    o_column, part = _columns(tl.program_id(0), width, COLUMNS)
    b_bias = _load_bias(bias, o_column, width, ACC)[None, :]
    b_sum = tl.zeros([ROWS, COLUMNS], ACC)
    end = tl.minimum((part + 1) * share, rows)
    for row0 in range(part * share, end, ROWS):
        o_row = row0 + tl.arange(0, ROWS)
        o_x = o_row.to(tl.int64)[:, None] * width + o_column[None, :]
        m_x = (o_row < end)[:, None] & (o_column < width)[None, :]
        b_dy = tl.load(gradient + o_x, mask=m_x, other=0.0).to(ACC)
        b_z = tl.load(x + o_x, mask=m_x, other=0.0).to(ACC) + b_bias
        b_gate, b_slope = _gate_and_slope(b_z, KIND)
        b_dx = b_dy * (b_gate + b_z * b_slope)
        tl.store(dx + o_x, primitives.round_to(b_dx, dx.dtype.element_ty), mask=m_x)
        # Behind the last row dy is 0; NaN comes from an infinite bias, for which the sum is NaN anyway.
        b_sum += b_dx
    if partials is not None:
        column_sums.store_partial_sum(partials, part, 1, 0, tl.sum(b_sum, axis=0), o_column, width)


# Host


def _split(rows: int, width: int) -> tuple[int, column_sums.RowSplit]:
    """Number of column blocks, and the ranges of rows."""
    columns = primitives.divide_up(width, _BLOCK.COLUMNS)
    return columns, column_sums.split_rows(rows, _BLOCK.ROWS, _MAX_PROGRAMS // columns)


def launch_forward(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """``act(x + bias)``, in one launch."""
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    y = primitives.empty(*x.shape, dtype=x.dtype, device=x.device)
    columns, split = _split(rows, width)
    if rows:
        primitives.launch(
            activation_kernel,
            columns * split.programs,
            *(primitives.dense(x), _dense_bias(bias), y, rows, width, split.share),
            KIND=kind,
            BLOCK=_BLOCK,
            ACC=primitives.acc_dtype(x.dtype),
            num_warps=_NUM_WARPS,
        )
    return y


def launch_backward(
    gradient: Tensor, x: Tensor, bias: Tensor | None, kind: str, bias_gradient: bool
) -> list[Tensor]:
    """``[dx]`` in one launch, or ``[dx, dbias]`` in two."""
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    dx = primitives.empty(*x.shape, dtype=x.dtype, device=x.device)
    columns, split = _split(rows, width)
    partials = None
    if bias_gradient:
        dtype = primitives.compute_dtype(x.dtype)
        partials = primitives.empty(split.programs, 1, width, dtype=dtype, device=x.device)
    if rows:
        primitives.launch(
            activation_gradient_kernel,
            columns * split.programs,
            *(primitives.dense(gradient), primitives.dense(x), _dense_bias(bias), dx, partials),
            *(rows, width, split.share),
            KIND=kind,
            BLOCK=_BLOCK,
            ACC=primitives.acc_dtype(x.dtype),
            num_warps=_NUM_WARPS,
        )
    if partials is None or bias is None:
        return [dx]
    return [dx, *column_sums.launch_column_sums(partials, [bias.dtype])]


def _dense_bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


forward = torch.library.custom_op("dive_fast::biased_activation", launch_forward, mutates_args=())
backward = torch.library.custom_op("dive_fast::biased_activation_backward", launch_backward, mutates_args=())


@forward.register_fake
def _(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return primitives.empty(*x.shape, dtype=x.dtype, device=x.device)


@backward.register_fake
def _(gradient: Tensor, x: Tensor, bias: Tensor | None, kind: str, bias_gradient: bool) -> list[Tensor]:
    dx = primitives.empty(*x.shape, dtype=x.dtype, device=x.device)
    return [dx, torch.empty_like(bias)] if bias is not None and bias_gradient else [dx]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.kind = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
    if gradient is None:
        return None, None, None
    x, bias = ctx.saved_tensors
    run = direct.first_order(launch_backward, backward, gradient, x)
    dx, *dbias = run(gradient, x, bias, ctx.kind, bias is not None and ctx.needs_input_grad[1])
    return dx, dbias[0] if dbias else None, None


forward.register_autograd(_backward, setup_context=_setup_context)
_apply = direct.differentiable(launch_forward, _backward, _setup_context)


def biased_activation(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """``act(x + bias)`` with its gradient; arguments are checked by the caller."""
    tensors = (x,) if bias is None else (x, bias)
    return (_apply if direct.is_eager(*tensors) else forward)(x, bias, kind)
