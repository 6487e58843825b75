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

from dive_fast.kernels import contrastive, difference, direct, primitives, process_group
from dive_fast.kernels.contrastive import finish_contrastive, gradient_block, pack_block, statistics_block
from dive_fast.kernels.difference import (
    Inputs,
    Options,
    difference_gradient_block,
    finish_difference,
    sums_block,
    values_block,
)


@triton.jit(do_not_specialize=["pack_programs", "num_tickets", "N", "reference_B"])
def dive_rows_kernel(
    image,
    text,
    packed,
    tickets,
    inputs,
    sums,
    pack_programs,
    num_tickets,
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
        pack_block(pid, image, text, packed, tickets, num_tickets, N, N_padded, D, D_padded, BLOCK, ACC)
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
    buffers,  # of the difference loss; its loss is that of the joint step, its last result the contrastive loss
    tickets,
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
    SPLIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    WEIGHT: tl.constexpr,
    CONSTANTS: tl.constexpr,
    REFERENCE_BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``x^, f -> r, c, a, dL/ds`` of target rows; ``x, sums -> m`` of reference rows; the joint loss of both."""
    pid = tl.program_id(0)
    values_programs = tl.num_programs(0) - statistics_programs
    num_blocks = 2 * tl.cdiv(B, TILE.ROWS)
    is_finisher = values_programs > 0  # true, as a value of the kernel
    if pid < statistics_programs:
        is_finisher = statistics_block(
            pid, packed, logit_scale, reduction, tickets, B, N, first, N_padded, D_padded, num_splits, TILE, SPLIT,
            ACC,
        )  # fmt: skip
    else:
        values_block(
            pid - statistics_programs, values_programs, inputs, previous, buffers, reference_B, reference_N,
            reference_D, num_sums, CONSTANTS, REFERENCE_BLOCK, ACC,
        )  # fmt: skip
    if is_finisher:  # noqa: SIM102 (Triton evaluates both sides of an "and")
        if primitives.is_last(tickets, num_blocks + values_programs):
            target = finish_contrastive(reduction, B, num_blocks, BLOCKS, ACC)
            reference = finish_difference(buffers, reference_B, reference_D, values_programs, CONSTANTS, ACC)
            tl.store(buffers.loss, target + reference * WEIGHT)
            tl.store(buffers.results + reference_D + 4, target)


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


def allocate(
    target: contrastive.Shape, reference: difference.Shape, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized results of the user, packed rows, and the state: the contrastive and the difference loss's."""
    plan = contrastive.geometry(target, contrastive.SETTINGS)
    results = primitives.empty(reference.width + 5, dtype=plan.acc_dtype, device=device)
    return results, *contrastive.allocate(target, _state_sizes(target, reference), plan.acc_dtype, device)


def _state_sizes(target: contrastive.Shape, reference: difference.Shape) -> tuple[int, ...]:
    sizes = contrastive.geometry(target, contrastive.SETTINGS).state_sizes
    return sizes + difference.geometry(reference).state_sizes


def _split_state(
    state: Tensor, target: contrastive.Shape, reference: difference.Shape
) -> tuple[contrastive.State, difference.State]:
    views = state.split_with_sizes(_state_sizes(target, reference))
    num_views = len(contrastive.State._fields)
    return contrastive.State._make(views[:num_views]), difference.State._make(views[num_views:])


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The joint loss, the results of :mod:`difference` with the contrastive loss, packed rows, and the state."""
    options = Options(decay, average_weight, pairwise_weight, mean_gradient)
    target, reference = contrastive.shape_of(image, group), difference.shape_of(reference_image, group)
    target_plan, reference_plan = (
        contrastive.geometry(target, contrastive.SETTINGS),
        difference.geometry(reference),
    )
    image, text = contrastive.gather_features(image, group), contrastive.gather_features(text, group)
    device = image.device
    results, packed, buffer = allocate(target, reference, device)
    loss = primitives.empty(dtype=target_plan.acc_dtype, device=device)
    tickets = primitives.empty(target_plan.num_tickets, dtype=torch.int32, device=device)
    state, reference_state = _split_state(buffer, target, reference)
    rows = contrastive.Packed(packed, state.factors)
    inputs = Inputs(*map(primitives.dense, (reference_image, reference_text, image_teacher, text_teacher)))
    primitives.launch(
        dive_rows_kernel,
        target_plan.pack_programs + reference_plan.sums_programs,
        *(image, text, rows, tickets, inputs, reference_state.sums),
        *(target_plan.pack_programs, target_plan.num_tickets),
        *(target.total, target.total_padded, target.width, target.width_padded, reference.rows, reference.width),
        BLOCK=target_plan.block,
        REFERENCE_BLOCK=reference_plan.block,
        ACC=target_plan.acc,
    )
    sums, num_sums = difference.gather_sums(reference_state.sums, reference_plan, reference.width, group)
    primitives.launch(
        dive_values_kernel,
        target_plan.statistics_programs + reference_plan.values_programs,
        *(rows, logit_scale, contrastive.reduction_of(state, target), inputs, primitives.dense(average_vector)),
        difference.Buffers(sums, reference_state.average, reference_state.partials, results, loss),
        *(tickets, target_plan.statistics_programs),
        *(target.rows, target.total, target.first, target.total_padded, target.width_padded),
        *(target_plan.num_splits, reference.rows, reference.total, reference.width, num_sums),
        **target_plan.tile.options(),
        SPLIT=target_plan.num_splits > 1,
        BLOCKS=contrastive.BLOCKS,
        WEIGHT=float(weight),
        CONSTANTS=options.for_forward(),
        REFERENCE_BLOCK=reference_plan.block,
        ACC=target_plan.acc,
    )
    if target.rows != target.total:
        # One message: the statistics of the pairs, followed by the parts of the difference loss.
        parts, size = difference.parts_of(results, reference.width), 8 * target.rows
        message = process_group.gather(torch.cat([state.local_statistics[:size], parts]), group)
        parts.copy_(message[:, size:].mean(0))
        target_loss = contrastive.gather_statistics(state, message[:, :size], target)
        results[reference.width + 4] = target_loss
        loss = target_loss + weight * difference.loss_of(parts, options)
    return loss, results, packed, buffer


forward = torch.library.custom_op("dive_fast::dive_loss", launch_forward, mutates_args=())


@forward.register_fake
def _(
    image: Tensor, text: Tensor, logit_scale: Tensor, reference_image: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *_, group = arguments
    target, reference = contrastive.shape_of(image, group), difference.shape_of(reference_image, group)
    results, packed, state = allocate(target, reference, image.device)
    return primitives.empty(dtype=results.dtype, device=image.device), results, packed, state


def launch_backward(
    upstream: Tensor,
    logit_scale: Tensor,
    packed: Tensor,
    state: Tensor,
    reference_image: Tensor,
    reference_text: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    count: int,
    total: int,
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
    target = contrastive.saved_shape(packed, count, total, first, width)
    reference = difference.shape_of(reference_image, "")
    buffers, reference_buffers = _split_state(state, target, reference)
    inputs = Inputs(*map(primitives.dense, (reference_image, reference_text, image_teacher, text_teacher)))
    gradients = contrastive.allocate_gradients(target, logit_scale)
    average = reference_buffers.average
    launch = contrastive.gradient_plan(target, contrastive.SETTINGS)
    if launch.path == "chunked":
        contrastive.chunked_gradient(upstream, logit_scale, packed, buffers, target, gradients)
        # After the chunk's memory is free again.
        reference_gradients = difference.allocate_gradients(reference_image)
        difference.launch_gradient(upstream, weight, inputs, average, options, reference_gradients)
        return *gradients, *reference_gradients
    reference_gradients = difference.allocate_gradients(reference_image)
    plan = difference.geometry(reference)
    primitives.launch(
        dive_gradient_kernel,
        launch.programs + plan.gradient_programs,
        *(contrastive.Packed(packed, buffers.factors), logit_scale, buffers.statistics, upstream, buffers.slope),
        *(gradients, inputs, average, reference_gradients, launch.programs),
        *(target.rows, target.total, target.first, target.total_padded, target.width, target.width_padded),
        *(reference.rows, reference.width),
        **launch.tile.options(),
        SLICE=launch.slice_width,
        CONSTANTS=options.for_gradient(weight),
        REFERENCE_BLOCK=plan.block,
        ACC=plan.acc,
    )
    return *gradients, *reference_gradients


backward = torch.library.custom_op("dive_fast::dive_loss_backward", launch_backward, mutates_args=())


@backward.register_fake
def _(
    upstream: Tensor,
    logit_scale: Tensor,
    packed: Tensor,
    state: Tensor,
    reference_image: Tensor,
    reference_text: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    count: int,
    total: int,
    first: int,
    width: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    target = contrastive.saved_shape(packed, count, total, first, width)
    return *contrastive.allocate_gradients(target, logit_scale), *difference.allocate_gradients(reference_image)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, _, logit_scale, *reference, _, weight, decay, average_weight, pairwise_weight, mean_gradient, group = (
        inputs
    )
    _, results, packed, state = output
    ctx.set_materialize_grads(False)
    # The packed rows stay differentiable for the reason given in the contrastive loss.
    ctx.mark_non_differentiable(results, state)
    ctx.save_for_backward(logit_scale, packed, state, *reference)
    shape = contrastive.shape_of(image, group)
    options = weight, decay, average_weight, pairwise_weight, mean_gradient
    ctx.constants = shape.rows, shape.total, shape.first, shape.width, *options


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * 14
    run = direct.first_order(launch_backward, backward, upstream)
    return *run(upstream, *ctx.saved_tensors, *ctx.constants), *([None] * 9)


forward.register_autograd(_backward, setup_context=_setup_context)
apply = direct.differentiable(launch_forward, _backward, _setup_context)
