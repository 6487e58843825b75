"""A model with the weights of any checkpoint: this engine's, open_clip's, or DeepSpeed's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dive_fast.checkpoint.manifest import FIXED, MANIFEST, WEIGHTS, Tensors, read_identity
from dive_fast.config.schema import ModelConfig
from dive_fast.errors import ConfigError
from dive_fast.io.safe_read import forbid_code_execution
from dive_fast.model import head as heads
from dive_fast.model.head import Head
from dive_fast.model.model_files import (
    DESCRIPTION,
    applied,
    check_architecture,
    read_description,
    tell,
    written_out,
)
from dive_fast.model.towers import HEAD, Towers, read_weights


def load_into(towers: Towers, model: ModelConfig, path: Path) -> Towers:
    """Puts a checkpoint's weights into the towers; returns them.

    Images are preprocessed as the ``open_clip_config.json`` next to the file says, and otherwise as before, which
    is reported.

    Args:
        model: what the towers were made from.
        path: ``model.safetensors`` of a run; a checkpoint of it, ``<run>/checkpoints/step<number>``; what
            open_clip's ``load_checkpoint`` reads; or a folder that DeepSpeed's ``save_checkpoint`` wrote, of any
            ZeRO stage and number of ranks.

    Raises:
        ConfigError: it cannot be read, or does not fit the model. Nothing in it is executed: files that hold more
            than tensors and plain values are refused.
    """
    if path.is_dir():
        is_ours = (path / MANIFEST).exists()
        _check_beside(towers, model, path.parent.parent if is_ours else path)
        state = _state(path) if is_ours else _deepspeed_state(path)
        try:
            towers.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith(HEAD)})
        except (RuntimeError, AttributeError, TypeError) as error:  # the latter of what is no table of tensors
            raise ConfigError(f"{path}: not the weights of {model.name}: {_first_line(error)}") from error
        return towers
    is_described = _check_beside(towers, model, path.parent)
    towers.load_exported(read_weights(model, path))
    if not is_described:
        tell(
            f"{path}: no {DESCRIPTION} next to it, so images are preprocessed as for model.name = {model.name} "
            f"({written_out(towers.preprocess)})"
        )
    return towers


def head_of(path: Path) -> Head | None:
    """The head that was trained with the weights of a checkpoint; None where there is none.

    Args:
        path: as for :func:`load_into`.

    Raises:
        ConfigError: it cannot be read.
    """
    if not path.is_dir():
        beside = heads.beside(path)
        return None if beside is None else heads.load(beside)
    if not (path / MANIFEST).exists():
        return None
    state = {name: tensor.float() for name, tensor in _state(path, HEAD).items()}
    if not state:
        return None
    target = read_identity(path).get("data", {}).get("target", {})
    names = target.get("class_names") if isinstance(target, dict) else None
    weight, bias = state.get(f"{HEAD}weight"), state.get(f"{HEAD}bias")
    if weight is None or bias is None or not isinstance(names, list) or len(names) != len(weight):
        raise ConfigError(f"{path}: its head has no class names; measure by prompts: --head none")
    return Head(weight, bias, tuple(map(str, names)))


def exported(towers: Towers, model: ModelConfig, path: Path) -> dict[str, Tensor]:
    """A checkpoint's weights under open_clip's names; the towers have them too, afterwards.

    Args:
        model, path: as for :func:`load_into`.

    Raises:
        ConfigError: as there, or the weights want other images than the towers did: no set of images is right for
            both.
    """
    before = towers.preprocess
    state = load_into(towers, model, path).state_dict()
    if towers.preprocess != before:
        raise ConfigError(
            f"{path}: trained on images with {written_out(towers.preprocess)}, {model.name} has "
            f"{written_out(before)}: the two cannot be compared on the same images; name the run's own model"
        )
    return {name: tensor.clone() for name, tensor in towers.export(state).items()}


def _check_beside(towers: Towers, model: ModelConfig, folder: Path) -> bool:
    """Takes the preprocessing that is written in a folder; returns whether it is there.

    Raises:
        ConfigError: the folder's weights are of another architecture.
    """
    described = read_description(folder)
    if described is None:
        return False
    if towers.model_cfg is not None:
        check_architecture(described, model.name, towers.model_cfg)
    towers.preprocess = applied(towers.preprocess, described.preprocess_cfg)
    return True


def _state(checkpoint: Path, prefix: str = "") -> dict[str, Tensor]:
    """Weights and buffers of a checkpoint of a run, under those names of :class:`Towers` with a prefix."""
    stored, on_cpu = Tensors(checkpoint), torch.device("cpu")
    kinds = {name: kind for kind in (WEIGHTS, FIXED) for name in stored.shapes(kind) if name.startswith(prefix)}
    return {name: stored.read(kind, name, on_cpu) for name, kind in kinds.items()}


def _deepspeed_state(folder: Path) -> dict[str, Tensor]:
    """All weights in fp32, under the names of :class:`Towers`."""
    partitioned = any(folder.glob("zero_pp_rank_*_model_states.pt"))
    whole = folder / "mp_rank_00_model_states.pt"
    if not partitioned and not whole.is_file():
        raise ConfigError(
            f"{folder}: no checkpoint there: expected <run>/checkpoints/step<number>, or the file of the weights"
        )
    try:
        if not partitioned:  # below ZeRO-3 every rank has all weights, and the first wrote them, in fp32
            with forbid_code_execution():
                state: dict[str, Tensor] = torch.load(whole, map_location="cpu", weights_only=True)["module"]
            return state
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with _nothing_but_data():
            gathered: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
                str(folder.parent), tag=folder.name
            )
        return gathered
    except Exception as error:  # pickle, torch and DeepSpeed have errors of their own
        raise ConfigError(f"{folder}: cannot read the DeepSpeed checkpoint: {_first_line(error)}") from error


@contextmanager
def _nothing_but_data() -> Iterator[None]:
    """DeepSpeed unpickles its files whole; inside, torch admits tensors, plain values and these classes alone."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    with forbid_code_execution(), torch.serialization.safe_globals(classes):
        yield


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
