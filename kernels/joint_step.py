"""Both losses of a joint step in Triton: three launches, backward included, where separate losses take six.

Each launch runs the programs of the same stage of :mod:`~dive_fast.kernels.contrastive` and
:mod:`~dive_fast.kernels.difference` side by side; the last program of the second launch finishes both losses::

    1  pack target rows             sums of difference vectors
    2  statistics of the logits     average vector, average and pairwise loss
    3  gradients of target rows     gradients of reference rows

    L = L_contrastive + w L_difference

Where the contrastive gradient is chunked (see there), stage 3 is launched separately: the work dwarfs a launch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels import contrastive, difference, primitives, process_group
from dive_fast.kernels.contrastive import finish_contrastive, gradient_block, pack_block, statistics_block
from dive_fast.kernels.difference import (
    Inputs,
    Options,
    difference_gradient_block,
    finish_difference,
    sums_block,
    values_block,
)


@triton.jit(do_not_specialize=["pack_programs", "N", "reference_B"])
def dive_rows_kernel(
    image,
    text,
    packed,
    ticket,
    inputs,
    sums,
    pack_programs,
    N,
    N_padded,
    D,
    D_padded,
    reference_B,
    reference_D,
    BLOCK: tl.constexpr,
    REFERENCE_BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``x -> x^, f, 1/|x|`` of target rows; ``x -> sums of (u + v)/2`` of reference rows."""
    pid = tl.program_id(0)
    if pid < pack_programs:
        pack_block(pid, image, text, packed, ticket, N, N_padded, D, D_padded, BLOCK, ACC)
    else:
        sums_block(
            pid - pack_programs, tl.num_programs(0) - pack_programs, inputs, sums, reference_B, reference_D,
            REFERENCE_BLOCK, ACC,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        *("statistics_programs", "B", "N", "first", "num_splits"),
        *("reference_B", "reference_N", "num_sums"),
    ],
    do_not_specialize_on_alignment=["logit_scale"],
)
def dive_values_kernel(
    packed,
    logit_scale,
    reduction,
    inputs,
    previous,
    buffers,  # of the difference loss; its loss is that of the joint step
    contrastive_loss,
    ticket,
    statistics_programs,
    B,
    N,
    first,
    N_padded,
    D_padded,
    num_splits,
    reference_B,
    reference_N,
    reference_D,
    num_sums,
    TILE: tl.constexpr,
    FINISH_ROWS: tl.constexpr,
    WEIGHT: tl.constexpr,
    CONSTANTS: tl.constexpr,
    REFERENCE_BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``x^, f -> r, c, a, dL/ds`` of target rows; ``x, sums -> m`` of reference rows; the joint loss of both."""
    pid = tl.program_id(0)
    values_programs = tl.num_programs(0) - statistics_programs
    if pid < statistics_programs:
        statistics_block(
            pid, packed, logit_scale, reduction, B, N, first, N_padded, D_padded, num_splits, TILE, ACC
        )  # fmt: skip
    else:
        values_block(
            pid - statistics_programs, values_programs, inputs, previous, buffers, reference_B, reference_N,
            reference_D, num_sums, CONSTANTS, REFERENCE_BLOCK, ACC,
        )  # fmt: skip
    if primitives.is_last(ticket, tl.num_programs(0)):
        target = finish_contrastive(reduction, B, num_splits, FINISH_ROWS, ACC)
        reference = finish_difference(buffers, reference_B, values_programs, CONSTANTS, ACC)
        tl.store(buffers.loss, target + reference * WEIGHT)
        tl.store(contrastive_loss, target)


@triton.jit(
    do_not_specialize=["contrastive_programs", "B", "N", "first", "reference_B"],
    do_not_specialize_on_alignment=["logit_scale", "upstream"],
)
def dive_gradient_kernel(
    packed,
    logit_scale,
    statistics,
    upstream,
    slope,
    gradients,
    inputs,
    average,
    reference_gradients,
    contrastive_programs,
    B,
    N,
    first,
    N_padded,
    D,
    D_padded,
    reference_B,
    reference_D,
    TILE: tl.constexpr,
    SLICE: tl.constexpr,
    CONSTANTS: tl.constexpr,
    REFERENCE_BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``x^, f, r, c, a, dL/ds -> dL/dx, dL/ds`` of target rows; ``x, m -> w dL/dx`` of reference rows."""
    pid = tl.program_id(0)
    if pid < contrastive_programs:
        gradient_block(
            pid, packed, logit_scale, statistics, upstream, slope, gradients, B, N, first, N_padded, D, D_padded,
            TILE, SLICE, ACC,
        )  # fmt: skip
    else:
        difference_gradient_block(
            pid - contrastive_programs, tl.num_programs(0) - contrastive_programs, inputs, average, upstream,
            reference_gradients, reference_B, reference_D, CONSTANTS, REFERENCE_BLOCK, ACC,
        )  # fmt: skip


# Host


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
    """The joint loss and the contrastive loss, then the other results of both losses' forward."""
    options = Options(decay, average_weight, pairwise_weight, mean_gradient)
    target, reference = contrastive.shape_of(image, group), difference.shape_of(reference_image, group)
    image, text = (contrastive.gather_features(features, group) for features in (image, text))
    inputs = Inputs(*map(primitives.dense, (reference_image, reference_text, image_teacher, text_teacher)))
    buffers = contrastive.allocate(target, image.device)
    reference_buffers = difference.allocate(reference, reference_image)
    block, reference_block = primitives.row_block(target.width_padded), primitives.row_block(reference.width)
    pack_programs = target.total_padded // block.ROWS
    acc = primitives.acc_dtype(target.dtype)
    primitives.launch(
        dive_rows_kernel,
        pack_programs + reference.programs,
        *(image, text, buffers.packed, buffers.ticket, inputs, reference_buffers.sums, pack_programs),
        *(target.total, target.total_padded, target.width, target.width_padded, reference.rows, reference.width),
        BLOCK=block,
        REFERENCE_BLOCK=reference_block,
        ACC=acc,
    )
    reference_buffers = difference.gather_sums(reference_buffers, group)
    num_splits, statistics_programs = contrastive.num_splits(target), contrastive.statistics_programs(target)
    primitives.launch(
        dive_values_kernel,
        statistics_programs + reference.programs,
        *(buffers.packed, logit_scale, buffers.reduction, inputs, primitives.dense(average_vector)),
        *(reference_buffers, buffers.loss, buffers.ticket, statistics_programs),
        *(target.rows, target.total, target.first, target.total_padded, target.width_padded, num_splits),
        *(reference.rows, reference.total, reference.width, len(reference_buffers.sums)),
        **contrastive.statistics_tile(target).options(),
        FINISH_ROWS=contrastive.FINISH_ROWS,
        WEIGHT=float(weight),
        CONSTANTS=options.for_forward(),
        REFERENCE_BLOCK=reference_block,
        ACC=acc,
    )
    loss, target_loss = reference_buffers.loss, buffers.loss
    statistics, parts = buffers.reduction.statistics, reference_buffers.parts
    if process_group.world_size(group) > 1:
        # One message: the statistics of the pairs, followed by the parts of the difference loss.
        message = process_group.gather(torch.cat([statistics.flatten(), parts]), group)
        statistics = message[:, :-4].unflatten(1, statistics.shape).transpose(0, 1).flatten(1).contiguous()
        parts = message[:, -4:].mean(0)
        target_loss = contrastive.loss_of(statistics)
        loss = target_loss + weight * difference.loss_of(parts, options)
    saved = *buffers.packed, statistics, buffers.reduction.slope
    return loss, target_loss, *saved, parts, reference_buffers.average


forward = torch.library.custom_op("dive_fast::dive_loss", launch_forward, mutates_args=())


@forward.register_fake
def _(
    image: Tensor, text: Tensor, logit_scale: Tensor, reference_image: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *_, group = arguments
    target, reference = contrastive.shape_of(image, group), difference.shape_of(reference_image, group)
    buffers = contrastive.allocate(target, image.device)
    reference_buffers = difference.allocate(reference, reference_image)
    statistics = buffers.packed.factors.new_empty(7, target.total)
    saved = *buffers.packed, statistics, buffers.reduction.slope
    return reference_buffers.loss, buffers.loss, *saved, reference_buffers.parts, reference_buffers.average


def launch_backward(
    upstream: Tensor,
    logit_scale: Tensor,
    packed: Tensor,
    factors: Tensor,
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
    rows = contrastive.Packed(packed, factors)
    inputs = Inputs(*map(primitives.dense, (reference_image, reference_text, image_teacher, text_teacher)))
    if shape.is_large:
        gradients = contrastive.chunked_gradient(upstream, logit_scale, rows, statistics, slope, shape)
        return *gradients, *difference.gradient(upstream, weight, inputs, average, options)
    gradients = contrastive.allocate_gradients(shape, logit_scale)
    reference_gradients = difference.allocate_gradients(reference_image)
    reference = difference.shape_of(reference_image, "")
    tile, slice_width = contrastive.gradient_tile(shape)
    contrastive_programs = contrastive.gradient_programs(shape)
    primitives.launch(
        dive_gradient_kernel,
        contrastive_programs + reference.programs,
        *(rows, logit_scale, statistics, upstream, slope, gradients),
        *(inputs, average, reference_gradients, contrastive_programs),
        *(shape.rows, shape.total, shape.first, shape.total_padded, shape.width, shape.width_padded),
        *(reference.rows, reference.width),
        **tile.options(),
        SLICE=slice_width,
        CONSTANTS=options.for_gradient(weight),
        REFERENCE_BLOCK=primitives.row_block(reference.width),
        ACC=primitives.acc_dtype(shape.dtype),
    )
    return *gradients, *reference_gradients


backward = torch.library.custom_op("dive_fast::dive_loss_backward", launch_backward, mutates_args=())


@backward.register_fake
def _(
    upstream: Tensor,
    logit_scale: Tensor,
    packed: Tensor,
    factors: Tensor,
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
    return *contrastive.allocate_gradients(shape, logit_scale), *difference.allocate_gradients(reference_image)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, _, logit_scale, *reference, _, weight, decay, average_weight, pairwise_weight, mean_gradient, group = (
        inputs
    )
    _, *others = output
    _, packed, factors, statistics, slope, _, average = others
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(logit_scale, packed, factors, statistics, slope, *reference, average)
    shape = contrastive.shape_of(image, group)
    options = weight, decay, average_weight, pairwise_weight, mean_gradient
    ctx.constants = shape.rows, shape.first, shape.width, *options


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * 14
    return *backward(upstream, *ctx.saved_tensors, *ctx.constants), *([None] * 9)


forward.register_autograd(_backward, setup_context=_setup_context)
