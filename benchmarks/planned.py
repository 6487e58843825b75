"""Plans memory and time of a step, lever by lever: ``python benchmarks/planned.py``.

Needs no GPU: the engine's step runs on fake tensors (``dive_fast/planner/plan.py``). Writes results/planned.json
and a picture. ``--methods`` prints a table of all methods on two models instead. ``--against RESULTS``, a file of
``steps.py``, compares measured cases of the engine with their plans. ``--draw PICTURE`` draws what is stored.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")

from loss_report import REPOSITORY, commit, write_json  # noqa: E402
from steps import COMPILED, ENGINES, Case, engine_config  # noqa: E402

from dive_fast.evaluation import plots  # noqa: E402
from dive_fast.methods.run_config import load_run_config  # noqa: E402
from dive_fast.planner.gpu_specs import GPUS, gpu_key  # noqa: E402
from dive_fast.planner.plan import Plan  # noqa: E402
from dive_fast.planner.simulate import plan_run  # noqa: E402

CONFIG, GPU = "vitb16_dive.json", "h200"
PLAIN = "train.fast_blocks=false"
PAPER = (PLAIN, "train.precision=fp32", "train.schedule=joint", "teacher.mode=online")
FLYP = ("objective.name=flyp",)
SHORT = ("data.target.text_length=16", "data.reference.text_length=32")
STEPS = {
    "FLYP, published": (*FLYP, *PAPER[:2]),
    "DiVE, published": PAPER,
    "  + cached teacher": PAPER[:3],
    "  + sequential halves": PAPER[:2],
    "  + fp16": PAPER[:1],
    "  + trimmed texts": (*PAPER[:1], *SHORT),
    "  + fast blocks": SHORT,
    "FLYP, here": (*FLYP, *SHORT),
}
METHODS = ("flyp", "dive", "tracer", "carot", "tracer_dive", "lipsum", "starft")
MODELS = {"ViT-B/16": CONFIG, "ViT-L/14": "vitl14_dive.json"}
OLD_EFFICIENCY = {True: 0.45, False: 0.75}
"""Shares of peak arithmetic, in 16 bits and in fp32, by which earlier plans predicted time, for comparison."""
GREEN, GREY, BLUE, PALE = "#1b7f4c", "#6b7280", "#a7c7e7", "#b9bec5"
PARTS = {"product": ("matrix products", 1.0), "attention": ("attention", 0.65), "elementwise": ("all other", 0.35)}
"""Parts of the GPU's time, with their labels and opacities."""
RESULTS = REPOSITORY / "benchmarks/results/planned.json"


def figures() -> list[dict[str, Any]]:
    """Peak bytes, FLOP, element-wise bytes and predicted seconds of each step."""
    rows = []
    for name, overrides in STEPS.items():
        plan = plan_run(load_run_config(CONFIG, list(overrides), REPOSITORY / "launch/configs"))
        rows.append(
            {
                "step": name.strip(),
                "overrides": list(overrides),
                "peak_memory_bytes": plan.peak_memory_bytes,
                "flop": plan.flop_per_step,
                "elementwise_bytes": plan.bytes_of(),
                "seconds": plan.step_seconds(GPUS[GPU]),
                "seconds_by_part": plan.seconds(GPUS[GPU])._asdict(),
                "old_seconds": old_seconds(plan),
            }
        )
    return rows


def old_seconds(plan: Plan) -> float:
    """Seconds of a step at a fixed share of peak arithmetic, the prediction of earlier plans."""
    rates = {True: OLD_EFFICIENCY[True] * GPUS[GPU].half, False: OLD_EFFICIENCY[False] * GPUS[GPU].single}
    return sum(count * each.flop / rates[each.is_half] for each, count in plan.operations.items())


def draw(steps: list[dict[str, Any]], picture: Path) -> None:
    """Draws bars with their ratios to FLYP as published; those of time are divided into parts."""
    figure = plots.new_figure(plots.WIDTH, 4.2)
    plots.add_title(figure, "Planned, not measured: one step of ViT-B/16, B = B' = 512, on one H200")
    panels = (("peak_memory_bytes", "peak memory, GiB", 2**30, "{:.0f}"), ("seconds", "time, s", 1.0, "{:.2f}"))
    # Levers from the top; below a gap, another method.
    rows = [float(len(steps) - i) for i in range(len(steps) - 1)] + [0.4]
    colours = [GREY, GREY, *[BLUE] * (len(steps) - 4), GREEN, PALE]
    for axis, (name, title, unit, template) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        values = [step[name] / unit for step in steps]
        if name == "seconds":
            starts = [0.0] * len(steps)
            for part, (_, opacity) in PARTS.items():
                widths = [step["seconds_by_part"][part] for step in steps]
                axis.barh(rows, widths, left=starts, color=colours, height=0.7, alpha=opacity)
                starts = [start + width for start, width in zip(starts, widths, strict=True)]
            axis.legend(
                handles=_legend(), loc="center right", fontsize=9, frameon=False, bbox_to_anchor=(1.02, 0.33)
            )
        else:
            axis.barh(rows, values, color=colours, height=0.7)
            axis.legend(handles=_key(), loc="center right", fontsize=9, frameon=False, bbox_to_anchor=(1.06, 0.33))
        for row, value in zip(rows, values, strict=True):
            axis.annotate(
                f"{template.format(value)} ({value / values[0]:.2f}x)",
                *((value, row), (5, 0)),
                textcoords="offset points",
                va="center",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
        axis.axvline(values[0], color="#444444", linewidth=1, linestyle="--", zorder=0)
        axis.annotate(
            "FLYP, published", (values[0], 0), (4, -1), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=9, color="#444444",
        )  # fmt: skip
        axis.set_yticks(rows, list(STEPS))
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlim(0, 1.42 * max(values))
        axis.set_ylim(-0.6, len(steps) + 0.6)
        axis.set_xticks([])
        axis.tick_params(axis="y", length=0, labelsize=10)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    plots.save_figure(figure, picture)


def _key() -> list[Any]:
    from matplotlib.patches import Patch

    names = {GREY: "as published", BLUE: "one lever more", GREEN: "all: DiVE, here", PALE: "another method"}
    return [Patch(color=colour, label=name) for colour, name in names.items()]


def _legend() -> list[Any]:
    from matplotlib.patches import Patch

    return [Patch(color=GREY, alpha=opacity, label=label) for label, opacity in PARTS.values()]


def against(results: Path) -> str:
    """Markdown table of measured peak memory, FLOP and time relative to their plans, without batches.

    Compiled cases are left out, since plans do not model compilation. Time has no plan on a device without
    published rates.

    Args:
        results: results file of ``steps.py``.

    Raises:
        SystemExit: there are no results, or no measured case has a plan.
    """
    if not results.exists():
        sys.exit(f"{results}: no such file; run benchmarks/steps.py first")
    measured = json.loads(results.read_text())
    gpu = gpu_key(measured["device"])
    columns = ("model, B", "step", "planned", "measured", "/ planned", "FLOP / planned", "time / planned")
    lines, memory, time = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"], [], []
    for entry in measured["cases"]:
        if entry["outcome"] != "measured" or entry["competitor"] not in set(ENGINES) - set(COMPILED):
            continue
        case = Case(*(entry[name] for name in Case._fields))
        plan = plan_run(engine_config(case, measured["precision"], measured["zero"]))
        peak = plan.peak_memory_bytes - plan.parts["batches"]
        gib, flop = peak / 2**30, entry["flop"] / plan.flop_per_step
        memory.append(entry["peak_bytes"] / peak)
        if gpu is not None:
            time.append(entry["seconds"] / plan.step_seconds(GPUS[gpu]))
        name = (
            case.competitor if case.reference_batch is None else f"{case.competitor}, B' = {case.reference_batch}"
        )
        lines.append(
            f"| {case.model}, {case.batch} | `{name}` | {gib:.2f} GiB | {entry['peak_bytes'] / 2**30:.2f} GiB "
            f"| {memory[-1]:.2f} | {flop:.2f} | {f'{time[-1]:.2f}' if time else ''} |"
        )
    if not memory:
        sys.exit(f"{results}: no measured case has a plan")
    ranges = [
        f"{what} {min(ratios):.2f} to {max(ratios):.2f}"
        for what, ratios in (("memory", memory), ("time", time))
        if ratios
    ]
    return "\n".join([*lines, "", f"measured: {', '.join(ranges)}"])


def print_methods() -> None:
    """Prints a Markdown table of the planned step of each method on each model, in fp16, next to FLYP's."""
    print("| model | method | FLOP | / FLYP | other, GB | memory, GiB | teacher, GiB | step, ms | / FLYP |")
    print("|---" * 9 + "|")
    for model, config in MODELS.items():
        flyp: Plan | None = None
        for method in METHODS:
            overrides = [f"objective.name={method}", *SHORT]
            plan = plan_run(load_run_config(config, overrides, REPOSITORY / "launch/configs"))
            flyp = flyp or plan
            flop, seconds = plan.flop_per_step, plan.step_seconds(GPUS[GPU])
            memory, teacher = plan.peak_memory_bytes / 2**30, plan.parts.get("target_teacher", 0) / 2**30
            print(
                f"| {model} | `{method}` | {flop / 1e12:.1f} T | {flop / flyp.flop_per_step:.2f} "
                f"| {plan.bytes_of() / 1e9:.0f} | {memory:.1f} | {teacher:.2f} "
                f"| {1000 * seconds:.0f} | {seconds / flyp.step_seconds(GPUS[GPU]):.2f} |",
                flush=True,
            )


def main() -> None:
    """Plans all steps, writes and draws them; or compares results with plans."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, metavar="RESULTS", help="results file of steps.py")
    parser.add_argument("--draw", type=Path, metavar="PICTURE", help="draw the stored plans, and plan nothing")
    parser.add_argument("--methods", action="store_true", help="print a table of all methods")
    options = parser.parse_args()
    if options.draw:
        draw(json.loads(RESULTS.read_text())["steps"], options.draw)
    if options.methods:
        print_methods()
        return
    if options.against:
        print(against(options.against))
    if options.draw or options.against:
        return
    steps = figures()
    write_json(RESULTS, {"config": CONFIG, "gpu": GPU, "commit": commit(), "steps": steps})
    draw(steps, RESULTS.with_suffix(".png"))
    for step in steps:
        memory, tera = step["peak_memory_bytes"] / 2**30, step["flop"] / 1e12
        parts = "  ".join(f"{part} {seconds:.3f}" for part, seconds in step["seconds_by_part"].items())
        print(f"{step['step']:<24} {memory:7.1f} GiB {tera:7.1f} TFLOP {step['seconds']:7.3f} s: {parts}")


if __name__ == "__main__":
    main()
