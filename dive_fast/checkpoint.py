"""Saving and resuming a run, and exporting its model to open_clip.

A checkpoint is a folder of safetensors and JSON, and fits any number of ranks and any ZeRO stage:

===========================  ================================================================================
``rank<number>.safetensors``   weights and moments of the parameters that this rank has written; its random state
``trainer.json``             what is no tensor: steps, updates, loss scale, evaluations so far
``manifest.json``            each file's size and SHA-256; written last
===========================  ================================================================================

It is written beside, under another name, and renamed when it is whole: a folder called ``step<number>`` is whole, or
has been damaged since, which its manifest tells.
"""

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dive_fast import state, towers
from dive_fast.config import ConfigError
from dive_fast.engine import Engine
from dive_fast.evaluate import head as heads
from dive_fast.evaluate.head import Head
from dive_fast.state import MOMENTS, Trained

FORMAT = 1
MANIFEST, TRAINER = "manifest.json", "trainer.json"
MODEL = "model.safetensors"
"""Exported weights, in the folder of a run."""
WEIGHTS, FIXED, OBJECTIVE, RANDOM = "weights", "fixed", "objective", "random"
"""What the names of a checkpoint's tensors begin with: tuned weights, untuned ones and buffers, the objective's
state, the random generators'."""


def save(engine: Engine, folder: Path, step: int, keep: int, validation: dict[str, Any]) -> Path:
    """Writes a checkpoint after ``step`` updates and removes all but the newest ``keep``; all ranks call it.

    Args:
        validation: what evaluations so far have found, for :func:`load` to give back.
    """
    ranks = engine.ranks
    path = folder / f"step{step:08d}"
    partial = path.with_name(f".{path.name}.partial")
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    tensors = dict(_tensors(engine))
    save_file(tensors, partial / _file(ranks.rank))
    if ranks.first:
        trainer = {
            "step": step,
            "updates": state.updates_of(engine),
            "loss_scale": engine.scale.state_dict(),
            "validation": validation,
        }
        (partial / TRAINER).write_text(json.dumps(trainer, indent=2) + "\n")
    ranks.barrier()
    if ranks.first:
        files = {file.name: _fingerprint(file) for file in sorted(partial.iterdir())}
        manifest = {"format": FORMAT, "ranks": ranks.world_size, "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
        for old in whole_checkpoints(folder)[:-keep]:
            # First no longer whole, then gone: a kill in between leaves nothing that looks usable.
            (old / MANIFEST).unlink()
            shutil.rmtree(old)
    ranks.barrier()
    return path


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints whose files are all there in their full size, oldest first."""
    return sorted(path for path in folder.glob("step*") if _missing(path) is None)


def find(resume: str, folder: Path) -> Path | None:
    """The checkpoint that ``train.resume`` stands for, or None to start anew.

    Raises:
        ConfigError: a named checkpoint is not there or not whole.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return next(reversed(whole_checkpoints(folder)), None)
    if (missing := _missing(Path(resume))) is not None:
        raise ConfigError(f"train.resume = {resume}: no whole checkpoint there ({missing})")
    return Path(resume)


def load(engine: Engine, checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """Continues from a checkpoint; returns the number of steps it had, and what evaluations had found.

    All ranks call it. They may be another number of ranks, at another ZeRO stage, than those that wrote it.

    Raises:
        ConfigError: a file is not what the manifest says, or the checkpoint is of another model.
    """
    ranks = engine.ranks
    with ranks.together(ConfigError):
        manifest = _read_manifest(checkpoint)
        files = list(manifest["files"])
        # Each file once over all ranks: reading is what takes the time.
        for name in files[ranks.rank :: ranks.world_size]:
            if _fingerprint(checkpoint / name) != manifest["files"][name]:
                raise ConfigError(f"{checkpoint / name}: changed since it was written; remove {checkpoint}")
    trainer = json.loads((checkpoint / TRAINER).read_text())
    tensors = _Tensors(checkpoint, [name for name in files if name != TRAINER])
    with ranks.together(ConfigError):
        wanted = {f"{WEIGHTS}/{name}": state.shape_of(parameter) for name, parameter in state.tuned(engine)}
        found = {name: tensors.shape(name) for name in tensors.names(WEIGHTS)}
        if {name: tuple(shape) for name, shape in wanted.items()} != found:
            raise ConfigError(f"{checkpoint}: of another model, or other parameters are tuned; start a new run")

    def read(name: str) -> Trained:
        moments = {key: tensors.read(f"{key}/{name}", ranks.device) for key in MOMENTS}
        return Trained(name, tensors.read(f"{WEIGHTS}/{name}", ranks.device), moments)

    state.put(engine, read, trainer["updates"])
    own = engine.towers.state_dict(keep_vars=True)
    for name in tensors.names(FIXED):
        _fix(own[name.partition("/")[2]], tensors.read(name, ranks.device))
    engine.objective.load_state_dict(
        {name.partition("/")[2]: tensors.read(name, ranks.device) for name in tensors.names(OBJECTIVE)}
    )
    # Ranks that were not there when it was written keep what their seed gave them.
    if tensors.has(name := f"{RANDOM}/cpu/{ranks.rank}"):
        torch.set_rng_state(tensors.read(name, torch.device("cpu")))
    if ranks.device.type == "cuda" and tensors.has(name := f"{RANDOM}/cuda/{ranks.rank}"):
        torch.cuda.set_rng_state(tensors.read(name, torch.device("cpu")), ranks.device)
    engine.scale.load_state_dict(trainer["loss_scale"])
    engine.at_step(trainer["step"])
    return int(trainer["step"]), trainer["validation"]


def _tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """What this rank writes; all ranks go through it."""
    ranks = engine.ranks
    for place, found in enumerate(state.gathered(engine)):
        if place % ranks.world_size == ranks.rank:
            yield f"{WEIGHTS}/{found.name}", _on_cpu(found.weights)
            for key, moment in found.moments.items():
                yield f"{key}/{found.name}", _on_cpu(moment)
    tuned = {name for name, _ in state.tuned(engine)}
    for name, tensor in full_state(engine, without=tuned).items():
        yield f"{FIXED}/{name}", tensor
    if ranks.first:
        for name, tensor in engine.objective.state_dict().items():
            yield f"{OBJECTIVE}/{name}", _on_cpu(tensor)
    yield f"{RANDOM}/cpu/{ranks.rank}", torch.get_rng_state()
    if ranks.device.type == "cuda":
        yield f"{RANDOM}/cuda/{ranks.rank}", torch.cuda.get_rng_state(ranks.device)


class _Tensors:
    """The tensors of a checkpoint, whichever file they lie in."""

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        opened = [safe_open(folder / name, "pt") for name in files]
        self._file_of = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - no mapping

    def names(self, kind: str) -> list[str]:
        return sorted(name for name in self._file_of if name.startswith(f"{kind}/"))

    def has(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def read(self, name: str, device: torch.device) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor.to(device)


def _file(rank: int) -> str:
    return f"rank{rank:05d}.safetensors"


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _read_manifest(checkpoint: Path) -> Mapping[str, Any]:
    """The manifest, held to its form: it may come from anywhere."""
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        assert manifest["format"] == FORMAT
        assert all(Path(name).name == name for name in manifest["files"])
        assert all(isinstance(file["bytes"], int) and file["sha256"] for file in manifest["files"].values())
        assert TRAINER in manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ConfigError(f"{path}: no manifest of a checkpoint of format {FORMAT}") from error
    return manifest  # type: ignore[no-any-return]


def _missing(checkpoint: Path) -> str | None:
    """What a folder lacks of a whole checkpoint; None: nothing."""
    if not (checkpoint / MANIFEST).is_file():
        return f"no file {MANIFEST}"
    try:
        files = _read_manifest(checkpoint)["files"]
    except ConfigError as error:
        return str(error)
    for name, file in files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            return f"{name} is not there in its full size"
    return None


def _fix(tensor: Any, value: Tensor) -> None:
    """Sets a buffer, or a parameter that is not tuned."""
    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0, enabled=hasattr(tensor, "ds_id")):
        if not hasattr(tensor, "ds_id") or torch.distributed.get_rank() == 0:
            with torch.no_grad():
                tensor.copy_(value)


def export(engine: Engine, folder: Path, class_names: Sequence[str] = ()) -> None:
    """Writes the weights as open_clip has them, ``open_clip.create_model(name, pretrained=folder/MODEL)``.

    All ranks call it; the first one writes. A trained head goes into a file beside them; another run's is removed.

    Args:
        class_names: of the head's rows.
    """
    weights = full_state(engine)
    if engine.ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        towers.save(engine.towers.export(weights), folder / MODEL)
        if engine.towers.head is None:
            (folder / heads.FILE).unlink(missing_ok=True)
        else:
            head = Head(weights["head.weight"], weights["head.bias"], tuple(class_names))
            heads.save(head, folder / heads.FILE)
    engine.ranks.barrier()


def copy_export(source: Path, folder: Path) -> None:
    """Puts what :func:`export` left in one folder into the place of what it left in another."""
    for name in (MODEL, heads.FILE):
        if (source / name).is_file():
            partial = folder / f".{name}.partial"
            shutil.copyfile(source / name, partial)
            partial.replace(folder / name)
        else:
            # Another run's: it would classify in the place of prompts.
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
            if engine.ranks.first:
                found[name] = tensor.detach().float().cpu().clone() if tensor.is_floating_point() else tensor.cpu()
    return found
