"""A trained classification head: a linear layer over unit image features, in a file beside the weights."""

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
"""Its name in a run folder."""


class Head(NamedTuple):
    """Logits are ``unit(image_features) @ weight.T + bias``."""

    weight: Tensor
    """``(C, D)`` fp32."""
    bias: Tensor
    """``(C,)`` fp32."""
    class_names: tuple[str, ...]
    """C names, in the order of the rows."""
    trained_with: str = ""
    """:func:`dive_fast.model.model_identity.weights_digest` of the towers whose features it classifies; empty: not known."""


def save(head: Head, path: Path) -> None:
    """Writes a head as safetensors with its class names as metadata, whole or not at all."""
    tensors = {name: getattr(head, name).detach().float().cpu().contiguous() for name in ("weight", "bias")}
    about = {"class_names": json.dumps(list(head.class_names), ensure_ascii=False)}
    about |= {"trained_with": head.trained_with} if head.trained_with else {}
    with atomic_path(path) as partial:
        save_file(tensors, partial, about)


def head_path(weights: Path) -> Path:
    """The file for the head of exported weights: :data:`FILE` for ``model.safetensors``, else named after them."""
    return weights.with_name(FILE if weights.name == "model.safetensors" else f"{weights.stem}_{FILE}")


def find_head(weights: Path) -> Path | None:
    """The head that was trained or mixed with exported weights; None where there is none."""
    found = head_path(weights)
    return found if found.is_file() else None


def load(path: Path) -> Head:
    """Reads what :func:`save` wrote.

    Raises:
        ConfigError: the file cannot be read, or holds no head.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            about = file.metadata() or {}
            names = parse_json(about.get("class_names", "null"))
    except Exception as error:  # safetensors has an error of its own for each way to be broken
        raise ConfigError(
            f"{path}: cannot be read as a head in safetensors: {error}; copy it again, or train it anew"
        ) from error
    weight, bias = tensors.get("weight"), tensors.get("bias")
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    are_numbers = all(tensor is not None and tensor.is_floating_point() for tensor in (weight, bias))
    if weight is None or bias is None or not are_names or not are_numbers:
        raise ConfigError(f"{path}: no head: expected tensors weight and bias, and class_names in its metadata")
    rows = (*weight.shape[:1], *bias.shape, len(names))
    if weight.ndim != 2 or bias.ndim != 1 or len(set(rows)) != 1:
        raise ConfigError(
            f"{path}: no head: weight {tuple(weight.shape)}, bias {tuple(bias.shape)} and {len(names)} class names"
        )
    return Head(weight.to(torch.float32), bias.to(torch.float32), tuple(names), about.get("trained_with", ""))
