"""What decides the features of a model under evaluation, and the rows of a classifier of prompts.

Batch size, ranks, workers and the places of files decide nothing and are left out.
"""

import hashlib
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from PIL import features
from torch import nn

from dive_fast import numerics as precision
from dive_fast.data.prompts import TOKENIZER_PROBES, Template, Tokenizer
from dive_fast.identity import Identity, digest, versions
from dive_fast.model.model_identity import model_identity
from dive_fast.model.towers import Towers

NOTED = ("training", "image_mean", "image_std")
"""Attributes of modules that decide nothing, or notes of what the preprocessing holds."""


def of_model(towers: Towers, tokenizer: Tokenizer, device: torch.device) -> Identity:
    """What decides a model's features, with the precision and the kind of device that they are computed in."""
    return {
        "model": model_identity(towers)
        | {
            "structure": [structure(towers.visual), structure(towers.text)],
            "pooled_at": towers.pooled_at,
            "tokenizer": _tokens(tokenizer),
        },
        "precision": _precision(towers),
        "device": _device(device),
        "versions": _versions(),
    }


def of_classifier(
    towers: Towers,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[Template],
    device: torch.device,
) -> Identity:
    """What decides the embeddings of class prompts: the image tower plays no part."""
    weights = hashlib.sha256()
    for name, tensor in sorted(towers.text.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        weights.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return {
        "text": {
            "structure": structure(towers.text),
            "pooled_at": towers.pooled_at,
            "weights": weights.hexdigest(),
            "tokenizer": _tokens(tokenizer),
        },
        "prompts": prompts_digest(class_names, templates),
        "precision": _precision(towers),
        "device": _device(device),
        "versions": _versions(),
    }


def prompts_digest(class_names: Sequence[str], templates: Sequence[Template]) -> str:
    """A hash of every prompt, class by class."""
    return digest([[template(name) for template in templates] for name in class_names])


def structure(module: nn.Module) -> str:
    """A hash of what a module computes, but for its weights: types of all parts, and their plain attributes.

    Read off the module as it was built: one name, or one configuration, may be built in several ways (an
    activation that a tag decides, say).
    """
    parts = []
    for name, part in module.named_modules():
        plain = {key: _plain(value) for key, value in vars(part).items() if key[:1] != "_" and key not in NOTED}
        kept = {key: value for key, value in sorted(plain.items()) if value is not None}
        parts.append([name, _called(type(part)), part.extra_repr(), kept])
    return digest(parts)


def _plain(value: Any) -> str | None:
    """A text for what decides something and has one; None for all else, which has its own place or none."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, tuple | list) and all(isinstance(entry, bool | int | float | str) for entry in value):
        return repr(list(value))
    if callable(value) and not isinstance(value, nn.Module):
        return _called(getattr(value, "func", value))
    return None


def _called(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def _tokens(tokenizer: Tokenizer) -> str:
    return digest(tokenizer(list(TOKENIZER_PROBES)).tolist())


def _precision(towers: Towers) -> Identity:
    return {"autocast": "fp32" if towers.autocast is None else str(towers.autocast)} | precision.state()


def _device(device: torch.device) -> str:
    """Its kind, since kinds round differently: a GPU's name, a CPU's vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}"


def _versions() -> Identity:
    """Of what computes, and of what decodes and resizes images."""
    codecs = {name: features.version(name) for name in ("libjpeg_turbo", "zlib", "webp")}
    return versions() | {"dive_fast": metadata.version("dive_fast")} | codecs
