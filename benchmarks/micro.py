"""Timing of small pieces of a step, and a report of their figures."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loss_report import REPOSITORY, commit, device_name, slug, write_json
from losses import DEVICE
from measure_losses import timed
from torch import Tensor

ROUNDS, CALLS = (10, 5) if DEVICE.type == "cuda" else (2, 1)
HALF = torch.float16 if DEVICE.type == "cuda" else torch.float32
"""Dtype of activations; CPUs compute fp16 many times slower than fp32."""


def median_seconds(call: Callable[[], object]) -> float:
    """Median seconds of a call over rounds of several calls each, after one that may compile."""
    call()
    return statistics.median(timed(lambda: [call() for _ in range(CALLS)]) / CALLS for _ in range(ROUNDS))


def forward_backward(function: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], object]:
    """A call that returns the gradients of all inputs of ``function(*inputs)``, upstream gradients being noise.

    The noise is the same for every function whose outputs have the same shapes.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    upstream: list[Tensor] = []

    def call() -> object:
        outputs = function(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if not upstream:
            generator = torch.Generator(DEVICE).manual_seed(1)
            noise = (torch.randn(output.shape, device=DEVICE, generator=generator) for output in outputs)
            upstream.extend(rows.to(output.dtype) for rows, output in zip(noise, outputs, strict=True))
        return torch.autograd.grad(outputs, leaves, upstream)

    return call


def write(name: str, figures: Any, folder: Path | None) -> None:
    """Writes ``<device>-<name>.json`` to a folder, by default ``build/benchmarks``."""
    folder = folder or REPOSITORY / "build/benchmarks"
    content = {"device": device_name(), "torch": torch.__version__, "commit": commit(), "figures": figures}
    write_json(folder / f"{slug(device_name())}-{name}.json", content)
