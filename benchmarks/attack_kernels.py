"""Measures the kernels of adversarial training: ``python benchmarks/attack_kernels.py``.

The volume of three vectors, forward and backward, at 512 rows of width 512 in fp16, and a step and a random start
of PGD on 256 images of 224 x 224 pixels: the kernels, and plain PyTorch. Results of both are compared before they
are timed. Bytes are those that each operation reads and writes, counted on fake tensors of these sizes. Without a
GPU times are of a tiny size, as a check.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from losses import DEVICE
from micro import HALF, median_seconds, write
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dive_fast.kernels import gram_volume, pgd_start, pgd_step
from dive_fast.kernels.backend import Backend
from dive_fast.planner.operations import operation_of

EPS, STEP = 4 / 255, 1 / 255
TOLERANCE = 1e-3
"""Largest difference of the gradients of both competitors, relative to the largest entry, in fp16."""


class Sizes(NamedTuple):
    """Rows and width of features, number and side of images."""

    rows: int
    width: int
    images: int
    side: int


COUNTED = Sizes(512, 512, 256, 224)
TIMED = COUNTED if DEVICE.type == "cuda" else Sizes(32, 64, 2, 32)


class Traffic(TorchDispatchMode):
    """Counts operations and the bytes that each of them reads and writes."""

    def __init__(self) -> None:
        """Starts at 0."""
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operation = operation_of(func, args, kwargs or {}, result, "loss")
        if operation is not None:
            self.operations += 1
            self.bytes += operation.bytes
        return result


def calls(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, backend: Backend
) -> dict[str, tuple[Callable[[], Any], int]]:
    """Each operation, and its number of elements: of one of its matrices, or of its images."""
    generator = torch.Generator(device).manual_seed(0) if device.type != "meta" else None

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    base = noise(sizes.rows, sizes.width)
    features = [(base + 0.5 * noise(*base.shape)).to(dtype).requires_grad_() for _ in range(3)]
    shape = sizes.images, 3, sizes.side, sizes.side
    images, clean, gradient = (
        (0.2 * noise(*shape) + 0.5).clamp(0, 1),
        noise(*shape).abs().clamp(max=1),
        noise(*shape),
    )
    samples = torch.arange(sizes.images, device=device)

    def volume() -> tuple[Tensor, ...]:
        loss = gram_volume(*features, backend=backend)
        return loss, *torch.autograd.grad(loss, features)

    return {
        "volume, forward + backward": (volume, base.numel()),
        "PGD step": (lambda: (pgd_step(images, clean, gradient, STEP, EPS, backend),), clean.numel()),
        "PGD start": (lambda: (pgd_start(clean, samples, EPS, 0, backend=backend),), clean.numel()),
    }


def traffic(dtype: torch.dtype, backend: Backend) -> dict[str, Traffic]:
    """Operations and bytes of each call at the counted sizes."""
    counts = {}
    with FakeTensorMode():
        for name, (call, _) in calls(COUNTED, dtype, torch.device("cpu"), backend).items():
            with Traffic() as counts[name]:
                call()
    return counts


def check_equal(name: str, first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    """Compares the results of both competitors.

    Raises:
        AssertionError: images differ at all, or gradients by more than rounding.
    """
    for a, b in zip(first, second, strict=True):
        difference = float((a.double() - b.double()).abs().max() / b.double().abs().max())
        # Written so that NaN fails.
        assert difference <= (TOLERANCE if name.startswith("volume") else 0), f"{name}: differ by {difference:.1e}"


def main() -> None:
    """Counts, compares, measures, prints a table and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    counted = {backend: traffic(torch.float16, backend) for backend in ("triton", "torch")}
    fused, plain = (calls(TIMED, HALF, DEVICE, backend) for backend in ("auto", "torch"))
    elements = {name: count for name, (_, count) in calls(COUNTED, HALF, torch.device("meta"), "torch").items()}
    columns = (
        "operation",
        "operations",
        "bytes an element",
        "plain: operations",
        "bytes an element",
        "ms",
        "plain, ms",
    )
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    figures: dict[str, Any] = {}
    for name, count in elements.items():
        check_equal(name, fused[name][0](), plain[name][0]())
        ours, theirs = counted["triton"][name], counted["torch"][name]
        times = [median_seconds(competitor[name][0]) for competitor in (fused, plain)]
        figures[name] = {
            "bytes": [ours.bytes, theirs.bytes],
            "operations": [ours.operations, theirs.operations],
            "seconds": times,
        }
        cells = [ours.operations, f"{ours.bytes / count:.1f}", theirs.operations, f"{theirs.bytes / count:.1f}"]
        print(f"| {' | '.join(map(str, [name, *cells, *(f'{1e3 * time:.3f}' for time in times)]))} |", flush=True)
    write("attack-kernels", figures, options.results)
    ratios = (f"{name} {each['seconds'][0] / each['seconds'][1]:.2f}" for name, each in figures.items())
    print("measured: " + ", ".join(ratios))


if __name__ == "__main__":
    main()
