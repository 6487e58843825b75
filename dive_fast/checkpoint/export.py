"""Export of the trained model from the engine, in open_clip's format."""

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from dive_fast.engine.step import Engine
from dive_fast.model import head as heads
from dive_fast.model import prompt_file, towers
from dive_fast.model.head import Head
from dive_fast.model.model_identity import state_digest
from dive_fast.model.model_names import DESCRIPTION

MODEL = "model.safetensors"
"""Exported weights, in the run folder."""
TEACHER = "moving_teacher.safetensors"
"""Weights of the target half's teacher next to them, where it moves."""
AVERAGE = "ema.safetensors"
"""Averaged weights next to them, with ``train.ema``."""
ADAPTER = "adapter.safetensors"
"""Factors of adapters next to the merged weights, with ``model.lora``."""
PROMPTS = prompt_file.FILE
"""Learned prompts, instead of the model, whose weights do not change."""
EXPORTED = {
    *(MODEL, heads.FILE, DESCRIPTION, TEACHER, AVERAGE, ADAPTER, PROMPTS),
    heads.head_path(Path(AVERAGE)).name,
}
"""Files that an export may write."""
SELECTED = "selected.json"
"""Step and accuracy of a run's best weights, next to them."""


def write_model(engine: Engine, folder: Path, class_names: Sequence[str] = ()) -> None:
    """Writes weights and description of the model, so that open_clip loads it as ``local-dir:<folder>``.

    All ranks call it; the first one writes: the weights, ``open_clip_config.json`` with architecture and
    preprocessing, and a Hugging Face tokenizer where the model has one. A trained head is written to a file next
    to them, and so are the factors of adapters, the weights of a moving teacher and averaged weights; those of
    another run are removed. Adapters are merged into the weights.
    With ``train.export_ema`` the averaged weights and their head are the model's. Where prompts are learned, their
    file is written instead of all others.

    Args:
        class_names: names of the head's rows.
    """
    if engine.towers.prompts is not None:
        _write_prompts(engine, folder)
        return
    weights = full_state(engine)
    if engine.ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        # The description first: weights of this run must not be preprocessed as an older description says.
        towers.save_description(engine.towers, folder)
        averaged = None if engine.average is None else engine.average.replace(weights)
        if engine.average is not None and engine.average.is_exported and averaged is not None:
            weights, averaged = averaged, None
        _write_adapter(engine, weights, folder / ADAPTER)
        _write_weights(engine, weights, folder / MODEL, class_names)
        _write_weights(engine, averaged, folder / AVERAGE, class_names)
        _write_teacher(engine, folder / TEACHER)
        (folder / PROMPTS).unlink(missing_ok=True)
    engine.ranks.barrier()


def _write_prompts(engine: Engine, folder: Path) -> None:
    """Writes learned prompts and removes other exports."""
    if engine.ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        prompt_file.save(engine.towers.prompts, folder / PROMPTS)
        for name in EXPORTED - {PROMPTS}:  # of another run
            (folder / name).unlink(missing_ok=True)
    engine.ranks.barrier()


def _write_weights(
    engine: Engine, weights: dict[str, Tensor] | None, path: Path, class_names: Sequence[str]
) -> None:
    """Writes weights and the head next to them; removes those of another run where there are none."""
    head = heads.head_path(path)
    if weights is None:
        path.unlink(missing_ok=True)
    else:
        towers.save(engine.towers.export(weights), path)
    if weights is None or engine.towers.head is None:
        head.unlink(missing_ok=True)
    else:
        names = tuple(class_names)
        digest = state_digest(engine.towers.plain_state(weights))
        heads.save(Head(weights["head.weight"], weights["head.bias"], names, digest), head)


def _write_adapter(engine: Engine, weights: dict[str, Tensor], path: Path) -> None:
    """Writes the factors by the names of their layers, with rank and alpha; removes those of another run."""
    adapters = engine.towers.adapters
    if adapters is None:
        path.unlink(missing_ok=True)
        return
    rank = adapters.config.rank
    towers.save(adapters.factors(weights), path, {"rank": str(rank), "alpha": f"{rank * adapters.scaling:g}"})


def _write_teacher(engine: Engine, path: Path) -> None:
    """Writes a moving teacher's weights, which every rank has, like the model's; removes those of another run."""
    if engine.teacher is None or not engine.teacher.moves:
        path.unlink(missing_ok=True)
        return
    state = {name: tensor.cpu().clone() for name, tensor in engine.teacher.towers.state_dict().items()}
    towers.save(engine.towers.export(state), path)


def copy_model(source: Path, folder: Path) -> None:
    """Replaces the model in ``folder`` by the one that :func:`write_model` wrote to ``source``."""
    names = {file.name for file in source.iterdir() if file.is_file() and file.name != SELECTED}
    # The weights last, as in write_model. Files of another run are removed: its head would classify instead of
    # prompts, and its description would determine how images are preprocessed.
    for name in sorted(names | EXPORTED, key=lambda name: name in (MODEL, PROMPTS)):
        if name in names:
            partial = folder / f".{name}.partial"
            shutil.copyfile(source / name, partial)
            partial.replace(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def full_state(engine: Engine, without: Collection[str] = ()) -> dict[str, Tensor]:
    """All weights and buffers on the CPU of the first rank, floating-point ones in fp32; empty on other ranks.

    All ranks call it.

    Args:
        without: names to leave out.
    """
    state: dict[str, Any] = {}
    parameters = dict(engine.towers.named_parameters())
    for name, tensor in engine.towers.state_dict(keep_vars=True).items():
        if name in without:
            continue
        partitioned = [parameters[name]] if hasattr(parameters.get(name), "ds_id") else []
        with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)), torch.no_grad():
            if engine.ranks.is_main:
                state[name] = tensor.detach().float().cpu().clone() if tensor.is_floating_point() else tensor.cpu()
    return state
