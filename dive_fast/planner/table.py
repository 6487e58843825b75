"""A plan as a table and as JSON."""

from collections.abc import Sequence
from typing import Any, get_args

from dive_fast.planner.advice import Advice
from dive_fast.planner.gpu_specs import GPUS
from dive_fast.planner.memory_tracker import Part, Stage
from dive_fast.planner.plan import EFFICIENCY, SINGLE_EFFICIENCY, Estimate, Plan


def as_json(planned: Plan, gpus: Sequence[str], advice: dict[str, Advice | None]) -> dict[str, Any]:
    """The plan as plain values: FLOP are of all ranks unless named otherwise, bytes of one GPU."""
    return {
        "parameters": planned.parameters,
        "ranks": planned.ranks,
        "flop_per_step": planned.flop_per_step,
        "flop_per_step_per_gpu": planned.flop_per_step // planned.ranks,
        "flop": {stage: planned.flop_of(stage) for stage in get_args(Stage)},
        "peak_memory_bytes": planned.peak_memory_bytes,
        "parts": {part: planned.parts.get(part, 0) for part in get_args(Part)},
        "needed_memory_bytes": planned.needed_memory_bytes,
        "estimates": {name: planned.estimates.get(name, 0) for name in get_args(Estimate)},
        "launches": planned.launches,
        "efficiency": EFFICIENCY,
        "step_seconds": {name: planned.step_seconds(GPUS[name]) for name in gpus},
        "fits": {name: planned.fits(GPUS[name]) for name in gpus},
        "advice": {name: None if found is None else found.as_json(GPUS[name]) for name, found in advice.items()},
    }


def as_table(planned: Plan, gpus: Sequence[str], advice: dict[str, Advice | None]) -> str:
    """The plan for people."""
    ranks = planned.ranks
    lines = [f"parameters       {planned.parameters:,}", f"FLOP per step    {_tera(planned.flop_per_step)}"]
    if ranks > 1:
        lines[-1] += f" on {ranks} GPUs, {_tera(planned.flop_per_step // ranks)} on each"
    names: dict[Stage, str] = {
        "target": "target half",
        "reference": "reference half",
        "teacher": "online teacher",
        "loss": "loss",
    }
    lines += [f"  {names[stage]:<16} {_tera(flop)}" for stage in names if (flop := planned.flop_of(stage))]
    lines.append(f"peak memory      {_gib(planned.peak_memory_bytes)} on each GPU")
    lines += [f"  {part:<16} {_gib(planned.parts[part])}" for part in get_args(Part) if planned.parts.get(part)]
    lines.append(f"with estimates   {_gib(planned.needed_memory_bytes)}, which has to fit")
    known_as: dict[Estimate, str] = {
        "context": "CUDA, cuBLAS",
        "nccl": "NCCL buffers",
        "scratch": "kernels' scratch",
        "allocator": "allocator",
    }
    lines += [f"  {known_as[name]:<16} {_gib(count)}" for name, count in planned.estimates.items() if count]
    lines.append("  left out: DALI's buffers where it decodes on the GPU")
    lines.append(f"step at {EFFICIENCY:.0%} of peak arithmetic, {SINGLE_EFFICIENCY:.0%} in fp32")
    for name in gpus:
        lines.append(f"  {name:<16} {planned.step_seconds(GPUS[name]):8.3f} s   {_verdict(planned, name, advice)}")
    return "\n".join(lines)


def _verdict(planned: Plan, name: str, advice: dict[str, Advice | None]) -> str:
    gpu = GPUS[name]
    if planned.fits(gpu):
        return "fits"
    found = advice[name]
    if found is None:
        return "does not fit, nor does any change that was tried; use more GPUs"
    seconds = found.plan.step_seconds(gpu)
    figures = f"{_gib(found.plan.needed_memory_bytes).strip()}, {seconds:.3f} s"
    return f"does not fit; {figures} with {' '.join(found.overrides)}"


def _tera(flop: int) -> str:
    return f"{flop / 1e12:8.2f} TFLOP" if flop >= 1e10 else f"{flop / 1e9:8.2f} GFLOP"


def _gib(count: int) -> str:
    return f"{count / 2**30:8.2f} GiB" if count >= 2**26 else f"{count / 2**20:8.2f} MiB"
