"""Host time of the joint loss, relative to eager PyTorch: ``python benchmarks/host_time.py``.

Needs no GPU: at B = 512 the host, not the GPU, bounds the losses. Eager PyTorch runs on tiny CPU tensors, whose
kernels take the place of launches. Ours runs its real host code at the real size, once with the launches left out
and once with Triton's launcher up to the call of the driver, which a substitute takes. Competitors take turns in
one process; a figure is the median of the thread's CPU time.
"""

import argparse
import json
import statistics
import time
import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import losses
import torch
from losses import Inputs
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from dive_fast.kernels import backend, primitives

TINY = 8
"""Batch and width of eager PyTorch: its kernels take next to no time."""


class SubstituteDriver:
    """Driver of an absent H200: Triton compiles for it, binds arguments and hands them to ``launcher_cls``."""

    class utils:  # noqa: N801
        """Functions of Triton's driver module."""

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            """Bytes of shared memory of one program."""
            return {"max_shared_mem": 232_448}

        @staticmethod
        def load_binary(*_: Any) -> tuple[int, int, int, int, int]:
            """Module, function, registers, spills and most threads of a kernel."""
            return 1, 1, 0, 0, 1024

        @staticmethod
        def unload_module(module: int) -> None:
            """Nothing to unload."""

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        """A launcher that drops its arguments."""
        return lambda *_: None

    def get_current_target(self) -> GPUTarget:
        """The architecture that kernels are compiled for."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Index of the device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Handle of the stream."""
        return 0


class Result(NamedTuple):
    """Median microseconds of a forward and backward, and the ratio to eager PyTorch's of the same run."""

    microseconds: float
    ratio: float


@contextmanager
def simulated_gpu(launch: bool) -> Iterator[None]:
    """Runs the kernels' host code on CPU tensors, with Triton's launcher or without any launch."""
    with unittest.mock.patch.object(backend, "_find_obstacle", lambda *_: None):
        if launch:
            with unittest.mock.patch.object(driver, "_active", SubstituteDriver()):
                yield
        else:
            with unittest.mock.patch.object(primitives, "launch", lambda *_, **__: None):
                yield


def steps(batch: int, width: int, dtype: torch.dtype) -> dict[str, tuple[Callable[[], object], Any]]:
    """A forward and backward of each competitor, and the context it runs in."""
    real, tiny = (losses.make_inputs(*size, dtype) for size in ((batch, width), (TINY, TINY)))

    def step(loss: Callable[..., Any], inputs: Inputs) -> Callable[[], object]:
        scale = losses.loss_scale(batch, dtype)
        return lambda: losses.step(loss, inputs, "joint", scale)

    def ours(inputs: Inputs, operation: str) -> Any:
        return losses.ours(inputs, operation, "triton")

    return {
        "eager": (step(losses.eager, tiny), None),
        "ours, without launches": (step(ours, real), False),
        "ours, with Triton's launcher": (step(ours, real), True),
    }


class Operators(TorchDispatchMode):
    """Counts operators that launch a kernel on a GPU: all except views and allocations."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view and "empty" not in str(function) and "detach" not in str(function)
        return function(*args, **kwargs or {})


def measure(batch: int, width: int, dtype: torch.dtype, rounds: int) -> dict[str, Result]:
    """Medians over rounds; in each round every competitor takes one turn of ten calls."""
    torch.set_num_threads(1)
    competitors = steps(batch, width, dtype)
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(rounds + 2):
        for name, (call, launch) in competitors.items():
            with simulated_gpu(launch) if launch is not None else unittest.mock.patch.object(torch, "e", torch.e):
                call()
                start = time.thread_time()
                for _ in range(10):
                    call()
                seconds = (time.thread_time() - start) / 10
            if turn >= 2:  # the first turns compile and fill caches
                times[name].append(seconds)
    medians = {name: 1e6 * statistics.median(values) for name, values in times.items()}
    return {name: Result(median, median / medians["eager"]) for name, median in medians.items()}


def main() -> None:
    """Measures and prints a line for each competitor."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    call, _ = steps(TINY, TINY, dtype)["eager"]
    with Operators() as operators:
        call()
    print(f"eager: {operators.count} operators that launch, forward and backward")
    results = measure(arguments.batch, arguments.width, dtype, arguments.rounds)
    for name, result in results.items():
        print(f"{name}: {result.microseconds:.0f} us, {result.ratio:.2f} of eager")
    print(json.dumps({name: result._asdict() for name, result in results.items()}))


if __name__ == "__main__":
    main()
