"""Time, memory and arithmetic of one competitor's step."""

import math
import timeit
from contextlib import ExitStack
from typing import Any

import torch
from loss_report import device_name
from losses import DEVICE
from measure_losses import peak_extra_bytes
from pytest_benchmark.fixture import BenchmarkFixture
from steps import Case, Running, make_inputs, running, teacher_rows
from torch.utils.flop_counter import FlopCounterMode

from dive_fast.planner.gpu_specs import GPUS, gpu_key
from dive_fast.planner.memory_tracker import MISSED_FLOP

SECONDS_PER_FIGURE = 5.0 if DEVICE.type == "cuda" else 0.5
MIN_ROUNDS, MAX_ROUNDS = 3, 20
MAX_SKIPPED_STEPS = 16
IMAGENET = 1_281_167


def measure(case: Case, zero: int, benchmark: BenchmarkFixture) -> dict[str, Any]:
    """Outcome and figures of a case (README.md says what they are).

    Raises:
        AssertionError: the loss is not a number, or gradients overflow at any loss scale.
        torch.OutOfMemoryError: the competitor needs more than the device has.
    """
    # Here, lest their memory be charged to the first competitor.
    make_inputs(*case.sizes)
    teacher_rows(*case.sizes)
    with ExitStack() as stack:
        begun: list[Running] = []

        def begin() -> None:
            begun.append(stack.enter_context(running(case, zero)))
            settle(begun[0])
            # The optimizer's state comes with the first update, and stays.
            begun[0].step()

        peak_bytes = peak_extra_bytes(begin)
        step = begun[0].step
        with FlopCounterMode(display=False, custom_mapping=MISSED_FLOP) as counter:
            loss = step()["loss"]
        assert math.isfinite(loss), f"{case}: loss is {float(loss)}"

        def synchronised() -> None:
            step()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        rounds = int(SECONDS_PER_FIGURE / timeit.timeit(synchronised, number=1))
        benchmark.group = f"{case.model}, B = {case.batch}"
        benchmark.pedantic(synchronised, rounds=min(MAX_ROUNDS, max(MIN_ROUNDS, rounds)))
    if benchmark.stats is None:  # --benchmark-disable
        return {"outcome": "not timed"}
    seconds, flop = benchmark.stats.stats.median, counter.get_total_flops()
    peak = peak_flops()
    images = case.batch if case.competitor.startswith("flyp") else sum(case.sizes[1:])
    return {
        "outcome": "measured",
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "flop": flop,
        "mfu": flop / seconds / peak if peak else None,
        "images_per_second": images / seconds,
        "minutes_per_epoch": IMAGENET / case.batch * seconds / 60,
    }


def settle(begun: Running) -> None:
    """Steps until one is not skipped for an overflow of the loss scale."""
    for _ in range(MAX_SKIPPED_STEPS):
        before = begun.loss_scale()
        begun.step()
        if begun.loss_scale() >= before:
            return
    raise AssertionError(f"gradients overflow at a loss scale of {begun.loss_scale()}")


def peak_flops() -> float | None:
    """16-bit FLOP/s that this device is rated at, if known: the yardstick of MFU for fp32 too."""
    gpu = gpu_key(device_name())
    return None if gpu is None else GPUS[gpu].half
