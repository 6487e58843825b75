"""Sums the time of the engine's steps by class of kernel: ``python benchmarks/profile_steps.py``.

Three profiled steps of ViT-B/16 with 512 + 512 pairs in fp16: with fused blocks, with plain blocks, and with plain
blocks compiled. Without a GPU: a tiny model, whose operators stand for kernels, as a check.
"""

import argparse
import gc
import importlib
import itertools
import pkgutil
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from losses import DEVICE
from measure_losses import ACTIVITIES, kernel_seconds
from measure_steps import settle
from micro import write
from steps import Case, make_batches, running
from torch.profiler import profile

from dive_fast import kernels

STEPS = 3
COMPETITORS = ("dive_fast", "dive_fast_plain", "dive_fast_compiled") if DEVICE.type == "cuda" else ("dive_fast",)
LAYER_MODULES = ("activation", "layer_norm", "packed_qkv", "column_sums")
"""Modules of the kernels between two products of a block; the other kernels are the losses'."""
CLASSES = {
    "communication": r"nccl",
    "attention": r"flash|fmha|attention|sdpa",
    "products": r"gemm|nvjet|cutlass|xmma|splitk|\bmm\b|addmm|bmm|convolution|conv2d|linear",
    "compiled": r"^triton_",
    "optimizer": r"multi_tensor|adam",
    "layer norm": r"layer_?norm|gammabeta|rowwisemoments",
    "copies": r"memcpy|memset|copy|catarray|fill",
    "reductions": r"reduce|::sum",
    "element-wise": r"elementwise|vectorized|unrolled|aten::",
}
"""Class of kernel -> pattern of its name; the first that matches counts."""


def our_kernels() -> dict[str, str]:
    """The class of each Triton kernel of this project, by name."""
    names = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        group = "fused layers" if module.name in LAYER_MODULES else "losses"
        for name, value in vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).items():
            if type(value).__name__ in ("JITFunction", "InterpretedFunction"):
                names[name] = group
    return names


def class_of(name: str, ours: dict[str, str]) -> str:
    """The class of a kernel."""
    if name in ours:
        return ours[name]
    return next((group for group, pattern in CLASSES.items() if re.search(pattern, name.lower())), "other")


def measure(case: Case) -> dict[str, Any]:
    """Milliseconds of a step by class, their sum, and the ten longest kernels."""
    make_batches(case)
    turns, ours = itertools.count(), our_kernels()
    with running(case, 0) as competitor:
        settle(competitor, turns)
        competitor.step(next(turns))
        with profile(activities=ACTIVITIES) as profiler:
            for _ in range(STEPS):
                competitor.step(next(turns))
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
    times: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    for kernel, seconds in kernel_seconds(profiler).items():
        times[class_of(kernel, ours)] += 1e3 * seconds / STEPS
        by_name[kernel] += 1e3 * seconds / STEPS
    gc.collect()
    return {"classes": dict(times), "sum": times.total(), "longest": by_name.most_common(10)}


def main() -> None:
    """Profiles each competitor, prints a table and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-16" if DEVICE.type == "cuda" else "ViT-tiny")
    parser.add_argument("--batch", type=int, default=512 if DEVICE.type == "cuda" else 8)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    figures = {}
    for name in COMPETITORS:
        figures[name] = measure(Case(options.model, options.batch, name))
        for kernel, milliseconds in figures[name]["longest"]:
            print(f"{name}: {milliseconds:8.3f} ms {kernel[:100]}", flush=True)
        write("profile", figures, options.results)
    groups = sorted({group for each in figures.values() for group in each["classes"]})
    print("| ms of a step | " + " | ".join(groups) + " | sum |\n|---" + "|---" * (1 + len(groups)) + "|")
    for name, each in figures.items():
        cells = (f"{each['classes'].get(group, 0):.1f}" for group in groups)
        print(f"| {name} | " + " | ".join(cells) + f" | {each['sum']:.1f} |")
    print("measured: " + ", ".join(f"{name} {each['sum']:.0f} ms" for name, each in figures.items()))


if __name__ == "__main__":
    main()
