"""Where the memory and the arithmetic of a step go, lever by lever, by plan: ``python benchmarks/planned.py``.

No GPU: the engine's own step runs on fake tensors (``dive_fast/planner/plan.py``). Writes results/planned.json, and draws.
With ``--against RESULTS``, a file of ``steps.py``, plans the engine's cases that were measured, and compares.
"""

import argparse
import json
import os
import warnings
from pathlib import Path
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")

from loss_report import REPOSITORY, commit, write_json  # noqa: E402
from steps import COMPILED, ENGINES, Case, engine_config  # noqa: E402

from dive_fast.methods.run_config import load_run_config  # noqa: E402
from dive_fast.planner.gpu_specs import GPUS  # noqa: E402
from dive_fast.planner.simulate import plan_run as plan_run  # noqa: E402

CONFIG, GPU = "vitb16_dive.json", "h200"
PAPER = ("train.precision=fp32", "train.schedule=joint", "teacher.mode=online")
FLYP = ("objective.name=flyp",)
SHORT = ("data.target.text_length=16", "data.reference.text_length=32")
STEPS = {
    "FLYP, fp32": (*FLYP, PAPER[0]),
    "DiVE as in the paper": PAPER,
    "  + cached teacher": PAPER[:2],
    "  + sequential halves": PAPER[:1],
    "  + fp16": (),
    "  + trimmed texts": SHORT,
    "FLYP, dive_fast": (*FLYP, *SHORT),
}
GREEN, GREY, BLUE = "#1b7f4c", "#6b7280", "#a7c7e7"
RESULTS = REPOSITORY / "benchmarks/results/planned.json"


def figures() -> list[dict[str, Any]]:
    """Of each step: peak bytes, FLOP, predicted seconds."""
    found = []
    for name, overrides in STEPS.items():
        planned = plan_run(load_run_config(CONFIG, list(overrides), REPOSITORY / "launch/configs"))
        found.append(
            {
                "step": name.strip(),
                "overrides": list(overrides),
                "peak_memory_bytes": planned.peak_memory_bytes,
                "flop": planned.flop_per_step,
                "seconds": planned.step_seconds(GPUS[GPU]),
            }
        )
    return found


def draw(steps: list[dict[str, Any]], picture: Path) -> None:
    """Bars, with their ratios to FLYP in fp32."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    figure.suptitle("One step of ViT-B/16, B = B' = 512, on one H200: planned, not measured", fontsize=12)
    panels = (("peak_memory_bytes", "peak memory, GiB", 2**30, "{:.0f}"), ("seconds", "time, s", 1.0, "{:.2f}"))
    places = range(len(steps), 0, -1)
    for axis, (name, title, unit, words) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        values = [step[name] / unit for step in steps]
        colours = [GREEN if i >= len(steps) - 2 else GREY if i < 2 else BLUE for i in range(len(steps))]
        axis.barh(places, values, color=colours, height=0.7)
        for place, value in zip(places, values, strict=True):
            axis.annotate(
                f"{words.format(value)}  ({value / values[0]:.2f}x)",
                (value, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        axis.axvline(values[0], color="#444444", linewidth=1, linestyle="--", zorder=0)
        axis.set_yticks(places, list(STEPS))
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlim(0, 1.25 * max(values))
        axis.set_xticks([])
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(picture, dpi=110)


def against(results: Path) -> str:
    """Markdown: peak memory and FLOP that were measured, over those planned; batches count on neither side.

    Blocks that are compiled are planned as they are without, so they are left out.

    Args:
        results: of ``steps.py``.
    """
    measured = json.loads(results.read_text())
    lines = ["| model, B | step | planned | measured | / planned | FLOP / planned |", "|---" * 6 + "|"]
    for entry in measured["cases"]:
        if entry["outcome"] != "measured" or entry["competitor"] not in set(ENGINES) - set(COMPILED):
            continue
        case = Case(*(entry[name] for name in Case._fields))
        planned = plan_run(engine_config(case, measured["precision"], measured["zero"]))
        peak = planned.peak_memory_bytes - planned.parts["batches"]
        gib, ratio, flop = peak / 2**30, entry["peak_bytes"] / peak, entry["flop"] / planned.flop_per_step
        name = (
            case.competitor if case.reference_batch is None else f"{case.competitor}, B' = {case.reference_batch}"
        )
        lines.append(
            f"| {case.model}, {case.batch} | `{name}` | {gib:.2f} GiB | {entry['peak_bytes'] / 2**30:.2f} GiB "
            f"| {ratio:.2f} | {flop:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Plans, writes, draws; or compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, metavar="RESULTS", help="of steps.py")
    options = parser.parse_args()
    if options.against:
        print(against(options.against))
        return
    steps = figures()
    write_json(RESULTS, {"config": CONFIG, "gpu": GPU, "commit": commit(), "steps": steps})
    draw(steps, RESULTS.with_suffix(".png"))
    for step in steps:
        memory, tera = step["peak_memory_bytes"] / 2**30, step["flop"] / 1e12
        print(f"{step['step']:<24} {memory:7.1f} GiB {tera:7.1f} TFLOP {step['seconds']:7.3f} s")


if __name__ == "__main__":
    main()
