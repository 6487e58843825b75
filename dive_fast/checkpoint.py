"""Saving and resuming a run, and exporting its model to open_clip."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from dive_fast import towers
from dive_fast.config import ConfigError
from dive_fast.engine import Engine
from dive_fast.evaluate import head as heads
from dive_fast.evaluate.head import Head

COMPLETE = "complete"
"""A file that stands in a checkpoint's folder once every rank has written its part. DeepSpeed's own `latest` is
written before its last barrier, so it can name a checkpoint that lacks a rank's part."""


STATE = "dive_fast"
MODEL = "model.safetensors"
"""Exported weights, in the folder of a run."""


def save(engine: Engine, folder: Path, step: int, keep: int, validation: dict[str, Any]) -> Path:
    """Writes a checkpoint after ``step`` updates and removes all but the newest ``keep``; all ranks call it.

    Args:
        validation: what evaluations so far have found, for :func:`load` to give back.
    """
    tag = f"step{step:08d}"
    state = {
        "step": step,
        "objective": engine.objective.state_dict(),
        "loss_scale": engine.scale.state_dict(),
        "validation": validation,
    }
    # Under a key of its own: DeepSpeed keeps some names for itself and hides them from us.
    engine.deepspeed.save_checkpoint(str(folder), tag=tag, client_state={STATE: state}, save_latest=False)
    engine.ranks.barrier()
    if engine.ranks.first:
        (folder / tag / COMPLETE).touch()
        for old in whole_checkpoints(folder)[:-keep]:
            # First no longer whole, then gone: a kill in between leaves nothing that looks usable.
            (old / COMPLETE).unlink()
            shutil.rmtree(old)
    engine.ranks.barrier()
    return folder / tag


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that every rank has written, oldest first."""
    return sorted(mark.parent for mark in folder.glob(f"step*/{COMPLETE}"))


def find(resume: str, folder: Path) -> Path | None:
    """The checkpoint that ``train.resume`` stands for, or None to start anew.

    Raises:
        ConfigError: a named checkpoint is not there or not whole.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return next(reversed(whole_checkpoints(folder)), None)
    if not (Path(resume) / COMPLETE).is_file():
        raise ConfigError(f"train.resume = {resume}: no whole checkpoint there (no file {COMPLETE})")
    return Path(resume)


def load(engine: Engine, checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """Continues from a checkpoint; returns the number of updates it had, and what evaluations had found."""
    path, state = engine.deepspeed.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise ConfigError(
            f"{checkpoint}: DeepSpeed cannot load this checkpoint with {engine.ranks.world_size} ranks"
        )
    own = state[STATE]
    engine.objective.load_state_dict(own["objective"])
    engine.scale.load_state_dict(own["loss_scale"])
    return int(own["step"]), own["validation"]


def export(engine: Engine, folder: Path, class_names: Sequence[str] = ()) -> None:
    """Writes the weights as open_clip has them, ``open_clip.create_model(name, pretrained=folder/MODEL)``.

    All ranks call it; the first one writes. A trained head goes into a file beside them.

    Args:
        class_names: of the head's rows.
    """
    state = full_state(engine)
    if engine.ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        towers.save(engine.towers.export(state), folder / MODEL)
        if engine.towers.head is not None:
            head = Head(state["head.weight"], state["head.bias"], tuple(class_names))
            heads.save(head, folder / heads.FILE)
    engine.ranks.barrier()


def full_state(engine: Engine) -> dict[str, Tensor]:
    """All weights in fp32 on the CPU, on the first rank; empty elsewhere. All ranks call it."""
    state: dict[str, Any] = {}
    parameters = dict(engine.towers.named_parameters())
    for name, tensor in engine.towers.state_dict(keep_vars=True).items():
        own = [parameters[name]] if hasattr(parameters.get(name), "ds_id") else []
        with deepspeed.zero.GatheredParameters(own, enabled=bool(own)), torch.no_grad():
            if engine.ranks.first:
                state[name] = tensor.detach().float().cpu().clone() if tensor.is_floating_point() else tensor.cpu()
    return state
