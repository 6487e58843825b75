"""The contrastive loss in Triton: no B x B matrix, and fp32's accuracy from half precision's matrix units.

For N pairs, z_i and t_i the unit rows of image and text i, and l_ij = s z_i.t_j::

    r_i = log sum_j exp(l_ij - l_ii)        c_j = log sum_i exp(l_ij - l_jj)
    L   = 1/(2N) sum_i (r_i + c_i)

**Rows are packed first**: x^_i = x_i / 2^e with norm in [1, 2), in the features' own dtype, hence exact, and
padded with zeros to full tiles. With the factor f_i = 2^e / |x_i| in (1/2, 1], z_i = f_i x^_i. Products of
half-precision rows are exact and accumulate in fp32, so l_ij = s f_i f_j (x^_i . y^_j) never sees a rounded unit
vector.

**The label is separate.** Logits are taken relative to the label's, l_ij - l_ii = s (z_i.t_j - z_i.t_i), so that
s magnifies a difference and not the rounding of a large number. Both cosines come from the same matrix product:
tensor cores truncate sums where other arithmetic rounds them, and a label summed elsewhere leaves that bias in
each difference. With d their log-sum-exp over j != i, the row's loss is r_i = softplus(d) and its label's error is
1 - p_ii = sigmoid(d): accurate also for a confident model, where two logarithms cancel. For the same reason r_i is
stored as two numbers: the highest relative logit, the label's 0 included, and the rest.

**Gradients.** With p_ij = exp(l_ij - l_ii - r_i), q_ij = exp(l_ij - l_jj - c_j), a_i = (1 - p_ii) + (1 - q_ii)::

    dL/dz_i = s/(2N) [ sum_{j != i} (p_ij + q_ij) t_j - a_i t_i ]
    dL/dx_i = (dz_i - z_i (z_i . dz_i)) / |x_i|          (dz_i / 1e-12 for |x_i| < 1e-12, as F.normalize)
    dL/ds   = 1/(2N) sum_i [ sum_{j != i} p_ij (l_ij - l_ii) / s  +  the same of q over its columns ]

z_i . dz_i follows from the logits alone, since z_i . t_j = l_ij / s. Texts are treated alike with p and q
exchanged.

Each rank gathers the rows of all ranks, processes its own rows against all columns, and gathers r and c.

There are two gradient paths. *Fused*: one launch; each program handles some rows and a slice of the width, and
recomputes its logits. *Chunked*: logits once per side, the weights p + q of a few rows at a time stored in two
halves (high and low bits), the sums over j computed by cuBLAS. The first saves launches, the second saves work.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels import primitives, process_group
from dive_fast.kernels.precision import full_fp32

# The packed matrices are padded to multiples of these: rows by the largest tile, width by the deepest product.
PAD_ROWS, PAD_WIDTH = 128, 64
# Weights lie in [0, 2]; scaled by this they use fp16's full range, and 2^-39 is the smallest difference kept.
_WEIGHT_SCALE = tl.constexpr(2.0**14)

# Fewer programs than this leave parts of a large GPU idle.
_PROGRAMS = 128
# Rows that the last program of the statistics processes at a time.
FINISH_ROWS = 256

# The gradient is fused up to this number of logits per side.
FUSED_LOGITS = 2048 * 2048
# Weights of the chunked gradient in memory at one time, and the fewest rows that make a product fill a GPU.
CHUNK_LOGITS = 2**22
CHUNK_ROWS = 512


class Tile(NamedTuple):
    """Block sizes of a kernel that iterates over tiles of logits, and its compiler options."""

    ROWS: int
    COLUMNS: int
    DEPTH: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        return {"TILE": self, "num_warps": self.num_warps, "num_stages": self.num_stages}


class Shape(NamedTuple):
    """Sizes of one call.

    This rank has ``rows`` (B) pairs, from row ``first`` of the ``total`` (N) over all ranks, of ``width`` (D).
    """

    rows: int
    total: int
    first: int
    width: int
    total_padded: int
    width_padded: int
    dtype: torch.dtype

    @property
    def is_half(self) -> bool:
        return self.dtype in (torch.float16, torch.bfloat16)

    @property
    def is_large(self) -> bool:
        return self.rows * self.total > FUSED_LOGITS


class Packed(NamedTuple):
    """Rows of all ranks in the form that the tiles read."""

    rows: Tensor  # (2, N_padded, D_padded): x^ of images, x^ of texts
    factors: Tensor  # (4, N_padded): f of images, f of texts, 1/|x| of images, 1/|x| of texts


class Reduction(NamedTuple):
    """Statistics of this rank's rows: per split of the columns, then per row, then in total."""

    partials: Tensor  # (3, 2, num_splits, B): highest l_ij - l_ii, sum of exponentials, sum weighted by cosines
    statistics: (
        Tensor  # (7, B): highest logits of images and texts, rest of their losses, a, z_i . t_i by both sides
    )
    slope: Tensor  # (): dL/ds


class Buffers(NamedTuple):
    """Memory that a forward allocates; the backward needs ``packed``, ``statistics`` and ``slope``."""

    packed: Packed
    ticket: Tensor  # (), int32: finished programs of the statistics
    reduction: Reduction
    loss: Tensor  # ()


class Gradients(NamedTuple):
    """Gradients of both feature matrices, ``(B, D)``, and of the scale."""

    image: Tensor
    text: Tensor
    scale: Tensor


def shape_of(image: Tensor, group: str) -> Shape:
    """Sizes of a call, from this rank's features."""
    rows, width = image.shape
    total, first = rows * process_group.world_size(group), rows * process_group.rank(group)
    # The last rank's last tile of rows may reach beyond the last tile of columns.
    total_padded = primitives.round_up(total - rows + primitives.round_up(rows, PAD_ROWS), PAD_ROWS)
    return Shape(rows, total, first, width, total_padded, primitives.round_up(width, PAD_WIDTH), image.dtype)


# Packing


@triton.jit
def pack_block(
    pid,
    image,
    text,
    packed,
    ticket,  # (): finished programs of the next launch
    N,
    N_padded,
    D,
    D_padded,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Packs a block of rows: ``x^_i = x_i / 2^e`` with ``2^e <= |x_i| < 2^(e+1)``,  ``f_i = 2^e / |x_i|``."""
    N_padded = N_padded.to(tl.int64)
    o_row = pid.to(tl.int64) * BLOCK.ROWS + tl.arange(0, BLOCK.ROWS)
    o_column = tl.arange(0, BLOCK.WIDTH)
    o_source = o_row[:, None] * D + o_column[None, :]
    o_target = o_row[:, None] * D_padded + o_column[None, :]
    m_source = (o_row < N)[:, None] & (o_column < D)[None, :]
    m_target = (o_row >= 0)[:, None] & (o_column < D_padded)[None, :]
    b_x = tl.load(image + o_source, mask=m_source, other=0.0).to(ACC)
    b_y = tl.load(text + o_source, mask=m_source, other=0.0).to(ACC)
    b_x, b_x_factor, b_x_inverse = _scale_rows(b_x)
    b_y, b_y_factor, b_y_inverse = _scale_rows(b_y)
    tl.store(packed.rows + o_target, b_x.to(packed.rows.dtype.element_ty), mask=m_target)
    tl.store(packed.rows + N_padded * D_padded + o_target, b_y.to(packed.rows.dtype.element_ty), mask=m_target)
    tl.store(packed.factors + o_row, b_x_factor)
    tl.store(packed.factors + N_padded + o_row, b_y_factor)
    tl.store(packed.factors + 2 * N_padded + o_row, b_x_inverse)
    tl.store(packed.factors + 3 * N_padded + o_row, b_y_inverse)
    if pid == 0:
        tl.store(ticket, 0)


@triton.jit
def _scale_rows(b_x):
    """``x^ = x / 2^e`` with norm in [1, 2), ``f = 2^e / |x|`` so that z = f x^, and ``1 / max(|x|, 1e-12)``."""
    b_norm = primitives.row_norms(b_x)
    b_power = primitives.power_of_two(b_norm)
    b_clamped_power = tl.full(b_norm.shape, primitives.CLAMPED_POWER, b_norm.dtype)
    b_power = tl.where(b_norm < primitives.CLAMP, b_clamped_power, b_power)
    b_length = primitives.clamp_norms(b_norm)
    b_one = tl.full(b_norm.shape, 1.0, b_norm.dtype)
    # A norm that overflows gives zeros, as in F.normalize: the power is infinite, and a factor of 1 keeps them.
    b_factor = tl.where(b_power == float("inf"), b_one, primitives.divide(b_power, b_length))
    return b_x * primitives.divide(b_one, b_power)[:, None], b_factor, primitives.divide(b_one, b_length)


# Statistics and loss


@triton.jit
def statistics_block(
    pid,
    packed,
    logit_scale,
    reduction,  # writes the partials, and the labels' cosines in the last two rows of the statistics
    B,
    N,
    first,
    N_padded,
    D_padded,
    num_splits,
    TILE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Online log-sum-exp of a tile of rows over one split of the columns, without the label.

    ``h_i = max_j (l_ij - l_ii)``,  ``sum_j exp(l_ij - l_ii - h_i)``,  and the same sum weighted by
    ``z_i.t_j - z_i.t_i``. One program reduces its columns in ascending order.
    """
    N_padded = N_padded.to(tl.int64)
    # Side 0 has images as rows and texts as columns, side 1 the other way round.
    side = pid % 2
    split = (pid // 2) % num_splits
    row0 = pid // (2 * num_splits) * TILE.ROWS
    o_row = row0 + tl.arange(0, TILE.ROWS)
    stride = D_padded.to(tl.int64)
    left = packed.rows + (side * N_padded + first + row0) * D_padded
    right = packed.rows + (1 - side) * N_padded * D_padded
    b_row_factor = tl.load(packed.factors + side * N_padded + first + o_row)
    s = tl.load(logit_scale).to(ACC)

    # The labels' cosines are the diagonal of a product like those below, so that equal logits differ by nothing.
    b_label_cosine = tl.zeros([TILE.ROWS], ACC)
    for offset in range(0, TILE.ROWS, TILE.COLUMNS):
        label = first + row0 + offset
        b_product = primitives.row_products(
            left, right + label * stride, D_padded, TILE.ROWS, TILE.COLUMNS, TILE.DEPTH, ACC
        )
        m_label = offset + tl.arange(0, TILE.COLUMNS)[None, :] == tl.arange(0, TILE.ROWS)[:, None]
        b_label_cosine += tl.sum(tl.where(m_label, b_product, 0.0), axis=1)
    b_label_cosine *= b_row_factor * tl.load(packed.factors + (1 - side) * N_padded + first + o_row)
    if split == 0:
        tl.store(reduction.statistics + (5 + side) * B.to(tl.int64) + o_row, b_label_cosine, mask=o_row < B)

    b_highest = tl.full([TILE.ROWS], float("-inf"), ACC)
    b_total = tl.zeros([TILE.ROWS], ACC)
    b_weighted = tl.zeros([TILE.ROWS], ACC)
    span = tl.cdiv(tl.cdiv(N, TILE.COLUMNS), num_splits) * TILE.COLUMNS
    for column0 in range(split * span, tl.minimum((split + 1) * span, N), TILE.COLUMNS):
        o_column = column0 + tl.arange(0, TILE.COLUMNS)
        b_column_factor = tl.load(packed.factors + (1 - side) * N_padded + o_column)
        b_product = primitives.row_products(
            left, right + column0 * stride, D_padded, TILE.ROWS, TILE.COLUMNS, TILE.DEPTH, ACC
        )
        # Each cosine relative to the label's: the large common part is gone before s magnifies it.
        b_relative = b_product * (b_row_factor[:, None] * b_column_factor[None, :]) - b_label_cosine[:, None]
        m_negative = (o_column < N)[None, :] & (o_column[None, :] != first + o_row[:, None])
        b_logit = tl.where(m_negative, b_relative * s, float("-inf"))
        b_new_highest = tl.maximum(b_highest, tl.max(b_logit, axis=1))
        # A row without a negative so far has no highest logit to subtract.
        b_shift = tl.where(b_new_highest == float("-inf"), 0.0, b_new_highest)
        b_mass = tl.exp(b_logit - b_shift[:, None])
        b_rescale = tl.exp(b_highest - b_shift)
        b_total = b_total * b_rescale + tl.sum(b_mass, axis=1)
        b_weighted = b_weighted * b_rescale + tl.sum(b_mass * b_relative, axis=1)
        b_highest = b_new_highest

    p_partial = reduction.partials + (side * num_splits + split).to(tl.int64) * B + o_row
    size = 2 * num_splits.to(tl.int64) * B
    tl.store(p_partial, b_highest, mask=o_row < B)
    # An infinite scale leaves a confident row without any negative: s - s makes it NaN, and is 0 otherwise.
    tl.store(p_partial + size, b_total + (s - s), mask=o_row < B)
    tl.store(p_partial + 2 * size, b_weighted, mask=o_row < B)


@triton.jit
def finish_contrastive(reduction, B, num_splits, ROWS: tl.constexpr, ACC: tl.constexpr):
    """Mean loss of this rank's rows, ``1/(2B) sum_i (r_i + c_i)``, from the partial sums of all programs.

    With d the log-sum-exp over all splits: ``r_i = softplus(d)``, ``1 - p_ii = sigmoid(d)``. Writes the first five
    rows of the statistics, and dL/ds. One program reduces splits and rows in a fixed order, so that the result
    does not depend on which program it is.
    """
    SPLITS: tl.constexpr = 8
    size = 2 * num_splits.to(tl.int64) * B
    statistics = reduction.statistics
    b_losses = tl.zeros([ROWS], ACC)
    b_slopes = tl.zeros([ROWS], ACC)
    for row0 in range(0, B, ROWS):
        o_row = row0 + tl.arange(0, ROWS)
        m_row = o_row < B
        b_label_errors = tl.zeros([ROWS], ACC)
        for side in tl.static_range(2):
            b_highest = tl.full([ROWS], float("-inf"), ACC)
            b_total = tl.zeros([ROWS], ACC)
            b_weighted = tl.zeros([ROWS], ACC)
            # Several splits at a time: a single program would otherwise wait for memory once per split.
            for split0 in range(0, num_splits, SPLITS):
                o_split = split0 + tl.arange(0, SPLITS)
                # From the cache that all programs share: this program's own may hold stale values.
                p_partial = (
                    reduction.partials + (side * num_splits + o_split)[:, None] * B.to(tl.int64) + o_row[None, :]
                )
                m_partial = (o_split < num_splits)[:, None] & m_row[None, :]
                b_highests = tl.load(p_partial, mask=m_partial, other=float("-inf"), cache_modifier=".cg")
                b_sums = tl.load(p_partial + size, mask=m_partial, other=0.0, cache_modifier=".cg")
                b_weighted_sums = tl.load(p_partial + 2 * size, mask=m_partial, other=0.0, cache_modifier=".cg")
                b_new_highest = tl.maximum(b_highest, tl.max(b_highests, axis=0))
                b_shift = tl.where(b_new_highest == float("-inf"), 0.0, b_new_highest)
                b_rescale = tl.exp(b_highest - b_shift)
                b_rescales = tl.exp(b_highests - b_shift[None, :])
                b_total = b_total * b_rescale + tl.sum(b_rescales * b_sums, axis=0)
                b_weighted = b_weighted * b_rescale + tl.sum(b_rescales * b_weighted_sums, axis=0)
                b_highest = b_new_highest
            b_top = tl.where(b_highest < 0, 0.0, b_highest)  # a comparison that propagates NaN
            b_mass = b_total * tl.exp(b_highest - b_top)
            # The highest logit, label included, contributes 1, which stays out of log1p's argument.
            b_rest = primitives.log1p(tl.where(b_top == 0.0, b_mass, b_mass - 1.0 + tl.exp(-b_top)))
            b_log_sum = tl.where(b_total == 0.0, float("-inf"), b_highest + tl.log(b_total))
            b_error = 1.0 / (1.0 + tl.exp(-b_log_sum))
            b_label_errors += b_error
            b_losses += tl.where(m_row, b_top + b_rest, 0.0)
            b_slopes += tl.where(m_row & (b_total != 0.0), b_error * b_weighted / b_total, 0.0)
            tl.store(statistics + side * B.to(tl.int64) + o_row, b_top, mask=m_row)
            tl.store(statistics + (2 + side) * B.to(tl.int64) + o_row, b_rest, mask=m_row)
        tl.store(statistics + 4 * B.to(tl.int64) + o_row, b_label_errors, mask=m_row)
    count = 2.0 * B.to(ACC)
    tl.store(reduction.slope, tl.sum(b_slopes, axis=0) / count)
    return tl.sum(b_losses, axis=0) / count


# Gradient, fused


@triton.jit
def _gradient_weights(
    b_product,
    o_row,
    o_column,
    side,
    packed,
    statistics,  # (7, N)
    s,
    N,
    first,
    N_padded,
):
    """``p_ij + q_ij`` of a tile, 0 at labels and outside of the matrix, and the cosines ``z_i.t_j``.

    ``p_ij = exp(l_ij - l_ii - r_i)``,  ``q_ij = exp(l_ij - l_jj - c_j)``; r and c are subtracted part by part.
    """
    b_factor = tl.load(packed.factors + side * N_padded + first + o_row)[:, None]
    b_factor = b_factor * tl.load(packed.factors + (1 - side) * N_padded + o_column)[None, :]
    b_cosine = b_product * b_factor
    o_label = first + o_row
    stride = N.to(tl.int64)
    p_row = statistics + side * stride + o_label
    p_column = statistics + (1 - side) * stride + o_column
    b_row_top = tl.load(p_row, mask=o_label < N, other=0.0)
    b_row_rest = tl.load(p_row + 2 * stride, mask=o_label < N, other=0.0)
    b_column_top = tl.load(p_column, mask=o_column < N, other=0.0)
    b_column_rest = tl.load(p_column + 2 * stride, mask=o_column < N, other=0.0)
    # Both labels from this side's product, as the cosines are.
    label_cosine = statistics + (5 + side) * stride
    b_to_row_label = b_cosine - tl.load(label_cosine + o_label, mask=o_label < N, other=0.0)[:, None]
    b_to_column_label = b_cosine - tl.load(label_cosine + o_column, mask=o_column < N, other=0.0)[None, :]
    b_weight = tl.exp(b_to_row_label * s - b_row_top[:, None] - b_row_rest[:, None])
    b_weight += tl.exp(b_to_column_label * s - b_column_top[None, :] - b_column_rest[None, :])
    # Rows beyond this rank's last are other ranks' or padding: computed, never stored.
    m_negative = (o_column < N)[None, :] & (o_column[None, :] != o_label[:, None]) & (o_label < N)[:, None]
    return tl.where(m_negative, b_weight, 0.0), b_cosine


@triton.jit
def gradient_block(
    pid,
    packed,
    logit_scale,
    statistics,  # (7, N)
    upstream,
    slope,  # (): dL/ds of this rank's rows
    gradients,
    B,
    N,
    first,
    N_padded,
    D,
    D_padded,
    TILE: tl.constexpr,
    SLICE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient of a tile of rows in one slice of the width.

    With the upstream gradient g, ``dz_i = sum_{j != i} (p_ij + q_ij) t_j - a_i t_i``,
    ``dx_i = g s/(2B) (dz_i - z_i (z_i . dz_i)) / |x_i|``. Every slice recomputes the logits of its rows. One
    program sums over all columns in ascending order: no atomics, and the same bits in every run.
    """
    N_padded = N_padded.to(tl.int64)
    num_slices = tl.cdiv(D, SLICE)
    side = pid % 2
    slice0 = (pid // 2) % num_slices * SLICE
    row0 = pid // (2 * num_slices) * TILE.ROWS
    o_row = row0 + tl.arange(0, TILE.ROWS)
    o_depth = slice0 + tl.arange(0, SLICE)
    stride = D_padded.to(tl.int64)
    left = packed.rows + (side * N_padded + first + row0) * D_padded
    right = packed.rows + (1 - side) * N_padded * D_padded
    s = tl.load(logit_scale).to(ACC)

    b_acc = tl.zeros([TILE.ROWS, SLICE], ACC)
    b_radial = tl.zeros([TILE.ROWS], ACC)  # z_i . dz_i
    o_tile = tl.arange(0, TILE.COLUMNS)
    p_slice = right + o_tile[:, None] * D_padded + o_depth[None, :]
    for column0 in range(0, N, TILE.COLUMNS):
        o_column = column0 + o_tile
        b_product = primitives.row_products(
            left, right + column0 * stride, D_padded, TILE.ROWS, TILE.COLUMNS, TILE.DEPTH, ACC
        )
        b_weight, b_cosine = _gradient_weights(
            b_product, o_row, o_column, side, packed, statistics, s, N, first, N_padded
        )
        b_radial += tl.sum(b_weight * b_cosine, axis=1)
        b_column_factor = tl.load(packed.factors + (1 - side) * N_padded + o_column)
        b_scaled = b_weight * (b_column_factor[None, :] * _WEIGHT_SCALE)
        b_right = tl.load(p_slice + column0 * stride, mask=(o_depth < D_padded)[None, :], other=0.0)
        b_acc = primitives.split_dot(b_scaled, b_right, b_acc)

    m_store = (o_depth < D)[None, :] & (o_row < B)[:, None]
    o_packed = o_row.to(tl.int64)[:, None] * D_padded + o_depth[None, :]
    b_row = tl.load(left - row0 * stride + o_packed, mask=m_store, other=0.0).to(ACC)
    b_partner = tl.load(right + first * stride + o_packed, mask=m_store, other=0.0).to(ACC)
    b_row_factor = tl.load(packed.factors + side * N_padded + first + o_row)
    b_partner_factor = tl.load(packed.factors + (1 - side) * N_padded + first + o_row)
    b_inverse = tl.load(packed.factors + (2 + side) * N_padded + first + o_row)
    p_statistics = statistics + first + o_row
    b_label_errors = tl.load(p_statistics + 4 * N.to(tl.int64), mask=o_row < B, other=0.0)
    b_label_cosine = tl.load(p_statistics + (5 + side) * N.to(tl.int64), mask=o_row < B, other=0.0)
    b_gradient = b_acc * (1.0 / _WEIGHT_SCALE) - b_partner * (b_partner_factor * b_label_errors)[:, None]
    b_radial = b_radial - b_label_errors * b_label_cosine
    # Below the clamp z is linear in x, and no component is projected out.
    b_radial = tl.where(b_inverse < 1.0 / primitives.CLAMP, b_radial, 0.0)
    b_gradient = b_gradient - b_row * (b_row_factor * b_radial)[:, None]
    b_gradient = b_gradient * (b_inverse * (tl.load(upstream).to(ACC) * s / (2.0 * B.to(ACC))))[:, None]
    o_gradient = o_row.to(tl.int64)[:, None] * D + o_depth[None, :]
    b_gradient = primitives.round_to(b_gradient, gradients.image.dtype.element_ty)
    if pid == 0:
        scale_gradient = tl.load(upstream).to(ACC) * tl.load(slope)
        tl.store(gradients.scale, primitives.round_to(scale_gradient, gradients.scale.dtype.element_ty))
    if side == 0:
        tl.store(gradients.image + o_gradient, b_gradient, mask=m_store)
    else:
        tl.store(gradients.text + o_gradient, b_gradient, mask=m_store)


# Gradient, chunked


@triton.jit(do_not_specialize=["side", "chunk0", "N", "first"], do_not_specialize_on_alignment=["logit_scale"])
def weights_kernel(
    packed,
    logit_scale,
    statistics,  # (7, N)
    halves,  # (2, chunk, columns): high and low bits, or (1, chunk, columns) where one dtype holds all
    side,
    chunk0,
    chunk,
    columns,
    N,
    first,
    N_padded,
    D_padded,
    TILE: tl.constexpr,
    ACC: tl.constexpr,
):
    """``(p_ij + q_ij) f_j`` of a chunk of rows and of all columns; 0 at labels and outside of the matrix.

    Side 0 has images as rows and texts as columns, side 1 the other way round. Each program writes one tile.
    """
    pid = tl.program_id(0)
    N_padded = N_padded.to(tl.int64)
    # Rows vary fastest: neighbouring programs share a tile of columns in the cache.
    num_row_tiles = tl.num_programs(0) // (columns // TILE.COLUMNS)
    row0 = pid % num_row_tiles * TILE.ROWS
    column0 = pid // num_row_tiles * TILE.COLUMNS
    o_row = chunk0 + row0 + tl.arange(0, TILE.ROWS)
    o_column = column0 + tl.arange(0, TILE.COLUMNS)
    left = packed.rows + (side * N_padded + first + chunk0 + row0) * D_padded
    right = packed.rows + ((1 - side) * N_padded + column0) * D_padded
    b_product = primitives.row_products(left, right, D_padded, TILE.ROWS, TILE.COLUMNS, TILE.DEPTH, ACC)
    s = tl.load(logit_scale).to(ACC)
    b_weight, _ = _gradient_weights(b_product, o_row, o_column, side, packed, statistics, s, N, first, N_padded)
    b_weight *= tl.load(packed.factors + (1 - side) * N_padded + o_column)[None, :] * _WEIGHT_SCALE
    o_weight = (row0 + tl.arange(0, TILE.ROWS)).to(tl.int64)[:, None] * columns + o_column[None, :]
    b_high = b_weight.to(halves.dtype.element_ty)
    tl.store(halves + o_weight, b_high)
    if halves.dtype.element_ty.primitive_bitwidth == 16:
        b_low = (b_weight - b_high.to(ACC)).to(halves.dtype.element_ty)
        tl.store(halves + chunk.to(tl.int64) * columns + o_weight, b_low)


@triton.jit(
    do_not_specialize=["side", "chunk0", "B", "N", "first"],
    do_not_specialize_on_alignment=["logit_scale", "upstream"],
)
def finish_gradient_kernel(
    sums,  # (chunk, D_padded): sum_j (p_ij + q_ij) t_j, times the scale of the weights
    packed,
    logit_scale,
    statistics,  # (7, N)
    upstream,
    gradient,  # (B, D)
    side,
    chunk0,
    B,
    N,
    first,
    N_padded,
    D,
    D_padded,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``dz_i = sums_i - a_i t_i``,  ``dx_i = g s/(2B) (dz_i - z_i (z_i . dz_i)) / |x_i|``  of a block of rows."""
    N_padded = N_padded.to(tl.int64)
    o_chunk_row = tl.program_id(0) * BLOCK.ROWS + tl.arange(0, BLOCK.ROWS)
    o_row = chunk0 + o_chunk_row
    o_depth = tl.arange(0, BLOCK.WIDTH)
    m_row = (o_row < B)[:, None] & (o_depth < D)[None, :]
    o_packed = (first + o_row).to(tl.int64)[:, None] * D_padded + o_depth[None, :]
    o_side = N_padded * D_padded
    p_sums = sums + o_chunk_row.to(tl.int64)[:, None] * D_padded + o_depth[None, :]
    b_sums = tl.load(p_sums, mask=m_row, other=0.0)
    b_z = tl.load(packed.rows + side * o_side + o_packed, mask=m_row, other=0.0).to(ACC)
    b_t = tl.load(packed.rows + (1 - side) * o_side + o_packed, mask=m_row, other=0.0).to(ACC)
    b_z *= tl.load(packed.factors + side * N_padded + first + o_row)[:, None]
    b_t *= tl.load(packed.factors + (1 - side) * N_padded + first + o_row)[:, None]
    b_inverse = tl.load(packed.factors + (2 + side) * N_padded + first + o_row)
    b_label_errors = tl.load(statistics + 4 * N.to(tl.int64) + first + o_row, mask=o_row < B, other=0.0)
    s = tl.load(logit_scale).to(ACC)
    b_gradient = b_sums * (1.0 / _WEIGHT_SCALE) - b_t * b_label_errors[:, None]
    # Below the clamp z is linear in x, and no component is projected out.
    b_radial = tl.where(b_inverse < 1.0 / primitives.CLAMP, tl.sum(b_z * b_gradient, axis=1), 0.0)
    b_gradient = (b_gradient - b_z * b_radial[:, None]) * b_inverse[:, None]
    b_gradient *= tl.load(upstream).to(ACC) * s / (2.0 * B.to(ACC))
    b_gradient = primitives.round_to(b_gradient, gradient.dtype.element_ty)
    tl.store(gradient + o_row.to(tl.int64)[:, None] * D + o_depth[None, :], b_gradient, mask=m_row)


# Launched kernels


@triton.jit(do_not_specialize=["N"])
def pack_kernel(image, text, packed, ticket, N, N_padded, D, D_padded, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """``x -> x^, f, 1/|x|`` of images and texts: :func:`pack_block`."""
    pack_block(tl.program_id(0), image, text, packed, ticket, N, N_padded, D, D_padded, BLOCK, ACC)


@triton.jit(do_not_specialize=["B", "N", "first", "num_splits"], do_not_specialize_on_alignment=["logit_scale"])
def statistics_kernel(
    packed,
    logit_scale,
    reduction,
    loss,
    ticket,
    B,
    N,
    first,
    N_padded,
    D_padded,
    num_splits,
    TILE: tl.constexpr,
    FINISH_ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """``x^, f -> r, c, a, L, dL/ds``: :func:`statistics_block`, at the end :func:`finish_contrastive`."""
    pid = tl.program_id(0)
    statistics_block(
        pid, packed, logit_scale, reduction, B, N, first, N_padded, D_padded, num_splits, TILE, ACC
    )  # fmt: skip
    if primitives.is_last(ticket, tl.num_programs(0)):
        value = finish_contrastive(reduction, B, num_splits, FINISH_ROWS, ACC)
        tl.store(loss, value)


@triton.jit(do_not_specialize=["B", "N", "first"], do_not_specialize_on_alignment=["logit_scale", "upstream"])
def gradient_kernel(
    packed,
    logit_scale,
    statistics,
    upstream,
    slope,
    gradients,
    B,
    N,
    first,
    N_padded,
    D,
    D_padded,
    TILE: tl.constexpr,
    SLICE: tl.constexpr,
    ACC: tl.constexpr,
):
    """``x^, f, r, c, a, dL/ds -> dL/dx, dL/dy, dL/ds``: :func:`gradient_block`."""
    pid = tl.program_id(0)
    gradient_block(
        pid, packed, logit_scale, statistics, upstream, slope, gradients, B, N, first, N_padded, D, D_padded, TILE,
        SLICE, ACC,
    )  # fmt: skip


# Host


def allocate(shape: Shape, device: torch.device) -> Buffers:
    """Uninitialized outputs and scratch memory of the forward."""
    acc = primitives.compute_dtype(shape.dtype)

    def empty(*size: int, dtype: torch.dtype = acc) -> Tensor:
        return primitives.empty(*size, dtype=dtype, device=device)

    return Buffers(
        Packed(empty(2, shape.total_padded, shape.width_padded, dtype=shape.dtype), empty(4, shape.total_padded)),
        empty(dtype=torch.int32),
        Reduction(empty(3, 2, num_splits(shape), shape.rows), empty(7, shape.rows), empty()),
        empty(),
    )


def statistics_tile(shape: Shape) -> Tile:
    """Tile of the statistics and of the chunked weights."""
    if shape.is_half:
        return Tile(128, 128, 64, num_warps=8, num_stages=4) if shape.is_large else Tile(64, 64, 64, 4, 3)
    return Tile(128, 64, 32, num_warps=8, num_stages=3) if shape.is_large else Tile(64, 32, 32, 4, 3)


def gradient_tile(shape: Shape) -> tuple[Tile, int]:
    """Tile of the fused gradient, and the slice of the width that one program handles.

    Logits must equal those of the statistics bit for bit: where one text holds all of an image's probability, the
    errors of its logit and of the log-sum-exp cancel. So both use the same kind of matrix instruction, on Hopper
    the one with 64 rows.
    """
    few = 2 * triton.cdiv(shape.rows, 64) * triton.cdiv(shape.width, 128) < _PROGRAMS
    if shape.is_half:
        return Tile(64, 64, 64, num_warps=8, num_stages=3), 64 if few else 128
    return Tile(64, 32, 32, num_warps=8, num_stages=2), 64


def num_splits(shape: Shape) -> int:
    """Number of parts into which the columns of a row are split, so that a small batch keeps the full GPU busy."""
    row_tiles = triton.cdiv(shape.rows, statistics_tile(shape).ROWS)
    column_tiles = triton.cdiv(shape.total, statistics_tile(shape).COLUMNS)
    return max(1, min(column_tiles, _PROGRAMS // (2 * row_tiles)))


def statistics_programs(shape: Shape) -> int:
    """Number of programs of :func:`statistics_block`."""
    return 2 * num_splits(shape) * triton.cdiv(shape.rows, statistics_tile(shape).ROWS)


def gradient_programs(shape: Shape) -> int:
    """Number of programs of :func:`gradient_block`."""
    tile, slice_width = gradient_tile(shape)
    return 2 * triton.cdiv(shape.rows, tile.ROWS) * triton.cdiv(shape.width, slice_width)


def gather_features(features: Tensor, group: str) -> Tensor:
    """Features of all ranks in rank order, contiguous: ``(B, D) -> (N, D)``."""
    return process_group.gather(primitives.dense(features), group).flatten(0, 1)


def gather_statistics(statistics: Tensor, group: str) -> Tensor:
    """Statistics of the pairs of all ranks: ``(7, B) -> (7, N)``."""
    gathered = process_group.gather(statistics, group)
    return statistics if len(gathered) == 1 else gathered.transpose(0, 1).flatten(1).contiguous()


def loss_of(statistics: Tensor) -> Tensor:
    """The global loss from the statistics of all ranks, bit for bit the same on each."""
    return statistics[:4].sum(0).mean() / 2


def launch_forward(
    image: Tensor, text: Tensor, logit_scale: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and the tensors of its backward: packed rows, their factors, statistics of all pairs, dL/ds."""
    shape = shape_of(image, group)
    image, text = (gather_features(features, group) for features in (image, text))
    buffers = allocate(shape, image.device)
    block = primitives.row_block(shape.width_padded)
    acc = primitives.acc_dtype(shape.dtype)
    primitives.launch(
        pack_kernel,
        shape.total_padded // block.ROWS,
        *(image, text, buffers.packed, buffers.ticket),
        *(shape.total, shape.total_padded, shape.width, shape.width_padded),
        BLOCK=block,
        ACC=acc,
    )
    primitives.launch(
        statistics_kernel,
        statistics_programs(shape),
        *(buffers.packed, logit_scale, buffers.reduction, buffers.loss, buffers.ticket),
        *(shape.rows, shape.total, shape.first, shape.total_padded, shape.width_padded, num_splits(shape)),
        **statistics_tile(shape).options(),
        FINISH_ROWS=FINISH_ROWS,
        ACC=acc,
    )
    statistics = gather_statistics(buffers.reduction.statistics, group)
    loss = buffers.loss if statistics is buffers.reduction.statistics else loss_of(statistics)
    return loss, *buffers.packed, statistics, buffers.reduction.slope


forward = torch.library.custom_op("dive_fast::contrastive_loss", launch_forward, mutates_args=())


@forward.register_fake
def _(image: Tensor, text: Tensor, logit_scale: Tensor, group: str) -> tuple[Tensor, ...]:
    shape = shape_of(image, group)
    buffers = allocate(shape, image.device)
    statistics = buffers.packed.factors.new_empty(7, shape.total)
    return buffers.loss, *buffers.packed, statistics, buffers.reduction.slope


def launch_backward(
    upstream: Tensor,
    logit_scale: Tensor,
    packed: Tensor,
    factors: Tensor,
    statistics: Tensor,
    slope: Tensor,
    count: int,
    first: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both feature matrices, ``(count, width)`` each, and of the scale."""
    shape = saved_shape(packed, statistics, count, first, width)
    rows = Packed(packed, factors)
    if shape.is_large:
        image, text, scale = chunked_gradient(upstream, logit_scale, rows, statistics, slope, shape)
        return image, text, scale
    gradients = allocate_gradients(shape, logit_scale)
    tile, slice_width = gradient_tile(shape)
    primitives.launch(
        gradient_kernel,
        gradient_programs(shape),
        *(rows, logit_scale, statistics, upstream, slope, gradients),
        *(shape.rows, shape.total, shape.first, shape.total_padded, shape.width, shape.width_padded),
        **tile.options(),
        SLICE=slice_width,
        ACC=primitives.acc_dtype(shape.dtype),
    )
    return gradients.image, gradients.text, gradients.scale


backward = torch.library.custom_op("dive_fast::contrastive_loss_backward", launch_backward, mutates_args=())


@backward.register_fake
def _(
    upstream: Tensor,
    logit_scale: Tensor,
    packed: Tensor,
    factors: Tensor,
    statistics: Tensor,
    slope: Tensor,
    count: int,
    first: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    image, text, scale = allocate_gradients(saved_shape(packed, statistics, count, first, width), logit_scale)
    return image, text, scale


def allocate_gradients(shape: Shape, logit_scale: Tensor) -> Gradients:
    """Uninitialized gradients of features and scale."""
    device = logit_scale.device
    image, text = (primitives.empty(shape.rows, shape.width, dtype=shape.dtype, device=device) for _ in range(2))
    return Gradients(image, text, primitives.empty(*logit_scale.shape, dtype=logit_scale.dtype, device=device))


def chunked_gradient(
    upstream: Tensor, logit_scale: Tensor, packed: Packed, statistics: Tensor, slope: Tensor, shape: Shape
) -> Gradients:
    """Gradients for batches with too many logits to recompute them for every slice of the width."""
    gradients = allocate_gradients(shape, logit_scale)
    chunk, columns = _chunk(shape)
    device = packed.rows.device
    halves = primitives.empty(2 if shape.is_half else 1, chunk, columns, dtype=shape.dtype, device=device)
    tile, block = statistics_tile(shape), primitives.row_block(shape.width_padded)
    acc = primitives.acc_dtype(shape.dtype)
    sizes = shape.total, shape.first, shape.total_padded
    for side, gradient in enumerate((gradients.image, gradients.text)):
        for start in range(0, shape.rows, chunk):
            count = min(chunk, shape.rows - start)  # the packed rows end with the last tile of them
            primitives.launch(
                weights_kernel,
                triton.cdiv(count, tile.ROWS) * (columns // tile.COLUMNS),
                *(packed, logit_scale, statistics, halves, side, start, chunk, columns),
                *(*sizes, shape.width_padded),
                **tile.options(),
                ACC=acc,
            )
            sums = _matmul(halves[:, :count], packed.rows[1 - side, :columns])
            primitives.launch(
                finish_gradient_kernel,
                triton.cdiv(count, block.ROWS),
                *(sums, packed, logit_scale, statistics, upstream, gradient, side, start, shape.rows),
                *(*sizes, shape.width, shape.width_padded),
                BLOCK=block,
                ACC=acc,
            )
    gradients.scale.copy_(upstream * slope)
    return gradients


def _chunk(shape: Shape) -> tuple[int, int]:
    """Rows and columns of the weights that are in memory at one time."""
    columns = primitives.round_up(shape.total, PAD_ROWS)
    chunk = max(CHUNK_LOGITS // columns // PAD_ROWS * PAD_ROWS, CHUNK_ROWS)
    return min(chunk, primitives.round_up(shape.rows, PAD_ROWS)), columns


def scratch_bytes(shape: Shape) -> int:
    """Memory that :func:`chunked_gradient` allocates besides its results; 0 if the gradient is fused."""
    if not shape.is_large:
        return 0
    chunk, columns = _chunk(shape)
    weights = (2 if shape.is_half else 1) * chunk * columns * shape.dtype.itemsize
    # The sums of the high half, and those with the low half added.
    sums = (2 if shape.is_half else 1) * chunk * shape.width_padded
    return weights + sums * primitives.compute_dtype(shape.dtype).itemsize


def _matmul(halves: Tensor, right: Tensor) -> Tensor:
    """``sum(halves) @ right`` by PyTorch, accumulated in fp32 (fp64)."""
    with full_fp32(right.device):
        if len(halves) == 1:
            return halves[0] @ right
        if right.device.type == "cpu":
            return (halves[0].float() + halves[1].float()) @ right.float()
        high = torch.mm(halves[0], right, out_dtype=torch.float32)
        return torch.addmm(high, halves[1], right, out_dtype=torch.float32)


def saved_shape(packed: Tensor, statistics: Tensor, count: int, first: int, width: int) -> Shape:
    """Sizes of the forward that saved these tensors."""
    return Shape(count, statistics.shape[1], first, width, packed.shape[1], packed.shape[2], packed.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, _, logit_scale, group = inputs
    _, *saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(logit_scale, *saved)
    shape = shape_of(image, group)
    ctx.sizes = shape.rows, shape.first, shape.width


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * 4
    return *backward(upstream, *ctx.saved_tensors, *ctx.sizes), None


forward.register_autograd(_backward, setup_context=_setup_context)
