"""Compares choices of the contrastive loss's kernels, so far predictions: ``python benchmarks/tiles.py``.

Forward and backward with one choice changed at a time, in turns, as ratios to the present choice; results of each
are verified first. And the chunked gradient's product: one of 1024 x N x D against two of 512 rows that are added,
and eager's. Without a GPU, under TRITON_INTERPRET=1: a tiny size, as a check.
"""

import argparse
import contextlib
import statistics
import unittest.mock
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import losses
import torch
import verify
from losses import DEVICE, Case
from measure_losses import timed
from micro import median_seconds, write

from dive_fast.kernels import contrastive

SIZES = [(512, 512), (512, 768), (2048, 512), (8192, 512), (32768, 768)] if DEVICE.type == "cuda" else [(33, 48)]
DTYPE = torch.float16
ROUNDS = 7 if DEVICE.type == "cuda" else 1
ROWS, COLUMNS, WIDTH = (512, 32768, 768) if DEVICE.type == "cuda" else (4, 64, 16)
"""Rows of a chunk, logits of a row, and width of the product."""


class Choice(NamedTuple):
    """One change of the kernels' choices."""

    settings: Mapping[str, Any] = MappingProxyType({})
    """Fields of ``contrastive.SETTINGS``."""
    tile: tuple[int, int, int, int, int] | None = None
    """Tile of the logits in the statistics: rows, columns, depth, warps, stages."""
    warps: int | None = None
    """Warps of a program of the fused gradient."""


PRESENT = "present"
CHOICES = {
    PRESENT: Choice(),
    "gradient fused": Choice({"gradient": "fused"}),
    "gradient chunked": Choice({"gradient": "chunked"}),
    "fused, 4 warps": Choice({"gradient": "fused"}, warps=4),
    "fused, 8 warps": Choice({"gradient": "fused"}, warps=8),
    "chunks of 2^22 logits": Choice({"gradient": "chunked", "chunk_logits": 2**22}),
    "chunks of 2^26 logits": Choice({"gradient": "chunked", "chunk_logits": 2**26}),
    "splits for 384 programs": Choice({"processors": 384}),
    "statistics 64 x 64, 4 warps": Choice(tile=(64, 64, 64, 4, 3)),
    "statistics 64 x 128, 4 warps": Choice(tile=(64, 128, 64, 4, 3)),
    "statistics 128 x 64, 4 warps": Choice(tile=(128, 64, 64, 4, 3)),
    "statistics 128 x 128, 8 warps": Choice(tile=(128, 128, 64, 8, 4)),
}


@contextlib.contextmanager
def chosen(choice: Choice) -> Iterator[None]:
    """Applies a choice inside the block."""
    plan = contrastive.gradient_plan

    def with_warps(shape: Any, settings: Any) -> Any:
        present = plan(shape, settings)
        return present._replace(tile=present.tile._replace(num_warps=choice.warps))

    with contextlib.ExitStack() as stack:
        settings = contrastive.SETTINGS._replace(**choice.settings)
        stack.enter_context(unittest.mock.patch.object(contrastive, "SETTINGS", settings))
        if choice.tile is not None:
            tile = contrastive.Tile(*choice.tile)
            stack.enter_context(unittest.mock.patch.object(contrastive, "logits_tile", return_value=tile))
        if choice.warps is not None:
            stack.enter_context(unittest.mock.patch.object(contrastive, "gradient_plan", with_warps))
        contrastive.geometry.cache_clear()
        try:
            yield
        finally:
            contrastive.geometry.cache_clear()


def compare(batch: int, width: int) -> dict[str, Any]:
    """Median ratio of each choice's time to the present one's; ``wrong`` or the error where it does not run."""
    case, sizes = Case("contrastive", batch, width, "triton"), (batch, width, DTYPE)
    truth, naive_errors = verify.expected(case.operation, *sizes)
    inputs, scale = losses.make_inputs(*sizes), losses.loss_scale(batch, DTYPE)
    step = partial(losses.step, partial(losses.ours, backend="triton"), inputs, case.operation, scale)
    outcomes: dict[str, Any] = {}
    for name, choice in CHOICES.items():
        try:
            with chosen(choice):
                verify.check(step(), truth, naive_errors, case)
        except (AssertionError, RuntimeError) as error:  # Triton's own errors are RuntimeErrors
            outcomes[name] = f"failed: {str(error).splitlines()[0][:80]}"
    times: dict[str, list[float]] = {name: [] for name in CHOICES if name not in outcomes}
    for _ in range(ROUNDS):
        for name in times:
            with chosen(CHOICES[name]):
                step()  # fills the caches that a change has cleared
                times[name].append(timed(step))
    present = statistics.median(times[PRESENT])
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"seconds": present, "ratios": {name: value / present for name, value in medians.items()} | outcomes}


def products() -> dict[str, float]:
    """TFLOP/s of a chunk's sums: one product of both halves, or one and one that adds."""
    weights = torch.randn(2 * ROWS, COLUMNS, device=DEVICE).to(DTYPE)
    rows = torch.randn(COLUMNS, WIDTH, device=DEVICE).to(DTYPE)
    one, sums = torch.empty(2 * ROWS, WIDTH, device=DEVICE), torch.empty(ROWS, WIDTH, device=DEVICE)
    on_gpu = DEVICE.type == "cuda"
    if not on_gpu:  # CPUs have no products with another output dtype
        weights, rows = weights.float(), rows.float()
    options: dict[str, Any] = {"out_dtype": torch.float32} if on_gpu else {}

    def together() -> None:
        torch.mm(weights, rows, out=one, **options)

    def apart() -> None:
        torch.mm(weights[:ROWS], rows, out=sums, **options)
        torch.addmm(sums, weights[ROWS:], rows, out=one[:ROWS], **options)

    flop = 4 * ROWS * COLUMNS * WIDTH
    return {name: flop / median_seconds(call) / 1e12 for name, call in (("one", together), ("two", apart))}


def main() -> None:
    """Compares, prints and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    figures: dict[str, Any] = {"products": products()}
    print(f"TFLOP/s of a chunk's sums: {figures['products']}", flush=True)
    best = []
    for batch, width in SIZES:
        size = f"{batch} x {width}"
        figures[size] = compare(batch, width)
        print(f"{size}: {figures[size]}", flush=True)
        ratios = {name: x for name, x in figures[size]["ratios"].items() if not isinstance(x, str)}
        fastest = min(ratios, key=lambda name: ratios[name])
        best.append(f"{size} {fastest} {ratios[fastest]:.2f}")
        write("tiles", figures, options.results)
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in figures["products"].items())
    print(f"measured: fastest over present: {'; '.join(best)}; TFLOP/s of sums: {rates}")


if __name__ == "__main__":
    main()
