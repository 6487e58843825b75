"""The volume of three unit vectors in Triton: two launches forward, one backward, nothing kept in between.

With z_j = unit(x_j), a = z_2 - z_1, b = z_3 - z_1, p = z_1 . a, q = z_1 . b, n = |z_1|^2 and B rows::

    det = n (|a|^2 |b|^2 - (a . b)^2) - p^2 |b|^2 - q^2 |a|^2 + 2 p q (a . b)
    L   = 1/B sum_i v_i,     v = sqrt(max(det, 0) + e^2)

1. *Rows*: each program computes the volumes of some rows and stores their sum.
2. *Finish*: one program adds the sums of all.
3. *Gradient*, in the backward, recomputed from the inputs; 0 where det <= 0::

    B v dL/da = (n |b|^2 - q^2) a + (p q - n a.b) b + (q a.b - p |b|^2) z_1          = B v dL/dz_2
    B v dL/db = (n |a|^2 - p^2) b + (p q - n a.b) a + (p a.b - q |a|^2) z_1          = B v dL/dz_3
    B v dL/dz_1 = (|a|^2 |b|^2 - (a.b)^2) z_1 + (q a.b - p |b|^2) a + (p a.b - q |a|^2) b - B v (dL/da + dL/db)

   The normalization's backward is that of :mod:`dive_fast.kernels.contrastive`.

The forward reads the inputs once, the backward reads them again and writes the gradients: 9 elements for each
position of the three matrices. A forward that also wrote gradients would move 12, since the backward would have to
apply the upstream gradient to them.

No product and sum are fused into one operation: the determinant of two equal rows is exactly 0, as in plain
PyTorch, only if products are rounded.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels import direct, naive, primitives

_NUM_WARPS = 8
# Sums that the last launch adds at a time.
_SUMS = 1024
_SQUARE = tl.constexpr(naive.VOLUME_EPS**2)


class Triple(NamedTuple):
    """Three matrices ``(B, D)``: features, or their gradients."""

    first: Tensor
    second: Tensor
    third: Tensor


@triton.jit
def _elements(row0, B, D, BLOCK: tl.constexpr):
    """Offsets of a block of rows in a ``(B, D)`` matrix, and which of them exist."""
    o_row = row0 + tl.arange(0, BLOCK.ROWS)
    o_column = tl.arange(0, BLOCK.WIDTH)
    o_element = o_row.to(tl.int64)[:, None] * D + o_column[None, :]
    return o_element, (o_row < B)[:, None] & (o_column < D)[None, :]


@triton.jit
def _unit_rows(features, o_element, m_element, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """``z = x / max(|x|, 1e-12)`` and ``|x|`` of a block of rows; 0 outside of the matrix."""
    b_x = tl.load(features + o_element, mask=m_element, other=0.0).to(ACC)
    b_norm = primitives.row_norms(b_x)
    b_length = tl.broadcast_to(primitives.clamp_norms(b_norm)[:, None], [BLOCK.ROWS, BLOCK.WIDTH])
    return primitives.divide(b_x, b_length), b_norm


@triton.jit
def _store_gradient(gradient, b_z, b_dz, b_norm, scale, o_element, m_element, BLOCK: tl.constexpr):
    """``dx = scale (dz - z (z . dz)) / max(|x|, 1e-12)`` of a block of rows."""
    # Below the clamp z is linear in x, and no component is projected out.
    b_radial = tl.where(b_norm < primitives.CLAMP, 0.0, tl.sum(b_z * b_dz, axis=1))
    b_dx = b_dz - b_z * b_radial[:, None]
    b_dx *= primitives.divide(tl.broadcast_to(scale, [BLOCK.ROWS]), primitives.clamp_norms(b_norm))[:, None]
    tl.store(gradient + o_element, primitives.round_to(b_dx, gradient.dtype.element_ty), mask=m_element)


@triton.jit
def _products(b_z, b_a, b_b):
    """``|z|^2, |a|^2, |b|^2, a . b, z . a, z . b`` of each row."""
    return (
        tl.sum(b_z * b_z, axis=1),
        tl.sum(b_a * b_a, axis=1),
        tl.sum(b_b * b_b, axis=1),
        tl.sum(b_a * b_b, axis=1),
        tl.sum(b_z * b_a, axis=1),
        tl.sum(b_z * b_b, axis=1),
    )


@triton.jit
def _determinant(products):
    """``det G`` of each row, in the order of operations of plain PyTorch."""
    b_zz, b_aa, b_bb, b_ab, b_p, b_q = products
    b_area = b_zz * (b_aa * b_bb - b_ab * b_ab)
    return b_area - b_p * b_p * b_bb - b_q * b_q * b_aa + 2.0 * (b_p * b_q * b_ab)


@triton.jit
def _volume(b_determinant):
    """``sqrt(max(det, 0) + e^2)``; unlike ``tl.maximum`` it propagates NaN."""
    return primitives.square_root(tl.where(b_determinant < 0, 0.0, b_determinant) + _SQUARE)


@triton.jit(do_not_specialize=["B"])
def gram_volume_kernel(
    features,
    sums,  # (programs,): sum of v over the rows of each program
    B,
    D,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``x_1, x_2, x_3 -> sums of v``."""
    pid = tl.program_id(0)
    row0 = pid * BLOCK.ROWS
    o_element, m_element = _elements(row0, B, D, BLOCK)
    b_z, _ = _unit_rows(features.first, o_element, m_element, BLOCK, ACC)
    b_second, _ = _unit_rows(features.second, o_element, m_element, BLOCK, ACC)
    b_third, _ = _unit_rows(features.third, o_element, m_element, BLOCK, ACC)
    b_volume = _volume(_determinant(_products(b_z, b_second - b_z, b_third - b_z)))
    m_row = row0 + tl.arange(0, BLOCK.ROWS) < B
    tl.store(sums + pid, tl.sum(tl.where(m_row, b_volume, 0.0), axis=0))


@triton.jit(do_not_specialize=["count", "B"])
def gram_volume_finish_kernel(sums, loss, count, B, SUMS: tl.constexpr, ACC: tl.constexpr):
    """``L = 1/B sum v`` from the ``count`` sums of all programs, in ascending order."""
    b_acc = tl.zeros([SUMS], ACC)
    for sum0 in range(0, count, SUMS):
        o_sum = sum0 + tl.arange(0, SUMS)
        b_acc += tl.load(sums + o_sum, mask=o_sum < count, other=0.0)
    tl.store(loss, tl.sum(b_acc, axis=0) / B.to(ACC))


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["upstream"])
def gram_volume_gradient_kernel(features, upstream, gradients, B, D, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """``x_1, x_2, x_3 -> dL/dx_1, dL/dx_2, dL/dx_3``."""
    o_element, m_element = _elements(tl.program_id(0) * BLOCK.ROWS, B, D, BLOCK)
    b_z, b_first_norm = _unit_rows(features.first, o_element, m_element, BLOCK, ACC)
    b_second, b_second_norm = _unit_rows(features.second, o_element, m_element, BLOCK, ACC)
    b_third, b_third_norm = _unit_rows(features.third, o_element, m_element, BLOCK, ACC)
    b_a, b_b = b_second - b_z, b_third - b_z
    products = _products(b_z, b_a, b_b)
    b_zz, b_aa, b_bb, b_ab, b_p, b_q = products
    b_determinant = _determinant(products)
    b_weight = tl.where(b_determinant <= 0, 0.0, 1.0 / _volume(b_determinant))
    b_by_a = (b_q * b_ab - b_p * b_bb) * b_weight
    b_by_b = (b_p * b_ab - b_q * b_aa) * b_weight
    b_mixed = (b_p * b_q - b_zz * b_ab) * b_weight
    b_da = ((b_zz * b_bb - b_q * b_q) * b_weight)[:, None] * b_a
    b_da += b_mixed[:, None] * b_b + b_by_a[:, None] * b_z
    b_db = ((b_zz * b_aa - b_p * b_p) * b_weight)[:, None] * b_b
    b_db += b_mixed[:, None] * b_a + b_by_b[:, None] * b_z
    b_dz = ((b_aa * b_bb - b_ab * b_ab) * b_weight)[:, None] * b_z
    b_dz += b_by_a[:, None] * b_a + b_by_b[:, None] * b_b - b_da - b_db
    scale = tl.load(upstream).to(ACC) / B.to(ACC)
    _store_gradient(gradients.first, b_z, b_dz, b_first_norm, scale, o_element, m_element, BLOCK)
    _store_gradient(gradients.second, b_second, b_da, b_second_norm, scale, o_element, m_element, BLOCK)
    _store_gradient(gradients.third, b_third, b_db, b_third_norm, scale, o_element, m_element, BLOCK)


# Host


def launch_forward(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """The mean volume, ``()``, in two launches."""
    rows, width = map(int, first.shape)
    block = primitives.row_block(width)
    programs = primitives.divide_up(rows, block.ROWS)
    kind: dict[str, Any] = {"dtype": primitives.compute_dtype(first.dtype), "device": first.device}
    sums, loss = primitives.empty(programs, **kind), primitives.empty(**kind)
    features = Triple(*map(primitives.dense, (first, second, third)))
    acc = primitives.acc_dtype(first.dtype)
    primitives.launch(
        gram_volume_kernel,
        programs,
        *(features, sums, rows, width),
        BLOCK=block,
        ACC=acc,
        num_warps=_NUM_WARPS,
        enable_fp_fusion=False,
    )
    primitives.launch(
        gram_volume_finish_kernel, 1, sums, loss, programs, rows, SUMS=_SUMS, ACC=acc, enable_fp_fusion=False
    )
    return loss


forward = torch.library.custom_op("dive_fast::gram_volume", launch_forward, mutates_args=())


@forward.register_fake
def _(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    return primitives.empty(dtype=primitives.compute_dtype(first.dtype), device=first.device)


def launch_backward(
    upstream: Tensor, first: Tensor, second: Tensor, third: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the three matrices, in one launch."""
    rows, width = map(int, first.shape)
    block = primitives.row_block(width)
    gradients = _empty_gradients(first)
    primitives.launch(
        gram_volume_gradient_kernel,
        primitives.divide_up(rows, block.ROWS),
        *(Triple(*map(primitives.dense, (first, second, third))), upstream, gradients, rows, width),
        BLOCK=block,
        ACC=primitives.acc_dtype(first.dtype),
        num_warps=_NUM_WARPS,
        enable_fp_fusion=False,
    )
    return gradients.first, gradients.second, gradients.third


def _empty_gradients(first: Tensor) -> Triple:
    return Triple(*(primitives.empty(*first.shape, dtype=first.dtype, device=first.device) for _ in range(3)))


backward = torch.library.custom_op("dive_fast::gram_volume_backward", launch_backward, mutates_args=())


@backward.register_fake
def _(upstream: Tensor, first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(first)
    return gradients.first, gradients.second, gradients.third


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, upstream: Tensor | None) -> tuple[Any, ...]:
    if upstream is None:
        return None, None, None
    run = direct.first_order(launch_backward, backward, upstream)
    return run(upstream, *ctx.saved_tensors)  # type: ignore[no-any-return]


forward.register_autograd(_backward, setup_context=_setup_context)
apply = direct.differentiable(launch_forward, _backward, _setup_context)
