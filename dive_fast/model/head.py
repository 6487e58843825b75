"""Trained classification heads: linear layers over unit image features, stored next to the weights."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dive_fast.errors import ConfigError
from dive_fast.io.atomic_files import atomic_path
from dive_fast.io.safe_read import parse_json

FILE = "head.safetensors"
"""Name of the head file in a run folder."""


class Head(NamedTuple):
    """A classification head with logits ``unit(image_features) @ weight.T + bias``."""

    weight: Tensor
    """``(C, D)`` fp32."""
    bias: Tensor
    """``(C,)`` fp32."""
    class_names: tuple[str, ...]
    """C class names in the order of the rows."""
    trained_with: str = ""
    """Digest of the weights of the towers that the head was trained with; empty: unknown. See
    :func:`dive_fast.model.model_identity.weights_digest`."""


def save(head: Head, path: Path) -> None:
    """Writes a head atomically as safetensors, with its class names as metadata."""
    tensors = {name: getattr(head, name).detach().float().cpu().contiguous() for name in ("weight", "bias")}
    metadata = {"class_names": json.dumps(list(head.class_names), ensure_ascii=False)}
    metadata |= {"trained_with": head.trained_with} if head.trained_with else {}
    with atomic_path(path) as partial:
        save_file(tensors, partial, metadata)


def head_path(weights: Path) -> Path:
    """The head file of exported weights: :data:`FILE` for ``model.safetensors``, otherwise named after them."""
    return weights.with_name(FILE if weights.name == "model.safetensors" else f"{weights.stem}_{FILE}")


def find_head(weights: Path) -> Path | None:
    """The file of the head that belongs to exported weights; None without one."""
    path = head_path(weights)
    return path if path.is_file() else None


def load(path: Path) -> Head:
    """Reads a head that :func:`save` wrote.

    Raises:
        ConfigError: the file cannot be read, or holds no head.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = file.metadata() or {}
            names = parse_json(metadata.get("class_names", "null"))
    except Exception as error:  # safetensors raises errors of many types
        raise ConfigError(
            f"{path}: cannot be read as a head in safetensors: {error}; copy it again, or train it again"
        ) from error
    weight, bias = tensors.get("weight"), tensors.get("bias")
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    are_numbers = all(tensor is not None and tensor.is_floating_point() for tensor in (weight, bias))
    if weight is None or bias is None or not are_names or not are_numbers:
        raise ConfigError(f"{path}: not a head: expected tensors weight and bias, and class_names in its metadata")
    rows = (*weight.shape[:1], *bias.shape, len(names))
    if weight.ndim != 2 or bias.ndim != 1 or len(set(rows)) != 1:
        raise ConfigError(
            f"{path}: not a head: weight {tuple(weight.shape)}, bias {tuple(bias.shape)} and "
            f"{len(names)} class names"
        )
    return Head(weight.to(torch.float32), bias.to(torch.float32), tuple(names), metadata.get("trained_with", ""))
