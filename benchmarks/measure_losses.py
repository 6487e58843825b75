"""Time and memory of one case, of the same closure on the same inputs, once its results are known to be right."""

import gc
import itertools
import time
import timeit
from collections.abc import Callable
from typing import Any

import losses
import torch
import verify
from losses import DEVICE, Case, Inputs
from pytest_benchmark.fixture import BenchmarkFixture
from torch.profiler import ProfilerActivity, profile

SECONDS_PER_FIGURE = 0.5
MIN_ROUNDS, MAX_ROUNDS = 10 if DEVICE.type == "cuda" else 3, 200


def measure(case: Case, dtype: torch.dtype, benchmark: BenchmarkFixture) -> dict[str, Any]:
    """Check, then measure one competitor: outcome, median seconds, extra bytes at the peak, error of each tensor.

    Raises:
        AssertionError: a result is wrong; nothing has been measured.
        torch.OutOfMemoryError: the competitor needs more than the device has.
    """
    sizes = case.batch, case.width, dtype
    truth, naive_errors = verify.expected(case.operation, *sizes)
    loss, scale = losses.COMPETITORS[case.competitor], losses.loss_scale(case.batch, dtype)
    torch.compiler.reset()  # else a new size counts as a recompilation, of which there may be few

    def step(inputs: Inputs) -> dict[str, torch.Tensor]:
        outputs = losses.step(loss, inputs, case.operation, scale)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return outputs

    inputs = losses.make_inputs(*sizes)
    errors = verify.check(step(inputs), truth, naive_errors, case)
    extra_bytes = peak_extra_bytes(lambda: step(inputs))

    shortest = min(timeit.repeat(lambda: step(inputs), number=1, repeat=3))
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(SECONDS_PER_FIGURE / shortest)))
    # Wall time of a step that starts on an idle device and ends synchronised: at small B most of it is launches,
    # which is what fusing saves, and events around queued work would hide a part of them. Inputs that fit in the
    # L2 cache take turns, so that none is read from it only because the round before left it there.
    turns = itertools.cycle([inputs, *(losses.make_inputs(*sizes, seed) for seed in range(1, num_sets(inputs)))])
    benchmark.group = f"{case.operation} {case.batch}x{case.width}"
    benchmark.pedantic(step, setup=lambda: ((next(turns),), {}), rounds=rounds, warmup_rounds=rounds // 4)
    figures = {"peak_extra_bytes": extra_bytes, "errors": errors}
    benchmark.extra_info |= figures
    if benchmark.stats is None:  # --benchmark-disable
        return {"outcome": "checked, not timed"}
    return {"outcome": "measured", "seconds": benchmark.stats.stats.median, **figures}


def ran_out(error: RuntimeError) -> bool:
    """Whether it is of memory: PyTorch's own error, or that of a library that allocates beside it."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "alloc_failed" in said


def num_sets(inputs: Inputs) -> int:
    """How many sets of inputs fill the L2 cache twice."""
    if DEVICE.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return 1 + 2 * cache // sum(x.nbytes for x in inputs)


def timed(work: Callable[[], object]) -> float:
    """Seconds, the device's work included."""
    begun = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def peak_extra_bytes(call: Callable[[], Any]) -> int:
    """Bytes at the peak above what is held before the call; what it returns, gradients included, counts."""
    gc.collect()  # else what is garbage now may be freed during the call, and hide as much
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    # The allocator's events: a TorchDispatchMode would not see what compiled code and custom ops allocate inside.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes, initial=0))
