"""The distillation losses in Triton: no B x B matrix, and exactly zero where student and teacher are equal.

For N pairs, with z_i the unit row of a side (images or texts), t_j those of the other side, z~, t~ the teacher's::

    l_ij = s z_i.t_j        l~_ij = s~ z~_i.t~_j        a_ij = s z_i.t~_j        p, p~, p^ softmax of their rows

    feature     = 1/(N D) sum_i |z_i - z~_i|^2                  relational  = 1/(2N) sum_i KL(p~_i || p_i)
    interactive = 1/(2N) sum_i -log p^_ii                       cross       = 1/(2N) sum_i KL(p~_i || p^_i)

each summed over both sides; a is called *mixed* below. Only the products that a term of non-zero weight needs are
compiled.

**All rows are fp32 unit rows** (fp64 for fp64 features), the student's normalized as the teacher's were: correctly
rounded. Products are tf32x3, which keeps fp32's accuracy. Half-precision rows packed exactly, as in
:mod:`~dive_fast.kernels.contrastive`, would make the student's product faster, but the teacher's rows are rounded:
equal models would have unequal logits, and the KL terms would be the square of that difference.

**Differences come first.** Cosines are taken relative to the label's, c_ij = z_i.t_j - z_i.t_i, before s magnifies
them, and all three log-sum-exps run through the same operations: that over j != i, then the label; log-sum-exp =
highest logit + rest, stored apart. In logits relative to the label's::

    KL(p~_i || p_i) = sum_j p~_ij (l~_ij - l_ij) + (highest_i - highest~_i) + (rest_i - rest~_i)

Every bracket is a difference of close numbers where the models are close, and equal rows give exactly 0. The
logits of the sum are those of the log-sum-exps, with the same rounding: it changes the distributions that are
compared, and the divergence grows with the square of that. So the error is a few roundings of 1, not of logits of
100. (A selection between logit and -inf keeps the compiler from contracting its product with a later
subtraction, which would leave the rounding of one logit in the difference.)

**Gradients.** With q of the columns, e the label's error 1 - p_ii, w the weights of the terms::

    W_ij  = w_relational (p_ij - p~_ij + q_ij - q~_ij)                 j != i
    W_ii  = w_relational (e~_i - e_i + e~'_i - e'_i)                   e' of the columns
    W^_ij = (w_interactive + w_cross) p^_ij - w_cross p~_ij            j != i
    W^_ii = w_cross e~_i - (w_interactive + w_cross) e^_i
    dL/dz_i = s/(2N) sum_j (W_ij t_j + W^_ij t~_j) + 2 w_feature / (N D) (z_i - z~_i)
    dL/ds   = 1/(2N) sum_i [ w_relational (E_p c - E_p~ c) + (w_interactive + w_cross) E_p^ c^ - w_cross E_p~ c^ ]

The weights W and W^ of some rows at a time are stored side by side, and one batched product of cuBLAS sums both
over the student's and the teacher's rows. No term has a gradient to the teacher.

Each rank gathers the rows of all ranks, processes its own rows against all columns, and gathers the statistics.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels import contrastive, direct, primitives, process_group
from dive_fast.kernels.contrastive import Shape, Tile, log_sums, masses, mean_relative
from dive_fast.kernels.precision import full_fp32

# Most splits of the columns of a row; the last one to finish reads all of them at a time.
_SPLITS = 16
# Vectors of a split, and statistics of a row, of which the mixed logits' come last.
_NUM_PARTIALS, _NUM_STATISTICS = 13, 12
_NUM_WARPS = 8


class Settings(NamedTuple):
    """Inputs of the choices that are made for each shape; tests replace them."""

    processors: int = 132  # of an H200; other GPUs run the same programs
    chunk_weights: int = 2**24  # weights of the gradient in memory at one time
    chunk_rows: int = 256  # the fewest rows of a chunk


SETTINGS = Settings()


class Terms(NamedTuple):
    """Weights of the terms and the products that they need, compiled into the kernels."""

    FEATURE_WEIGHT: float
    RELATIONAL_WEIGHT: float
    INTERACTIVE_WEIGHT: float
    CROSS_WEIGHT: float
    FEATURE: bool
    RELATIONAL: bool  # which alone reads the student's logits
    INTERACTIVE: bool
    CROSS: bool
    TEACHER: bool  # the teacher's logits
    MIXED: bool  # logits of student and teacher

    @property
    def has_logits(self) -> bool:
        return self.TEACHER or self.MIXED


@lru_cache
def terms_of(feature: float, relational: float, interactive: float, cross: float) -> Terms:
    """Terms from the weights that users pass."""
    return Terms(
        float(feature),
        float(relational),
        float(interactive),
        float(cross),
        FEATURE=feature != 0,
        RELATIONAL=relational != 0,
        INTERACTIVE=interactive != 0,
        CROSS=cross != 0,
        TEACHER=relational != 0 or cross != 0,
        MIXED=interactive != 0 or cross != 0,
    )


def products(terms: Terms) -> tuple[int, int]:
    """Products of ``(B, D)`` and ``(D, N)`` in the forward, and in the backward those again and the sums."""
    logits = terms.RELATIONAL + terms.TEACHER + terms.MIXED
    return 2 * logits, 2 * (logits + terms.RELATIONAL + terms.MIXED)


class Inputs(NamedTuple):
    """Features and the teacher's unit rows of all ranks' pairs, ``(N, D)`` each, dense."""

    image: Tensor
    text: Tensor
    image_teacher: Tensor
    text_teacher: Tensor


class Reduction(NamedTuple):
    """Sums of this rank's rows: per split of the columns, per row, per block of rows, and in total."""

    partials: Tensor  # (13, 2, num_splits, B)
    statistics: Tensor  # (12, 2, B): highest logit, rest, label's error and cosine: student, teacher, mixed
    blocks: Tensor  # (5, num_blocks): relational, interactive and cross terms, entropies, dL/ds
    slope: Tensor  # (1,): dL/ds
    feature_sums: Tensor  # (pack_programs,): sums of |z - z~|^2
    results: Tensor  # (5,): the four terms and the teacher's entropy
    loss: Tensor  # ()


class State(NamedTuple):
    """Views of the tensor that holds all small buffers of a call; the backward reads the first three."""

    inverses: Tensor  # (2, N_padded): 1 / max(|x|, 1e-12) of images and texts
    statistics: Tensor  # (12, 2, N)
    slope: Tensor  # (1,)
    partials: Tensor  # empty with one split
    blocks: Tensor
    feature_sums: Tensor
    message: Tensor  # (24 B + 5,): statistics and results of this rank, empty if it is alone


class Geometry(NamedTuple):
    """Launch parameters and sizes of the state, for one shape and its terms."""

    block: primitives.RowBlock
    pack_programs: int
    tile: Tile
    num_splits: int
    num_blocks: int  # of rows, of both sides
    num_tickets: int
    state_sizes: tuple[int, ...]
    acc: Any  # Triton's dtype


def shape_of(image: Tensor, terms: Terms, group: str) -> Shape:
    """Sizes of a call, from this rank's features, with the dtype of the unit rows.

    Without logits no rank reads another one's rows.
    """
    rows, width = map(int, image.shape)
    dtype = primitives.compute_dtype(image.dtype)
    if not terms.has_logits:
        group = ""
    return contrastive.shape_of_sizes(rows, width, dtype, group)


def saved_shape(packed: Tensor, count: int, total: int, first: int, width: int) -> Shape:
    """Sizes of the forward that saved these unit rows."""
    return contrastive.saved_shape(packed[0], count, total, first, width)


@lru_cache
def geometry(shape: Shape, terms: Terms, is_alone: bool, settings: Settings) -> Geometry:
    """Launch parameters and sizes of the state; ``is_alone``: whether the group is this rank."""
    tile, block = logits_tile(shape), primitives.row_block(shape.width_padded)
    row_tiles = primitives.divide_up(shape.rows, tile.ROWS) if terms.has_logits else 0
    num_splits = contrastive.num_splits(shape, tile, settings.processors, _SPLITS)
    is_split = num_splits > 1 and terms.has_logits
    pack_programs = shape.total_padded // block.ROWS
    num_statistics = 2 * _NUM_STATISTICS if terms.has_logits else 0
    sizes = (  # in the order of State
        2 * shape.total_padded,
        num_statistics * shape.total,
        1,
        2 * _NUM_PARTIALS * num_splits * shape.rows if is_split else 0,
        10 * row_tiles,
        pack_programs,
        0 if is_alone else num_statistics * shape.rows + 5,
    )
    return Geometry(
        block=block,
        pack_programs=pack_programs,
        tile=tile,
        num_splits=num_splits,
        num_blocks=2 * row_tiles,
        num_tickets=1 + (2 * row_tiles if is_split else 0),
        state_sizes=primitives.aligned(sizes),
        acc=primitives.acc_dtype(shape.dtype),
    )


def logits_tile(shape: Shape) -> Tile:
    """Tile of the statistics and of the weights, which hold up to three products at a time."""
    # With 64 columns the statistics of all terms spill registers.
    return contrastive.logits_tile(shape)._replace(COLUMNS=32)


# Unit rows and the feature term


@triton.jit(do_not_specialize=["num_tickets", "B", "N", "first"])
def distillation_rows_kernel(
    inputs,
    packed,  # (2, 2, N_padded, D_padded): unit rows of images and texts, student's and teacher's
    inverses,  # (2, N_padded)
    feature_sums,  # (programs,)
    tickets,  # (num_tickets,): finished programs of the next launch
    num_tickets,
    B,
    N,
    first,
    N_padded,
    D,
    D_padded,
    FEATURE: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``z = x / max(|x|, 1e-12)``, ``z~``, ``1/|x|``, and ``sum |z - z~|^2`` over this rank's rows of a block."""
    pid = tl.program_id(0)
    N_padded = N_padded.to(tl.int64)
    o_row = pid * BLOCK.ROWS + tl.arange(0, BLOCK.ROWS)
    o_column = tl.arange(0, BLOCK.WIDTH)
    o_source = o_row.to(tl.int64)[:, None] * D + o_column[None, :]
    m_source = (o_row < N)[:, None] & (o_column < D)[None, :]
    o_packed = o_row.to(tl.int64)[:, None] * D_padded + o_column[None, :]
    m_packed = (o_row >= 0)[:, None] & (o_column < D_padded)[None, :]
    size = N_padded * D_padded
    b_squares = tl.zeros([BLOCK.ROWS], ACC)
    for side in tl.static_range(2):
        b_x = tl.load(inputs[side] + o_source, mask=m_source, other=0.0).to(ACC)
        b_teacher = tl.load(inputs[side + 2] + o_source, mask=m_source, other=0.0)
        b_norm = primitives.row_norms(b_x)
        b_length = primitives.clamp_norms(b_norm)
        b_z = primitives.divide(b_x, tl.broadcast_to(b_length[:, None], [BLOCK.ROWS, BLOCK.WIDTH]))
        tl.store(packed + 2 * side * size + o_packed, b_z, mask=m_packed)
        tl.store(packed + (2 * side + 1) * size + o_packed, b_teacher, mask=m_packed)
        b_one = tl.full(b_norm.shape, 1.0, b_norm.dtype)
        tl.store(inverses + side * N_padded + o_row, primitives.divide(b_one, b_length))
        if FEATURE:
            b_squares += tl.sum((b_z - b_teacher) * (b_z - b_teacher), axis=1)
    if FEATURE:
        m_own = (o_row >= first) & (o_row < first + B)
        tl.store(feature_sums + pid, tl.sum(tl.where(m_own, b_squares, 0.0), axis=0))
    if pid == 0:
        for ticket0 in range(0, num_tickets, BLOCK.WIDTH):
            tl.store(tickets + ticket0 + o_column, 0, mask=ticket0 + o_column < num_tickets)


# Statistics and terms


@triton.jit(
    do_not_specialize=["B", "N", "first", "D", "num_splits", "num_sums"],
    do_not_specialize_on_alignment=["logit_scale", "teacher_scale"],
)
def distillation_statistics_kernel(
    packed,
    logit_scale,
    teacher_scale,
    reduction,
    tickets,  # the first counts finished blocks of rows, the others the finished splits of a block
    B,
    N,
    first,
    N_padded,
    D,
    D_padded,
    num_splits,
    num_sums,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Online log-sum-exps of a tile of rows over one split of the columns, and the means under p, p~ and p^.

    The last split of a block of rows merges all of them and finishes the rows; the last block finishes the loss.
    """
    ROWS: tl.constexpr = TILE.ROWS
    COLUMNS: tl.constexpr = TILE.COLUMNS
    DEPTH: tl.constexpr = TILE.DEPTH
    pid = tl.program_id(0)
    side = pid % 2
    split = (pid // 2) % num_splits
    row_tile = pid // (2 * num_splits)
    block = 2 * row_tile + side
    row0 = row_tile * ROWS
    o_row = row0 + tl.arange(0, ROWS)
    stride = D_padded.to(tl.int64)
    size = N_padded * stride
    student = packed + 2 * side * size + (first + row0) * stride
    teacher = student + size
    students = packed + 2 * (1 - side) * size
    teachers = students + size
    s = tl.load(logit_scale).to(ACC)
    ts = tl.load(teacher_scale).to(ACC)

    b_none = tl.full([ROWS], float("-inf"), ACC)
    b_zero = tl.zeros([ROWS], ACC)
    b_label, b_highest, b_total, b_mean = b_zero, b_none, b_zero, b_zero
    b_t_label, b_t_highest, b_t_total, b_t_mean = b_zero, b_none, b_zero, b_zero
    b_m_label, b_m_highest, b_m_total, b_m_mean = b_zero, b_none, b_zero, b_zero
    # Under p~: the student's cosine and l~ - l; the mixed cosine and l~ - a.
    b_t_student, b_t_kl, b_t_mixed, b_t_cross = b_zero, b_zero, b_zero, b_zero
    label = (first + row0) * stride
    if TERMS.RELATIONAL:
        b_label = primitives.diagonal_products(student, students + label, D_padded, ROWS, COLUMNS, DEPTH, ACC)
    if TERMS.TEACHER:
        b_t_label = primitives.diagonal_products(teacher, teachers + label, D_padded, ROWS, COLUMNS, DEPTH, ACC)
    if TERMS.MIXED:
        b_m_label = primitives.diagonal_products(student, teachers + label, D_padded, ROWS, COLUMNS, DEPTH, ACC)

    span = tl.cdiv(tl.cdiv(N, COLUMNS), num_splits) * COLUMNS
    for column0 in range(split * span, tl.minimum((split + 1) * span, N), COLUMNS):
        o_column = column0 + tl.arange(0, COLUMNS)
        m_negative = (o_column < N)[None, :] & (o_column[None, :] != first + o_row[:, None])
        offset = column0 * stride
        if TERMS.RELATIONAL:
            b_cosine = primitives.row_products(student, students + offset, D_padded, ROWS, COLUMNS, DEPTH, ACC)
            b_cosine -= b_label[:, None]
            b_logit = tl.where(m_negative, b_cosine * s, float("-inf"))
            b_highest, b_mass, b_rescale = masses(b_highest, b_logit)
            b_total = b_total * b_rescale + tl.sum(b_mass, axis=1)
            b_mean = b_mean * b_rescale + tl.sum(b_mass * b_cosine, axis=1)
        if TERMS.TEACHER:
            b_t_cosine = primitives.row_products(teacher, teachers + offset, D_padded, ROWS, COLUMNS, DEPTH, ACC)
            b_t_cosine -= b_t_label[:, None]
            b_t_logit = tl.where(m_negative, b_t_cosine * ts, float("-inf"))
            b_t_highest, b_t_mass, b_t_rescale = masses(b_t_highest, b_t_logit)
            b_t_total = b_t_total * b_t_rescale + tl.sum(b_t_mass, axis=1)
        if TERMS.RELATIONAL:
            b_t_mean = b_t_mean * b_t_rescale + tl.sum(b_t_mass * b_t_cosine, axis=1)
            b_t_student = b_t_student * b_t_rescale + tl.sum(b_t_mass * b_cosine, axis=1)
            b_difference = tl.where(m_negative, b_t_logit - b_logit, 0.0)
            b_t_kl = b_t_kl * b_t_rescale + tl.sum(b_t_mass * b_difference, axis=1)
        if TERMS.MIXED:
            b_m_cosine = primitives.row_products(student, teachers + offset, D_padded, ROWS, COLUMNS, DEPTH, ACC)
            b_m_cosine -= b_m_label[:, None]
            b_m_logit = tl.where(m_negative, b_m_cosine * s, float("-inf"))
            b_m_highest, b_mass, b_rescale = masses(b_m_highest, b_m_logit)
            b_m_total = b_m_total * b_rescale + tl.sum(b_mass, axis=1)
            b_m_mean = b_m_mean * b_rescale + tl.sum(b_mass * b_m_cosine, axis=1)
        if TERMS.CROSS:
            b_t_mixed = b_t_mixed * b_t_rescale + tl.sum(b_t_mass * b_m_cosine, axis=1)
            b_difference = tl.where(m_negative, b_t_logit - b_m_logit, 0.0)
            b_t_cross = b_t_cross * b_t_rescale + tl.sum(b_t_mass * b_difference, axis=1)

    is_finisher = num_splits >= 1  # true, as a value of the kernel
    if SPLITS > 1:
        p_partial = reduction.partials + (side * num_splits + split).to(tl.int64) * B + o_row
        size_partial = 2 * num_splits.to(tl.int64) * B
        m_row = o_row < B
        if TERMS.RELATIONAL:
            tl.store(p_partial, b_highest, mask=m_row)
            tl.store(p_partial + size_partial, b_total, mask=m_row)
            tl.store(p_partial + 2 * size_partial, b_mean, mask=m_row)
            tl.store(p_partial + 3 * size_partial, b_t_mean, mask=m_row)
            tl.store(p_partial + 4 * size_partial, b_t_student, mask=m_row)
            tl.store(p_partial + 5 * size_partial, b_t_kl, mask=m_row)
        if TERMS.TEACHER:
            tl.store(p_partial + 6 * size_partial, b_t_highest, mask=m_row)
            tl.store(p_partial + 7 * size_partial, b_t_total, mask=m_row)
        if TERMS.MIXED:
            tl.store(p_partial + 8 * size_partial, b_m_highest, mask=m_row)
            tl.store(p_partial + 9 * size_partial, b_m_total, mask=m_row)
            tl.store(p_partial + 10 * size_partial, b_m_mean, mask=m_row)
        if TERMS.CROSS:
            tl.store(p_partial + 11 * size_partial, b_t_mixed, mask=m_row)
            tl.store(p_partial + 12 * size_partial, b_t_cross, mask=m_row)
        is_finisher = primitives.is_last(tickets + 1 + block, num_splits)
        if is_finisher:
            o_split = tl.arange(0, SPLITS)
            p_split = reduction.partials + (side * num_splits + o_split)[:, None] * B.to(tl.int64) + o_row[None, :]
            m_split = (o_split < num_splits)[:, None] & m_row[None, :]
            if TERMS.RELATIONAL:
                b_highest, b_rescales = _highest_of_splits(p_split, m_split)
                b_total = _sum_of_splits(p_split + size_partial, m_split, b_rescales)
                b_mean = _sum_of_splits(p_split + 2 * size_partial, m_split, b_rescales)
            if TERMS.TEACHER:
                b_t_highest, b_rescales = _highest_of_splits(p_split + 6 * size_partial, m_split)
                b_t_total = _sum_of_splits(p_split + 7 * size_partial, m_split, b_rescales)
            if TERMS.RELATIONAL:
                b_t_mean = _sum_of_splits(p_split + 3 * size_partial, m_split, b_rescales)
                b_t_student = _sum_of_splits(p_split + 4 * size_partial, m_split, b_rescales)
                b_t_kl = _sum_of_splits(p_split + 5 * size_partial, m_split, b_rescales)
            if TERMS.CROSS:
                b_t_mixed = _sum_of_splits(p_split + 11 * size_partial, m_split, b_rescales)
                b_t_cross = _sum_of_splits(p_split + 12 * size_partial, m_split, b_rescales)
            if TERMS.MIXED:
                b_m_highest, b_rescales = _highest_of_splits(p_split + 8 * size_partial, m_split)
                b_m_total = _sum_of_splits(p_split + 9 * size_partial, m_split, b_rescales)
                b_m_mean = _sum_of_splits(p_split + 10 * size_partial, m_split, b_rescales)

    if is_finisher:
        num_blocks = 2 * tl.cdiv(B, ROWS)
        m_row = o_row < B
        p_row = reduction.statistics + side * B.to(tl.int64) + o_row
        p_block = reduction.blocks + block
        b_slope = b_zero
        if TERMS.TEACHER:
            # An infinite scale leaves a confident row without any negative: s - s makes it NaN, else it is 0.
            b_t_total += ts - ts
            b_t_top, b_t_rest, b_t_error = log_sums(b_t_highest, b_t_total)
            _store_statistics(p_row, 4, B, m_row, b_t_top, b_t_rest, b_t_error, b_t_label)
        if TERMS.RELATIONAL:
            b_total += s - s
            b_top, b_rest, b_error = log_sums(b_highest, b_total)
            _store_statistics(p_row, 0, B, m_row, b_top, b_rest, b_error, b_label)
            b_kl = mean_relative(b_t_error, b_t_kl, b_t_total) + (b_top - b_t_top) + (b_rest - b_t_rest)
            b_entropy = b_t_top + b_t_rest - mean_relative(b_t_error, b_t_mean, b_t_total) * ts
            b_slope += TERMS.RELATIONAL_WEIGHT * (
                mean_relative(b_error, b_mean, b_total) - mean_relative(b_t_error, b_t_student, b_t_total)
            )
            tl.store(p_block, tl.sum(tl.where(m_row, b_kl, 0.0), axis=0))
            tl.store(p_block + 3 * num_blocks, tl.sum(tl.where(m_row, b_entropy, 0.0), axis=0))
        if TERMS.MIXED:
            b_m_total += s - s
            b_m_top, b_m_rest, b_m_error = log_sums(b_m_highest, b_m_total)
            _store_statistics(p_row, 8, B, m_row, b_m_top, b_m_rest, b_m_error, b_m_label)
            b_m_mean = mean_relative(b_m_error, b_m_mean, b_m_total)
            b_slope += (TERMS.INTERACTIVE_WEIGHT + TERMS.CROSS_WEIGHT) * b_m_mean
        if TERMS.INTERACTIVE:
            tl.store(p_block + num_blocks, tl.sum(tl.where(m_row, b_m_top + b_m_rest, 0.0), axis=0))
        if TERMS.CROSS:
            b_kl = mean_relative(b_t_error, b_t_cross, b_t_total) + (b_m_top - b_t_top) + (b_m_rest - b_t_rest)
            b_slope -= TERMS.CROSS_WEIGHT * mean_relative(b_t_error, b_t_mixed, b_t_total)
            tl.store(p_block + 2 * num_blocks, tl.sum(tl.where(m_row, b_kl, 0.0), axis=0))
        tl.store(p_block + 4 * num_blocks, tl.sum(tl.where(m_row, b_slope, 0.0), axis=0))
        if primitives.is_last(tickets, num_blocks):
            _finish(reduction, B, D, num_blocks, num_sums, TERMS, BLOCKS, ACC)


@triton.jit
def _highest_of_splits(p_highest, m_split):
    """The highest logit of each row over all splits, and the factor of each split's sums, ``(SPLITS, ROWS)``."""
    # From the cache that all programs share: this program's own may hold stale values.
    b_highests = tl.load(p_highest, mask=m_split, other=float("-inf"), cache_modifier=".cg")
    b_highest = tl.max(b_highests, axis=0)
    b_shift = tl.where(b_highest == float("-inf"), 0.0, b_highest)
    return b_highest, tl.exp(b_highests - b_shift[None, :])


@triton.jit
def _sum_of_splits(p_sum, m_split, b_rescales):
    """Sum over all splits, in a fixed order."""
    return tl.sum(b_rescales * tl.load(p_sum, mask=m_split, other=0.0, cache_modifier=".cg"), axis=0)


@triton.jit
def _store_statistics(p_row, index: tl.constexpr, B, m_row, b_top, b_rest, b_error, b_label):
    """Highest logit, rest, label's error and cosine of one kind of logits."""
    stride = 2 * B.to(tl.int64)
    tl.store(p_row + index * stride, b_top, mask=m_row)
    tl.store(p_row + (index + 1) * stride, b_rest, mask=m_row)
    tl.store(p_row + (index + 2) * stride, b_error, mask=m_row)
    tl.store(p_row + (index + 3) * stride, b_label, mask=m_row)


@triton.jit
def _finish(reduction, B, D, num_blocks, num_sums, TERMS: tl.constexpr, BLOCKS: tl.constexpr, ACC: tl.constexpr):
    """All terms of this rank's rows and their weighted sum, from the sums of all blocks; writes dL/ds.

    One program adds the blocks in a fixed order, so that the result does not depend on which program it is.
    """
    zero = tl.sum(tl.zeros([BLOCKS], ACC), axis=0)
    feature, relational, interactive, cross, entropy, slope = zero, zero, zero, zero, zero, zero
    count = 2.0 * B.to(ACC)
    if TERMS.FEATURE:
        feature = _total(reduction.feature_sums, num_sums, BLOCKS, ACC) / (B.to(ACC) * D.to(ACC))
    if TERMS.RELATIONAL:
        relational = _total(reduction.blocks, num_blocks, BLOCKS, ACC) / count
        entropy = _total(reduction.blocks + 3 * num_blocks, num_blocks, BLOCKS, ACC) / count
    if TERMS.INTERACTIVE:
        interactive = _total(reduction.blocks + num_blocks, num_blocks, BLOCKS, ACC) / count
    if TERMS.CROSS:
        cross = _total(reduction.blocks + 2 * num_blocks, num_blocks, BLOCKS, ACC) / count
    if TERMS.TEACHER or TERMS.MIXED:
        slope = _total(reduction.blocks + 4 * num_blocks, num_blocks, BLOCKS, ACC) / count
    tl.store(reduction.results, feature)
    tl.store(reduction.results + 1, relational)
    tl.store(reduction.results + 2, interactive)
    tl.store(reduction.results + 3, cross)
    tl.store(reduction.results + 4, entropy)
    tl.store(reduction.slope, slope)
    loss = feature * TERMS.FEATURE_WEIGHT + relational * TERMS.RELATIONAL_WEIGHT
    tl.store(reduction.loss, loss + interactive * TERMS.INTERACTIVE_WEIGHT + cross * TERMS.CROSS_WEIGHT)


@triton.jit
def _total(sums, count, BLOCKS: tl.constexpr, ACC: tl.constexpr):
    """Sum of ``count`` numbers in a fixed order."""
    b_total = tl.zeros([BLOCKS], ACC)
    for block0 in range(0, count, BLOCKS):
        o_block = block0 + tl.arange(0, BLOCKS)
        # From the cache that all programs share: this program's own may hold stale values.
        b_total += tl.load(sums + o_block, mask=o_block < count, other=0.0, cache_modifier=".cg")
    return tl.sum(b_total, axis=0)


@triton.jit(do_not_specialize=["B", "D", "num_sums"])
def distillation_finish_kernel(
    reduction, B, D, num_sums, TERMS: tl.constexpr, BLOCKS: tl.constexpr, ACC: tl.constexpr
):
    """The loss where the feature term is the only one: one program, after the launch that sums the rows."""
    _finish(reduction, B, D, num_sums, num_sums, TERMS, BLOCKS, ACC)


# Gradient


@triton.jit(
    do_not_specialize=["chunk0", "count", "N", "first"],
    do_not_specialize_on_alignment=["logit_scale", "teacher_scale"],
)
def distillation_weights_kernel(
    packed,
    logit_scale,
    teacher_scale,
    statistics,  # (12, 2, N)
    weights,  # (2, count, N_padded), or twice as many columns: W, then W^; the first index is the columns' side
    chunk0,
    count,
    N,
    first,
    N_padded,
    D_padded,
    TILE: tl.constexpr,
    TERMS: tl.constexpr,
    ACC: tl.constexpr,
):
    """W and W^ of a chunk of rows and of all columns, both sides; 0 outside of the matrix.

    Each program writes one tile.
    """
    ROWS: tl.constexpr = TILE.ROWS
    COLUMNS: tl.constexpr = TILE.COLUMNS
    DEPTH: tl.constexpr = TILE.DEPTH
    pid = tl.program_id(0)
    side = pid % 2
    # Rows vary fastest: neighbouring programs share a tile of columns in the cache.
    num_row_tiles = count // ROWS
    row0 = (pid // 2) % num_row_tiles * ROWS
    column0 = pid // (2 * num_row_tiles) * COLUMNS
    o_label = first + chunk0 + row0 + tl.arange(0, ROWS)
    o_column = column0 + tl.arange(0, COLUMNS)
    m_valid = (o_label < N)[:, None] & (o_column < N)[None, :]
    m_label = o_label[:, None] == o_column[None, :]
    m_negative = m_valid & (o_label[:, None] != o_column[None, :])
    stride = D_padded.to(tl.int64)
    size = N_padded * stride
    student = packed + 2 * side * size + (first + chunk0 + row0) * stride
    teacher = student + size
    students = packed + 2 * (1 - side) * size + column0 * stride
    teachers = students + size
    s = tl.load(logit_scale).to(ACC)
    ts = tl.load(teacher_scale).to(ACC)
    p_row = statistics + side * N.to(tl.int64) + o_label
    p_column = statistics + (1 - side) * N.to(tl.int64) + o_column
    # Both labels from this side's products, as the cosines are.
    p_label_of_column = statistics + side * N.to(tl.int64) + o_column
    row_stride = N_padded.to(tl.int64)
    if TERMS.RELATIONAL and TERMS.MIXED:
        row_stride *= 2
    o_weight = ((1 - side) * count + row0 + tl.arange(0, ROWS)).to(tl.int64)[:, None] * row_stride
    p_weight = weights + o_weight + o_column[None, :]

    if TERMS.RELATIONAL:
        b_product = primitives.row_products(student, students, D_padded, ROWS, COLUMNS, DEPTH, ACC)
        b_weight = _row_softmax(b_product, p_row, 0, N, o_label, m_negative, s)
        b_weight += _column_softmax(b_product, p_column, p_label_of_column, 0, N, o_column, m_negative, s)
    if TERMS.TEACHER:
        b_product = primitives.row_products(teacher, teachers, D_padded, ROWS, COLUMNS, DEPTH, ACC)
        b_teacher = _row_softmax(b_product, p_row, 4, N, o_label, m_negative, ts)
        b_t_error = _statistic(p_row, 6, N, o_label)
    if TERMS.RELATIONAL:
        b_teacher_sum = b_teacher + _column_softmax(
            b_product, p_column, p_label_of_column, 4, N, o_column, m_negative, ts
        )
        b_row_error = b_t_error - _statistic(p_row, 2, N, o_label)
        b_column_error = _statistic(p_column, 6, N, o_column) - _statistic(p_column, 2, N, o_column)
        b_error = b_row_error[:, None] + b_column_error[None, :]
        b_weight = tl.where(m_label, b_error, b_weight - b_teacher_sum) * TERMS.RELATIONAL_WEIGHT
        tl.store(p_weight, tl.where(m_valid, b_weight, 0.0))
        p_weight += N_padded
    if TERMS.MIXED:
        MIXED_WEIGHT: tl.constexpr = TERMS.INTERACTIVE_WEIGHT + TERMS.CROSS_WEIGHT
        b_product = primitives.row_products(student, teachers, D_padded, ROWS, COLUMNS, DEPTH, ACC)
        b_weight = _row_softmax(b_product, p_row, 8, N, o_label, m_negative, s) * MIXED_WEIGHT
        b_error = _statistic(p_row, 10, N, o_label) * -MIXED_WEIGHT
        if TERMS.CROSS:
            b_weight -= b_teacher * TERMS.CROSS_WEIGHT
            b_error += b_t_error * TERMS.CROSS_WEIGHT
        b_weight = tl.where(m_label, b_error[:, None], b_weight)
        tl.store(p_weight, tl.where(m_valid, b_weight, 0.0))


@triton.jit
def _statistic(p_statistics, index: tl.constexpr, N, o_row):
    """Statistic number ``index`` of rows or columns, 0 beyond the last."""
    return tl.load(p_statistics + 2 * index * N.to(tl.int64), mask=o_row < N, other=0.0)


@triton.jit
def _row_softmax(b_cosine, p_row, index: tl.constexpr, N, o_label, m_negative, s):
    """``p_ij = exp(l_ij - l_ii - highest_i - rest_i)``, the log-sum-exp subtracted part by part; 0 at labels."""
    b_relative = b_cosine - _statistic(p_row, index + 3, N, o_label)[:, None]
    b_logit = tl.where(m_negative, b_relative * s, float("-inf")) - _statistic(p_row, index, N, o_label)[:, None]
    return tl.exp(b_logit - _statistic(p_row, index + 1, N, o_label)[:, None])


@triton.jit
def _column_softmax(b_cosine, p_column, p_label, index: tl.constexpr, N, o_column, m_negative, s):
    """``q_ij = exp(l_ij - l_jj - highest_j - rest_j)`` with the log-sum-exp of the columns; 0 at labels."""
    b_relative = b_cosine - _statistic(p_label, index + 3, N, o_column)[None, :]
    b_logit = (
        tl.where(m_negative, b_relative * s, float("-inf")) - _statistic(p_column, index, N, o_column)[None, :]
    )
    return tl.exp(b_logit - _statistic(p_column, index + 1, N, o_column)[None, :])


@triton.jit(
    do_not_specialize=["chunk0", "count", "B", "first"],
    do_not_specialize_on_alignment=["logit_scale", "upstream"],
)
def distillation_gradient_kernel(
    packed,
    sums,  # (2, count, D_padded): sum_j W_ij t_j + W^_ij t~_j, by the side of the columns; unused without logits
    inverses,  # (2, N_padded)
    logit_scale,
    upstream,
    slope,  # (1,): dL/ds of this rank's rows
    gradients,
    chunk0,
    count,
    B,
    first,
    N_padded,
    D,
    D_padded,
    BLOCK: tl.constexpr,
    TERMS: tl.constexpr,
    ACC: tl.constexpr,
):
    """``dz_i = s/(2B) sums_i + 2 w_feature/(B D) (z_i - z~_i)``, then the normalization's backward.

    With the upstream gradient g, ``dx_i = g (dz_i - z_i (z_i . dz_i)) / |x_i|``.
    """
    pid = tl.program_id(0)
    side = pid % 2
    o_chunk_row = pid // 2 * BLOCK.ROWS + tl.arange(0, BLOCK.ROWS)
    o_row = chunk0 + o_chunk_row
    o_depth = tl.arange(0, BLOCK.WIDTH)
    m_row = (o_chunk_row < count) & (o_row < B)
    m_element = m_row[:, None] & (o_depth < D)[None, :]
    stride = D_padded.to(tl.int64)
    size = N_padded * stride
    p_student = packed + 2 * side * size + (first + o_row)[:, None] * stride + o_depth[None, :]
    b_z = tl.load(p_student, mask=m_element, other=0.0)
    g = tl.load(upstream).to(ACC)
    count_rows = B.to(ACC)
    b_dz = tl.zeros([BLOCK.ROWS, BLOCK.WIDTH], ACC)
    if TERMS.TEACHER or TERMS.MIXED:
        p_sums = sums + ((1 - side) * count + o_chunk_row)[:, None] * stride + o_depth[None, :]
        s = tl.load(logit_scale).to(ACC)
        b_dz = tl.load(p_sums, mask=m_element, other=0.0) * (s / (2.0 * count_rows))
    if TERMS.FEATURE:
        b_teacher = tl.load(p_student + size, mask=m_element, other=0.0)
        b_dz += (b_z - b_teacher) * (2.0 * TERMS.FEATURE_WEIGHT / (count_rows * D))
    b_inverse = tl.load(inverses + side * N_padded + first + o_row, mask=m_row, other=0.0)
    # Below the clamp z is linear in x, and no component is projected out.
    b_radial = tl.where(b_inverse < 1.0 / primitives.CLAMP, tl.sum(b_z * b_dz, axis=1), 0.0)
    b_gradient = (b_dz - b_z * b_radial[:, None]) * (b_inverse * g)[:, None]
    b_gradient = primitives.round_to(b_gradient, gradients.image.dtype.element_ty)
    o_gradient = o_row.to(tl.int64)[:, None] * D + o_depth[None, :]
    if side == 0:
        tl.store(gradients.image + o_gradient, b_gradient, mask=m_element)
    else:
        tl.store(gradients.text + o_gradient, b_gradient, mask=m_element)
    if pid == 0:
        scale_gradient = g * tl.load(slope)
        tl.store(gradients.scale, primitives.round_to(scale_gradient, gradients.scale.dtype.element_ty))


# Host


def allocate(shape: Shape, plan: Geometry, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialized loss, terms, unit rows and state, the results of the forward."""
    kind: dict[str, Any] = {"dtype": shape.dtype, "device": device}
    packed = primitives.empty(2, 2, shape.total_padded, shape.width_padded, **kind)
    state = primitives.empty(sum(plan.state_sizes), **kind)
    return primitives.empty(**kind), primitives.empty(5, **kind), packed, state


def launch_forward(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    teacher_scale: Tensor,
    feature_weight: float,
    relational_weight: float,
    interactive_weight: float,
    cross_weight: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, its four terms and the teacher's entropy ``(5,)``, unit rows, and the :class:`State`."""
    terms = terms_of(feature_weight, relational_weight, interactive_weight, cross_weight)
    shape, is_alone = shape_of(image, terms, group), process_group.world_size(group) == 1
    plan = geometry(shape, terms, is_alone, SETTINGS)
    row_group = group if terms.has_logits else ""
    matrices = image, text, image_teacher, text_teacher
    inputs = Inputs(*(contrastive.gather_features(matrix, row_group) for matrix in matrices))
    loss, results, packed, buffer = allocate(shape, plan, image.device)
    tickets = primitives.empty(plan.num_tickets, dtype=torch.int32, device=image.device)
    state = State._make(buffer.split_with_sizes(plan.state_sizes))
    reduction = Reduction(
        partials=state.partials,
        statistics=state.statistics if is_alone else state.message,
        blocks=state.blocks,
        slope=state.slope,
        feature_sums=state.feature_sums,
        results=results,
        loss=loss,
    )
    primitives.launch(
        distillation_rows_kernel,
        plan.pack_programs,
        *(inputs, packed, state.inverses, state.feature_sums, tickets, plan.num_tickets),
        *(shape.rows, shape.total, shape.first, shape.total_padded, shape.width, shape.width_padded),
        FEATURE=terms.FEATURE,
        BLOCK=plan.block,
        ACC=plan.acc,
        num_warps=_NUM_WARPS,
    )
    constants = {"TERMS": terms, "BLOCKS": contrastive.BLOCKS, "ACC": plan.acc}
    if terms.has_logits:
        primitives.launch(
            distillation_statistics_kernel,
            plan.num_blocks * plan.num_splits,
            *(packed, logit_scale, teacher_scale, reduction, tickets),
            *(shape.rows, shape.total, shape.first, shape.total_padded, shape.width, shape.width_padded),
            *(plan.num_splits, plan.pack_programs),
            **plan.tile.options(),
            SPLITS=_SPLITS if plan.num_splits > 1 else 1,
            **constants,
        )
    else:
        primitives.launch(
            distillation_finish_kernel, 1, reduction, shape.rows, shape.width, plan.pack_programs, **constants
        )
    if not is_alone:
        loss = _gather_results(state, results, shape, terms, group)
    return loss, results, packed, buffer


def _gather_results(state: State, results: Tensor, shape: Shape, terms: Terms, group: str) -> Tensor:
    """Copies all ranks' statistics to the state and the mean of their terms to the results; the global loss.

    It is bit for bit the same on each rank.
    """
    size = 2 * _NUM_STATISTICS * shape.rows if terms.has_logits else 0
    state.message[size : size + 5].copy_(results)
    message = process_group.gather(state.message[: size + 5], group)
    if size:
        statistics = state.statistics[: 2 * _NUM_STATISTICS * shape.total].view(
            2 * _NUM_STATISTICS, -1, shape.rows
        )
        statistics.copy_(message[:, :size].view(-1, 2 * _NUM_STATISTICS, shape.rows).transpose(0, 1))
    results.copy_(message[:, size:].mean(0))
    weights = terms.FEATURE_WEIGHT, terms.RELATIONAL_WEIGHT, terms.INTERACTIVE_WEIGHT, terms.CROSS_WEIGHT
    return sum(weight * term for weight, term in zip(weights, results) if weight)  # type: ignore[return-value]


forward = torch.library.custom_op("dive_fast::distillation_loss", launch_forward, mutates_args=())


@forward.register_fake
def _(image: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, feature, relational, interactive, cross, group = arguments
    terms = terms_of(feature, relational, interactive, cross)
    shape = shape_of(image, terms, group)
    plan = geometry(shape, terms, process_group.world_size(group) == 1, SETTINGS)
    return allocate(shape, plan, image.device)


def launch_backward(
    upstream: Tensor,
    logit_scale: Tensor,
    teacher_scale: Tensor,
    packed: Tensor,
    state: Tensor,
    count: int,
    total: int,
    first: int,
    width: int,
    is_alone: bool,
    dtype: torch.dtype,
    feature_weight: float,
    relational_weight: float,
    interactive_weight: float,
    cross_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both feature matrices, ``(count, width)`` each, and of the scale."""
    terms = terms_of(feature_weight, relational_weight, interactive_weight, cross_weight)
    shape = saved_shape(packed, count, total, first, width)
    plan = geometry(shape, terms, is_alone, SETTINGS)
    buffers = State._make(state.split_with_sizes(plan.state_sizes))
    gradients = contrastive.allocate_gradients(shape._replace(dtype=dtype), logit_scale)
    chunk, columns = chunk_size(shape, terms, SETTINGS)
    tile, block = plan.tile, plan.block
    sums, weights = packed, packed
    if terms.has_logits:
        kind: dict[str, Any] = {"dtype": shape.dtype, "device": packed.device}
        weights = primitives.empty(2 * chunk * columns, **kind)
        sums = primitives.empty(2 * chunk * shape.width_padded, **kind)
    for start in range(0, shape.rows, chunk):
        # The packed rows end with the last tile of them.
        rows = min(chunk, primitives.round_up(shape.rows - start, tile.ROWS))
        if terms.has_logits:
            primitives.launch(
                distillation_weights_kernel,
                2 * (rows // tile.ROWS) * (shape.total_padded // tile.COLUMNS),
                *(packed, logit_scale, teacher_scale, buffers.statistics, weights, start, rows),
                *(shape.total, shape.first, shape.total_padded, shape.width_padded),
                **tile.options(),
                TERMS=terms,
                ACC=plan.acc,
            )
            _sum(weights, packed, sums, rows, terms)
        primitives.launch(
            distillation_gradient_kernel,
            2 * primitives.divide_up(min(rows, shape.rows - start), block.ROWS),
            *(packed, sums, buffers.inverses, logit_scale, upstream, buffers.slope, gradients, start, rows),
            *(shape.rows, shape.first, shape.total_padded, shape.width, shape.width_padded),
            BLOCK=block,
            TERMS=terms,
            ACC=plan.acc,
        )
    return gradients.image, gradients.text, gradients.scale


def _sum(weights: Tensor, packed: Tensor, sums: Tensor, rows: int, terms: Terms) -> None:
    """``W t + W^ t~`` of ``rows`` rows, both sides in one product: each side's rows follow one another."""
    is_both = terms.RELATIONAL and terms.MIXED
    right = packed.flatten(1, 2) if is_both else packed[:, 0 if terms.RELATIONAL else 1]
    _, columns, width = right.shape
    left = weights[: 2 * rows * columns].view(2, rows, columns)
    with full_fp32(packed.device):
        torch.bmm(left, right, out=sums[: 2 * rows * width].view(2, rows, width))


@lru_cache
def chunk_size(shape: Shape, terms: Terms, settings: Settings) -> tuple[int, int]:
    """Rows of the weights that are in memory at one time, and their columns."""
    columns = shape.total_padded * (terms.RELATIONAL + terms.MIXED)
    pad = contrastive.PAD_ROWS
    rows = primitives.round_up(shape.rows, pad)
    if columns == 0:
        return rows, columns
    return min(max(settings.chunk_weights // (2 * columns) // pad * pad, settings.chunk_rows), rows), columns


def scratch_bytes(shape: Shape, terms: Terms) -> int:
    """Memory that the backward allocates besides its results: a chunk of weights and its sums."""
    if not terms.has_logits:
        return 0
    chunk, columns = chunk_size(shape, terms, SETTINGS)
    return 2 * chunk * (columns + shape.width_padded) * shape.dtype.itemsize


backward = torch.library.custom_op("dive_fast::distillation_loss_backward", launch_backward, mutates_args=())


@backward.register_fake
def _(
    upstream: Tensor,
    logit_scale: Tensor,
    teacher_scale: Tensor,
    packed: Tensor,
    state: Tensor,
    count: int,
    total: int,
    first: int,
    width: int,
    is_alone: bool,
    dtype: torch.dtype,
    *weights: float,
) -> tuple[Tensor, ...]:
    shape = saved_shape(packed, count, total, first, width)
    gradients = contrastive.allocate_gradients(shape._replace(dtype=dtype), logit_scale)
    return gradients.image, gradients.text, gradients.scale


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, _, logit_scale, _, _, teacher_scale, *weights, group = inputs
    _, results, packed, state = output
    ctx.set_materialize_grads(False)
    # The unit rows stay differentiable for the reason given in the contrastive loss.
    ctx.mark_non_differentiable(results, state)
    ctx.save_for_backward(logit_scale, teacher_scale, packed, state)
    shape = shape_of(image, terms_of(*weights), group)
    is_alone = process_group.world_size(group) == 1
    ctx.constants = shape.rows, shape.total, shape.first, shape.width, is_alone, image.dtype, *weights


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * 11
    run = direct.first_order(launch_backward, backward, upstream)
    return *run(upstream, *ctx.saved_tensors, *ctx.constants), *([None] * 8)


forward.register_autograd(_backward, setup_context=_setup_context)
apply = direct.differentiable(launch_forward, _backward, _setup_context)
