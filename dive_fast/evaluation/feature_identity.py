"""Identities of a model's features and of a prompt classifier: everything that determines their values.

Batch size, ranks, workers and the paths of files do not, and are left out.
"""

import hashlib
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from PIL import features
from torch import nn

from dive_fast import numerics
from dive_fast.data.prompt_files import Template
from dive_fast.data.text_tokenizer import TOKENIZER_PROBES, Tokenizer
from dive_fast.identity import Identity, digest, versions
from dive_fast.model.model_identity import model_identity, state_digest
from dive_fast.model.towers import Towers

IGNORED_ATTRIBUTES = ("training", "image_mean", "image_std")
"""Attributes of modules that do not affect the features, or repeat the preprocessing."""


def features_identity(towers: Towers, tokenizer: Tokenizer, device: torch.device) -> Identity:
    """Identity of a model's features: model, tokenizer, precision, kind of device and versions."""
    return {
        "model": model_identity(towers)
        | {
            "structure": [structure(towers.visual), structure(towers.text)],
            "pooled_at": towers.pooled_at,
            "tokenizer": _probe_digest(tokenizer),
        }
        | _prompts(towers)
    } | computed_by(device, towers.autocast)


def computed_by(device: torch.device, autocast: torch.dtype | None = None) -> Identity:
    """The part of an identity of features that is not the model's: precision, kind of device, versions."""
    return {
        "precision": _precision(autocast),
        "device": _device(device),
        "versions": _versions(),
    }


def _prompts(towers: Towers) -> Identity:
    """The learned prompts, as a key of its own: results without them remain valid."""
    if towers.prompts is None:
        return {}
    prompts = towers.prompts
    about = [
        prompts.phrase,
        None if prompts.attention is None else [prompts.attention.heads, prompts.attention.residual],
    ]
    return {"prompts": digest([about, state_digest(prompts.state_dict())])}


def classifier_identity(
    towers: Towers,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[Template],
    device: torch.device,
) -> Identity:
    """Identity of the embeddings of class prompts; does not depend on the image tower."""
    weights = hashlib.sha256()
    for name, tensor in sorted(towers.text.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        weights.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return {
        "text": {
            "structure": structure(towers.text),
            "pooled_at": towers.pooled_at,
            "weights": weights.hexdigest(),
            "tokenizer": _probe_digest(tokenizer),
        },
        "prompts": prompts_digest(class_names, templates),
    } | computed_by(device, towers.autocast)


def prompts_digest(class_names: Sequence[str], templates: Sequence[Template]) -> str:
    """Hash of all prompts, class by class."""
    return digest([[template(name) for template in templates] for name in class_names])


def structure(module: nn.Module) -> str:
    """Hash of a module's structure without weights: types and plain attributes of all submodules.

    It is taken from the module that was built, since one name or configuration may give different modules: a
    pretrained tag, for example, may select the activation.
    """
    submodules = []
    for name, submodule in module.named_modules():
        public = {key: value for key, value in vars(submodule).items() if key[:1] != "_"}
        texts = {key: _as_text(value) for key, value in public.items() if key not in IGNORED_ATTRIBUTES}
        attributes = {key: text for key, text in sorted(texts.items()) if text is not None}
        submodules.append([name, _qualified_name(type(submodule)), submodule.extra_repr(), attributes])
    return digest(submodules)


def _as_text(value: Any) -> str | None:
    """Text of a plain attribute or function; None for other values, such as submodules and tensors."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, tuple | list) and all(isinstance(entry, bool | int | float | str) for entry in value):
        return repr(list(value))
    if callable(value) and not isinstance(value, nn.Module):
        return _qualified_name(getattr(value, "func", value))
    return None


def _qualified_name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _probe_digest(tokenizer: Tokenizer) -> str:
    return digest(tokenizer(list(TOKENIZER_PROBES)).tolist())


def _precision(autocast: torch.dtype | None) -> Identity:
    return {"autocast": "fp32" if autocast is None else str(autocast)} | numerics.state()


def _device(device: torch.device) -> str:
    """A GPU's name or a CPU's vector instructions, since kinds of devices round differently."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}"


def _versions() -> Identity:
    """Versions of the packages that compute features, and of those that decode and resize images."""
    codecs = {name: features.version(name) for name in ("libjpeg_turbo", "zlib", "webp")}
    return versions() | {"dive_fast": metadata.version("dive_fast")} | codecs
