"""Queries, keys and values as views of their packed product; their gradients are packed again in one pass.

The forward moves nothing. The backward reads dq, dk and dv, ``(B, H, N, d)``, writes them next to each other into
``(B, N, 3 H d)``, the gradient of the product, and adds its columns for the gradient of the bias. Gradients of
equal strides in which the d elements of a head are contiguous, as attention kernels give them, are not copied.

A program works on a block of columns of one of the three and iterates over its range of the B N rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels import column_sums, direct, primitives

_NUM_WARPS = 4
# Most programs of a launch: a few waves on the largest GPUs, and few enough that partial sums cost little.
_MAX_PROGRAMS = 4096


class Block(NamedTuple):
    """Elements that a program holds in registers at a time: with 16 bits, two loads of 16 bytes in each thread."""

    ROWS: int
    COLUMNS: int


_BLOCK = Block(8, 256)


@triton.jit(do_not_specialize=["rows", "length", "share"])
def pack_gradient_kernel(
    gradients,  # tuple of parts, each (B, H, N, d)
    packed,  # (B, N, parts H d)
    partials,  # (ranges of rows, 1, parts H d), or None
    rows,
    length,  # N
    batch_stride,
    head_stride,
    row_stride,
    width,  # H d
    share,
    HEAD_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``packed[b, n, (part, h, e)] = gradients[part][b, h, n, e]``, and column sums over the program's rows."""
    ROWS: tl.constexpr = BLOCK.ROWS
    COLUMNS: tl.constexpr = BLOCK.COLUMNS
    parts: tl.constexpr = len(gradients)
    blocks = tl.cdiv(width, COLUMNS)
    pid = tl.program_id(0)
    part = pid // blocks % parts
    group = pid // (blocks * parts)
    o_column = pid % blocks * COLUMNS + tl.arange(0, COLUMNS)
    o_element = (o_column // HEAD_WIDTH).to(tl.int64) * head_stride + o_column % HEAD_WIDTH
    o_packed_column = part * width + o_column
    gradient = gradients[0]
    for k in tl.static_range(1, parts):
        if part == k:
            gradient = gradients[k]
    b_sum = tl.zeros([ROWS, COLUMNS], ACC)
    end = tl.minimum((group + 1) * share, rows)
    for row0 in range(group * share, end, ROWS):
        o_row = row0 + tl.arange(0, ROWS)
        m_row = (o_row < end)[:, None] & (o_column < width)[None, :]
        o_token = (o_row // length).to(tl.int64) * batch_stride + (o_row % length).to(tl.int64) * row_stride
        b_gradient = tl.load(gradient + o_token[:, None] + o_element[None, :], mask=m_row, other=0.0)
        o_packed = o_row.to(tl.int64)[:, None] * (parts * width) + o_packed_column[None, :]
        tl.store(packed + o_packed, b_gradient, mask=m_row)
        b_sum += b_gradient.to(ACC)
    if partials is not None:
        # column_sums.store_partial_sum would compute these offsets again, for some 20 more registers.
        o_partial = group.to(tl.int64) * (parts * width) + o_packed_column
        tl.store(partials + o_partial, tl.sum(b_sum, axis=0), mask=o_column < width)


# Host


def launch_backward(gradients: Sequence[Tensor], bias_dtype: torch.dtype | None) -> list[Tensor]:
    """The packed gradient, and its column sums in ``bias_dtype`` if one is given; one or two launches."""
    gradients = _uniform(gradients)
    batch, heads, length, head_width = gradients[0].shape
    width = heads * head_width
    rows, columns = batch * length, primitives.divide_up(width, _BLOCK.COLUMNS)
    split = column_sums.split_rows(rows, _BLOCK.ROWS, _MAX_PROGRAMS // (columns * len(gradients)))
    packed, partials = _allocate(gradients), None
    if bias_dtype is not None:
        dtype = primitives.compute_dtype(packed.dtype)
        partials = primitives.empty(split.programs, 1, packed.shape[-1], dtype=dtype, device=packed.device)
    if rows:
        batch_stride, head_stride, row_stride, _ = gradients[0].stride()
        primitives.launch(
            pack_gradient_kernel,
            split.programs * len(gradients) * columns,
            *(tuple(gradients), packed, partials, rows, length),
            *(batch_stride, head_stride, row_stride, width, split.share),
            HEAD_WIDTH=head_width,
            BLOCK=_BLOCK,
            ACC=primitives.acc_dtype(packed.dtype),
            num_warps=_NUM_WARPS,
        )
    if partials is None or bias_dtype is None:
        return [packed]
    return [packed, *column_sums.launch_column_sums(partials, [bias_dtype])]


def _uniform(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients with one layout in which a head's elements are contiguous; copied only if they have not."""
    strides = gradients[0].stride()
    if strides[-1] == 1 and all(gradient.stride() == strides for gradient in gradients):
        return gradients
    return [gradient.transpose(1, 2).contiguous().transpose(1, 2) for gradient in gradients]


def _allocate(gradients: Sequence[Tensor]) -> Tensor:
    batch, heads, length, head_width = gradients[0].shape
    dtype, device = gradients[0].dtype, gradients[0].device
    return primitives.empty(batch, length, len(gradients) * heads * head_width, dtype=dtype, device=device)


backward = torch.library.custom_op("dive_fast::split_qkv_backward", launch_backward, mutates_args=())


@backward.register_fake
def _(gradients: Sequence[Tensor], bias_dtype: torch.dtype | None) -> list[Tensor]:
    packed = _allocate(gradients)
    if bias_dtype is None:
        return [packed]
    return [packed, primitives.empty(packed.shape[-1], dtype=bias_dtype, device=packed.device)]


class _SplitQkv(torch.autograd.Function):
    # A custom op cannot return views of its arguments, so the forward is not one.
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, qkv: Tensor, bias: Tensor | None, heads: int, parts: int
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return split(qkv, heads, parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        present = [gradient for gradient in gradients if gradient is not None]
        if not present:
            return None, None, None, None
        complete = [torch.zeros_like(present[0]) if gradient is None else gradient for gradient in gradients]
        run = direct.first_order(launch_backward, backward, *present)
        packed, *dbias = run(complete, ctx.bias_dtype if ctx.needs_input_grad[1] else None)
        return packed, dbias[0] if dbias else None, None, None


def split(qkv: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """Views ``(B, H, N, d)`` of the ``parts`` in ``(B, N, parts H d)``."""
    return qkv.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def split_qkv(qkv: Tensor, bias: Tensor | None, heads: int, parts: int) -> tuple[Tensor, ...]:
    """:func:`split` with its gradient and that of the bias; arguments are checked by the caller."""
    if not torch.is_grad_enabled():
        return split(qkv, heads, parts)
    return _SplitQkv.apply(qkv, bias, heads, parts)  # type: ignore[no-any-return, no-untyped-call]
