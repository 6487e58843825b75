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
recomputes its logits. *Chunked*: logits once per side, the weights p + q of some rows at a time stored, the sums
over j computed by cuBLAS. The first saves launches, the second saves work: :func:`gradient_path` predicts which is
faster.

**Rounding of the weights.** The sums are products in the features' dtype. In fp16 the weights are rounded to it
once: the gradient itself has no more bits, and its error stays below twice that of the formula in fp32, rounded to
fp16. In bf16 it does not where a batch has equal rows, so weights are the sum of a high and a low half there.
"""

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels import direct, primitives, process_group
from dive_fast.kernels.precision import full_fp32

# The packed matrices are padded to multiples of these: rows by the largest tile, width by the deepest product.
PAD_ROWS, PAD_WIDTH = 128, 64
# Weights lie in [0, 2]; scaled by this they use fp16's full range, and 2^-39 is the smallest difference kept.
_WEIGHT_SCALE = tl.constexpr(2.0**14)

# The tile of the logits is the larger one above this number of logits: a smaller batch has too few of those tiles.
_LARGE_LOGITS = 2048 * 2048


class Rates(NamedTuple):
    """Predicted FLOP/s on an H200, for the choice of the gradient path alone."""

    tile: float  # 64 rows of a program of the fused gradient
    weights: float  # the weights of the chunked gradient, on all processors
    cublas: float  # its sums


_HALF_RATES = Rates(1.6e12, 450e12, 550e12)
_FP32_RATES = Rates(0.27e12, 75e12, 50e12)
# Seconds that the three launches of a chunk cost the GPU and the host, predicted as well.
_CHUNK_LATENCY, _CHUNK_HOST_SECONDS = 12e-6, 45e-6
# Most splits of the columns of a row.
MAX_SPLITS = 32
# Block sums that the last program of the statistics adds at a time.
BLOCKS = 256


class Settings(NamedTuple):
    """Inputs of the choices that are made for each shape; tests and benchmarks replace them."""

    gradient: Literal["auto", "fused", "chunked"] = "auto"
    processors: int = 132  # of an H200; other GPUs run the same programs
    chunk_logits: int = 2**24  # weights of the chunked gradient in memory at one time
    chunk_rows: int = 512  # the fewest rows that make a product fill a GPU


SETTINGS = Settings()


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
        return self.rows * self.total > _LARGE_LOGITS

    @property
    def rates(self) -> Rates:
        return _HALF_RATES if self.is_half else _FP32_RATES

    @property
    def num_halves(self) -> int:
        """Parts in the features' dtype that represent one weight of the chunked gradient."""
        return 2 if self.dtype == torch.bfloat16 else 1


class Packed(NamedTuple):
    """Rows of all ranks in the form that the tiles read."""

    rows: Tensor  # (2, N_padded, D_padded): x^ of images, x^ of texts
    factors: Tensor  # (4, N_padded): f of images, f of texts, 1/|x| of images, 1/|x| of texts


class Reduction(NamedTuple):
    """Statistics of this rank's rows: per split of the columns, then per row, per block of rows, and in total."""

    partials: Tensor  # (3, 2, num_splits, B): highest l_ij - l_ii, sum of exponentials, sum weighted by cosines
    statistics: Tensor  # (8, B): highest logits of images and texts, rest of their losses, label errors, z_i . t_i
    blocks: Tensor  # (2, num_blocks): sums of losses and of dL/ds
    slope: Tensor  # (1,): dL/ds


class State(NamedTuple):
    """Views of the tensor that holds all small buffers of a call; the backward reads the first three."""

    factors: Tensor  # (4, N_padded)
    statistics: Tensor  # (8, N)
    slope: Tensor  # (1,)
    partials: Tensor  # (3, 2, num_splits, B), empty with one split
    blocks: Tensor  # (2, num_blocks)
    local_statistics: Tensor  # (8, B), empty if this rank is alone


class Gradients(NamedTuple):
    """Gradients of both feature matrices, ``(B, D)``, and of the scale."""

    image: Tensor
    text: Tensor
    scale: Tensor


class Geometry(NamedTuple):
    """Launch parameters of the forward and sizes of the state, for one shape."""

    block: primitives.RowBlock
    pack_programs: int
    tile: Tile
    num_splits: int
    num_blocks: int  # of rows, of both sides
    statistics_programs: int
    num_tickets: int
    state_sizes: tuple[int, ...]
    acc: Any  # Triton's dtype
    acc_dtype: torch.dtype


def shape_of(image: Tensor, group: str) -> Shape:
    """Sizes of a call, from this rank's features.

    They are plain integers: a program compiled for symbolic sizes is specialized, as its launches are.
    """
    rows, width = map(int, image.shape)
    return shape_of_sizes(rows, width, image.dtype, group)


def shape_of_sizes(rows: int, width: int, dtype: torch.dtype, group: str) -> Shape:
    """Sizes of a call on this rank's ``(rows, width)`` features, packed in ``dtype``."""
    return _shape(rows, width, dtype, process_group.world_size(group), process_group.rank(group))


@lru_cache
def _shape(rows: int, width: int, dtype: torch.dtype, world_size: int, rank: int) -> Shape:
    total = rows * world_size
    # The last rank's last tile of rows may reach beyond the last tile of columns.
    total_padded = primitives.round_up(total - rows + primitives.round_up(rows, PAD_ROWS), PAD_ROWS)
    return Shape(
        rows, total, rows * rank, width, total_padded, primitives.round_up(width, PAD_WIDTH), dtype
    )  # fmt: skip


# Packing


@triton.jit
def pack_block(
    pid,
    image,
    text,
    packed,
    tickets,  # (num_tickets,): finished programs of the next launch
    num_tickets,
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
        for ticket0 in range(0, num_tickets, BLOCK.WIDTH):
            tl.store(tickets + ticket0 + o_column, 0, mask=ticket0 + o_column < num_tickets)


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
    reduction,
    tickets,  # the first counts finished blocks of rows, the others the finished splits of a block
    B,
    N,
    first,
    N_padded,
    D_padded,
    num_splits,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Online log-sum-exp of a tile of rows over one split of the columns, without the label.

    ``h_i = max_j (l_ij - l_ii)``,  ``sum_j exp(l_ij - l_ii - h_i)``,  and the same sum weighted by
    ``z_i.t_j - z_i.t_i``. One program reduces its columns in ascending order. The last split of a block of rows
    merges all of them and finishes the rows; returns whether this program did.
    """
    ROWS: tl.constexpr = TILE.ROWS
    COLUMNS: tl.constexpr = TILE.COLUMNS
    N_padded = N_padded.to(tl.int64)
    # Side 0 has images as rows and texts as columns, side 1 the other way round.
    side = pid % 2
    split = (pid // 2) % num_splits
    row_tile = pid // (2 * num_splits)
    block = 2 * row_tile + side
    row0 = row_tile * ROWS
    o_row = row0 + tl.arange(0, ROWS)
    stride = D_padded.to(tl.int64)
    left = packed.rows + (side * N_padded + first + row0) * D_padded
    right = packed.rows + (1 - side) * N_padded * D_padded
    b_row_factor = tl.load(packed.factors + side * N_padded + first + o_row)
    s = tl.load(logit_scale).to(ACC)

    # The labels' cosines are the diagonal of a product like those below, so that equal logits differ by nothing.
    labels = right + (first + row0) * stride
    b_label_cosine = primitives.diagonal_products(left, labels, D_padded, ROWS, COLUMNS, TILE.DEPTH, ACC)
    b_label_cosine *= b_row_factor * tl.load(packed.factors + (1 - side) * N_padded + first + o_row)

    b_highest = tl.full([ROWS], float("-inf"), ACC)
    b_total = tl.zeros([ROWS], ACC)
    b_weighted = tl.zeros([ROWS], ACC)
    span = tl.cdiv(tl.cdiv(N, COLUMNS), num_splits) * COLUMNS
    for column0 in range(split * span, tl.minimum((split + 1) * span, N), COLUMNS):
        o_column = column0 + tl.arange(0, COLUMNS)
        b_column_factor = tl.load(packed.factors + (1 - side) * N_padded + o_column)
        b_product = primitives.row_products(
            left, right + column0 * stride, D_padded, ROWS, COLUMNS, TILE.DEPTH, ACC
        )
        # Each cosine relative to the label's: the large common part is gone before s magnifies it.
        b_relative = b_product * (b_row_factor[:, None] * b_column_factor[None, :]) - b_label_cosine[:, None]
        m_negative = (o_column < N)[None, :] & (o_column[None, :] != first + o_row[:, None])
        b_logit = tl.where(m_negative, b_relative * s, float("-inf"))
        b_highest, b_mass, b_rescale = masses(b_highest, b_logit)
        b_total = b_total * b_rescale + tl.sum(b_mass, axis=1)
        b_weighted = b_weighted * b_rescale + tl.sum(b_mass * b_relative, axis=1)
    # An infinite scale leaves a confident row without any negative: s - s makes it NaN, and is 0 otherwise.
    b_total += s - s

    num_blocks = 2 * tl.cdiv(B, ROWS)
    is_finisher = num_splits >= 1  # true, as a value of the kernel
    if SPLIT:
        p_partial = reduction.partials + (side * num_splits + split).to(tl.int64) * B + o_row
        size = 2 * num_splits.to(tl.int64) * B
        tl.store(p_partial, b_highest, mask=o_row < B)
        tl.store(p_partial + size, b_total, mask=o_row < B)
        tl.store(p_partial + 2 * size, b_weighted, mask=o_row < B)
        is_finisher = primitives.is_last(tickets + 1 + block, num_splits)
        if is_finisher:
            b_highest, b_total, b_weighted = _merge_splits(reduction, o_row, side, B, num_splits, ROWS, ACC)
            _finish_rows(
                reduction, o_row, side, block, num_blocks, B, b_highest, b_total, b_weighted, b_label_cosine
            )  # fmt: skip
    else:
        _finish_rows(
            reduction, o_row, side, block, num_blocks, B, b_highest, b_total, b_weighted, b_label_cosine
        )  # fmt: skip
    return is_finisher


@triton.jit
def masses(b_highest, b_logit):
    """Highest logit of each row including a tile, ``exp(logit - highest)``, and the factor of earlier sums."""
    b_new_highest = tl.maximum(b_highest, tl.max(b_logit, axis=1))
    # A row without a negative so far has no highest logit to subtract.
    b_shift = tl.where(b_new_highest == float("-inf"), 0.0, b_new_highest)
    return b_new_highest, tl.exp(b_logit - b_shift[:, None]), tl.exp(b_highest - b_shift)


@triton.jit
def _merge_splits(reduction, o_row, side, B, num_splits, ROWS: tl.constexpr, ACC: tl.constexpr):
    """Highest logit, sum of exponentials and weighted sum of a block of rows over all splits, in a fixed order."""
    SPLITS: tl.constexpr = 8
    size = 2 * num_splits.to(tl.int64) * B
    b_highest = tl.full([ROWS], float("-inf"), ACC)
    b_total = tl.zeros([ROWS], ACC)
    b_weighted = tl.zeros([ROWS], ACC)
    # Several splits at a time: the program would otherwise wait for memory once per split.
    for split0 in range(0, num_splits, SPLITS):
        o_split = split0 + tl.arange(0, SPLITS)
        p_partial = reduction.partials + (side * num_splits + o_split)[:, None] * B.to(tl.int64) + o_row[None, :]
        m_partial = (o_split < num_splits)[:, None] & (o_row < B)[None, :]
        # From the cache that all programs share: this program's own may hold stale values.
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
    return b_highest, b_total, b_weighted


@triton.jit
def _finish_rows(
    reduction, o_row, side, block, num_blocks, B, b_highest, b_total, b_weighted, b_label_cosine
):  # fmt: skip
    """Statistics of a block of rows, and the block's sums of losses and of their derivatives by s."""
    m_row = o_row < B
    b_top, b_rest, b_error = log_sums(b_highest, b_total)
    b_slope = tl.where(m_row, mean_relative(b_error, b_weighted, b_total), 0.0)
    stride = B.to(tl.int64)
    p_row = reduction.statistics + side * stride + o_row
    tl.store(p_row, b_top, mask=m_row)
    tl.store(p_row + 2 * stride, b_rest, mask=m_row)
    tl.store(p_row + 4 * stride, b_error, mask=m_row)
    tl.store(p_row + 6 * stride, b_label_cosine, mask=m_row)
    tl.store(reduction.blocks + block, tl.sum(tl.where(m_row, b_top + b_rest, 0.0), axis=0))
    tl.store(reduction.blocks + num_blocks + block, tl.sum(b_slope, axis=0))


@triton.jit
def log_sums(b_highest, b_total):
    """Log-sum-exp with the label, whose relative logit is 0, and the label's error.

    With d the log-sum-exp over j != i: ``r_i = softplus(d)``, as its highest logit and the rest, and
    ``1 - p_ii = sigmoid(d)``.
    """
    b_top = tl.where(b_highest < 0, 0.0, b_highest)  # a comparison that propagates NaN
    b_mass = b_total * tl.exp(b_highest - b_top)
    # The highest logit, label included, contributes 1, which stays out of log1p's argument.
    b_rest = primitives.log1p(tl.where(b_top == 0.0, b_mass, b_mass - 1.0 + tl.exp(-b_top)))
    b_log_sum = tl.where(b_total == 0.0, float("-inf"), b_highest + tl.log(b_total))
    return b_top, b_rest, 1.0 / (1.0 + tl.exp(-b_log_sum))


@triton.jit
def mean_relative(b_error, b_weighted, b_total):
    """``sum_j p_ij x_ij`` with ``x_ii = 0``, from the sums over j != i; 0 in a row without a negative."""
    return tl.where(b_total != 0.0, b_error * b_weighted / b_total, 0.0)


@triton.jit
def finish_contrastive(reduction, B, num_blocks, BLOCKS: tl.constexpr, ACC: tl.constexpr):
    """Mean loss of this rank's rows, ``1/(2B) sum_i (r_i + c_i)``, from the sums of all blocks; writes dL/ds.

    One program adds the blocks in a fixed order, so that the result does not depend on which program it is.
    """
    b_losses = tl.zeros([BLOCKS], ACC)
    b_slopes = tl.zeros([BLOCKS], ACC)
    for block0 in range(0, num_blocks, BLOCKS):
        o_block = block0 + tl.arange(0, BLOCKS)
        # From the cache that all programs share: this program's own may hold stale values.
        p_block = reduction.blocks + o_block
        b_losses += tl.load(p_block, mask=o_block < num_blocks, other=0.0, cache_modifier=".cg")
        b_slopes += tl.load(p_block + num_blocks, mask=o_block < num_blocks, other=0.0, cache_modifier=".cg")
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
    statistics,  # (8, N)
    s,
    N,
    first,
    N_padded,
):
    """``(p_ij + q_ij) f_j`` of a tile times the scale of the weights; 0 at labels and outside of the matrix.

    ``p_ij = exp(l_ij - l_ii - r_i)``,  ``q_ij = exp(l_ij - l_jj - c_j)``; r and c are subtracted part by part.
    """
    b_column_factor = tl.load(packed.factors + (1 - side) * N_padded + o_column)
    b_row_factor = tl.load(packed.factors + side * N_padded + first + o_row)
    b_cosine = b_product * (b_row_factor[:, None] * b_column_factor[None, :])
    o_label = first + o_row
    stride = N.to(tl.int64)
    p_row = statistics + side * stride + o_label
    p_column = statistics + (1 - side) * stride + o_column
    b_row_top = tl.load(p_row, mask=o_label < N, other=0.0)
    b_row_rest = tl.load(p_row + 2 * stride, mask=o_label < N, other=0.0)
    b_column_top = tl.load(p_column, mask=o_column < N, other=0.0)
    b_column_rest = tl.load(p_column + 2 * stride, mask=o_column < N, other=0.0)
    # Both labels from this side's product, as the cosines are.
    label_cosine = statistics + (6 + side) * stride
    b_to_row_label = b_cosine - tl.load(label_cosine + o_label, mask=o_label < N, other=0.0)[:, None]
    b_to_column_label = b_cosine - tl.load(label_cosine + o_column, mask=o_column < N, other=0.0)[None, :]
    b_weight = tl.exp(b_to_row_label * s - b_row_top[:, None] - b_row_rest[:, None])
    b_weight += tl.exp(b_to_column_label * s - b_column_top[None, :] - b_column_rest[None, :])
    # Rows beyond this rank's last are other ranks' or padding: computed, never stored.
    m_negative = (o_column < N)[None, :] & (o_column[None, :] != o_label[:, None]) & (o_label < N)[:, None]
    return tl.where(m_negative, b_weight * (b_column_factor * _WEIGHT_SCALE)[None, :], 0.0)


@triton.jit
def gradient_block(
    pid,
    packed,
    logit_scale,
    statistics,  # (8, N)
    upstream,
    slope,  # (1,): dL/ds of this rank's rows
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
    ROWS: tl.constexpr = TILE.ROWS
    COLUMNS: tl.constexpr = TILE.COLUMNS
    DTYPE: tl.constexpr = packed.rows.dtype.element_ty
    HAS_LOW_HALF: tl.constexpr = packed.rows.dtype.element_ty == tl.bfloat16
    N_padded = N_padded.to(tl.int64)
    num_slices = tl.cdiv(D, SLICE)
    side = pid % 2
    slice0 = (pid // 2) % num_slices * SLICE
    row0 = pid // (2 * num_slices) * ROWS
    o_row = row0 + tl.arange(0, ROWS)
    o_depth = slice0 + tl.arange(0, SLICE)
    stride = D_padded.to(tl.int64)
    left = packed.rows + (side * N_padded + first + row0) * D_padded
    right = packed.rows + (1 - side) * N_padded * D_padded
    s = tl.load(logit_scale).to(ACC)

    b_acc = tl.zeros([ROWS, SLICE], ACC)
    if HAS_LOW_HALF:
        b_low_acc = tl.zeros([ROWS, SLICE], ACC)
    b_radial = tl.zeros([ROWS], ACC)  # z_i . dz_i, without f_i and the scale of the weights
    o_tile = tl.arange(0, COLUMNS)
    p_slice = right + o_tile[:, None] * D_padded + o_depth[None, :]
    for column0 in range(0, N, COLUMNS):
        b_product = primitives.row_products(
            left, right + column0 * stride, D_padded, ROWS, COLUMNS, TILE.DEPTH, ACC
        )
        b_weight = _gradient_weights(
            b_product, o_row, column0 + o_tile, side, packed, statistics, s, N, first, N_padded
        )  # fmt: skip
        b_right = tl.load(p_slice + column0 * stride, mask=(o_depth < D_padded)[None, :], other=0.0)
        b_high = primitives.round_to(b_weight, DTYPE)
        b_acc = primitives.dot(b_high, b_right, b_acc)
        if HAS_LOW_HALF:
            # A sum of its own: chained products would recompute each other's rows and exchange their layouts.
            b_low_acc = primitives.dot(primitives.round_to(b_weight - b_high.to(ACC), DTYPE), b_right, b_low_acc)
        else:
            b_weight = b_high.to(ACC)  # of the weights that are summed, so that their rounding is projected out
        b_radial += tl.sum(b_weight * b_product, axis=1)
    if HAS_LOW_HALF:
        b_acc += b_low_acc

    m_store = (o_depth < D)[None, :] & (o_row < B)[:, None]
    o_packed = o_row.to(tl.int64)[:, None] * D_padded + o_depth[None, :]
    b_row = tl.load(left - row0 * stride + o_packed, mask=m_store, other=0.0).to(ACC)
    b_partner = tl.load(right + first * stride + o_packed, mask=m_store, other=0.0).to(ACC)
    b_row_factor = tl.load(packed.factors + side * N_padded + first + o_row)
    b_partner_factor = tl.load(packed.factors + (1 - side) * N_padded + first + o_row)
    b_inverse = tl.load(packed.factors + (2 + side) * N_padded + first + o_row)
    p_statistics = statistics + first + o_row
    b_label_errors = _label_errors(p_statistics, N, o_row < B)
    b_label_cosine = tl.load(p_statistics + (6 + side) * N.to(tl.int64), mask=o_row < B, other=0.0)
    b_gradient = b_acc * (1.0 / _WEIGHT_SCALE) - b_partner * (b_partner_factor * b_label_errors)[:, None]
    b_radial = b_radial * (b_row_factor * (1.0 / _WEIGHT_SCALE)) - b_label_errors * b_label_cosine
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


@triton.jit
def _label_errors(p_statistics, N, m_row):
    """``a_i = (1 - p_ii) + (1 - q_ii)`` of the rows whose first statistic ``p_statistics`` points to."""
    b_image = tl.load(p_statistics + 4 * N.to(tl.int64), mask=m_row, other=0.0)
    return b_image + tl.load(p_statistics + 5 * N.to(tl.int64), mask=m_row, other=0.0)


# Gradient, chunked


@triton.jit(do_not_specialize=["side", "chunk0", "N", "first"], do_not_specialize_on_alignment=["logit_scale"])
def weights_kernel(
    packed,
    logit_scale,
    statistics,  # (8, N)
    weights,  # (chunk, columns); in bf16 (2 chunk, columns): the high bits of all rows, then the low bits
    side,
    chunk0,
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
    DTYPE: tl.constexpr = weights.dtype.element_ty
    HAS_LOW_HALF: tl.constexpr = weights.dtype.element_ty == tl.bfloat16
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
    b_weight = _gradient_weights(b_product, o_row, o_column, side, packed, statistics, s, N, first, N_padded)
    o_weight = (row0 + tl.arange(0, TILE.ROWS)).to(tl.int64)[:, None] * columns + o_column[None, :]
    b_high = primitives.round_to(b_weight, DTYPE)
    tl.store(weights + o_weight, b_high)
    if HAS_LOW_HALF:
        low = weights + (num_row_tiles * TILE.ROWS).to(tl.int64) * columns
        tl.store(low + o_weight, primitives.round_to(b_weight - b_high.to(ACC), DTYPE))


@triton.jit(
    do_not_specialize=["side", "chunk0", "chunk", "B", "N", "first"],
    do_not_specialize_on_alignment=["logit_scale", "upstream"],
)
def finish_gradient_kernel(
    sums,  # (chunk, D_padded): sum_j (p_ij + q_ij) t_j, scaled as the weights; in bf16 those of both halves
    packed,
    logit_scale,
    statistics,  # (8, N)
    upstream,
    gradient,  # (B, D)
    side,
    chunk0,
    chunk,
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
    m_row = (o_chunk_row < chunk) & (o_row < B)
    m_element = m_row[:, None] & (o_depth < D)[None, :]
    o_packed = (first + o_row).to(tl.int64)[:, None] * D_padded + o_depth[None, :]
    o_side = N_padded * D_padded
    p_sums = sums + o_chunk_row.to(tl.int64)[:, None] * D_padded + o_depth[None, :]
    b_sums = tl.load(p_sums, mask=m_element, other=0.0)
    if packed.rows.dtype.element_ty == tl.bfloat16:
        b_sums += tl.load(p_sums + chunk.to(tl.int64) * D_padded, mask=m_element, other=0.0)
    b_z = tl.load(packed.rows + side * o_side + o_packed, mask=m_element, other=0.0).to(ACC)
    b_t = tl.load(packed.rows + (1 - side) * o_side + o_packed, mask=m_element, other=0.0).to(ACC)
    b_z *= tl.load(packed.factors + side * N_padded + first + o_row)[:, None]
    b_t *= tl.load(packed.factors + (1 - side) * N_padded + first + o_row)[:, None]
    b_inverse = tl.load(packed.factors + (2 + side) * N_padded + first + o_row)
    b_label_errors = _label_errors(statistics + first + o_row, N, m_row)
    s = tl.load(logit_scale).to(ACC)
    b_gradient = b_sums * (1.0 / _WEIGHT_SCALE) - b_t * b_label_errors[:, None]
    # Below the clamp z is linear in x, and no component is projected out.
    b_radial = tl.where(b_inverse < 1.0 / primitives.CLAMP, tl.sum(b_z * b_gradient, axis=1), 0.0)
    b_gradient = (b_gradient - b_z * b_radial[:, None]) * b_inverse[:, None]
    b_gradient *= tl.load(upstream).to(ACC) * s / (2.0 * B.to(ACC))
    b_gradient = primitives.round_to(b_gradient, gradient.dtype.element_ty)
    tl.store(gradient + o_row.to(tl.int64)[:, None] * D + o_depth[None, :], b_gradient, mask=m_element)


# Launched kernels


@triton.jit(do_not_specialize=["num_tickets", "N"])
def pack_kernel(
    image, text, packed, tickets, num_tickets, N, N_padded, D, D_padded, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """``x -> x^, f, 1/|x|`` of images and texts: :func:`pack_block`."""
    pack_block(tl.program_id(0), image, text, packed, tickets, num_tickets, N, N_padded, D, D_padded, BLOCK, ACC)


@triton.jit(do_not_specialize=["B", "N", "first", "num_splits"], do_not_specialize_on_alignment=["logit_scale"])
def statistics_kernel(
    packed,
    logit_scale,
    reduction,
    loss,
    tickets,
    B,
    N,
    first,
    N_padded,
    D_padded,
    num_splits,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    ACC: tl.constexpr,
):
    """``x^, f -> r, c, a, L, dL/ds``: :func:`statistics_block`, at the end :func:`finish_contrastive`."""
    num_blocks = 2 * tl.cdiv(B, TILE.ROWS)
    is_finisher = statistics_block(
        tl.program_id(0), packed, logit_scale, reduction, tickets, B, N, first, N_padded, D_padded, num_splits,
        TILE, SPLIT, ACC,
    )  # fmt: skip
    if is_finisher:  # noqa: SIM102 (Triton evaluates both sides of an "and")
        if primitives.is_last(tickets, num_blocks):
            tl.store(loss, finish_contrastive(reduction, B, num_blocks, BLOCKS, ACC))


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


@lru_cache
def geometry(shape: Shape, settings: Settings) -> Geometry:
    """Launch parameters of the forward, and sizes of the state."""
    tile, block = logits_tile(shape), primitives.row_block(shape.width_padded)
    row_tiles = primitives.divide_up(shape.rows, tile.ROWS)
    splits = num_splits(shape, tile, settings.processors, MAX_SPLITS)
    is_split, is_alone = splits > 1, shape.rows == shape.total
    sizes = (  # in the order of State
        4 * shape.total_padded,
        8 * shape.total,
        1,
        6 * splits * shape.rows if is_split else 0,
        4 * row_tiles,
        0 if is_alone else 8 * shape.rows,
    )
    return Geometry(
        block=block,
        pack_programs=shape.total_padded // block.ROWS,
        tile=tile,
        num_splits=splits,
        num_blocks=2 * row_tiles,
        statistics_programs=2 * row_tiles * splits,
        num_tickets=1 + (2 * row_tiles if is_split else 0),
        state_sizes=primitives.aligned(sizes),
        acc=primitives.acc_dtype(shape.dtype),
        acc_dtype=primitives.compute_dtype(shape.dtype),
    )


def logits_tile(shape: Shape) -> Tile:
    """Tile of the statistics and of the chunked weights."""
    if shape.is_half:
        return Tile(128, 128, 64, num_warps=8, num_stages=4) if shape.is_large else Tile(64, 64, 64, 4, 3)
    return Tile(128, 64, 32, num_warps=8, num_stages=3) if shape.is_large else Tile(64, 32, 32, 4, 3)


def num_splits(shape: Shape, tile: Tile, processors: int, most: int) -> int:
    """Number of parts into which the columns of a row are split, so that a small batch keeps the full GPU busy.

    The fewest tiles one after another: each program has those of its split and those of its labels, and as many
    programs run at a time as fit on the processors (three of the small tile, by their shared memory).
    """
    column_tiles = primitives.divide_up(shape.total, tile.COLUMNS)
    row_programs = 2 * primitives.divide_up(shape.rows, tile.ROWS)
    resident = processors * (3 if tile.num_warps == 4 else 1)

    def tiles_in_turn(splits: int) -> int:
        tiles = primitives.divide_up(column_tiles, splits) + tile.ROWS // tile.COLUMNS
        return primitives.divide_up(row_programs * splits, resident) * tiles

    return min(range(1, min(column_tiles, most) + 1), key=tiles_in_turn)


class GradientPlan(NamedTuple):
    """The path of the gradient, and the launch of the fused one: its tile, and the slice of a program."""

    path: Literal["fused", "chunked"]
    tile: Tile
    slice_width: int
    programs: int
    fused_seconds: float  # predicted
    chunked_seconds: float


@lru_cache
def gradient_plan(shape: Shape, settings: Settings) -> GradientPlan:
    """The gradient that is predicted to take the least time.

    Logits must equal those of the statistics bit for bit: where one text holds all of an image's probability, the
    errors of its logit and of the log-sum-exp cancel. So both use the same kind of matrix instruction, on Hopper
    the one with 64 rows.
    """
    launches: tuple[tuple[Tile, int], ...]
    if shape.is_half:
        # Four warps, or 128 rows for eight, spill registers in the joint step's kernel.
        launches = (Tile(64, 64, 64, num_warps=8, num_stages=3), 64), (Tile(64, 64, 64, 8, 3), 128)
    else:
        launches = ((Tile(64, 32, 32, num_warps=4, num_stages=2), 64),)
    seconds, tile, slice_width = min((_fused_seconds(shape, *launch, settings), *launch) for launch in launches)
    chunked_seconds = _chunked_seconds(shape, settings)
    path = settings.gradient
    if path == "auto":
        path = "fused" if seconds <= chunked_seconds else "chunked"
    programs = _fused_programs(shape, tile, slice_width)
    return GradientPlan(path, tile, slice_width, programs, seconds, chunked_seconds)


def _fused_programs(shape: Shape, tile: Tile, slice_width: int) -> int:
    """Number of programs of :func:`gradient_block`."""
    return 2 * primitives.divide_up(shape.rows, tile.ROWS) * primitives.divide_up(shape.width, slice_width)


def _fused_seconds(shape: Shape, tile: Tile, slice_width: int, settings: Settings) -> float:
    """Prediction of the fused gradient: complete waves of programs, each with all logits of its rows."""
    resident = settings.processors * (2 if tile.num_warps == 4 else 1)
    waves = primitives.divide_up(_fused_programs(shape, tile, slice_width), resident)
    depth = shape.width_padded + shape.num_halves * slice_width
    flop = 2 * tile.ROWS * depth * primitives.round_up(shape.total, tile.COLUMNS)
    return waves * flop / (shape.rates.tile * tile.ROWS / 64)


def _chunked_seconds(shape: Shape, settings: Settings) -> float:
    """Prediction of the chunked gradient: the longer of its work on the GPU and of its launches by the host."""
    chunk, columns = chunk_size(shape, settings)
    num_chunks = 2 * primitives.divide_up(shape.rows, chunk)
    flop = 4 * shape.rows * columns * shape.width_padded  # one product, both sides
    products = flop / shape.rates.weights + shape.num_halves * flop / shape.rates.cublas
    return max(products + num_chunks * _CHUNK_LATENCY, num_chunks * _CHUNK_HOST_SECONDS)


def gradient_path(shape: Shape, settings: Settings) -> Literal["fused", "chunked"]:
    """The gradient path."""
    return gradient_plan(shape, settings).path


def gather_features(features: Tensor, group: str) -> Tensor:
    """Features of all ranks in rank order, contiguous: ``(B, D) -> (N, D)``."""
    features = primitives.dense(features)
    return (
        features if process_group.world_size(group) == 1 else process_group.gather(features, group).flatten(0, 1)
    )


def gather_statistics(state: State, message: Tensor, shape: Shape) -> Tensor:
    """The global loss from all ranks' statistics, ``(W, 8 B)``, which are copied to the state.

    It is bit for bit the same on each rank.
    """
    statistics = state.statistics[: 8 * shape.total].view(8, -1, shape.rows)
    statistics.copy_(message.view(-1, 8, shape.rows).transpose(0, 1))
    return statistics[:4].sum(0).mean() / 2


def allocate(shape: Shape, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Uninitialized packed rows and state, the results that the backward needs."""
    packed = primitives.empty(2, shape.total_padded, shape.width_padded, dtype=shape.dtype, device=device)
    return packed, primitives.empty(sum(sizes), dtype=dtype, device=device)


def reduction_of(state: State, shape: Shape) -> Reduction:
    """The buffers that the statistics are written to."""
    local = state.statistics if shape.rows == shape.total else state.local_statistics
    return Reduction(state.partials, local, state.blocks, state.slope)


def launch_forward(image: Tensor, text: Tensor, logit_scale: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the tensors of its backward: packed rows, and the :class:`State` as one tensor."""
    shape = shape_of(image, group)
    plan = geometry(shape, SETTINGS)
    image, text = gather_features(image, group), gather_features(text, group)
    device = image.device
    packed, buffer = allocate(shape, plan.state_sizes, plan.acc_dtype, device)
    loss = primitives.empty(dtype=plan.acc_dtype, device=device)
    tickets = primitives.empty(plan.num_tickets, dtype=torch.int32, device=device)
    state = State._make(buffer.split_with_sizes(plan.state_sizes))
    rows = Packed(packed, state.factors)
    primitives.launch(
        pack_kernel,
        plan.pack_programs,
        *(image, text, rows, tickets, plan.num_tickets),
        *(shape.total, shape.total_padded, shape.width, shape.width_padded),
        BLOCK=plan.block,
        ACC=plan.acc,
    )
    primitives.launch(
        statistics_kernel,
        plan.statistics_programs,
        *(rows, logit_scale, reduction_of(state, shape), loss, tickets),
        *(shape.rows, shape.total, shape.first, shape.total_padded, shape.width_padded, plan.num_splits),
        **plan.tile.options(),
        SPLIT=plan.num_splits > 1,
        BLOCKS=BLOCKS,
        ACC=plan.acc,
    )
    if shape.rows != shape.total:
        message = process_group.gather(state.local_statistics[: 8 * shape.rows], group)
        loss = gather_statistics(state, message, shape)
    return loss, packed, buffer


forward = torch.library.custom_op("dive_fast::contrastive_loss", launch_forward, mutates_args=())


@forward.register_fake
def _(image: Tensor, text: Tensor, logit_scale: Tensor, group: str) -> tuple[Tensor, ...]:
    shape = shape_of(image, group)
    plan = geometry(shape, SETTINGS)
    loss = primitives.empty(dtype=plan.acc_dtype, device=image.device)
    return loss, *allocate(shape, plan.state_sizes, plan.acc_dtype, image.device)


def launch_backward(
    upstream: Tensor,
    logit_scale: Tensor,
    packed: Tensor,
    state: Tensor,
    count: int,
    total: int,
    first: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both feature matrices, ``(count, width)`` each, and of the scale."""
    shape = saved_shape(packed, count, total, first, width)
    plan = geometry(shape, SETTINGS)
    buffers = State._make(state.split_with_sizes(plan.state_sizes))
    gradients = allocate_gradients(shape, logit_scale)
    if gradient_path(shape, SETTINGS) == "chunked":
        chunked_gradient(upstream, logit_scale, packed, buffers, shape, gradients)
        return gradients.image, gradients.text, gradients.scale
    launch = gradient_plan(shape, SETTINGS)
    primitives.launch(
        gradient_kernel,
        launch.programs,
        *(Packed(packed, buffers.factors), logit_scale, buffers.statistics, upstream, buffers.slope, gradients),
        *(shape.rows, shape.total, shape.first, shape.total_padded, shape.width, shape.width_padded),
        **launch.tile.options(),
        SLICE=launch.slice_width,
        ACC=plan.acc,
    )
    return gradients.image, gradients.text, gradients.scale


backward = torch.library.custom_op("dive_fast::contrastive_loss_backward", launch_backward, mutates_args=())


@backward.register_fake
def _(
    upstream: Tensor,
    logit_scale: Tensor,
    packed: Tensor,
    state: Tensor,
    count: int,
    total: int,
    first: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    image, text, scale = allocate_gradients(saved_shape(packed, count, total, first, width), logit_scale)
    return image, text, scale


def allocate_gradients(shape: Shape, logit_scale: Tensor) -> Gradients:
    """Uninitialized gradients of features and scale."""
    device = logit_scale.device
    image, text = (primitives.empty(shape.rows, shape.width, dtype=shape.dtype, device=device) for _ in range(2))
    return Gradients(image, text, primitives.empty(*logit_scale.shape, dtype=logit_scale.dtype, device=device))


def chunked_gradient(
    upstream: Tensor, logit_scale: Tensor, packed: Tensor, state: State, shape: Shape, gradients: Gradients
) -> None:
    """Writes the gradients of batches with too many logits to recompute them for every slice of the width."""
    plan, rows = geometry(shape, SETTINGS), Packed(packed, state.factors)
    chunk, columns = chunk_size(shape, SETTINGS)
    halves, tile, block = shape.num_halves, plan.tile, plan.block
    device = packed.device
    weights = primitives.empty(halves * chunk, columns, dtype=shape.dtype, device=device)
    sums = primitives.empty(halves * chunk, shape.width_padded, dtype=plan.acc_dtype, device=device)
    sizes = shape.total, shape.first, shape.total_padded
    with full_fp32(device):
        for side, gradient in enumerate((gradients.image, gradients.text)):
            for start in range(0, shape.rows, chunk):
                # The packed rows end with the last tile of them.
                count = min(chunk, primitives.round_up(shape.rows - start, tile.ROWS))
                primitives.launch(
                    weights_kernel,
                    count // tile.ROWS * (columns // tile.COLUMNS),
                    *(rows, logit_scale, state.statistics, weights, side, start, columns),
                    *(*sizes, shape.width_padded),
                    **tile.options(),
                    ACC=plan.acc,
                )
                _matmul(weights[: halves * count], packed[1 - side, :columns], sums[: halves * count])
                primitives.launch(
                    finish_gradient_kernel,
                    primitives.divide_up(count, block.ROWS),
                    *(
                        sums,
                        rows,
                        logit_scale,
                        state.statistics,
                        upstream,
                        gradient,
                        side,
                        start,
                        count,
                        shape.rows,
                    ),
                    *(*sizes, shape.width, shape.width_padded),
                    BLOCK=block,
                    ACC=plan.acc,
                )
    torch.mul(upstream, state.slope[0], out=gradients.scale.view(()))


@lru_cache
def chunk_size(shape: Shape, settings: Settings) -> tuple[int, int]:
    """Rows and columns of the weights that are in memory at one time."""
    columns = primitives.round_up(shape.total, PAD_ROWS)
    chunk = max(settings.chunk_logits // columns // PAD_ROWS * PAD_ROWS, settings.chunk_rows)
    return min(chunk, primitives.round_up(shape.rows, PAD_ROWS)), columns


def scratch_bytes(shape: Shape) -> int:
    """Memory that :func:`chunked_gradient` allocates besides its results; 0 if the gradient is fused."""
    if gradient_path(shape, SETTINGS) == "fused":
        return 0
    chunk, columns = chunk_size(shape, SETTINGS)
    sum_bytes = primitives.compute_dtype(shape.dtype).itemsize
    return shape.num_halves * chunk * (columns * shape.dtype.itemsize + shape.width_padded * sum_bytes)


def _matmul(weights: Tensor, right: Tensor, sums: Tensor) -> None:
    """Writes ``weights @ right``, accumulated in the dtype of ``sums``."""
    if weights.dtype == sums.dtype:
        torch.mm(weights, right, out=sums)
    elif right.device.type == "cpu":
        torch.mm(weights.float(), right.float(), out=sums)
    else:
        torch.mm(weights, right, out_dtype=sums.dtype, out=sums)


def saved_shape(packed: Tensor, count: int, total: int, first: int, width: int) -> Shape:
    """Sizes of the forward that saved these tensors."""
    _, total_padded, width_padded = map(int, packed.shape)
    return Shape(int(count), int(total), int(first), int(width), total_padded, width_padded, packed.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, _, logit_scale, group = inputs
    _, packed, state = output
    ctx.set_materialize_grads(False)
    # The packed rows stay differentiable. Features are not saved, so these tie a second derivative to them and
    # make it an error instead of a constant.
    ctx.mark_non_differentiable(state)
    ctx.save_for_backward(logit_scale, packed, state)
    shape = shape_of(image, group)
    ctx.sizes = shape.rows, shape.total, shape.first, shape.width


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * 4
    run = direct.first_order(launch_backward, backward, upstream)
    return *run(upstream, *ctx.saved_tensors, *ctx.sizes), None


forward.register_autograd(_backward, setup_context=_setup_context)
apply = direct.differentiable(launch_forward, _backward, _setup_context)
