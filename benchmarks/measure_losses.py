"""Measures time and memory of one case after verifying its results, with the same closure and inputs."""

import gc
import itertools
import statistics
import time
import timeit
from collections.abc import Callable
from typing import Any

import losses
import torch
import verify
from losses import DEVICE, Case, Inputs
from pytest_benchmark.fixture import BenchmarkFixture
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

SECONDS_PER_FIGURE = 0.5
ACTIVITIES = [ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU]
"""What is profiled: kernels, or without a GPU the operators that stand for them."""
APART = 10
"""Calls of which the host's and the device's seconds are measured apart."""
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

    def issue(inputs: Inputs) -> dict[str, torch.Tensor]:
        return losses.step(loss, inputs, case.operation, scale)

    def step(inputs: Inputs) -> dict[str, torch.Tensor]:
        outputs = issue(inputs)
        synchronize()
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
    figures["host_seconds"] = host_seconds(lambda: issue(next(turns)))
    figures["device_seconds"] = device_seconds(lambda: issue(next(turns)))
    benchmark.extra_info |= figures
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


def synchronize() -> None:
    """Waits for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def host_seconds(call: Callable[[], object]) -> float:
    """Median seconds until a call has issued its work to an idle device, which is not waited for."""

    def issued() -> float:
        synchronize()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    seconds = statistics.median(issued() for _ in range(APART))
    synchronize()
    return seconds


def device_seconds(call: Callable[[], object]) -> float:
    """Seconds of a call's kernels, without the gaps between them; their mean over some calls."""
    with profile(activities=ACTIVITIES) as profiler:
        for _ in range(APART):
            call()
        synchronize()
    return sum(kernel_seconds(profiler).values()) / APART


def kernel_seconds(profiler: profile) -> dict[str, float]:
    """Seconds of each kernel, or without a GPU of each operator, by name."""
    seconds: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.is_user_annotation or (DEVICE.type == "cuda" and event.device_type != DeviceType.CUDA):
            continue
        microseconds = event.self_device_time_total if DEVICE.type == "cuda" else event.self_cpu_time_total
        seconds[event.key] = seconds.get(event.key, 0.0) + microseconds / 1e6
    return seconds


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes, including its work on the device."""
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def peak_extra_bytes(call: Callable[[], Any]) -> int:
    """Peak bytes above those allocated before the call; the returned tensors count."""
    gc.collect()  # otherwise garbage that is freed during the call hides allocations
    if DEVICE.type == "cuda":
        synchronize()
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
