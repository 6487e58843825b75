"""Validation of the losses' arguments, for every backend."""

from torch import Tensor


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


def check_scale(logit_scale: Tensor, image_features: Tensor) -> None:
    """Checks that the scale is one floating-point number on the features' device.

    Raises:
        ValueError: its shape, dtype or device is wrong.
    """
    if logit_scale.shape not in ((), (1,)):
        raise ValueError(f"logit_scale: expected shape () or (1,), got {tuple(logit_scale.shape)}")
    if not logit_scale.is_floating_point():
        raise ValueError(f"logit_scale: expected a floating-point dtype, got {logit_scale.dtype}")
    _check_device("logit_scale", logit_scale, "image_features", image_features)


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


def _check_device(name: str, tensor: Tensor, other: str, reference: Tensor) -> None:
    if tensor.device != reference.device:
        raise ValueError(f"{name}: expected device {reference.device} as {other} has, got {tensor.device}")
