"""Folders of models in transformers' format: local ones, or snapshots of the Hugging Face hub in its cache."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dive_fast.io.safe_read import below, read_json
from dive_fast.model.model_names import SCHEME

_DESCRIPTIONS = ("*.json", "*.txt", "*.model")
_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"
"""File of weights in either format; ``.index.json`` behind it names several."""


def folder_of(name: str, weights: bool) -> Path:
    """The folder of a model, which is downloaded or read from the hub's cache if no local folder has its name.

    Args:
        name: a folder or a hub id, with or without :data:`SCHEME`.
        weights: whether the files of weights are needed.

    Raises:
        ValueError: the model does not exist or cannot be downloaded.
    """
    name = name.removeprefix(SCHEME)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise ValueError(f"folder not found: {folder}")
    return _snapshot(name, weights)


def repository_of(name: str) -> str | None:
    """The hub id of a name with or without :data:`SCHEME`; None for a local folder."""
    name = name.removeprefix(SCHEME)
    return None if Path(name).expanduser().is_dir() or name.startswith((".", "~", "/")) else name


@cache
def _snapshot(repository: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_DESCRIPTIONS, *(("*.safetensors",) if weights else ())]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns))
        if weights and not any((folder / name).exists() for name in (_SAFETENSORS, f"{_SAFETENSORS}.index.json")):
            folder = Path(
                snapshot_download(repository, allow_patterns=[*_DESCRIPTIONS, f"{Path(_PICKLE).stem}*.bin"])
            )
    except Exception as error:  # the hub's client raises errors of many types
        raise ValueError(_reason(repository, error)) from error
    return folder


def _reason(repository: str, error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            f"no folder {repository}, and the hub's cache ({constants.HF_HUB_CACHE}) does not have it; "
            "HF_HUB_OFFLINE forbids the download"
        )
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"no folder {repository}, and the hub does not give it: {first[:200]}"


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of ``config.json``.

    Raises:
        ValueError: it does not exist, or is not the config of a model of transformers.
    """
    try:
        tree = read_json(folder / "config.json")
    except OSError as error:
        raise ValueError(f"{folder} has no config.json that can be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not JSON: {error}") from error
    if not isinstance(tree, dict) or "model_type" not in tree:
        hint = "; it is a run folder or an open_clip model: use local-dir:" if _is_open_clip(folder) else ""
        raise ValueError(f"{folder / 'config.json'} is not the config of a model of transformers{hint}")
    return tree


def _is_open_clip(folder: Path) -> bool:
    return (folder / "open_clip_config.json").is_file()


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder; safetensors come before pickles.

    Raises:
        ValueError: there are none, or an index names a missing one.
    """
    for name in (_SAFETENSORS, _PICKLE):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _indexed(folder, index)
    raise ValueError(
        f"no weights in {folder}: expected {_SAFETENSORS}; model.random = true starts from random weights"
    )


def _indexed(folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weights") from error
    # Not `inside`: a file of a snapshot is a link into the hub's cache.
    paths = [below(folder, name) for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{index.name} names {json.dumps(missing)}, which {folder} does not have")
    return paths


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model in fp32, without buffers of position numbers. Executes no code.

    Raises:
        ValueError: there are no weights, or a file cannot be read.
    """
    state: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            part = (
                load_file(path)
                if path.suffix == ".safetensors"
                else torch.load(path, map_location="cpu", weights_only=True)
            )
            state.update({name: tensor.float() for name, tensor in part.items() if "position_ids" not in name})
        except Exception as error:  # parsers raise errors of many types
            raise ValueError(f"{path} cannot be read without executing code: {str(error)[:200]}") from error
    return state
