"""Measures what the process-wide precision switches cost and keep: ``python benchmarks/switches.py``.

For random weights of a model: the distance of its fp16 features from fp32 features, which is the noise floor of
difference vectors, that of fp32 features outside of the engine's towers, and the time of forward and backward in
fp16; with the switches of ``dive_fast/numerics.py``, and with one of them changed.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from losses import DEVICE
from micro import median_seconds, write
from steps import Case, make_inputs, random_model
from torch import Tensor

from dive_fast import numerics
from dive_fast.model.towers import Towers, unit

HALF = torch.float16 if DEVICE.type == "cuda" else torch.bfloat16


def reduce_in_fp16() -> None:
    """Allows cuBLAS to add partial sums in fp16, PyTorch's default."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True


def tf32() -> None:
    """Enables TF32 in products and convolutions, as NVIDIA's containers do."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def cudnn_attention() -> None:
    """Allows cuDNN's attention, PyTorch's default."""
    torch.backends.cuda.enable_cudnn_sdp(True)


CHANGES: dict[str, Callable[[], None] | None] = {
    "as configured": None,
    "fp16 partial sums": reduce_in_fp16,
    "TF32": tf32,
    "cuDNN attention": cudnn_attention,
}


@contextmanager
def switched(change: Callable[[], None] | None) -> Iterator[None]:
    """The engine's switches, with one change inside the block."""
    numerics.configure()
    if change is not None:
        change()
    try:
        yield
    finally:
        numerics.configure()


def main() -> None:
    """Measures, prints and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-16" if DEVICE.type == "cuda" else "ViT-tiny")
    parser.add_argument("--batch", type=int, default=256 if DEVICE.type == "cuda" else 4)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    towers = Towers(copy.deepcopy(random_model(options.model))).to(DEVICE)
    inputs = make_inputs(*Case(options.model, options.batch, "dive_fast").sizes)

    def features(dtype: torch.dtype | None) -> list[Tensor]:
        towers.autocast = dtype
        with torch.no_grad():
            both = towers.encode_image(inputs.target_images), towers.encode_text(inputs.target_tokens)
        return [unit(rows).double() for rows in both]

    def fp32_features() -> list[Tensor]:
        # Towers disable TF32 by themselves; this is the model without them, as a library's user has it.
        with torch.no_grad():
            both = towers.visual(inputs.target_images), towers.text(inputs.target_tokens)
        return [unit(rows).double() for rows in both]

    def step() -> None:
        towers.autocast = HALF
        image, text = towers.encode_image(inputs.target_images), towers.encode_text(inputs.target_tokens)
        torch.autograd.grad((unit(image) * unit(text)).sum(), list(towers.parameters()), allow_unused=True)

    def distance(first: list[Tensor], second: list[Tensor]) -> list[float]:
        return [float((a - b).norm(dim=1).mean()) for a, b in zip(first, second, strict=True)]

    with switched(None):
        exact = features(None)
    figures: dict[str, Any] = {}
    for name, change in CHANGES.items():
        with switched(change):
            figures[name] = {
                "noise": distance(features(HALF), exact),
                "fp32_noise": distance(fp32_features(), exact),
                "seconds": median_seconds(step),
            }
        print(f"{name}: {figures[name]}", flush=True)
    write("switches", figures, options.results)
    summary = (
        f"{name} {each['noise'][0]:.1e}, fp32 {each['fp32_noise'][0]:.1e}, {1e3 * each['seconds']:.0f} ms"
        for name, each in figures.items()
    )
    print("measured: noise of images: " + "; ".join(summary))


if __name__ == "__main__":
    main()
