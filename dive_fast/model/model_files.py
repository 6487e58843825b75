"""Files and folders of weights: the description next to them, and the recognition of other tools' files.

``open_clip_config.json`` is open_clip's description of a ``local-dir:`` or ``hf-hub:`` model. Exported weights
have one next to them, which keeps a model's preprocessing with its weights.
"""

import json
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

from dive_fast.data.text_tokenizer import TOKENIZER_PROBES, Tokenizer
from dive_fast.data.transforms import Preprocess
from dive_fast.errors import ConfigError, warn_on_main_rank
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import read_json
from dive_fast.model.model_names import DESCRIPTION

PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
"""Keys of open_clip's preprocess config that are used; the size comes from the image tower."""

NOT_COMPARED = {
    "": {"custom_text", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"},
    "vision_cfg": {"image_size", "output_tokens", "patch_dropout", "timm_drop", "timm_drop_path"}
    | {"timm_model_pretrained"},
    "text_cfg": {"context_length", "output_tokens", "hf_model_name", "hf_model_pretrained", "hf_tokenizer_name"},
}
"""Fields of an architecture that do not change the function of given weights: names, initial values, dropout
rates, and sizes to which open_clip interpolates positions."""


@dataclass(frozen=True)
class Description:
    """The contents of an ``open_clip_config.json``."""

    path: Path
    model_cfg: Mapping[str, Any]
    """open_clip's architecture."""
    preprocess_cfg: Mapping[str, Any]
    """open_clip's preprocess config by :data:`PREPROCESS_KEYS`; missing keys have open_clip's defaults."""


def read_description(folder: Path) -> Description | None:
    """The description in a folder; None without one.

    Raises:
        ConfigError: it cannot be read, or is not a description.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    try:
        tree = read_json(path)
        model_cfg, preprocess_cfg = tree["model_cfg"], tree.get("preprocess_cfg") or {}
        preprocess = {key: preprocess_cfg[key] for key in PREPROCESS_KEYS if preprocess_cfg.get(key) is not None}
        if not isinstance(model_cfg, dict):
            raise TypeError("model_cfg is not an object")
        check_preprocess(preprocess)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, LookupError) else error
        raise ConfigError(
            f"{path}: not a description of an open_clip model: {reason}; copy it again, or remove it to use "
            "open_clip's default preprocessing"
        ) from error
    return Description(path, model_cfg, preprocess)


def check_preprocess(config: Mapping[str, Any]) -> None:
    """Validates the fields of a preprocess config.

    Raises:
        ValueError: a field is invalid; the message names it.
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
            raise ValueError(f"preprocess_cfg.{key} is not one of {', '.join(allowed)}")


def with_preprocess_config(preprocess: Preprocess, config: Mapping[str, Any]) -> Preprocess:
    """A preprocessing of equal image size with the fields of ``config`` and open_clip's defaults."""
    cfg = PreprocessCfg(**{**config, "size": preprocess.size})
    return Preprocess.of(SimpleNamespace(preprocess_cfg=asdict(cfg)))


def check_architecture(described: Description, name: str, model_cfg: Mapping[str, Any]) -> None:
    """Checks that described weights fit the architecture into which they are loaded.

    Raises:
        ConfigError: the architectures compute different functions; the message names the fields and, if there is
            one, a built-in model that fits.
    """
    different = list(architecture_differences(described.model_cfg, model_cfg))
    if not different:
        return
    fitting = [other for other in open_clip.list_models() if _has_architecture(described, other)]
    remedy = f"; use model.name = {' or '.join(fitting[:3])}" if fitting else f"; see {described.path}"
    raise ConfigError(
        f"model.name: the weights in {described.path.parent} are of another architecture than {name}: "
        f"{', '.join(different[:4])}{' ...' if len(different) > 4 else ''}{remedy}"
    )


def _has_architecture(described: Description, name: str) -> bool:
    config = open_clip.get_model_config(name)
    if next(architecture_differences(described.model_cfg, config), None) is not None:
        return False
    sizes = (("vision_cfg", "image_size"), ("text_cfg", "context_length"))
    return all(
        _with_defaults(described.model_cfg)[part][key] == _with_defaults(config)[part][key] for part, key in sizes
    )


def architecture_differences(described: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    """Lines for the fields that make two architectures compute different functions of equal weights."""
    first, second = _with_defaults(described), _with_defaults(model)
    for part in sorted(first.keys() | second.keys()):
        one, other = first.get(part, {}), second.get(part, {})
        for key in sorted(one.keys() | other.keys()):
            if key not in NOT_COMPARED.get(part, ()) and one.get(key) != other.get(key):
                path = f"{part}.{key}" if part else key
                yield f"{path} = {json.dumps(one.get(key))} there, {json.dumps(other.get(key))} in the model"


def _with_defaults(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """An architecture with open_clip's defaults filled in, as JSON values by section."""
    sections: dict[str, dict[str, Any]] = {"": {"quick_gelu": False}}
    for key, value in config.items():
        defaults = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}.get(key)
        if not isinstance(value, dict):
            sections[""][key] = value
            continue
        sections[key] = ({} if defaults is None else asdict(defaults())) | value
    as_json: dict[str, dict[str, Any]] = json.loads(json.dumps(sections))
    return as_json


def write_description(
    folder: Path, model_cfg: Mapping[str, Any], preprocess: Preprocess, tokenizer: Tokenizer | None
) -> None:
    """Writes the files that, with weights, make ``local-dir:<folder>`` a model.

    Args:
        tokenizer: a Hugging Face tokenizer, which open_clip reads from the folder; None for open_clip's own.
    """
    preprocess_cfg = {key: value for key, value in asdict(preprocess).items() if key in PREPROCESS_KEYS}
    text = json.dumps(
        {"model_cfg": model_cfg, "preprocess_cfg": {"size": preprocess.size} | preprocess_cfg}, indent=2
    )
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)
    write_atomic(folder / DESCRIPTION, (text + "\n").encode())
    if tokenizer is not None:
        saved = open_clip.get_tokenizer(f"local-dir:{folder}")
        if not torch.equal(saved(list(TOKENIZER_PROBES)), tokenizer(list(TOKENIZER_PROBES))):
            warn_on_main_rank(f"{folder}: the saved tokenizer splits texts differently than the model's tokenizer")


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    save = getattr(tokenizer, "save_pretrained", None)
    if save is not None:
        save(str(folder))


def describe_interpolation(shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Any]) -> str | None:
    """A line about positional embeddings that open_clip interpolates to the model's size; None if sizes are equal.

    Args:
        shapes: shapes of the tensors in a file by name.
        state: state dict of the model.
    """
    descriptions = []
    for names, size in (
        (("visual.positional_embedding",), "images of {} patches (with the class token)"),
        (("positional_embedding", "text.positional_embedding"), "texts of {} tokens"),
    ):
        in_file = next((shapes[name] for name in names if name in shapes), None)
        in_model = next((tuple(state[name].shape) for name in names if name in state), None)
        if in_file and in_model and in_file[0] != in_model[0]:
            descriptions.append(f"{size.format(in_file[0])}, the model takes {in_model[0]}")
    if not descriptions:
        return None
    return f"made for {' and '.join(descriptions)}: its positional embeddings are interpolated"


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a file of weights by name without ``module.``; empty if it cannot be read."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        state = checkpoint.get("state_dict", checkpoint)
        return {
            name.removeprefix("module."): tuple(value.shape)
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
        }
    except Exception:  # the loader reports the error
        return {}


def describe_foreign_file(path: Path) -> str | None:
    """A description of a file that open_clip cannot load, with a remedy; None if unknown. Executes no code."""
    try:
        return _describe_file(path)
    except Exception:  # parsers raise errors of many types for broken files
        return None


def _describe_file(path: Path) -> str | None:
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
        return _describe_archive(path)
    shapes = tensor_shapes(path)
    if shapes:
        return _describe_names(set(shapes))
    if path.suffix == ".safetensors" and start[:1] in (b"\x80", b"P"):
        return "not safetensors, despite its name; files of torch.save are called .pt or .bin"
    if start[:1] == b"\x80":
        return f"an old pickle that holds more than tensors; {_CONVERT}"
    return None


_CONVERT = "it is not executed here; if you trust it and have its code, save only its state dict with torch.save"


def _describe_archive(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        return (
            "a TorchScript archive, as OpenAI publishes its models; save its tensors once: "
            "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), OUT), without input_resolution, context_length "
            "and vocab_size"
        )
    if not any(name.endswith("data.pkl") for name in names):
        return "a zip archive that torch.save did not write; unpack it and name the file of weights"
    classes = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    if "argparse.Namespace" in classes:
        return f"a training checkpoint with its command line (argparse.Namespace) inside; {_CONVERT}"
    if classes:
        return f"a pickle of Python objects ({', '.join(classes[:3])}), not only tensors; {_CONVERT}"
    return _describe_names(set(tensor_shapes(path)))


def _describe_names(names: set[str]) -> str | None:
    if any(name.startswith("vision_model.") for name in names):
        return "weights in transformers' format; name their folder, with its config.json: model.name = hf:FOLDER"
    if names == {"weight", "bias"}:
        return "a classification head; name the model.safetensors next to it"
    if any(".lora_" in name for name in names):
        return "LoRA adapters; name weights that have them merged, such as the model.safetensors next to them"
    if any(name.startswith("optimizer") for name in names):
        return "the state of an optimizer; name the file of weights"
    return None


def summarize_preprocess(preprocess: Preprocess) -> str:
    """A one-line summary of a preprocessing."""

    def numbers(values: tuple[float, ...]) -> str:
        return "/".join(f"{value:.3g}" for value in values)

    return (
        f"mean {numbers(preprocess.mean)}, std {numbers(preprocess.std)}, {preprocess.interpolation}, "
        f"{preprocess.resize_mode}"
    )
