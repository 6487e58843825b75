"""The trained model out of the engine, as open_clip has it."""

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from dive_fast.engine.step import Engine
from dive_fast.model import head as heads
from dive_fast.model import towers
from dive_fast.model.head import Head
from dive_fast.model.model_files import DESCRIPTION
from dive_fast.model.model_identity import state_digest

MODEL = "model.safetensors"
"""Exported weights, in the folder of a run."""
SELECTED = "selected.json"
"""Step and accuracy of a run's best weights, next to them."""


def write_model(engine: Engine, folder: Path, class_names: Sequence[str] = ()) -> None:
    """Writes the weights as open_clip has them, and what they are, so that ``local-dir:<folder>`` is the model.

    All ranks call it; the first one writes: the weights, ``open_clip_config.json`` with architecture and
    preprocessing, and a tokenizer of Hugging Face's where the model has one. A trained head goes into a file next
    to them; another run's is removed.

    Args:
        class_names: of the head's rows.
    """
    weights = full_state(engine)
    if engine.ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        # First: weights of this run next to the description of another would be preprocessed as that one says.
        towers.describe(engine.towers, folder)
        towers.save(engine.towers.export(weights), folder / MODEL)
        if engine.towers.head is None:
            (folder / heads.FILE).unlink(missing_ok=True)
        else:
            head = Head(weights["head.weight"], weights["head.bias"], tuple(class_names), state_digest(weights))
            heads.save(head, folder / heads.FILE)
    engine.ranks.barrier()


def copy_model(source: Path, folder: Path) -> None:
    """Puts what :func:`write_model` left in one folder into the place of what it left in another."""
    left = {file.name for file in source.iterdir() if file.is_file() and file.name != SELECTED}
    # The weights last, as they are written. Of another run's files, a head would classify instead of prompts, and
    # a description would decide how images are preprocessed.
    for name in sorted(left | {heads.FILE, DESCRIPTION}, key=lambda name: name == MODEL):
        if name in left:
            partial = folder / f".{name}.partial"
            shutil.copyfile(source / name, partial)
            partial.replace(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def full_state(engine: Engine, without: Collection[str] = ()) -> dict[str, Tensor]:
    """All weights and buffers, weights in fp32, on the CPU of the first rank; empty elsewhere. All ranks call it.

    Args:
        without: names to leave out.
    """
    found: dict[str, Any] = {}
    parameters = dict(engine.towers.named_parameters())
    for name, tensor in engine.towers.state_dict(keep_vars=True).items():
        if name in without:
            continue
        own = [parameters[name]] if hasattr(parameters.get(name), "ds_id") else []
        with deepspeed.zero.GatheredParameters(own, enabled=bool(own)), torch.no_grad():
            if engine.ranks.is_main:
                found[name] = tensor.detach().float().cpu().clone() if tensor.is_floating_point() else tensor.cpu()
    return found
