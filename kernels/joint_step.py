"""Both losses of a joint step in Triton: three launches, backward included, where the two apart take six.

Each launch runs the programs of the same stage of :mod:`~dive_fast.kernels.contrastive` and
:mod:`~dive_fast.kernels.difference` side by side; the second's last program finishes both losses::

    1  pack target rows             sums of difference vectors
    2  statistics of the logits     average vector, average and pairwise loss     -> the loss, from both
    3  gradients of target rows     gradients of reference rows

Where the contrastive gradient is chunked (see there), stage 3 is launched apart: the work dwarfs a launch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels import contrastive, difference, primitives, process_group
from dive_fast.kernels.contrastive import finish_contrastive, gradient_block, pack_block, statistics_block
from dive_fast.kernels.difference import (
    Options,
    difference_gradient_block,
    finish_difference,
    sums_block,
    values_block,
)


@triton.jit(do_not_specialize=["pack_programs", "N", "reference_rows"])
def dive_rows_kernel(
    image,
    text,
    packed,
    rows,
    ticket,
    reference_image,
    reference_text,
    image_teacher,
    text_teacher,
    sums,
    pack_programs,
    N,
    N_padded,
    D,
    D_padded,
    reference_rows,
    reference_D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    REFERENCE_ROWS: tl.constexpr,
    REFERENCE_WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < pack_programs:
        pack_block(pid, image, text, packed, rows, ticket, N, N_padded, D, D_padded, ROWS, WIDTH, ACC)
    else:
        sums_block(
            pid - pack_programs, tl.num_programs(0) - pack_programs, reference_image, reference_text,
            image_teacher, text_teacher, sums, reference_rows, reference_D, REFERENCE_ROWS, REFERENCE_WIDTH, ACC,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        *("statistics_programs", "B", "N", "first", "num_splits"),
        *("reference_rows", "reference_total", "num_sums"),
    ],
    do_not_specialize_on_alignment=["logit_scale"],
)
def dive_values_kernel(
    packed,
    rows,
    logit_scale,
    partials,
    statistics,
    slope,
    reference_image,
    reference_text,
    image_teacher,
    text_teacher,
    previous,
    sums,
    average,
    reference_partials,
    parts,
    loss,
    contrastive_loss,
    ticket,
    statistics_programs,
    B,
    N,
    first,
    N_padded,
    D_padded,
    num_splits,
    reference_rows,
    reference_total,
    reference_D,
    num_sums,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    FINISH_ROWS: tl.constexpr,
    REFERENCE_ROWS: tl.constexpr,
    REFERENCE_WIDTH: tl.constexpr,
    DECAY: tl.constexpr,
    GROWTH: tl.constexpr,
    WEIGHT: tl.constexpr,
    AVERAGE_WEIGHT: tl.constexpr,
    PAIRWISE_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    values_programs = tl.num_programs(0) - statistics_programs
    if pid < statistics_programs:
        statistics_block(
            pid, packed, rows, logit_scale, partials, statistics, B, N, first, N_padded, D_padded, num_splits,
            ROWS, COLUMNS, DEPTH, ACC,
        )  # fmt: skip
    else:
        values_block(
            pid - statistics_programs, values_programs, reference_image, reference_text, image_teacher,
            text_teacher, previous, sums, average, reference_partials, reference_rows, reference_total,
            reference_D, num_sums, REFERENCE_ROWS, REFERENCE_WIDTH, DECAY, GROWTH, ACC,
        )  # fmt: skip
    if primitives.is_last(ticket, tl.num_programs(0)):
        target = finish_contrastive(partials, statistics, slope, B, num_splits, FINISH_ROWS, ACC)
        reference = finish_difference(
            reference_partials, parts, reference_rows, values_programs, AVERAGE_WEIGHT, PAIRWISE_WEIGHT, ACC
        )
        tl.store(loss, target + reference * WEIGHT)
        tl.store(contrastive_loss, target)


@triton.jit(
    do_not_specialize=["contrastive_programs", "B", "N", "first", "reference_rows"],
    do_not_specialize_on_alignment=["logit_scale", "upstream"],
)
def dive_gradient_kernel(
    packed,
    rows,
    logit_scale,
    statistics,
    upstream,
    slope,
    image_gradient,
    text_gradient,
    scale_gradient,
    reference_image,
    reference_text,
    image_teacher,
    text_teacher,
    average,
    reference_image_gradient,
    reference_text_gradient,
    contrastive_programs,
    B,
    N,
    first,
    N_padded,
    D,
    D_padded,
    reference_rows,
    reference_D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICE: tl.constexpr,
    REFERENCE_ROWS: tl.constexpr,
    REFERENCE_WIDTH: tl.constexpr,
    WEIGHT: tl.constexpr,
    AVERAGE_WEIGHT: tl.constexpr,
    PAIRWISE_WEIGHT: tl.constexpr,
    MEAN_GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < contrastive_programs:
        gradient_block(
            pid, packed, rows, logit_scale, statistics, upstream, slope, image_gradient, text_gradient,
            scale_gradient, B, N, first, N_padded, D, D_padded, ROWS, COLUMNS, DEPTH, SLICE, ACC,
        )  # fmt: skip
    else:
        difference_gradient_block(
            pid - contrastive_programs, tl.num_programs(0) - contrastive_programs, reference_image,
            reference_text, image_teacher, text_teacher, average, upstream, reference_image_gradient,
            reference_text_gradient, reference_rows, reference_D, WEIGHT, AVERAGE_WEIGHT, PAIRWISE_WEIGHT,
            MEAN_GRADIENT, REFERENCE_ROWS, REFERENCE_WIDTH, ACC,
        )  # fmt: skip


def _reference_block(width: int) -> dict[str, int]:
    return {f"REFERENCE_{name}": size for name, size in primitives.row_block(width).items()}


def launch_forward(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    reference_image: Tensor,
    reference_text: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    average_vector: Tensor,
    weight: float,
    decay: float,
    average_weight: float,
    pairwise_weight: float,
    mean_gradient: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What both halves return, their losses replaced by the whole loss and the contrastive one."""
    options = Options(decay, average_weight, pairwise_weight, mean_gradient)
    target, reference = contrastive.shape_of(image, group), difference.shape_of(reference_image, group)
    image, text = (
        process_group.gather(primitives.dense(features), group).flatten(0, 1) for features in (image, text)
    )
    inputs = [
        primitives.dense(tensor) for tensor in (reference_image, reference_text, image_teacher, text_teacher)
    ]
    made, reference_made = (
        contrastive.buffers(target, image.device),
        difference.buffers(reference, reference_image),
    )
    pack_block = primitives.row_block(target.width_padded)
    pack_programs = target.total_padded // pack_block["ROWS"]
    primitives.launch(
        dive_rows_kernel,
        pack_programs + reference.programs,
        *(image, text, made.packed, made.rows, made.ticket, *inputs, reference_made.sums, pack_programs),
        *(target.total, target.total_padded, target.width, target.width_padded, reference.rows, reference.width),
        **pack_block,
        **_reference_block(reference.width),
        ACC=primitives.acc(target.dtype),
    )
    sums = difference.gather_sums(reference_made.sums, group)
    num_splits, statistics_programs = contrastive.num_splits(target), contrastive.statistics_programs(target)
    primitives.launch(
        dive_values_kernel,
        statistics_programs + reference.programs,
        *(made.packed, made.rows, logit_scale, made.partials, made.statistics, made.slope),
        *(
            *inputs,
            primitives.dense(average_vector),
            sums,
            reference_made.average,
            reference_made.partials,
            reference_made.parts,
        ),
        *(reference_made.loss, made.loss, made.ticket, statistics_programs),
        *(target.rows, target.total, target.first, target.total_padded, target.width_padded, num_splits),
        *(reference.rows, reference.total, reference.width, len(sums)),
        **contrastive.tile(target)._asdict(),
        FINISH_ROWS=contrastive.FINISH_ROWS,
        **_reference_block(reference.width),
        **options.constants(),
        WEIGHT=float(weight),
        ACC=primitives.acc(target.dtype),
    )
    loss, target_loss = reference_made.loss, made.loss
    statistics, parts = made.statistics, reference_made.parts
    if process_group.world_size(group) > 1:
        # One message: the statistics of the pairs, and the parts of the difference loss behind them.
        message = process_group.gather(torch.cat([statistics.flatten(), parts]), group)
        statistics = message[:, :-4].unflatten(1, statistics.shape).transpose(0, 1).flatten(1).contiguous()
        parts = message[:, -4:].mean(0)
        target_loss = contrastive.loss_of(statistics)
        loss = target_loss + weight * difference.loss_of(parts, options)
    return loss, target_loss, made.packed, made.rows, statistics, made.slope, parts, reference_made.average


forward = torch.library.custom_op("dive_fast::dive_loss", launch_forward, mutates_args=())


@forward.register_fake
def _(
    image: Tensor, text: Tensor, logit_scale: Tensor, reference_image: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *_, group = arguments
    target, reference = contrastive.shape_of(image, group), difference.shape_of(reference_image, group)
    made, reference_made = (
        contrastive.buffers(target, image.device),
        difference.buffers(reference, reference_image),
    )
    statistics = made.rows.new_empty(7, target.total)
    saved = made.packed, made.rows, statistics, made.slope
    return reference_made.loss, made.loss, *saved, reference_made.parts, reference_made.average


def launch_backward(
    upstream: Tensor,
    logit_scale: Tensor,
    packed: Tensor,
    rows: Tensor,
    statistics: Tensor,
    slope: Tensor,
    reference_image: Tensor,
    reference_text: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    average: Tensor,
    count: int,
    first: int,
    width: int,
    weight: float,
    decay: float,
    average_weight: float,
    pairwise_weight: float,
    mean_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of both target matrices, the scale, and both reference matrices."""
    options = Options(decay, average_weight, pairwise_weight, mean_gradient)
    shape = contrastive.saved_shape(packed, statistics, count, first, width)
    saved = packed, rows, logit_scale, statistics
    inputs = [
        primitives.dense(tensor) for tensor in (reference_image, reference_text, image_teacher, text_teacher)
    ]
    inputs.append(average)
    if shape.is_large:
        target_gradients = contrastive.chunked_gradient(
            upstream, logit_scale, packed, rows, statistics, slope, shape
        )
        return *target_gradients, *difference.gradient(upstream, weight, *inputs, options)
    target_gradients = contrastive.gradients(shape, logit_scale)
    reference_gradients = difference.gradients(reference_image)
    reference = difference.shape_of(reference_image, "")
    tile, slice_width = contrastive.gradient_tile(shape)
    contrastive_programs = contrastive.gradient_programs(shape)
    primitives.launch(
        dive_gradient_kernel,
        contrastive_programs + reference.programs,
        *(*saved, upstream, slope, *target_gradients, *inputs, *reference_gradients, contrastive_programs),
        *(shape.rows, shape.total, shape.first, shape.total_padded, shape.width, shape.width_padded),
        *(reference.rows, reference.width),
        **tile._asdict(),
        SLICE=slice_width,
        **_reference_block(reference.width),
        **difference.gradient_constants(weight, options),
        ACC=primitives.acc(shape.dtype),
    )
    return *target_gradients, *reference_gradients


backward = torch.library.custom_op("dive_fast::dive_loss_backward", launch_backward, mutates_args=())


@backward.register_fake
def _(
    upstream: Tensor,
    logit_scale: Tensor,
    packed: Tensor,
    rows: Tensor,
    statistics: Tensor,
    slope: Tensor,
    reference_image: Tensor,
    reference_text: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    average: Tensor,
    count: int,
    first: int,
    width: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    shape = contrastive.saved_shape(packed, statistics, count, first, width)
    return *contrastive.gradients(shape, logit_scale), *difference.gradients(reference_image)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, _, logit_scale, *reference, _, weight, decay, average_weight, pairwise_weight, mean_gradient, group = (
        inputs
    )
    _, *others = output
    _, packed, rows, statistics, slope, _, average = others
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(logit_scale, packed, rows, statistics, slope, *reference, average)
    shape = contrastive.shape_of(image, group)
    options = weight, decay, average_weight, pairwise_weight, mean_gradient
    ctx.constants = shape.rows, shape.first, shape.width, *options


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * 14
    return *backward(upstream, *ctx.saved_tensors, *ctx.constants), *([None] * 9)


forward.register_autograd(_backward, setup_context=_setup_context)
