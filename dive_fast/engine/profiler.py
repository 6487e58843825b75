"""A trace of some steps by torch's profiler, with named ranges for the parts of a step."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from dive_fast.distributed import Ranks
from dive_fast.io.atomic_files import atomic_path

logger = logging.getLogger(__name__)

RANGES = ("load", "teacher", "target", "reference", "joint", "loss", "optimizer")
"""Names of the ranges. ``target``, ``reference`` and ``joint`` are forward, loss and backward of a half, or of
both in one graph; ``load`` is the wait for a batch, ``teacher`` an online teacher's forward."""

WAIT_STEPS, WARMUP_STEPS = 8, 2
"""Steps before the trace: first without the profiler, while code is compiled and memory is allocated, then with
it."""


def span(name: str) -> Any:
    """A context whose work appears in traces under ``name``, one of :data:`RANGES`."""
    return record_function(name)


@contextlib.contextmanager
def tracing(steps: int, path: Path, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """Traces some steps on the main rank and prints a summary; yields a function to call after every step.

    Args:
        steps: number of traced steps; 0 for none.
        path: file of the trace, a ``.json.gz`` that Perfetto and Chrome open.
    """
    if steps == 0 or not ranks.is_main:
        yield lambda: None
        return

    def write(profiler: Any) -> None:
        with atomic_path(path) as partial:
            profiler.export_chrome_trace(str(partial))
        ranks.print(
            f"{path}: trace of {steps} steps (ui.perfetto.dev opens it); ms a step\n{summarize(profiler, steps)}"
        )

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ranks.device.type == "cuda" else [])]
    plan = schedule(wait=WAIT_STEPS, warmup=WARMUP_STEPS, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
    if not path.exists():
        logger.warning("no trace: the run is shorter than %d steps", WAIT_STEPS + WARMUP_STEPS + 1)


def summarize(profiler: Any, steps: int) -> str:
    """A table of milliseconds a step for each range, on the host and on the device, which runs asynchronously."""
    host: dict[str, float] = {}
    device: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.key in RANGES:
            side = host if event.device_type == DeviceType.CPU else device
            side[event.key] = (event.cpu_time_total if side is host else event.device_time_total) / 1e3 / steps
    lines = [f"  {'':<10}{'host':>9}" + (f"{'device':>9}" if device else "")]
    for name in RANGES:
        if name in host:
            lines.append(f"  {name:<10}{host[name]:9.2f}" + (f"{device.get(name, 0.0):9.2f}" if device else ""))
    return "\n".join(lines)
