"""What a file or folder of weights is: the description next to it, and the kinds of other tools' files.

``open_clip_config.json`` is open_clip's own description of a ``local-dir:`` or ``hf-hub:`` model. Exported weights
have one beside them, so that what a model wants of its images travels with its weights.
"""

import json
import logging
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg
from safetensors import safe_open

from dive_fast.data.prompts import TOKENIZER_PROBES, Tokenizer
from dive_fast.data.transforms import Preprocess
from dive_fast.errors import ConfigError
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import read_json

logger = logging.getLogger(__name__)

DESCRIPTION = "open_clip_config.json"
PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
"""Of open_clip's preprocess config, without the size, which is the image tower's."""

NOT_COMPARED = {
    "": {"custom_text", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"},
    "vision_cfg": {"image_size", "output_tokens", "patch_dropout", "timm_drop", "timm_drop_path"}
    | {"timm_model_pretrained"},
    "text_cfg": {"context_length", "output_tokens", "hf_model_name", "hf_model_pretrained", "hf_tokenizer_name"},
}
"""Fields of an architecture that do not decide what a model computes of its weights: names, starting values, what
is dropped in training, and sizes to which open_clip interpolates positions."""


@dataclass(frozen=True)
class Description:
    """What ``open_clip_config.json`` says."""

    path: Path
    model_cfg: Mapping[str, Any]
    """open_clip's architecture."""
    preprocess_cfg: Mapping[str, Any]
    """Of open_clip's preprocess config, by :data:`PREPROCESS_KEYS`; what is missing has open_clip's default."""


def read_description(folder: Path) -> Description | None:
    """The description in a folder; None where there is none.

    Raises:
        ConfigError: it cannot be read, or is not a description.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    try:
        tree = read_json(path)
        model_cfg, preprocess_cfg = tree["model_cfg"], tree.get("preprocess_cfg") or {}
        known = {key: preprocess_cfg[key] for key in PREPROCESS_KEYS if preprocess_cfg.get(key) is not None}
        if not isinstance(model_cfg, dict):
            raise TypeError("model_cfg is not an object")
        check_preprocess(known)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = f"no {error}" if isinstance(error, LookupError) else error
        raise ConfigError(
            f"{path}: not a description of an open_clip model: {why}; copy it again, or remove it to use "
            "open_clip's default preprocessing"
        ) from error
    return Description(path, model_cfg, known)


def check_preprocess(config: Mapping[str, Any]) -> None:
    """Validates the fields of a preprocess config.

    Raises:
        ValueError: names the field.
    """
    for key in ("mean", "std"):
        values = config.get(key, (0.5,) * 3)
        is_row = isinstance(values, list | tuple) and len(values) == 3
        if not is_row or not all(isinstance(value, int | float) for value in values):
            raise ValueError(f"preprocess_cfg.{key} is not three numbers")
    if not all(config.get("std", (0.5,) * 3)):
        raise ValueError("preprocess_cfg.std has a zero")
    for key, allowed in (
        ("interpolation", ("bicubic", "bilinear", "random")),
        ("resize_mode", ("shortest", "longest", "squash")),
    ):
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"preprocess_cfg.{key} is none of {', '.join(allowed)}")


def with_preprocess_config(preprocess: Preprocess, config: Mapping[str, Any]) -> Preprocess:
    """A preprocessing with open_clip's defaults and the given fields, for images of the same size."""
    cfg = PreprocessCfg(**{**config, "size": preprocess.size})
    return Preprocess.of(SimpleNamespace(preprocess_cfg=asdict(cfg)))


def check_architecture(described: Description, name: str, model_cfg: Mapping[str, Any]) -> None:
    """Compares a description with the architecture that its weights are to be loaded into.

    Raises:
        ConfigError: they compute different functions; names each field, and the built-in model that fits.
    """
    found = list(differences(described.model_cfg, model_cfg))
    if not found:
        return
    fitting = [other for other in open_clip.list_models() if _is_same(described, other)]
    instead = f"; take model.name = {' or '.join(fitting[:3])}" if fitting else f"; see {described.path}"
    raise ConfigError(
        f"model.name: the weights in {described.path.parent} are of another architecture than {name}: "
        f"{', '.join(found[:4])}{' ...' if len(found) > 4 else ''}{instead}"
    )


def _is_same(described: Description, name: str) -> bool:
    config = open_clip.get_model_config(name)
    if next(differences(described.model_cfg, config), None) is not None:
        return False
    sizes = (("vision_cfg", "image_size"), ("text_cfg", "context_length"))
    return all(_plain(described.model_cfg)[part][key] == _plain(config)[part][key] for part, key in sizes)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Each field in which two architectures compute different functions of their weights."""
    first, second = _plain(there), _plain(here)
    for part in sorted(first.keys() | second.keys()):
        one, other = first.get(part, {}), second.get(part, {})
        for key in sorted(one.keys() | other.keys()):
            if key not in NOT_COMPARED.get(part, ()) and one.get(key) != other.get(key):
                path = f"{part}.{key}" if part else key
                yield f"{path} = {json.dumps(one.get(key))} there, {json.dumps(other.get(key))} in the model"


def _plain(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """An architecture with all of open_clip's defaults, as JSON values by section."""
    found: dict[str, dict[str, Any]] = {"": {"quick_gelu": False}}
    for key, value in config.items():
        defaults = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}.get(key)
        if not isinstance(value, dict):
            found[""][key] = value
            continue
        own = {} if defaults is None else asdict(defaults())
        found[key] = own | value
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(found))
    return plain


def write_description(
    folder: Path, model_cfg: Mapping[str, Any], preprocess: Preprocess, tokenizer: Tokenizer | None
) -> None:
    """Writes what makes ``local-dir:<folder>`` a model, once its weights are there.

    Args:
        tokenizer: of Hugging Face, which open_clip looks for in the folder; None for open_clip's own.
    """
    chosen = {key: value for key, value in asdict(preprocess).items() if key in PREPROCESS_KEYS}
    text = json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {"size": preprocess.size} | chosen}, indent=2)
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)
    write_atomic(folder / DESCRIPTION, (text + "\n").encode())
    if tokenizer is not None:
        again = open_clip.get_tokenizer(f"local-dir:{folder}")
        if not torch.equal(again(list(TOKENIZER_PROBES)), tokenizer(list(TOKENIZER_PROBES))):
            warn_on_main_rank(
                f"{folder}: the tokenizer saved there splits texts in another way than the model's own"
            )


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    save = getattr(tokenizer, "save_pretrained", None)
    if save is not None:
        save(str(folder))


def interpolated(shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Any]) -> str | None:
    """How open_clip fits positional embeddings of another size; None where they have the model's.

    Args:
        shapes: of the tensors in a file, by name.
        state: the model's own.
    """
    said = []
    for names, what in (
        (("visual.positional_embedding",), "images of {} patches (with the class token)"),
        (("positional_embedding", "text.positional_embedding"), "texts of {} tokens"),
    ):
        there = next((shapes[name] for name in names if name in shapes), None)
        here = next((tuple(state[name].shape) for name in names if name in state), None)
        if there and here and there[0] != here[0]:
            said.append(f"{what.format(there[0])}, the model takes {here[0]}")
    return f"made for {' and '.join(said)}: its positional embeddings are interpolated" if said else None


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a file of weights, by name without ``module.``; empty where it cannot be read."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        state = found.get("state_dict", found)
        return {
            name.removeprefix("module."): tuple(value.shape)
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
        }
    except Exception:  # whatever it is, the loader itself tells
        return {}


def kind_of(path: Path) -> str | None:
    """What a file is that open_clip cannot load, and what to do; None where nothing is known. Executes nothing."""
    try:
        return _kind_of(path)
    except Exception:  # of broken files, parsers have errors of their own
        return None


def _kind_of(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(1024)
    if not start:
        return "an empty file; copy it again"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer and not the weights; run `git lfs pull` in its clone, or download the file"
    if start.lstrip()[:1] == b"<":
        return "a web page, as a failed download leaves it; download the file again"
    if start.lstrip()[:1] in (b"{", b"["):
        return "JSON text, such as a model's config; name the file of weights next to it"
    if zipfile.is_zipfile(path):
        return _kind_of_archive(path)
    shapes = shapes_of(path)
    if shapes:
        return _kind_of_names(set(shapes))
    if path.suffix == ".safetensors" and start[:1] in (b"\x80", b"P"):
        return "not safetensors, in spite of its name; torch.save's files are called .pt or .bin"
    if start[:1] == b"\x80":
        return f"an old pickle that holds more than tensors; {_CONVERT}"
    return None


_CONVERT = (
    "nothing in it is executed here; where you trust it and have its code, save its state dict alone by torch.save"
)


def _kind_of_archive(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        return (
            "a TorchScript archive, as OpenAI publishes its models; save its tensors once: "
            "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), OUT), without input_resolution, context_length "
            "and vocab_size"
        )
    if not any(name.endswith("data.pkl") for name in names):
        return "a zip archive that torch.save has not written; unpack it and name the file of weights"
    classes = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    if "argparse.Namespace" in classes:
        return f"a training checkpoint with its command line (argparse.Namespace) inside; {_CONVERT}"
    if classes:
        return f"a pickle of Python objects ({', '.join(classes[:3])}), not of tensors alone; {_CONVERT}"
    return _kind_of_names(set(shapes_of(path)))


def _kind_of_names(names: set[str]) -> str | None:
    if any(name.startswith("vision_model.") for name in names):
        return "weights in transformers' format; take open_clip's file of the model, e.g. model.name = hf-hub:..."
    if names == {"weight", "bias"}:
        return "a classification head; name the model.safetensors next to it"
    if any(".lora_" in name for name in names):
        return "LoRA adapters; merge them into their model, and name its weights"
    if any(name.startswith("optimizer") for name in names):
        return "the state of an optimizer; name the file of weights"
    return None


def warn_on_main_rank(line: str) -> None:
    """Warns of something once, by the first rank: every rank reads the same files."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(line)


def summarize_preprocess(preprocess: Preprocess) -> str:
    """A preprocessing in one line."""

    def numbers(values: tuple[float, ...]) -> str:
        return "/".join(f"{value:.3g}" for value in values)

    return (
        f"mean {numbers(preprocess.mean)}, std {numbers(preprocess.std)}, {preprocess.interpolation}, "
        f"{preprocess.resize_mode}"
    )
