"""Loading the weights of any checkpoint into a model: this engine's, open_clip's, or DeepSpeed's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dive_fast.checkpoint.manifest import FIXED, MANIFEST, WEIGHTS, Tensors, read_identity
from dive_fast.config.schema import LoraConfig, ModelConfig
from dive_fast.errors import ConfigError, warn_on_main_rank
from dive_fast.io.safe_read import forbid_code_execution
from dive_fast.model import adapters
from dive_fast.model import head as heads
from dive_fast.model.head import Head
from dive_fast.model.model_files import (
    check_architecture,
    read_description,
    summarize_preprocess,
    with_preprocess_config,
)
from dive_fast.model.model_identity import weights_digest
from dive_fast.model.model_names import DESCRIPTION
from dive_fast.model.towers import HEAD, PROMPTS, Towers, create, read_weights


def load_into(towers: Towers, model: ModelConfig, path: Path) -> Towers:
    """Loads the weights of a checkpoint into the towers; returns the towers.

    The preprocessing is taken from the ``open_clip_config.json`` next to the file. Where there is none, it stays
    unchanged, which is reported.

    Args:
        model: config of the towers.
        path: ``model.safetensors`` of a run; one of its checkpoints, ``<run>/checkpoints/step<number>``, whose
            adapters are merged into the model's pre-trained weights; a file
            that open_clip's ``load_checkpoint`` reads; or a folder written by DeepSpeed's ``save_checkpoint``,
            with any ZeRO stage and number of ranks.

    Raises:
        ConfigError: the checkpoint cannot be read, or does not fit the model. Nothing in it is executed: files
            that hold more than tensors and plain values are refused.
    """
    if path.is_dir():
        is_ours = (path / MANIFEST).exists()
        _apply_description(towers, model, path.parent.parent if is_ours else path)
        if is_ours and _has_prompts(path):
            raise ConfigError(
                f"{path}: holds learned prompts and no weights; name their file by --prompts, the "
                "prompts.safetensors in the run folder"
            )
        if is_ours and (lora := _lora_of(path)) is not None:
            towers.load_state_dict(_merged_state(model, lora, path))
            return towers
        state = _read_state(path) if is_ours else _read_deepspeed_state(path)
        try:
            towers.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith(HEAD)})
        except (RuntimeError, AttributeError, TypeError) as error:  # the last two: not a dict of tensors
            raise ConfigError(f"{path}: not the weights of {model.name}: {_first_line(error)}") from error
        return towers
    is_described = _apply_description(towers, model, path.parent)
    towers.load_exported(read_weights(model, path))
    if not is_described:
        warn_on_main_rank(
            f"{path}: no {DESCRIPTION} next to it, so images are preprocessed as for model.name = {model.name} "
            f"({summarize_preprocess(towers.preprocess)})"
        )
    return towers


def head_of(path: Path) -> Head | None:
    """The head that was trained with the weights of a checkpoint; None if there is none.

    Args:
        path: as for :func:`load_into`.

    Raises:
        ConfigError: the head cannot be read.
    """
    if not path.is_dir():
        file = heads.find_head(path)
        return None if file is None else heads.load(file)
    if not (path / MANIFEST).exists():
        return None
    state = {name: tensor.float() for name, tensor in _read_state(path, HEAD).items()}
    if not state:
        return None
    target = read_identity(path).get("data", {}).get("target", {})
    names = target.get("class_names") if isinstance(target, dict) else None
    weight, bias = state.get(f"{HEAD}weight"), state.get(f"{HEAD}bias")
    if weight is None or bias is None or not isinstance(names, list) or len(names) != len(weight):
        raise ConfigError(f"{path}: its head has no class names; evaluate with prompts: --head none")
    return Head(weight, bias, tuple(map(str, names)))


def exported(towers: Towers, model: ModelConfig, path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint under open_clip's names; they are loaded into the towers too.

    Args:
        model, path: as for :func:`load_into`.

    Raises:
        ConfigError: as for :func:`load_into`, or the weights need another preprocessing than the towers, so that
            no set of images fits both.
    """
    before = towers.preprocess
    state = load_into(towers, model, path).state_dict()
    if towers.preprocess != before:
        raise ConfigError(
            f"{path}: trained on images with {summarize_preprocess(towers.preprocess)}, but {model.name} "
            f"has {summarize_preprocess(before)}: the two cannot be compared on the same images; "
            "name the model of that run"
        )
    return {name: tensor.clone() for name, tensor in towers.export(state).items()}


def _apply_description(towers: Towers, model: ModelConfig, folder: Path) -> bool:
    """Applies the preprocessing described in a folder to the towers; returns whether there is a description.

    Raises:
        ConfigError: the weights in the folder have another architecture.
    """
    described = read_description(folder)
    if described is None:
        return False
    if towers.model_cfg is not None:
        check_architecture(described, model.name, towers.model_cfg)
    towers.preprocess = with_preprocess_config(towers.preprocess, described.preprocess_cfg)
    return True


def _has_prompts(checkpoint: Path) -> bool:
    return any(name.startswith(PROMPTS) for name in Tensors(checkpoint).shapes(WEIGHTS))


def _lora_of(checkpoint: Path) -> LoraConfig | None:
    """The adapters of a run's checkpoint; None for one with all weights.

    Raises:
        ConfigError: their config in the checkpoint's identity is invalid.
    """
    section = read_identity(checkpoint).get("model")
    lora = section.get("lora") if isinstance(section, dict) else None
    if lora is None:
        return None
    try:
        return LoraConfig.model_validate(lora)
    except ValueError as error:
        raise ConfigError(f"{checkpoint}: invalid adapters: {_first_line(error)}") from error


def _merged_state(model: ModelConfig, lora: LoraConfig, checkpoint: Path) -> dict[str, Tensor]:
    """The state of the towers of a checkpoint that holds adapters alone, merged into their pre-trained weights.

    Raises:
        ConfigError: the model has no pre-trained weights, or others than those that were adapted.
    """
    base, state = create(model), _read_state(checkpoint)
    if weights_digest(base) != read_identity(checkpoint)["model"].get("weights"):
        raise ConfigError(
            f"{checkpoint}: holds adapters alone, of other weights than {model.name} ({model.pretrained}); name "
            "the model and the pre-trained weights that the run started from"
        )
    names = [name for name in state if adapters.is_factor(name)]
    towers = sorted({"image" if name.startswith("visual.") else "text" for name in names})
    if names:
        adapters.apply(base, lora.model_copy(update={"towers": towers}))
    loaded = base.load_state_dict({name: state[name] for name in state if not name.startswith(HEAD)}, strict=False)
    if loaded.unexpected_keys:
        raise ConfigError(f"{checkpoint}: not adapters of {model.name}: it has no {loaded.unexpected_keys[0]}")
    return base.plain_state(base.state_dict())


def _read_state(checkpoint: Path, prefix: str = "") -> dict[str, Tensor]:
    """Weights and buffers of a run's checkpoint whose names in :class:`Towers` start with ``prefix``."""
    stored, on_cpu = Tensors(checkpoint), torch.device("cpu")
    kinds = {name: kind for kind in (WEIGHTS, FIXED) for name in stored.shapes(kind) if name.startswith(prefix)}
    return {name: stored.read(kind, name, on_cpu) for name, kind in kinds.items()}


def _read_deepspeed_state(folder: Path) -> dict[str, Tensor]:
    """All weights of a DeepSpeed checkpoint in fp32, under the names of :class:`Towers`."""
    is_partitioned = any(folder.glob("zero_pp_rank_*_model_states.pt"))
    full = folder / "mp_rank_00_model_states.pt"
    if not is_partitioned and not full.is_file():
        raise ConfigError(
            f"{folder}: not a checkpoint: expected <run>/checkpoints/step<number>, or the file of the weights"
        )
    try:
        if not is_partitioned:  # below ZeRO-3 every rank has all weights, and the first one writes them, in fp32
            with forbid_code_execution():
                state: dict[str, Tensor] = torch.load(full, map_location="cpu", weights_only=True)["module"]
            return state
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with _only_tensors_and_plain_values():
            gathered: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
                str(folder.parent), tag=folder.name
            )
        return gathered
    except Exception as error:  # pickle, torch and DeepSpeed have errors of their own
        raise ConfigError(f"{folder}: cannot read the DeepSpeed checkpoint: {_first_line(error)}") from error


@contextmanager
def _only_tensors_and_plain_values() -> Iterator[None]:
    """Restricts DeepSpeed's unpickling to tensors, plain values and the classes below."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    with forbid_code_execution(), torch.serialization.safe_globals(classes):
        yield


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
