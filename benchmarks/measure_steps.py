"""Measures time, memory and arithmetic of a competitor's step."""

import itertools
import math
import timeit
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from loss_report import device_name
from losses import DEVICE
from measure_losses import peak_extra_bytes
from pytest_benchmark.fixture import BenchmarkFixture
from steps import NUM_TURNS, Case, Running, make_batches, running
from torch.utils.flop_counter import FlopCounterMode

from dive_fast.planner.gpu_specs import GPUS, gpu_key
from dive_fast.planner.operations import MISSED_FLOP

SECONDS_PER_FIGURE = 5.0 if DEVICE.type == "cuda" else 0.5
MIN_ROUNDS, MAX_ROUNDS = 3, NUM_TURNS - 12
"""Steps that are timed. On a GPU, no earlier step had their texts, unless fp16 skips many at the start."""
MAX_SKIPPED_STEPS = 16
IMAGENET = 1_281_167


def measure(case: Case, zero: int, benchmark: BenchmarkFixture) -> dict[str, Any]:
    """Outcome and figures of a case; README.md describes the figures.

    Raises:
        AssertionError: the loss is not a number, or gradients overflow at any loss scale.
        torch.OutOfMemoryError: the competitor needs more than the device has.
    """
    make_batches(case)  # cached here, so that their memory does not count
    turns = itertools.count()
    with ExitStack() as stack:
        started: list[Running] = []

        def begin() -> None:
            started.append(stack.enter_context(running(case, zero)))
            settle(started[0], turns)
            # The first update allocates the optimizer's state.
            started[0].step(next(turns))

        peak_bytes = peak_extra_bytes(begin)
        step = started[0].step
        with FlopCounterMode(display=False, custom_mapping=MISSED_FLOP) as counter:
            loss = step(0)["loss"]
        assert math.isfinite(loss), f"{case}: loss is {float(loss)}"

        def synchronized_step() -> None:
            step(next(turns))
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        rounds = int(SECONDS_PER_FIGURE / timeit.timeit(synchronized_step, number=1))
        benchmark.group = f"{case.model}, B = {case.batch}"
        benchmark.pedantic(synchronized_step, rounds=min(MAX_ROUNDS, max(MIN_ROUNDS, rounds)))
    if benchmark.stats is None:  # --benchmark-disable
        return {"outcome": "not timed"}
    seconds, mean, flop = benchmark.stats.stats.median, benchmark.stats.stats.mean, counter.get_total_flops()
    peak = peak_flops()
    images = case.batch if case.competitor.startswith("flyp") else sum(case.sizes[1:])
    return {
        "outcome": "measured",
        "seconds": seconds,
        "mean_over_median": mean / seconds,
        "peak_bytes": peak_bytes,
        "flop": flop,
        "mfu": flop / seconds / peak if peak else None,
        "images_per_second": images / seconds,
        "minutes_per_epoch": IMAGENET / case.batch * seconds / 60,
    }


def settle(competitor: Running, turns: Iterator[int]) -> None:
    """Runs steps of the next turns until one is not skipped because of an overflow."""
    for _ in range(MAX_SKIPPED_STEPS):
        before = competitor.loss_scale()
        competitor.step(next(turns))
        if competitor.loss_scale() >= before:
            return
    raise AssertionError(f"gradients overflow at a loss scale of {competitor.loss_scale()}")


def peak_flops() -> float | None:
    """Rated 16-bit FLOP/s of this device, if known; MFU is relative to it, also for fp32."""
    gpu = gpu_key(device_name())
    return None if gpu is None else GPUS[gpu].half
