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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import losses
import torch
from losses import Inputs
from torch import Tensor
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
def without_launches() -> Iterator[None]:
    """Runs the kernels' host code on CPU tensors, and no launch."""
    with (
        unittest.mock.patch.object(backend, "_find_obstacle", return_value=None),
        unittest.mock.patch.object(primitives, "launch", _do_nothing),
    ):
        yield


@contextmanager
def without_driver() -> Iterator[None]:
    """Runs the kernels' host code on CPU tensors, with launches for an absent GPU."""
    with (
        unittest.mock.patch.object(backend, "_find_obstacle", return_value=None),
        unittest.mock.patch.object(driver, "_active", SubstituteDriver()),
    ):
        yield


def _do_nothing(*_: Any, **__: Any) -> None:
    pass


class Competitor(NamedTuple):
    """A forward and backward, and the context that it runs in."""

    step: Callable[[], object]
    context: Callable[[], AbstractContextManager[None]]


def competitors(batch: int, width: int, dtype: torch.dtype) -> dict[str, Competitor]:
    """Eager PyTorch at a tiny size, and ours at the real one."""
    real, tiny = (losses.make_inputs(*size, dtype) for size in ((batch, width), (TINY, TINY)))
    scale = losses.loss_scale(batch, dtype)

    def ours(inputs: Inputs, operation: str) -> tuple[Tensor, Tensor | None]:
        return losses.ours(inputs, operation, "triton")

    eager, fast = partial(losses.step, losses.eager, tiny), partial(losses.step, ours, real)
    return {
        "eager": Competitor(lambda: eager("joint", scale), nullcontext),
        "ours, without launches": Competitor(lambda: fast("joint", scale), without_launches),
        "ours, without the driver": Competitor(lambda: fast("joint", scale), without_driver),
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
    times: dict[str, list[float]] = {}
    turns = competitors(batch, width, dtype)
    for turn in range(rounds + 2):
        for name, (step, context) in turns.items():
            with context():
                step()
                start = time.thread_time()
                for _ in range(10):
                    step()
                seconds = (time.thread_time() - start) / 10
            if turn >= 2:  # the first turns compile and fill caches
                times.setdefault(name, []).append(seconds)
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
    step, _ = competitors(TINY, TINY, dtype)["eager"]
    with Operators() as operators:
        step()
    print(f"eager: {operators.count} operators that launch, forward and backward")
    results = measure(arguments.batch, arguments.width, dtype, arguments.rounds)
    for name, result in results.items():
        print(f"{name}: {result.microseconds:.0f} us, {result.ratio:.2f} of eager")
    print(json.dumps({name: result._asdict() for name, result in results.items()}))


if __name__ == "__main__":
    main()
