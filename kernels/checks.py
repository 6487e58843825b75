"""Validation of the arguments of losses and layers, for every backend."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]
"""Name of an activation; :func:`dive_fast.kernels.naive.biased_activation` has their formulas."""


def check_pairs(**matrices: Tensor) -> None:
    """Checks the matrices of one batch: all have the shape and device of the first, features also its dtype.

    Raises:
        ValueError: the first is not a non-empty floating-point matrix, or another one differs from it.
    """
    (first, reference), *_ = matrices.items()
    if reference.ndim != 2 or 0 in reference.shape:
        raise ValueError(f"{first}: expected a non-empty (B, D) matrix, got shape {tuple(reference.shape)}")
    for name, matrix in matrices.items():
        if matrix.shape != reference.shape:
            expected, actual = tuple(reference.shape), tuple(matrix.shape)
            raise ValueError(f"{name}: expected shape {expected} as {first} has, got {actual}")
        if not matrix.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point dtype, got {matrix.dtype}")
        if name.endswith("features") and matrix.dtype != reference.dtype:
            raise ValueError(f"{name}: expected dtype {reference.dtype} as {first} has, got {matrix.dtype}")
        _check_device(name, matrix, first, reference)


def check_triple(first: Tensor, second: Tensor, third: Tensor) -> None:
    """Checks three matrices of features of one shape, dtype and device.

    Raises:
        ValueError: the first is not a non-empty floating-point matrix, or another one differs from it.
    """
    check_pairs(first=first, second=second, third=third)
    for name, matrix in {"second": second, "third": third}.items():
        if matrix.dtype != first.dtype:
            raise ValueError(f"{name}: expected dtype {first.dtype} as first has, got {matrix.dtype}")


def check_scale(scale: Tensor, image_features: Tensor, name: str = "logit_scale") -> None:
    """Checks that a scale is one floating-point number on the features' device.

    Raises:
        ValueError: its shape, dtype or device is wrong.
    """
    if not isinstance(scale, Tensor):
        raise ValueError(f"{name}: expected a tensor, such as torch.tensor({scale}), got {type(scale).__name__}")
    if scale.shape not in ((), (1,)):
        raise ValueError(f"{name}: expected shape () or (1,), got {tuple(scale.shape)}")
    if not scale.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point dtype, got {scale.dtype}")
    _check_device(name, scale, "image_features", image_features)


def check_average_vector(average_vector: Tensor, image_features: Tensor) -> None:
    """Checks that the average vector is ``(D,)``, floating-point, and on the features' device.

    Raises:
        ValueError: its shape, dtype or device is wrong.
    """
    expected, actual = tuple(image_features.shape[1:]), tuple(average_vector.shape)
    if expected != actual:
        raise ValueError(f"average_vector: expected shape {expected}, got {actual}")
    if not average_vector.is_floating_point():
        raise ValueError(f"average_vector: expected a floating-point dtype, got {average_vector.dtype}")
    _check_device("average_vector", average_vector, "image_features", image_features)


def check_same_kind(image_features: Tensor, reference_image_features: Tensor) -> None:
    """Checks that the features of both batches have the same dtype and device.

    Raises:
        ValueError: dtype or device of the reference batch differs.
    """
    name, dtype = "reference_image_features", image_features.dtype
    if reference_image_features.dtype != dtype:
        actual = reference_image_features.dtype
        raise ValueError(f"{name}: expected dtype {dtype} as image_features has, got {actual}")
    _check_device(name, reference_image_features, "image_features", image_features)


def check_averages(averages: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Checks pairs of fp32 tensors of equal shape on one device; there may be none.

    Raises:
        ValueError: their numbers differ, or a tensor has another shape, dtype or device.
    """
    if len(averages) != len(values):
        raise ValueError(f"values: expected {len(averages)} tensors as averages has, got {len(values)}")
    for index, (average, value) in enumerate(zip(averages, values, strict=True)):
        for name, tensor in (f"averages[{index}]", average), (f"values[{index}]", value):
            if tensor.dtype != torch.float32:
                raise ValueError(f"{name}: expected fp32, got {tensor.dtype}")
            _check_device(name, tensor, "averages[0]", averages[0])
        if average.shape != value.shape:
            expected, actual = tuple(average.shape), tuple(value.shape)
            raise ValueError(f"values[{index}]: expected shape {expected} as averages has, got {actual}")


def check_rate(rate: Tensor, average: Tensor) -> None:
    """Checks that the rate of a moving average is one fp32 number on its device.

    Raises:
        ValueError: its shape, dtype or device is wrong.
    """
    if rate.shape not in ((), (1,)):
        raise ValueError(f"rate: expected shape () or (1,), got {tuple(rate.shape)}")
    if rate.dtype != torch.float32:
        raise ValueError(f"rate: expected fp32, got {rate.dtype}")
    _check_device("rate", rate, "averages", average)


def check_deviations(
    weights: Sequence[Tensor], anchors: Sequence[Tensor], previous: Sequence[Tensor] | None
) -> None:
    """Checks pieces of flattened fp32 weights, and others of equal shape on one device; there may be none.

    Raises:
        ValueError: their numbers differ, or a tensor has another shape, dtype or device, or gaps.
    """
    for name, tensors in ("weights", weights), ("anchors", anchors), ("previous", previous):
        if tensors is None:
            continue
        if len(tensors) != len(weights):
            raise ValueError(f"{name}: expected {len(weights)} tensors as weights has, got {len(tensors)}")
        for index, tensor in enumerate(tensors):
            if weights[index].ndim != 1:
                raise ValueError(f"weights[{index}]: expected one dimension, got {tuple(weights[index].shape)}")
            _check_piece(f"{name}[{index}]", tensor, weights[index])
            _check_device(f"{name}[{index}]", tensor, "weights[0]", weights[0])


def check_gradients(gradients: Sequence[Tensor | None], weights: Sequence[Tensor]) -> None:
    """Checks gradients of pieces, of which some or all may be None.

    Raises:
        ValueError: their number differs, or a gradient has another shape, dtype or device, or gaps.
    """
    if len(gradients) != len(weights):
        raise ValueError(f"gradients: expected {len(weights)} tensors as weights has, got {len(gradients)}")
    for index, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
        if gradient is not None:
            _check_piece(f"gradients[{index}]", gradient, weight)
            _check_device(f"gradients[{index}]", gradient, "weights", weight)


def check_coefficients(coefficients: Tensor, skipped: Tensor | None, count: int, device: torch.device) -> None:
    """Checks one coefficient for each slot, and whether the step is skipped.

    Raises:
        ValueError: a shape, dtype or device is wrong.
    """
    if coefficients.shape != (count,):
        raise ValueError(f"coefficients: expected shape ({count},), got {tuple(coefficients.shape)}")
    if coefficients.dtype not in (torch.float64, torch.float32):
        raise ValueError(f"coefficients: expected fp64 or fp32, got {coefficients.dtype}")
    if skipped is not None:
        if skipped.shape not in ((), (1,)):
            raise ValueError(f"skipped: expected shape () or (1,), got {tuple(skipped.shape)}")
        if skipped.dtype not in (torch.float32, torch.bool):
            raise ValueError(f"skipped: expected fp32 or bool, got {skipped.dtype}")
    for name, tensor in ("coefficients", coefficients), ("skipped", skipped):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: expected device {device} as weights have, got {tensor.device}")


def _check_piece(name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise ValueError(f"{name}: expected fp32, got {tensor.dtype}")
    if tensor.shape != weight.shape:
        raise ValueError(f"{name}: expected shape {tuple(weight.shape)} as weights has, got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got stride {tensor.stride()[0]}")


def check_activation(x: Tensor, bias: Tensor | None, kind: str) -> None:
    """Checks rows ``(..., W)``, of which there may be none, a bias ``(W,)``, and the name of an activation.

    Raises:
        ValueError: a shape, dtype or device is wrong, or the name is unknown.
    """
    _check_rows("x", x)
    _check_columns("x", x, bias=bias)
    if kind not in get_args(Activation):
        raise ValueError(f"kind: expected one of {', '.join(get_args(Activation))}, got {kind!r}")


def check_pixels(pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> None:
    """Checks 8-bit images ``(B, H, W, 3)``, of which there may be none, and the numbers that normalise them.

    Raises:
        ValueError: a shape or dtype is wrong.
    """
    if pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"pixels: expected shape (B, H, W, 3), got {tuple(pixels.shape)}")
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels: expected dtype torch.uint8, got {pixels.dtype}")
    for name, values in {"mean": mean, "std": std}.items():
        if len(values) != 3:
            raise ValueError(f"{name}: expected 3 numbers, got {len(values)}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype: expected float16, bfloat16 or float32, got {dtype}")


def check_attacked(
    clean: Tensor, eps: float, images: Tensor | None = None, gradient: Tensor | None = None
) -> None:
    """Checks images ``(B, C, H, W)``, of which there may be none, and others of the same shape, dtype and device.

    Raises:
        ValueError: a shape, dtype or device is wrong, or eps is negative.
    """
    if clean.ndim != 4:
        raise ValueError(f"clean: expected shape (B, 3, H, W), got {tuple(clean.shape)}")
    if clean.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"clean: expected dtype torch.float32 or torch.float64, got {clean.dtype}")
    for name, tensor in {"images": images, "gradient": gradient}.items():
        if tensor is None:
            continue
        if tensor.dtype != clean.dtype:
            raise ValueError(f"{name}: expected dtype {clean.dtype} as clean has, got {tensor.dtype}")
        if tensor.shape != clean.shape:
            raise ValueError(
                f"{name}: expected shape {tuple(clean.shape)} as clean has, got {tuple(tensor.shape)}"
            )
        _check_device(name, tensor, "clean", clean)
    if not eps >= 0:
        raise ValueError(f"eps: expected a number that is not negative, got {eps}")


def check_step_sizes(step_size: Tensor, clean: Tensor) -> None:
    """Checks one number for each image, of its dtype.

    Raises:
        ValueError: its shape, dtype or device is wrong.
    """
    if step_size.shape != clean.shape[:1]:
        raise ValueError(f"step_size: expected shape ({len(clean)},), got {tuple(step_size.shape)}")
    if step_size.dtype != clean.dtype:
        raise ValueError(f"step_size: expected dtype {clean.dtype} as clean has, got {step_size.dtype}")
    _check_device("step_size", step_size, "clean", clean)


def check_samples(samples: Tensor, clean: Tensor, seed: int, step: int) -> None:
    """Checks one number of a sample for each image, and the seed and the step of random numbers.

    Raises:
        ValueError: a shape, dtype or device is wrong, or a number is out of range.
    """
    if samples.shape != clean.shape[:1]:
        raise ValueError(f"samples: expected shape ({len(clean)},), got {tuple(samples.shape)}")
    if samples.dtype != torch.int64:
        raise ValueError(f"samples: expected dtype torch.int64, got {samples.dtype}")
    _check_device("samples", samples, "clean", clean)
    for name, number, bits in ("seed", seed, 64), ("step", step, 32):
        if not 0 <= number < 2**bits:
            raise ValueError(f"{name}: expected a number from 0 to 2^{bits} - 1, got {number}")


def check_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
) -> None:
    """Checks rows ``(..., D)``, of which there may be none, what is added to them, and a norm of its rows.

    Raises:
        ValueError: a shape, dtype or device is wrong, or there is a bias of a branch without a branch.
    """
    _check_rows("x", x)
    if branch is not None:
        if branch.shape != x.shape:
            raise ValueError(f"branch: expected shape {tuple(x.shape)} as x has, got {tuple(branch.shape)}")
        if not branch.is_floating_point():
            raise ValueError(f"branch: expected a floating-point dtype, got {branch.dtype}")
        _check_device("branch", branch, "x", x)
    elif branch_bias is not None:
        raise ValueError("branch_bias: expected None because branch is None")
    _check_columns("x", x, branch_bias=branch_bias, weight=weight, bias=bias)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point dtype, got {dtype}")


def check_packed(qkv: Tensor, bias: Tensor | None, heads: int, parts: int) -> None:
    """Checks that the columns of ``(B, N, parts * heads * width)`` divide into parts and heads, and their bias.

    Raises:
        ValueError: a shape, dtype or device is wrong, or ``parts`` is not 2 or 3.
    """
    if parts not in (2, 3):
        raise ValueError(f"parts: expected 2 (keys, values) or 3 (queries, keys, values), got {parts}")
    _check_rows("qkv", qkv)
    if qkv.ndim != 3 or heads < 1 or qkv.shape[-1] % (parts * heads):
        raise ValueError(f"qkv: expected shape (B, N, {parts} * {heads} * width), got {tuple(qkv.shape)}")
    _check_columns("qkv", qkv, bias=bias)


def _check_rows(name: str, rows: Tensor) -> None:
    if rows.ndim == 0 or rows.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape (..., W) with W > 0, got {tuple(rows.shape)}")
    if not rows.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point dtype, got {rows.dtype}")


def _check_columns(rows_name: str, rows: Tensor, **vectors: Tensor | None) -> None:
    """Checks vectors with one element for each column of ``rows``."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != rows.shape[-1:]:
            raise ValueError(f"{name}: expected shape {tuple(rows.shape[-1:])}, got {tuple(vector.shape)}")
        if not vector.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point dtype, got {vector.dtype}")
        _check_device(name, vector, rows_name, rows)


def _check_device(name: str, tensor: Tensor, other: str, reference: Tensor) -> None:
    if tensor.device != reference.device:
        raise ValueError(f"{name}: expected device {reference.device} as {other} has, got {tensor.device}")
