"""Small checkpoints, and a small engine to save and load them: real files, tensors, optimizer and loss scale."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dive_fast.checkpoint import manifest
from dive_fast.checkpoint.zero_state import MOMENTS
from dive_fast.distributed import Ranks
from dive_fast.engine.update import LossScale

ALONE = Ranks(0, 1, torch.device("cpu"))
RUN = "0123456789abcdef"
VALIDATION = {"best": 0.5, "best_step": 2, "since_best": 0, "select": "a set"}


def write_checkpoint(folder: Path, step: int = 2, run: str = RUN) -> Path:
    """Writes a checkpoint with two parameters."""
    path = manifest.checkpoint_path(folder, step)
    path.mkdir(parents=True)
    tensors = {f"{kind}/{name}": torch.rand(3, 2) for kind in (manifest.WEIGHTS, *MOMENTS) for name in "ab"}
    save_file(tensors, path / "rank00000.safetensors")
    numbers = {
        "run": run,
        "total_steps": 3,
        "step": step,
        "updates": step,
        "loss_scale": LossScale("fp16", torch.device("cpu")).state_dict(),
        "validation": VALIDATION,
        "metrics": {"loss": 0.5},
    }
    (path / manifest.TRAINER).write_text(json.dumps(numbers))
    (path / manifest.IDENTITY).write_text(json.dumps({"train": {"seed": 0}}))
    seal(path)
    return path


def seal(path: Path, **changes: Any) -> None:
    """Writes the manifest of the files that are present, with changed values."""
    unlisted = (manifest.MANIFEST, manifest.EVALUATION)
    files = sorted(file for file in path.iterdir() if file.name not in unlisted)
    described = {file.name: manifest.describe_file(file) for file in files}
    content = {"format": manifest.FORMAT, "ranks": 1, "files": described} | changes
    (path / manifest.MANIFEST).write_text(json.dumps(content))


class Towers(nn.Module):
    """One tuned parameter, one fixed parameter and a buffer, without adapters."""

    adapters = prompts = None

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.fixed = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("positions", torch.arange(5))


def make_engine(seed: int = 0, updates: int = 0) -> Any:
    """The parts of an engine below ZeRO-1 that checkpoints read and write, after some updates."""
    torch.manual_seed(seed)
    towers = Towers()
    optimizer = torch.optim.AdamW([towers.weight], lr=0.1)
    for _ in range(updates):
        towers.weight.grad = torch.randn(4, 3)
        optimizer.step()
    average: dict[str, Tensor] = {"average_vector": torch.randn(3)}
    steps: list[int] = []
    return SimpleNamespace(
        ranks=ALONE,
        towers=towers,
        deepspeed=SimpleNamespace(optimizer=optimizer),
        method=SimpleNamespace(state=lambda: average),
        teacher=None,
        average=None,
        projection=None,
        scale=LossScale("fp16", torch.device("cpu")),
        set_step=steps.append,
        steps=steps,
    )
