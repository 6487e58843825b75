"""The contrastive loss in Triton: no B x B matrix, and fp32's accuracy from half precision's matrix units.

For N pairs, z_i and t_i the unit rows of image and text i, and l_ij = s z_i.t_j::

    r_i = log sum_j exp(l_ij - l_ii)        c_j = log sum_i exp(l_ij - l_jj)
    L   = 1/(2N) sum_i (r_i + c_i)

**Rows are packed first**: x^_i = x_i / 2^e with norm in [1, 2), in the features' own dtype, hence exact, and
padded with zeros to whole tiles. With the factor f_i = 2^e / |x_i| in (1/2, 1], z_i = f_i x^_i. Products of
half-precision rows are exact and accumulate in fp32, so l_ij = s f_i f_j (x^_i . y^_j) never sees a rounded unit
vector.

**The label stands apart.** Logits are taken relative to the label's, l_ij - l_ii = s (z_i.t_j - z_i.t_i), so that
s magnifies a difference and no large number's rounding. Both cosines come from the same matrix product: tensor
cores cut sums off where other arithmetic rounds them, and a label summed elsewhere leaves that bias in each
difference. With d their log-sum-exp over j != i, the row's loss is r_i = softplus(d) and its label's error is
1 - p_ii = sigmoid(d): accurate also when the model is sure, where two logarithms cancel. r_i is kept as the
highest logit, label included, and the rest, for the same reason.

**Gradients.** With p_ij = exp(l_ij - l_ii - r_i), q_ij = exp(l_ij - l_jj - c_j), a_i = (1 - p_ii) + (1 - q_ii)::

    dL/dz_i = s/(2N) [ sum_{j != i} (p_ij + q_ij) t_j - a_i t_i ]
    dL/dx_i = (dz_i - z_i (z_i . dz_i)) / |x_i|          (dz_i / 1e-12 for |x_i| < 1e-12, as F.normalize)
    dL/ds   = 1/(2N) sum_i [ sum_{j != i} p_ij (l_ij - l_ii) / s  +  the same of q over its columns ]

z_i . dz_i follows from the logits alone, since z_i . t_j = l_ij / s. Texts are treated alike with p and q
exchanged.

Over ranks each one gathers all rows, does the work of its own rows against all columns, and gathers r and c.

Two ways to the gradient. *Fused*: one launch; each program owns some rows and a slice of the width, and computes
its logits anew. *Chunked*: logits once per side, the weights p + q of a few rows at a time stored in two halves
(high and low bits), the sums over j left to cuBLAS. The former saves launches, the latter work.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels import primitives, process_group
from dive_fast.kernels.precision import full_fp32

# Rows and columns of the packed matrices are padded to these.
TILE, DEPTH = 128, 64
# Weights lie in [0, 2]; times this they use fp16's whole range, 2^-39 being the smallest difference kept.
_WEIGHT_SCALE = tl.constexpr(2.0**14)

# Fewer programs than this leave parts of a large GPU idle.
_PROGRAMS = 128
# Rows that the last program of the statistics takes at a time.
FINISH_ROWS = 256

# Up to so many logits per side the gradient is fused.
FUSED_LOGITS = 2048 * 2048
# Weights of the chunked gradient that exist at one time; rows at least, or a product is too flat to fill a GPU.
CHUNK_LOGITS = 2**22
CHUNK_ROWS = 512


class Tile(NamedTuple):
    """Constants of a kernel that walks over tiles of logits."""

    ROWS: int
    COLUMNS: int
    DEPTH: int
    num_warps: int
    num_stages: int


class Shape(NamedTuple):
    """Of one call: B rows of this rank, from row ``first`` of N over all ranks; D columns; padded sizes."""

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


def shape_of(image: Tensor, group: str) -> Shape:
    """Sizes from this rank's features."""
    rows, width = image.shape
    total, first = rows * process_group.world_size(group), rows * process_group.rank(group)
    # The last rank's last tile of rows may reach beyond the last tile of columns.
    total_padded = primitives.round_up(total - rows + primitives.round_up(rows, TILE), TILE)
    return Shape(rows, total, first, width, total_padded, primitives.round_up(width, DEPTH), image.dtype)


# Pack


@triton.jit
def pack_block(
    pid,
    image,
    text,
    packed,  # (2, N_padded, D_padded): x^
    rows,  # (4, N_padded): factors of images and texts, 1/|x| of images and texts
    ticket,  # (): programs of the next launch that are done
    N,
    N_padded,
    D,
    D_padded,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    N_padded = N_padded.to(tl.int64)
    row = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    source = row[:, None] * D + column[None, :]
    target = row[:, None] * D_padded + column[None, :]
    inside = (row < N)[:, None] & (column < D)[None, :]
    padded = (row >= 0)[:, None] & (column < D_padded)[None, :]
    x = tl.load(image + source, mask=inside, other=0.0).to(ACC)
    y = tl.load(text + source, mask=inside, other=0.0).to(ACC)
    x, x_factor, x_inverse = _scaled(x)
    y, y_factor, y_inverse = _scaled(y)
    tl.store(packed + target, x.to(packed.dtype.element_ty), mask=padded)
    tl.store(packed + N_padded * D_padded + target, y.to(packed.dtype.element_ty), mask=padded)
    tl.store(rows + row, x_factor)
    tl.store(rows + N_padded + row, y_factor)
    tl.store(rows + 2 * N_padded + row, x_inverse)
    tl.store(rows + 3 * N_padded + row, y_inverse)
    if pid == 0:
        tl.store(ticket, 0)


@triton.jit
def _scaled(x):
    """x^ with norm in [1, 2), the factor that makes it the unit row, and 1 / max(|x|, 1e-12)."""
    norm = primitives.norms(x)
    power = primitives.power_of_two(norm)
    power = tl.where(norm < primitives.CLAMP, tl.full(norm.shape, primitives.CLAMPED_POWER, norm.dtype), power)
    length = primitives.clamped(norm)
    one = tl.full(norm.shape, 1.0, norm.dtype)
    # A norm that overflows leaves zeros, as in F.normalize: power is infinite, and a factor of 1 keeps them.
    factor = tl.where(power == float("inf"), one, primitives.divide(power, length))
    return x * primitives.divide(one, power)[:, None], factor, primitives.divide(one, length)


# Statistics and loss


@triton.jit
def statistics_block(
    pid,
    packed,
    rows,
    logit_scale,
    partials,  # (3, 2, num_splits, B): highest l_ij - l_ii, sum of exponentials, sum weighted by cosines
    statistics,  # (7, B), of which this writes the last two rows: the labels' cosines
    B,
    N,
    first,
    N_padded,
    D_padded,
    num_splits,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ACC: tl.constexpr,
):
    N_padded = N_padded.to(tl.int64)
    side = pid % 2
    split = (pid // 2) % num_splits
    row0 = pid // (2 * num_splits) * ROWS
    row = row0 + tl.arange(0, ROWS)
    stride = D_padded.to(tl.int64)
    left = packed + (side * N_padded + first + row0) * D_padded
    right = packed + (1 - side) * N_padded * D_padded
    row_factor = tl.load(rows + side * N_padded + first + row)
    s = tl.load(logit_scale).to(ACC)

    # The labels' cosines are the diagonal of a product like those below, so that equal logits differ by nothing.
    positive = tl.zeros([ROWS], ACC)
    for offset in range(0, ROWS, COLUMNS):
        label = first + row0 + offset
        product = primitives.products(left, right + label * stride, D_padded, ROWS, COLUMNS, DEPTH, ACC)
        is_label = offset + tl.arange(0, COLUMNS)[None, :] == tl.arange(0, ROWS)[:, None]
        positive += tl.sum(tl.where(is_label, product, 0.0), axis=1)
    positive *= row_factor * tl.load(rows + (1 - side) * N_padded + first + row)
    if split == 0:
        tl.store(statistics + (5 + side) * B.to(tl.int64) + row, positive, mask=row < B)

    highest = tl.full([ROWS], float("-inf"), ACC)
    total = tl.zeros([ROWS], ACC)
    weighted = tl.zeros([ROWS], ACC)
    span = tl.cdiv(tl.cdiv(N, COLUMNS), num_splits) * COLUMNS
    for column0 in range(split * span, tl.minimum((split + 1) * span, N), COLUMNS):
        column = column0 + tl.arange(0, COLUMNS)
        column_factor = tl.load(rows + (1 - side) * N_padded + column)
        product = primitives.products(left, right + column0 * stride, D_padded, ROWS, COLUMNS, DEPTH, ACC)
        # How far above the label's each cosine is: what is large and common is gone before s magnifies it.
        above = product * (row_factor[:, None] * column_factor[None, :]) - positive[:, None]
        negative = (column < N)[None, :] & (column[None, :] != first + row[:, None])
        logit = tl.where(negative, above * s, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logit, axis=1))
        # A row without a negative so far has no highest logit to subtract.
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        mass = tl.exp(logit - shift[:, None])
        old = tl.exp(highest - shift)
        total = total * old + tl.sum(mass, axis=1)
        weighted = weighted * old + tl.sum(mass * above, axis=1)
        highest = new_highest

    place = partials + (side * num_splits + split).to(tl.int64) * B + row
    size = 2 * num_splits.to(tl.int64) * B
    tl.store(place, highest, mask=row < B)
    # An infinite scale leaves a sure row no negative at all: s - s makes it NaN, and is 0 otherwise.
    tl.store(place + size, total + (s - s), mask=row < B)
    tl.store(place + 2 * size, weighted, mask=row < B)


@triton.jit
def finish_contrastive(
    partials,
    statistics,  # (7, B), of which this writes the first five rows
    slope,  # (): dL/ds of this rank's rows
    B,
    num_splits,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Loss of this rank's rows, from all programs' partial sums, in an order that does not vary."""
    SPLITS: tl.constexpr = 8
    size = 2 * num_splits.to(tl.int64) * B
    losses = tl.zeros([ROWS], ACC)
    slopes = tl.zeros([ROWS], ACC)
    for row0 in range(0, B, ROWS):
        row = row0 + tl.arange(0, ROWS)
        inside = row < B
        complement = tl.zeros([ROWS], ACC)
        for side in tl.static_range(2):
            highest = tl.full([ROWS], float("-inf"), ACC)
            total = tl.zeros([ROWS], ACC)
            weighted = tl.zeros([ROWS], ACC)
            # Several splits at a time: one by one, a single program would wait for memory as often.
            for split0 in range(0, num_splits, SPLITS):
                split = split0 + tl.arange(0, SPLITS)
                # From the cache that all programs share: this one's own may hold what was there before.
                place = partials + (side * num_splits + split)[:, None] * B.to(tl.int64) + row[None, :]
                there = (split < num_splits)[:, None] & inside[None, :]
                part = tl.load(place, mask=there, other=float("-inf"), cache_modifier=".cg")
                sums = tl.load(place + size, mask=there, other=0.0, cache_modifier=".cg")
                weights = tl.load(place + 2 * size, mask=there, other=0.0, cache_modifier=".cg")
                new_highest = tl.maximum(highest, tl.max(part, axis=0))
                shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
                old = tl.exp(highest - shift)
                new = tl.exp(part - shift[None, :])
                total = total * old + tl.sum(new * sums, axis=0)
                weighted = weighted * old + tl.sum(new * weights, axis=0)
                highest = new_highest
            top = tl.where(highest < 0, 0.0, highest)  # a comparison that lets a NaN through
            mass = total * tl.exp(highest - top)
            # The highest of all, label included, is worth 1 and stays out of what log1p is given.
            rest = primitives.log1p(tl.where(top == 0.0, mass, mass - 1.0 + tl.exp(-top)))
            margin = tl.where(total == 0.0, float("-inf"), highest + tl.log(total))
            error = 1.0 / (1.0 + tl.exp(-margin))
            complement += error
            losses += tl.where(inside, top + rest, 0.0)
            slopes += tl.where(inside & (total != 0.0), error * weighted / total, 0.0)
            tl.store(statistics + side * B.to(tl.int64) + row, top, mask=inside)
            tl.store(statistics + (2 + side) * B.to(tl.int64) + row, rest, mask=inside)
        tl.store(statistics + 4 * B.to(tl.int64) + row, complement, mask=inside)
    count = 2.0 * B.to(ACC)
    tl.store(slope, tl.sum(slopes, axis=0) / count)
    return tl.sum(losses, axis=0) / count


# Gradient, fused


@triton.jit
def _weights(
    product,
    row,
    column,
    side,
    rows,
    statistics,
    s,
    N,
    first,
    N_padded,
):
    """p + q of a tile, 0 at labels and beyond the edge, and the cosines."""
    factor = tl.load(rows + side * N_padded + first + row)[:, None]
    factor = factor * tl.load(rows + (1 - side) * N_padded + column)[None, :]
    cosine = product * factor
    own = first + row
    stride = N.to(tl.int64)
    p_own = statistics + side * stride + own
    p_other = statistics + (1 - side) * stride + column
    own_top = tl.load(p_own, mask=own < N, other=0.0)
    own_rest = tl.load(p_own + 2 * stride, mask=own < N, other=0.0)
    other_top = tl.load(p_other, mask=column < N, other=0.0)
    other_rest = tl.load(p_other + 2 * stride, mask=column < N, other=0.0)
    # Both labels from this side's product, as the cosines are.
    positive = statistics + (5 + side) * stride
    above_own = cosine - tl.load(positive + own, mask=own < N, other=0.0)[:, None]
    above_other = cosine - tl.load(positive + column, mask=column < N, other=0.0)[None, :]
    weight = tl.exp(above_own * s - own_top[:, None] - own_rest[:, None])
    weight += tl.exp(above_other * s - other_top[None, :] - other_rest[None, :])
    # Rows beyond this rank's last are other ranks' or padding: computed, never stored.
    negative = (column < N)[None, :] & (column[None, :] != own[:, None]) & (own < N)[:, None]
    return tl.where(negative, weight, 0.0), cosine


@triton.jit
def gradient_block(
    pid,
    packed,
    rows,
    logit_scale,
    statistics,  # (7, N)
    upstream,
    slope,  # (): dL/ds of this rank's rows
    image_gradient,  # (B, D)
    text_gradient,
    scale_gradient,  # ()
    B,
    N,
    first,
    N_padded,
    D,
    D_padded,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICE: tl.constexpr,
    ACC: tl.constexpr,
):
    N_padded = N_padded.to(tl.int64)
    num_slices = tl.cdiv(D, SLICE)
    side = pid % 2
    slice0 = (pid // 2) % num_slices * SLICE
    row0 = pid // (2 * num_slices) * ROWS
    row = row0 + tl.arange(0, ROWS)
    depth = slice0 + tl.arange(0, SLICE)
    stride = D_padded.to(tl.int64)
    left = packed + (side * N_padded + first + row0) * D_padded
    right = packed + (1 - side) * N_padded * D_padded
    s = tl.load(logit_scale).to(ACC)

    acc = tl.zeros([ROWS, SLICE], ACC)
    along = tl.zeros([ROWS], ACC)
    offset = tl.arange(0, COLUMNS)
    p_slice = right + offset[:, None] * D_padded + depth[None, :]
    for column0 in range(0, N, COLUMNS):
        column = column0 + offset
        product = primitives.products(left, right + column0 * stride, D_padded, ROWS, COLUMNS, DEPTH, ACC)
        weight, cosine = _weights(product, row, column, side, rows, statistics, s, N, first, N_padded)
        along += tl.sum(weight * cosine, axis=1)
        scaled = weight * (tl.load(rows + (1 - side) * N_padded + column)[None, :] * _WEIGHT_SCALE)
        block = tl.load(p_slice + column0 * stride, mask=(depth < D_padded)[None, :], other=0.0)
        acc = primitives.split_dot(scaled, block, acc)

    inside = (depth < D)[None, :] & (row < B)[:, None]
    place = row.to(tl.int64)[:, None] * D_padded + depth[None, :]
    own = tl.load(left - row0 * stride + place, mask=inside, other=0.0).to(ACC)
    partner = tl.load(right + first * stride + place, mask=inside, other=0.0).to(ACC)
    own_factor = tl.load(rows + side * N_padded + first + row)
    partner_factor = tl.load(rows + (1 - side) * N_padded + first + row)
    inverse = tl.load(rows + (2 + side) * N_padded + first + row)
    pairs = statistics + first + row
    complement = tl.load(pairs + 4 * N.to(tl.int64), mask=row < B, other=0.0)
    positive = tl.load(pairs + (5 + side) * N.to(tl.int64), mask=row < B, other=0.0)
    gradient = acc * (1.0 / _WEIGHT_SCALE) - partner * (partner_factor * complement)[:, None]
    along = along - complement * positive
    # Below the clamp z is linear in x and nothing is projected out.
    along = tl.where(inverse < 1.0 / primitives.CLAMP, along, 0.0)
    gradient = gradient - own * (own_factor * along)[:, None]
    gradient = gradient * (inverse * (tl.load(upstream).to(ACC) * s / (2.0 * B.to(ACC))))[:, None]
    place = row.to(tl.int64)[:, None] * D + depth[None, :]
    gradient = primitives.rounded(gradient, image_gradient.dtype.element_ty)
    if pid == 0:
        scale = tl.load(upstream).to(ACC) * tl.load(slope)
        tl.store(scale_gradient, primitives.rounded(scale, scale_gradient.dtype.element_ty))
    if side == 0:
        tl.store(image_gradient + place, gradient, mask=inside)
    else:
        tl.store(text_gradient + place, gradient, mask=inside)


# Gradient, chunked


@triton.jit(do_not_specialize=["side", "chunk0", "N", "first"], do_not_specialize_on_alignment=["logit_scale"])
def weights_kernel(
    packed,
    rows,
    logit_scale,
    statistics,
    halves,  # (2, chunk, columns): high and low bits, or (1, chunk, columns) where one dtype holds all
    side,
    chunk0,
    chunk,
    columns,
    N,
    first,
    N_padded,
    D_padded,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """The weights of texts (side 0: of images) in the gradients of rows ``chunk0 ...``, zeros beyond the edge."""
    pid = tl.program_id(0)
    N_padded = N_padded.to(tl.int64)
    # Rows vary fastest: neighbours share a tile of columns.
    num_row_blocks = tl.num_programs(0) // (columns // COLUMNS)
    place0 = pid % num_row_blocks * ROWS
    column0 = pid // num_row_blocks * COLUMNS
    row = chunk0 + place0 + tl.arange(0, ROWS)
    column = column0 + tl.arange(0, COLUMNS)
    left = packed + (side * N_padded + first + chunk0 + place0) * D_padded
    right = packed + ((1 - side) * N_padded + column0) * D_padded
    product = primitives.products(left, right, D_padded, ROWS, COLUMNS, DEPTH, ACC)
    s = tl.load(logit_scale).to(ACC)
    weight, _ = _weights(product, row, column, side, rows, statistics, s, N, first, N_padded)
    weight *= tl.load(rows + (1 - side) * N_padded + column)[None, :] * _WEIGHT_SCALE
    place = (place0 + tl.arange(0, ROWS)).to(tl.int64)[:, None] * columns + column[None, :]
    high = weight.to(halves.dtype.element_ty)
    tl.store(halves + place, high)
    if halves.dtype.element_ty.primitive_bitwidth == 16:
        low = (weight - high.to(ACC)).to(halves.dtype.element_ty)
        tl.store(halves + chunk.to(tl.int64) * columns + place, low)


@triton.jit(
    do_not_specialize=["side", "chunk0", "B", "N", "first"],
    do_not_specialize_on_alignment=["logit_scale", "upstream"],
)
def finish_gradient_kernel(
    sums,  # (chunk, D_padded): sum over j of weights times x^_j
    packed,
    rows,
    logit_scale,
    statistics,
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
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """From the sum over texts to the gradient of un-normalised image rows, or the other way round."""
    N_padded = N_padded.to(tl.int64)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = chunk0 + place
    depth = tl.arange(0, WIDTH)
    inside = (row < B)[:, None] & (depth < D)[None, :]
    offset = (first + row).to(tl.int64)[:, None] * D_padded + depth[None, :]
    far = N_padded * D_padded
    acc = tl.load(sums + place.to(tl.int64)[:, None] * D_padded + depth[None, :], mask=inside, other=0.0)
    own = tl.load(packed + side * far + offset, mask=inside, other=0.0).to(ACC)
    partner = tl.load(packed + (1 - side) * far + offset, mask=inside, other=0.0).to(ACC)
    own *= tl.load(rows + side * N_padded + first + row)[:, None]
    partner *= tl.load(rows + (1 - side) * N_padded + first + row)[:, None]
    inverse = tl.load(rows + (2 + side) * N_padded + first + row)
    complement = tl.load(statistics + 4 * N.to(tl.int64) + first + row, mask=row < B, other=0.0)
    s = tl.load(logit_scale).to(ACC)
    result = acc * (1.0 / _WEIGHT_SCALE) - partner * complement[:, None]
    along = tl.where(inverse < 1.0 / primitives.CLAMP, tl.sum(own * result, axis=1), 0.0)
    result = (result - own * along[:, None]) * inverse[:, None]
    result *= tl.load(upstream).to(ACC) * s / (2.0 * B.to(ACC))
    result = primitives.rounded(result, gradient.dtype.element_ty)
    tl.store(gradient + row.to(tl.int64)[:, None] * D + depth[None, :], result, mask=inside)


# Launches


@triton.jit(do_not_specialize=["N"])
def pack_kernel(
    image,
    text,
    packed,
    rows,
    ticket,
    N,
    N_padded,
    D,
    D_padded,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    pack_block(pid, image, text, packed, rows, ticket, N, N_padded, D, D_padded, ROWS, WIDTH, ACC)


@triton.jit(do_not_specialize=["B", "N", "first", "num_splits"], do_not_specialize_on_alignment=["logit_scale"])
def statistics_kernel(
    packed,
    rows,
    logit_scale,
    partials,
    statistics,
    slope,
    loss,
    ticket,
    B,
    N,
    first,
    N_padded,
    D_padded,
    num_splits,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    FINISH_ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    statistics_block(
        pid, packed, rows, logit_scale, partials, statistics, B, N, first, N_padded, D_padded, num_splits, ROWS,
        COLUMNS, DEPTH, ACC,
    )  # fmt: skip
    if primitives.is_last(ticket, tl.num_programs(0)):
        value = finish_contrastive(partials, statistics, slope, B, num_splits, FINISH_ROWS, ACC)
        tl.store(loss, value)


@triton.jit(do_not_specialize=["B", "N", "first"], do_not_specialize_on_alignment=["logit_scale", "upstream"])
def gradient_kernel(
    packed,
    rows,
    logit_scale,
    statistics,
    upstream,
    slope,
    image_gradient,
    text_gradient,
    scale_gradient,
    B,
    N,
    first,
    N_padded,
    D,
    D_padded,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICE: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    gradient_block(
        pid, packed, rows, logit_scale, statistics, upstream, slope, image_gradient, text_gradient, scale_gradient,
        B, N, first, N_padded, D, D_padded, ROWS, COLUMNS, DEPTH, SLICE, ACC,
    )  # fmt: skip


# Host


class Buffers(NamedTuple):
    """What a call allocates; the backward needs ``packed``, ``rows``, ``statistics`` and ``slope``."""

    packed: Tensor  # (2, N_padded, D_padded)
    rows: Tensor  # (4, N_padded)
    ticket: Tensor  # ()
    partials: Tensor  # (3, 2, num_splits, B)
    statistics: Tensor  # (7, B): highest logits of images and of texts, rest of their losses, a, z_i . t_i twice
    slope: Tensor  # ()
    loss: Tensor  # ()


def buffers(shape: Shape, device: torch.device) -> Buffers:
    """Outputs and scratch of the forward, unwritten."""
    computing = primitives.computing_dtype(shape.dtype)

    def empty(*size: int, dtype: torch.dtype = computing) -> Tensor:
        return primitives.empty(*size, dtype=dtype, device=device)

    return Buffers(
        empty(2, shape.total_padded, shape.width_padded, dtype=shape.dtype),
        empty(4, shape.total_padded),
        empty(dtype=torch.int32),
        empty(3, 2, num_splits(shape), shape.rows),
        empty(7, shape.rows),
        empty(),
        empty(),
    )


def tile(shape: Shape) -> Tile:
    """Tiles of the statistics and of the chunked weights."""
    if shape.is_half:
        return Tile(128, 128, 64, num_warps=8, num_stages=4) if shape.is_large else Tile(64, 64, 64, 4, 3)
    return Tile(128, 64, 32, num_warps=8, num_stages=3) if shape.is_large else Tile(64, 32, 32, 4, 3)


def gradient_tile(shape: Shape) -> tuple[Tile, int]:
    """Tile of the fused gradient, and how much of the width one program owns.

    Logits have to come out as they did for the statistics, bit for bit: where one text holds all of an image's
    probability, the errors of its logit and of the log-sum-exp cancel. So both use matrix instructions of one
    kind, those of 64 rows on Hopper.
    """
    few = 2 * triton.cdiv(shape.rows, 64) * triton.cdiv(shape.width, 128) < _PROGRAMS
    if shape.is_half:
        return Tile(64, 64, 64, num_warps=8, num_stages=3), 64 if few else 128
    return Tile(64, 32, 32, num_warps=8, num_stages=2), 64


def num_splits(shape: Shape) -> int:
    """Into how many parts the columns of a row are cut, so that a small batch keeps the whole GPU busy."""
    row_blocks = triton.cdiv(shape.rows, tile(shape).ROWS)
    column_blocks = triton.cdiv(shape.total, tile(shape).COLUMNS)
    return max(1, min(column_blocks, _PROGRAMS // (2 * row_blocks)))


def statistics_programs(shape: Shape) -> int:
    """Programs of :func:`statistics_block`."""
    return 2 * num_splits(shape) * triton.cdiv(shape.rows, tile(shape).ROWS)


def gradient_programs(shape: Shape) -> int:
    """Programs of :func:`gradient_block`."""
    tile, width = gradient_tile(shape)
    return 2 * triton.cdiv(shape.rows, tile.ROWS) * triton.cdiv(shape.width, width)


def gather_rows(features: Tensor, group: str) -> Tensor:
    """Features of all ranks in rank order, ``(B, D) -> (N, D)``, dense."""
    return process_group.gather(primitives.dense(features), group).flatten(0, 1)


def gather_statistics(statistics: Tensor, group: str) -> Tensor:
    """Statistics of the pairs of all ranks, ``(7, B) -> (7, N)``."""
    gathered = process_group.gather(statistics, group)
    return statistics if len(gathered) == 1 else gathered.transpose(0, 1).flatten(1).contiguous()


def loss_of(statistics: Tensor) -> Tensor:
    """The global loss from the statistics of all ranks: the same on each, bit for bit."""
    return statistics[:4].sum(0).mean() / 2


def launch_forward(
    image: Tensor, text: Tensor, logit_scale: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, and what its backward needs: packed rows, their factors, statistics of all pairs, dL/ds."""
    shape = shape_of(image, group)
    image, text = (
        process_group.gather(primitives.dense(features), group).flatten(0, 1) for features in (image, text)
    )
    made = buffers(shape, image.device)
    row_block = primitives.row_block(shape.width_padded)
    primitives.launch(
        pack_kernel,
        shape.total_padded // row_block["ROWS"],
        image,
        text,
        *made[:3],
        shape.total,
        shape.total_padded,
        shape.width,
        shape.width_padded,
        **row_block,
        ACC=primitives.acc(shape.dtype),
    )
    primitives.launch(
        statistics_kernel,
        statistics_programs(shape),
        *(
            made.packed,
            made.rows,
            logit_scale,
            made.partials,
            made.statistics,
            made.slope,
            made.loss,
            made.ticket,
        ),
        *(shape.rows, shape.total, shape.first, shape.total_padded, shape.width_padded, num_splits(shape)),
        **tile(shape)._asdict(),
        FINISH_ROWS=FINISH_ROWS,
        ACC=primitives.acc(shape.dtype),
    )
    statistics = gather_statistics(made.statistics, group)
    loss = made.loss if statistics is made.statistics else loss_of(statistics)
    return loss, made.packed, made.rows, statistics, made.slope


forward = torch.library.custom_op("dive_fast::contrastive_loss", launch_forward, mutates_args=())


@forward.register_fake
def _(image: Tensor, text: Tensor, logit_scale: Tensor, group: str) -> tuple[Tensor, ...]:
    shape = shape_of(image, group)
    made = buffers(shape, image.device)
    return made.loss, made.packed, made.rows, made.rows.new_empty(7, shape.total), made.slope


def launch_backward(
    upstream: Tensor,
    logit_scale: Tensor,
    packed: Tensor,
    rows: Tensor,
    statistics: Tensor,
    slope: Tensor,
    count: int,
    first: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both feature matrices, ``(count, width)`` each, and of the scale."""
    shape = saved_shape(packed, statistics, count, first, width)
    if shape.is_large:
        return chunked_gradient(upstream, logit_scale, packed, rows, statistics, slope, shape)
    image, text, scale = gradients(shape, logit_scale)
    tile, slice_width = gradient_tile(shape)
    primitives.launch(
        gradient_kernel,
        gradient_programs(shape),
        *(packed, rows, logit_scale, statistics, upstream, slope, image, text, scale),
        *(shape.rows, shape.total, shape.first, shape.total_padded, shape.width, shape.width_padded),
        **tile._asdict(),
        SLICE=slice_width,
        ACC=primitives.acc(shape.dtype),
    )
    return image, text, scale


backward = torch.library.custom_op("dive_fast::contrastive_loss_backward", launch_backward, mutates_args=())


@backward.register_fake
def _(
    upstream: Tensor,
    logit_scale: Tensor,
    packed: Tensor,
    rows: Tensor,
    statistics: Tensor,
    slope: Tensor,
    count: int,
    first: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return gradients(saved_shape(packed, statistics, count, first, width), logit_scale)


def gradients(shape: Shape, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten gradients of features and scale."""
    device = logit_scale.device
    image, text = (primitives.empty(shape.rows, shape.width, dtype=shape.dtype, device=device) for _ in range(2))
    return image, text, primitives.empty(*logit_scale.shape, dtype=logit_scale.dtype, device=device)


def chunked_gradient(
    upstream: Tensor,
    logit_scale: Tensor,
    packed: Tensor,
    rows: Tensor,
    statistics: Tensor,
    slope: Tensor,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients where the logits are too many to compute anew for every slice of the width."""
    image, text, scale = gradients(shape, logit_scale)
    chunk, columns = _chunk(shape)
    halves = primitives.empty(2 if shape.is_half else 1, chunk, columns, dtype=shape.dtype, device=packed.device)
    constants = tile(shape)
    row_block = primitives.row_block(shape.width_padded)
    sizes = shape.total, shape.first, shape.total_padded
    for side, gradient in enumerate((image, text)):
        for start in range(0, shape.rows, chunk):
            count = min(chunk, shape.rows - start)  # the packed rows end with the last tile of them
            primitives.launch(
                weights_kernel,
                triton.cdiv(count, constants.ROWS) * (columns // constants.COLUMNS),
                *(packed, rows, logit_scale, statistics, halves, side, start, chunk, columns),
                *(*sizes, shape.width_padded),
                **constants._asdict(),
                ACC=primitives.acc(shape.dtype),
            )
            sums = _matmul(halves[:, :count], packed[1 - side, :columns])
            primitives.launch(
                finish_gradient_kernel,
                triton.cdiv(count, row_block["ROWS"]),
                *(sums, packed, rows, logit_scale, statistics, upstream, gradient, side, start, shape.rows),
                *(*sizes, shape.width, shape.width_padded),
                **row_block,
                ACC=primitives.acc(shape.dtype),
            )
    scale.copy_(upstream * slope)
    return image, text, scale


def _chunk(shape: Shape) -> tuple[int, int]:
    """Rows and columns of the weights that exist at one time."""
    columns = primitives.round_up(shape.total, TILE)
    chunk = max(CHUNK_LOGITS // columns // TILE * TILE, CHUNK_ROWS)
    return min(chunk, primitives.round_up(shape.rows, TILE)), columns


def scratch_bytes(shape: Shape) -> int:
    """Memory that :func:`chunked_gradient` takes besides its results; 0 where the gradient is fused."""
    if not shape.is_large:
        return 0
    chunk, columns = _chunk(shape)
    weights = (2 if shape.is_half else 1) * chunk * columns * shape.dtype.itemsize
    # The sums of the high half and, added to them, of the low one.
    sums = (2 if shape.is_half else 1) * chunk * shape.width_padded
    return weights + sums * primitives.computing_dtype(shape.dtype).itemsize


def _matmul(halves: Tensor, right: Tensor) -> Tensor:
    """``sum(halves) @ right`` by the library, accumulated in fp32 (fp64)."""
    with full_fp32(right.device):
        if len(halves) == 1:
            return halves[0] @ right
        if right.device.type == "cpu":
            return (halves[0].float() + halves[1].float()) @ right.float()
        high = torch.mm(halves[0], right, out_dtype=torch.float32)
        return torch.addmm(high, halves[1], right, out_dtype=torch.float32)


def saved_shape(packed: Tensor, statistics: Tensor, count: int, first: int, width: int) -> Shape:
    """Sizes of the call that saved these tensors."""
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
