"""Measures time and memory of one case after verifying its results, with the same closure and inputs."""

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
    """Verifies and measures a competitor: outcome, median seconds, extra bytes at the peak, error of each tensor.

    Raises:
        AssertionError: a result is wrong; nothing has been measured.
        torch.OutOfMemoryError: the competitor needs more than the device has.
    """
    sizes = case.batch, case.width, dtype
    truth, naive_errors = verify.expected(case.operation, *sizes)
    loss, scale = losses.COMPETITORS[case.competitor], losses.loss_scale(case.batch, dtype)
    torch.compiler.reset()  # otherwise new sizes count as recompilations, whose number is limited

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
    # Wall time of a step that starts on an idle device and ends synchronized: at small B most of it is launches,
    # which fusion saves, and events around queued work would hide a part of them. Inputs that fit in the L2 cache
    # take turns, so that none is cached only because the previous round has read it.
    turns = itertools.cycle([inputs, *(losses.make_inputs(*sizes, seed) for seed in range(1, num_sets(inputs)))])
    benchmark.group = f"{case.operation} {case.batch}x{case.width}"
    benchmark.pedantic(step, setup=lambda: ((next(turns),), {}), rounds=rounds, warmup_rounds=rounds // 4)
    figures = {"peak_extra_bytes": extra_bytes, "errors": errors}
    benchmark.extra_info |= figures
    if benchmark.stats is None:  # --benchmark-disable
        return {"outcome": "checked, not timed"}
    return {"outcome": "measured", "seconds": benchmark.stats.stats.median, **figures}


def ran_out(error: RuntimeError) -> bool:
    """Whether an error means out of memory, from PyTorch or from a library with its own allocations."""
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in message or "alloc_failed" in message


def num_sets(inputs: Inputs) -> int:
    """Number of input sets that fill the L2 cache twice."""
    if DEVICE.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return 1 + 2 * cache // sum(x.nbytes for x in inputs)


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes, including its work on the device."""
    start = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_extra_bytes(call: Callable[[], Any]) -> int:
    """Peak bytes above those allocated before the call; the returned tensors count."""
    gc.collect()  # otherwise garbage that is freed during the call hides allocations
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    # The allocator's events: a TorchDispatchMode does not see allocations inside compiled code and custom ops.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes, initial=0))
