"""A model with the weights of any checkpoint: this engine's, open_clip's, or DeepSpeed's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dive_fast.checkpoint.format import FIXED, MANIFEST, WEIGHTS, Tensors
from dive_fast.config import ConfigError, ModelConfig
from dive_fast.towers import HEAD, Towers, read_weights
from dive_fast.untrusted import nothing_executed


def load_into(towers: Towers, model: ModelConfig, path: Path) -> Towers:
    """Puts a checkpoint's weights into the towers; returns them.

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
        state = _state(path) if (path / MANIFEST).exists() else _deepspeed_state(path)
        try:
            towers.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith(HEAD)})
        except (RuntimeError, AttributeError, TypeError) as error:  # the latter of what is no table of tensors
            raise ConfigError(f"{path}: not the weights of {model.name}: {_first_line(error)}") from error
        return towers
    return towers.load_exported(read_weights(model, path))


def exported(towers: Towers, model: ModelConfig, path: Path) -> dict[str, Tensor]:
    """A checkpoint's weights under open_clip's names; the towers have them too, afterwards.

    Args:
        model, path: as for :func:`load_into`, and so are the errors.
    """
    state = load_into(towers, model, path).state_dict()
    return {name: tensor.clone() for name, tensor in towers.export(state).items()}


def _state(checkpoint: Path) -> dict[str, Tensor]:
    """All weights and buffers of a checkpoint of a run, under the names of :class:`Towers`."""
    stored, on_cpu = Tensors(checkpoint), torch.device("cpu")
    kinds = {name: kind for kind in (WEIGHTS, FIXED) for name in stored.shapes(kind)}
    return {name: stored.read(kind, name, on_cpu) for name, kind in kinds.items()}


def _deepspeed_state(folder: Path) -> dict[str, Tensor]:
    """All weights in fp32, under the names of :class:`Towers`."""
    partitioned = any(folder.glob("zero_pp_rank_*_model_states.pt"))
    whole = folder / "mp_rank_00_model_states.pt"
    if not partitioned and not whole.is_file():
        raise ConfigError(f"{folder}: no checkpoint there: expected <run>/checkpoints/step<number>")
    try:
        if not partitioned:  # below ZeRO-3 every rank has all weights, and the first wrote them, in fp32
            with nothing_executed():
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
    with nothing_executed(), torch.serialization.safe_globals(classes):
        yield


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
