"""A run's ``config.json``: complete settings, versions, device, commit."""

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dive_fast.config.schema import Config
from dive_fast.distributed import Ranks
from dive_fast.identity import Identity, versions
from dive_fast.io.atomic_files import write_atomic


def write_provenance(config: Config, folder: Path, ranks: Ranks, identity: Identity, total_steps: int) -> None:
    """Writes ``config.json`` into the run folder.

    Args:
        config: the config with its defaults filled in.
    """
    provenance: dict[str, Any] = {
        "config": config.model_dump(),
        "steps": total_steps,
        "identity": identity,
        "versions": {"dive_fast": metadata.version("dive_fast")} | versions(),
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else platform.processor() or "cpu",
        "ranks": ranks.world_size,
        "commit": _commit(),
    }
    write_atomic(folder / "config.json", (json.dumps(provenance, indent=2) + "\n").encode())


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
