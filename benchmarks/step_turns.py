"""Measures steps on a CPU as ratios in one run: ``python benchmarks/step_turns.py --model ViT-B-16 --batch 4``.

FLYP and DiVE as published, single levers on the latter, and the engine take turns in one process, with one thread
each and on the same texts in a round. Figures are CPU seconds of the process, which other processes on the machine
disturb less than wall time; ratios are within a round. All competitors train the same weights and share moments,
so that they fit a small machine; their modules and graphs are their own.
"""

import argparse
import copy
import statistics
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from loss_report import REPOSITORY, commit, device_name, slug, write_json
from losses import DEVICE
from step_report import NAMES
from steps import Case, Running, make_batches, random_model, running
from torch.utils.flop_counter import FlopCounterMode

from dive_fast.distributed import join
from dive_fast.planner.operations import MISSED_FLOP

FLYP, DIVE = "flyp_published", "dive_published"
LEVERS = ("sequential", "cached_teacher", "trimmed_text", "distinct_texts", "fast_blocks")
COMPETITORS = (FLYP, DIVE, *LEVERS, "flyp_fast", "dive_fast")


def share_parameters(model: Any) -> Any:
    """A copy of a model's modules with the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def share_moments(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """Makes an optimizer use the moments that another one has of the same parameters."""
    for group in target.param_groups:
        for parameter in group["params"]:
            if parameter in source.state:
                target.state[parameter] = source.state[parameter]


def count_flop(competitor: Running) -> int:
    """FLOP of a step, which also is the competitor's first."""
    with FlopCounterMode(display=False, custom_mapping=MISSED_FLOP) as counter:
        competitor.step(0)
    return counter.get_total_flops()


def cpu_seconds(competitor: Running, turn: int) -> float:
    """CPU seconds of a step of this process."""
    for group in competitor.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None  # of another competitor
    start = time.process_time()
    competitor.step(turn)
    return time.process_time() - start


def summarize(flop: dict[str, int], rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Medians over rounds of each competitor's seconds and of its ratios to both peers, and its ratios of FLOP."""
    rows = {}
    for name in flop:
        row = {"seconds": statistics.median(each[name] for each in rounds), "flop": float(flop[name])}
        for peer in (FLYP, DIVE):
            row[f"time_over_{peer}"] = statistics.median(each[name] / each[peer] for each in rounds)
            row[f"flop_over_{peer}"] = flop[name] / flop[peer]
        rows[name] = row
    return rows


def table(summary: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = [
        "| step | CPU seconds | / DiVE as published | FLOP | / FLYP as published | FLOP |",
        "|---" * 6 + "|",
    ]
    for name, row in summary.items():
        ratios = (row[f"{kind}_over_{peer}"] for peer in (DIVE, FLYP) for kind in ("time", "flop"))
        lines.append(f"| {NAMES[name]} | {row['seconds']:.2f} | " + " | ".join(f"{x:.2f}" for x in ratios) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints a table and writes a JSON file after each round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "build/benchmarks")
    options = parser.parse_args()
    if DEVICE.type != "cpu":
        parser.error("CPU seconds are no measure of a GPU's step; use steps.py")
    join()
    torch.set_num_threads(1)
    about = {"device": device_name(), "commit": commit(), "threads": 1, "precision": "fp32"}
    model, teacher = random_model(options.model), copy.deepcopy(random_model(options.model))
    with ExitStack() as stack:
        competitors: dict[str, Running] = {}
        flop, rounds = {}, []
        for name in COMPETITORS:
            case = Case(options.model, options.batch, name)
            make_batches(case)
            competitor = stack.enter_context(running(case, 0, share_parameters(model), share_parameters(teacher)))
            torch.set_num_threads(1)  # joining the group sets another number
            if competitors:
                share_moments(competitors[FLYP].optimizer, competitor.optimizer)
            competitors[name] = competitor
            flop[name] = count_flop(competitor)
            print(f"{name}: {flop[name] / 1e12:.3f} TFLOP", flush=True)
        for turn in range(1, 1 + options.rounds):
            rounds.append({name: cpu_seconds(each, turn) for name, each in competitors.items()})
            summary = summarize(flop, rounds)
            packages = {name: version(name) for name in ("torch", "deepspeed", "open_clip_torch")}
            sizes = {"model": options.model, "batch": options.batch}
            results = about | {"versions": packages} | sizes | {"summary": summary, "rounds": rounds}
            write_json(options.results / f"{slug(device_name())}-step-turns.json", results)
    print(table(summary))


if __name__ == "__main__":
    main()
