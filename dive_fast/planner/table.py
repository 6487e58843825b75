"""Formats a plan as a table and as JSON."""

from collections.abc import Sequence
from typing import Any, get_args

from dive_fast.planner.advice import Advice
from dive_fast.planner.gpu_specs import GPUS
from dive_fast.planner.memory_tracker import Part
from dive_fast.planner.operations import Kind, Stage
from dive_fast.planner.plan import Estimate, Plan


def as_json(plan: Plan, gpus: Sequence[str], advice: dict[str, Advice | None]) -> dict[str, Any]:
    """The plan as JSON values: FLOP of all ranks unless named otherwise, bytes of one GPU."""
    return {
        "parameters": plan.parameters,
        "trained_parameters": plan.trained,
        "ranks": plan.ranks,
        "flop_per_step": plan.flop_per_step,
        "flop_per_step_per_gpu": plan.flop_per_step // plan.ranks,
        "flop": {stage: plan.flop_of(stage) for stage in get_args(Stage)},
        "bytes": {kind: plan.bytes_of(kind=kind) for kind in get_args(Kind)},
        "elementwise_bytes": {stage: plan.bytes_of(stage) for stage in get_args(Stage)},
        "peak_memory_bytes": plan.peak_memory_bytes,
        "parts": {part: plan.parts.get(part, 0) for part in get_args(Part)},
        "needed_memory_bytes": plan.needed_memory_bytes,
        "estimates": {name: plan.estimates.get(name, 0) for name in get_args(Estimate)},
        "launches": plan.launches,
        "efficiency": {name: plan.efficiency(GPUS[name]) for name in gpus},
        "seconds": {name: plan.seconds(GPUS[name])._asdict() for name in gpus},
        "step_seconds": {name: plan.step_seconds(GPUS[name]) for name in gpus},
        "fits": {name: plan.fits(GPUS[name]) for name in gpus},
        "advice": {name: None if best is None else best.as_json(GPUS[name]) for name, best in advice.items()},
    }


def as_table(plan: Plan, gpus: Sequence[str], advice: dict[str, Advice | None]) -> str:
    """The plan as a table to print."""
    ranks = plan.ranks
    trained = "" if plan.trained == plan.parameters else f", {plan.trained:,} of them trained"
    lines = [f"parameters       {plan.parameters:,}{trained}", f"FLOP per step    {_tera(plan.flop_per_step)}"]
    if ranks > 1:
        lines[-1] += f" on {ranks} GPUs, {_tera(plan.flop_per_step // ranks)} on each"
    names: dict[Stage, str] = {
        "target": "target half",
        "reference": "reference half",
        "teacher": "online teacher",
        "target_teacher": "target's teacher",
        "loss": "loss",
        "update": "update",
    }
    lines += [f"  {names[stage]:<16} {_tera(flop)}" for stage in names if (flop := plan.flop_of(stage))]
    lines.append(f"element-wise     {_giga(plan.bytes_of())} read and written on each GPU")
    lines += [f"  {names[stage]:<16} {_giga(count)}" for stage in names if (count := plan.bytes_of(stage))]
    lines.append(f"peak memory      {_gib(plan.peak_memory_bytes)} on each GPU")
    part_names: dict[Part, str] = {part: part for part in get_args(Part)}
    part_names |= {"teacher": names["teacher"], "target_teacher": names["target_teacher"]}
    part_names |= {"average": "averaged weights", "projection": "anchors"}
    lines += [f"  {part_names[part]:<16} {_gib(plan.parts[part])}" for part in part_names if plan.parts.get(part)]
    lines.append(f"with estimates   {_gib(plan.needed_memory_bytes)}, which has to fit")
    labels: dict[Estimate, str] = {
        "context": "CUDA, cuBLAS",
        "nccl": "NCCL buffers",
        "scratch": "kernels' scratch",
        "allocator": "allocator",
    }
    lines += [f"  {labels[name]:<16} {_gib(count)}" for name, count in plan.estimates.items() if count]
    lines.append("  left out: DALI's buffers where it decodes on the GPU")
    lines.append("step, s            step   products  attention  element-wise   host   of peak")
    for name in gpus:
        seconds = plan.seconds(GPUS[name])
        parts = (
            f"{seconds.product:10.3f} {seconds.attention:10.3f} {seconds.elementwise:13.3f} {seconds.host:6.3f}"
        )
        share = f"{plan.efficiency(GPUS[name]):9.0%}"
        lines.append(f"  {name:<14} {seconds.step:8.3f} {parts} {share}   {_verdict(plan, name, advice)}")
    return "\n".join(lines)


def _verdict(plan: Plan, name: str, advice: dict[str, Advice | None]) -> str:
    gpu = GPUS[name]
    if plan.fits(gpu):
        return "fits"
    best = advice[name]
    if best is None:
        return "does not fit, nor does any change that was tried; use more GPUs"
    seconds = best.plan.step_seconds(gpu)
    figures = f"{_gib(best.plan.needed_memory_bytes).strip()}, {seconds:.3f} s"
    return f"does not fit; {figures} with {' '.join(best.overrides)}"


def _tera(flop: int) -> str:
    return f"{flop / 1e12:8.2f} TFLOP" if flop >= 1e10 else f"{flop / 1e9:8.2f} GFLOP"


def _giga(count: int) -> str:
    return f"{count / 1e9:8.2f} GB" if count >= 1e7 else f"{count / 1e6:8.2f} MB"


def _gib(count: int) -> str:
    return f"{count / 2**30:8.2f} GiB" if count >= 2**26 else f"{count / 2**20:8.2f} MiB"
