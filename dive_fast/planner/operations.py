"""The work that each operation gives a GPU: arithmetic of products and attention, and bytes in memory.

Bytes of an operation: each operand is read once and each result written once. Views and allocations move nothing,
an operand changed in place is read and written, a filled one only written, and a gather reads the rows that it
returns. This is the least that a kernel of this operation alone moves: caches are ignored, and so are second
passes, such as that of CUDA's layer norm over its input for the gradients of scale and shift. The towers'
operations on the CPU, where steps are planned, are those of CUDA; :mod:`dive_fast.planner.simulate` corrects the
exceptions.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from dive_fast.kernels import backend, process_group

if backend.primitives is not None:
    from dive_fast.kernels import distillation

Stage = Literal["target", "reference", "teacher", "target_teacher", "loss", "update"]
Kind = Literal["product", "attention", "elementwise"]


class Operation(NamedTuple):
    """The work of one operation; equal operations of a step are counted together."""

    stage: Stage
    kind: Kind
    """``product``: a matrix product, convolution or loss kernel; ``elementwise``: everything without FLOP."""
    name: str
    """Name without namespace and overload, such as ``addmm``."""
    is_half: bool
    """Whether its first matrix has 16-bit entries, for which GPUs have faster units."""
    flop: int
    """A multiply-add is two operations, as in torch's FlopCounterMode."""
    bytes: int
    """Bytes read and written."""
    reduction: int
    """Number of terms in each sum of a matrix product, which limits its rate; 0 for other kinds."""
    is_triton: bool = False
    """Whether the host launches it by Triton, which takes longer."""


def _native_attention_flop(query: Any, key: Any, value: Any, width: int, *_: Any, **__: Any) -> int:
    batch, length, _ = query
    return int(2 * batch * length * (4 * width**2 + 2 * length * width))


def _cpu_attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _cpu_attention_backward_flop(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


MISSED_FLOP = {
    torch.ops.aten._native_multi_head_attention: _native_attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flop,
}
"""FLOP formulas missing from torch's registry: nn.MultiheadAttention in evaluation without gradient, as in an
online teacher; in PyTorch 2.11 also attention on the CPU, where steps are planned."""
_FLOP = flop_registry | {op: shape_wrapper(formula) for op, formula in MISSED_FLOP.items()}
_ALLOCATIONS = {
    *("_unsafe_view", "empty", "empty_like", "empty_strided", "empty_permuted"),
    *("new_empty", "new_empty_strided", "resize_", "set_"),
}
_FILLS = {
    *("fill_", "zero_", "copy_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"),
    *("_foreach_zero_", "_foreach_copy_"),
}
"""In-place operations that do not read what they overwrite."""
_WRITTEN = {"add_deviations_to_gradients": "previous", "add_deviations_to_weights": "previous"}
"""Operations of :mod:`dive_fast.kernels` with an argument that they overwrite without reading it, and its name."""
_GATHERS = {"embedding": 1, "index": 1, "index_select": 2, "gather": 2, "take": 1}
"""Operations that read only some rows of their first argument, and the position of the indices."""
_SCATTERS = {"index_put_": 2, "_index_put_impl_": 2, "index_add_": 3, "index_copy_": 3, "scatter_add_": 3}
"""Operations that change only some rows of their first argument, and the position of the rows' values."""
_SLICE_BACKWARDS = ("select_backward", "slice_backward", "diagonal_backward")
"""Backwards of views, which fill a tensor with zeros and then copy the gradient into a part of it."""


def operation_of(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, stage: Stage
) -> Operation | None:
    """The work of a dispatched operation; None for one that launches nothing, such as a view.

    Args:
        func: operation in torch.ops, with overload.
        result: returned by ``func(*args, **kwargs)``.
        stage: stage of operations other than the loss kernels.
    """
    name = func._overloadpacket.__name__
    if func.namespace not in ("aten", "dive_fast") or func.is_view or name in _ALLOCATIONS:
        return None
    kind: Kind = "elementwise"
    flop = reduction = 0
    if is_loss_kernel(func):
        stage, kind = "loss", "product"
        flop, reduction = _loss_work(func, args)
    elif (formula := _FLOP.get(func._overloadpacket)) is not None:
        kind = "attention" if "scaled_dot_product" in name or name.endswith("_attention_forward") else "product"
        flop = formula(*args, **kwargs, out_val=result)
        reduction = _reduction(name, args) if kind == "product" else 0
    matrix = next((each for each in tree_leaves(args) if isinstance(each, Tensor) and each.ndim > 1), None)
    is_half = flop > 0 and matrix is not None and matrix.element_size() == 2 and name != "distillation_loss"
    moved = _moved_bytes(func, name, args, kwargs, result)
    return Operation(stage, kind, name, is_half, flop, moved, reduction, func.namespace == "dive_fast")


def is_loss_kernel(func: Any) -> bool:
    """Whether an operation is one of the losses in :mod:`dive_fast.kernels`, forward or backward."""
    return func.namespace == "dive_fast" and "_loss" in func._overloadpacket.__name__


def arguments_by_name(func: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments by their names in the operation's schema."""
    return dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))


def _moved_bytes(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    written = _new_bytes(func, result)
    if name in _GATHERS:
        return 2 * written + _bytes(args[_GATHERS[name]])
    if name in _SCATTERS:
        values = _bytes(args[_SCATTERS[name]])
        return 3 * values + _bytes(args[_SCATTERS[name] - 1])
    if name in _SLICE_BACKWARDS:
        return written + 2 * _bytes(args[0])
    read = 0
    seen: set[tuple[Any, ...]] = set()
    for argument, value in _schema_arguments(func, args, kwargs):
        is_changed = argument.alias_info is not None and argument.alias_info.is_write
        is_read = not (is_changed and (name in _FILLS or argument.is_out or argument.name == _WRITTEN.get(name)))
        for tensor in tree_leaves(value):
            if not isinstance(tensor, Tensor):
                continue
            key = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()
            if is_changed:
                written += _bytes(tensor)
            if is_read and key not in seen:
                read += _bytes(tensor)
                seen.add(key)
    return read + written


def _schema_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            yield argument, args[position]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _new_bytes(func: Any, result: Any) -> int:
    """Bytes of the returned tensors that are not arguments."""
    returns = func._schema.returns
    results = (result,) if len(returns) == 1 else result or ()
    return sum(_bytes(value) for each, value in zip(returns, results, strict=False) if each.alias_info is None)


def _bytes(value: Any) -> int:
    """Bytes of the tensors in a value; an expanded dimension counts once."""
    total = 0
    for tensor in tree_leaves(value):
        if isinstance(tensor, Tensor):
            sizes = (1 if stride == 0 and size else size for size, stride in zip(tensor.shape, tensor.stride()))
            total += math.prod(sizes) * tensor.element_size()
    return total


def _reduction(name: str, args: tuple[Any, ...]) -> int:
    if name.endswith("convolution"):
        return math.prod(args[1].shape[1:])
    if name == "convolution_backward":
        # The weight's gradient sums over images and pixels, that of the images over output channels.
        gradient, weight = args[0], args[2]
        return int(weight.shape[0] if args[-1][0] else gradient.numel() // weight.shape[0])
    matrices = [each for each in args if isinstance(each, Tensor) and each.ndim > 1]
    left = matrices[-2] if name in ("mm", "addmm", "bmm", "baddbmm") else matrices[0]
    return int(left.shape[-1])


def _loss_work(func: Any, args: tuple[Any, ...]) -> tuple[int, int]:
    """FLOP and width of a loss kernel: logits of both directions; in the backward, logits again and sums.

    The distillation losses have up to three kinds of logits. The difference loss has no matrix product; it counts
    for nothing, like all element-wise operations.
    """
    named = arguments_by_name(func, args)
    if "logit_scale" not in named:
        return 0, 0
    if "packed" in named:
        rows, columns, width, products = named["count"], named["total"], named["width"], 4
    else:
        (rows, width), products = named["image"].shape, 2
        columns = rows * process_group.world_size(named["group"])
    if "teacher_scale" in named:
        forward, backward = distillation.products(distillation_terms(named))
        products = backward if "packed" in named else forward
    return int(2 * products * rows * columns * width), int(width)


def distillation_terms(named: dict[str, Any]) -> "distillation.Terms":
    """Terms of the distillation losses, from the arguments of one of their operations."""
    names = ("feature_weight", "relational_weight", "interactive_weight", "cross_weight")
    return distillation.terms_of(*(named[name] for name in names))
