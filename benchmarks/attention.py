"""Measures attention backends on texts of changing shapes and on images: ``python benchmarks/attention.py``.

A backend that builds a plan for each new shape is slow in its first pass over the shapes and fast in the second.
"""

import argparse
import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from losses import DEVICE
from measure_losses import timed
from micro import HALF, median_seconds, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dive_fast import numerics

NUM_SHAPES = 20 if DEVICE.type == "cuda" else 3
TEXTS, LENGTHS = ((448, 512), (16, 32)) if DEVICE.type == "cuda" else ((2, 4), (3, 8))
TEXT_HEADS, WIDTH = 8, 64
IMAGES, IMAGE_HEADS, TOKENS = (512, 12, 197) if DEVICE.type == "cuda" else (2, 2, 5)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def shapes(multiple: int) -> list[tuple[int, int]]:
    """Numbers of texts and lengths, drawn and rounded up."""
    draws = random.Random(0)
    drawn = [(draws.randint(*TEXTS), draws.randint(*LENGTHS)) for _ in range(NUM_SHAPES)]
    return [(count, -(-length // multiple) * multiple) for count, length in drawn]


def attend(batch: int, heads: int, tokens: int, causal: str) -> Callable[[], object]:
    """Forward and backward of attention.

    Args:
        causal: ``mask``, by a tensor as in open_clip; ``flag``; or ``none``.
    """
    query, key, value = (
        torch.randn(batch, tokens, heads, WIDTH, device=DEVICE, dtype=HALF).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    upstream = torch.randn_like(query)
    mask: Tensor | None = None
    if causal == "mask":
        mask = torch.full((tokens, tokens), float("-inf"), device=DEVICE, dtype=HALF).triu_(1)

    def call() -> object:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal == "flag")
        return torch.autograd.grad(output, [query, key, value], upstream)

    return call


@contextlib.contextmanager
def only(backend: SDPBackend) -> Iterator[None]:
    """Allows one backend, cuDNN's too, which the engine disables for the process."""
    with sdpa_kernel([backend]):
        yield


def passes(backend: SDPBackend, causal: str, multiple: int) -> dict[str, Any]:
    """Seconds of the first and the second pass over all shapes, and of the slowest first call."""
    calls = [attend(count, TEXT_HEADS, length, causal) for count, length in shapes(multiple)]
    attend(1, TEXT_HEADS, LENGTHS[0], causal)()  # loads the library
    first = [timed(call) for call in calls]
    return {"first": sum(first), "slowest": max(first), "second": sum(timed(call) for call in calls)}


def attempt(measure: Callable[[], Any]) -> Any:
    """The measurement, or one line of the error of a backend that refuses its inputs."""
    try:
        return measure()
    except RuntimeError as error:
        return {"refused": str(error).splitlines()[0]}


def main() -> None:
    """Measures, prints and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    numerics.configure()
    figures: dict[str, Any] = {"text": {}, "image": {}}
    for name, backend in BACKENDS.items():
        for causal in ("mask", "flag"):
            for multiple in (1, 8):
                with only(backend):
                    outcome = attempt(lambda b=backend, c=causal, m=multiple: passes(b, c, m))  # type: ignore[misc]
                figures["text"][f"{name}, {causal}, lengths x {multiple}"] = outcome
                print(f"texts: {name}, {causal}, lengths x {multiple}: {outcome}", flush=True)
        with only(backend):
            call = attend(IMAGES, IMAGE_HEADS, TOKENS, "none")
            figures["image"][name] = attempt(lambda c=call: {"seconds": median_seconds(c)})  # type: ignore[misc]
        print(f"images: {name}: {figures['image'][name]}", flush=True)
    write("attention", figures, options.results)
    stalls = ", ".join(
        f"{name} {outcome['first'] / outcome['second']:.1f}"
        for name, outcome in figures["text"].items()
        if "first" in outcome
    )
    images = ", ".join(f"{k} {1e3 * v['seconds']:.2f} ms" for k, v in figures["image"].items() if "seconds" in v)
    print(f"measured: first pass over second: {stalls}; images: {images}")


if __name__ == "__main__":
    main()
