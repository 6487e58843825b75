"""Prints versions, precision switches, attention backends, clocks and rates: ``python benchmarks/device.py``."""

import argparse
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ceiling
import torch
import torch.nn.functional as F
from losses import DEVICE
from micro import HALF, write

from dive_fast import numerics

PACKAGES = ("torch", "triton", "deepspeed", "open_clip_torch", "nvidia-dali-cuda130", "ffcv", "memeff")
CLOCKS = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"


def installed(name: str) -> str | None:
    """Version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def clocks() -> str:
    """Clocks, power and driver by nvidia-smi; empty without it."""
    if DEVICE.type != "cuda" or not (program := shutil.which("nvidia-smi")):
        return ""
    command = [program, f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Prints the figures and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    query = torch.randn(2, 2, 16, 64, device=DEVICE, dtype=HALF)
    F.scaled_dot_product_attention(query, query, query)  # chooses the order of backends
    figures: dict[str, Any] = {
        "versions": {name: installed(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "attention_order": torch._C._get_sdp_priority_order(),
        "switches_at_start": numerics.state(),
        "clocks": clocks(),
    }
    numerics.configure()
    figures["switches"] = numerics.state()
    rates = ceiling.measure(HALF)
    figures["ceiling"] = rates._asdict()
    figures["clocks_after"] = clocks()
    for name, value in figures.items():
        print(f"{name}: {value}", flush=True)
    write("device", figures, options.results)
    enabled = [name for name, value in figures["switches"].items() if value]
    tera, bandwidth = rates.flop_per_second / 1e12, rates.bytes_per_second / 1e12
    print(f"measured: {tera:.3g} TFLOP/s, {bandwidth:.3g} TB/s; switches on: {', '.join(enabled) or 'none'}")


if __name__ == "__main__":
    main()
