"""Extra time of each method in weight space over plain AdamW: ``python benchmarks/projections.py``.

Predicted: the bytes that the optimizer's step of each rule moves besides AdamW's, counted on fake tensors with the
kernels, over the reachable rate of an H200. Measured: AdamW's step with the rule's hooks over AdamW's alone, in
turns in one process, on the same weights, gradients and moments; ratios are within a round. On a CPU, where plain
PyTorch runs, figures are CPU seconds of the process, which other processes on the machine disturb less than wall
time; on a GPU, seconds of the device while the host is ahead of it. All are steps without ZeRO, on one rank.
"""

import argparse
import statistics
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from loss_report import REPOSITORY, commit, device_name, slug, write_json
from losses import DEVICE
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dive_fast.config.schema import ProjectionConfig
from dive_fast.engine.weight_projection import WeightProjection
from dive_fast.kernels.backend import Backend
from dive_fast.planner.gpu_specs import GPUS
from dive_fast.planner.memory_tracker import Tracker
from dive_fast.planner.operations import Operation
from dive_fast.projections import rules

open_clip.add_model_config(Path(__file__).with_name("models"))
ADAMW = "AdamW"
RULES: dict[str, dict[str, Any]] = {
    "L2-SP": {"name": "l2sp"},
    "SPD": {"name": "spd"},
    "FTP": {"name": "ftp"},
    "DiGraP": {"name": "digrap"},
    "DiGraP, current": {"name": "digrap", "direction": "current"},
}
MODELS = {"ViT-B/16": "ViT-B-16", "ViT-L/14": "ViT-L-14"}
GPU = "h200"
SCALE = 1e-3
"""Standard deviation of gradients, which are noise."""
AHEAD_CYCLES = 60_000_000
"""Cycles, some 30 ms, that a GPU waits for the host before a timed step."""
CPU_REMARK = (
    ", of CPU seconds with one thread; the machine was not idle. The kernels do not run on a CPU: plain PyTorch "
    "makes some ten passes over each block in the cache, in fp64, which take longer than the memory"
)
"""Why ratios on a CPU are not those of the bytes."""


class Step:
    """AdamW's step with the hooks of a rule, or alone."""

    def __init__(self, model: nn.Module, rule: dict[str, Any] | None, backend: Backend) -> None:
        """Copies the anchors of a rule.

        Args:
            model: its parameters are updated.
            rule: the ``projection`` section; None: AdamW alone.
        """
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        # As the engine sets them before each step.
        device = next(model.parameters()).device
        self.optimizer.grad_scale = torch.ones((), device=device)  # type: ignore[attr-defined]
        self.optimizer.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]
        self.projection = None
        if rule is not None:
            created = rules.create(ProjectionConfig(**rule))
            assert created is not None
            engine = SimpleNamespace(zero_optimization_stage=lambda: 0)
            self.projection = WeightProjection(created, engine, self.optimizer, model, False, backend)


def make_model(name: str, blocks: int | None = None) -> nn.Module:
    """An open_clip model with random weights; only some blocks of each tower, or all of them."""
    model = open_clip.CustomTextCLIP(**open_clip.get_model_config(name))
    for transformer in (model.visual.transformer, model.text.transformer):
        transformer.resblocks = transformer.resblocks[:blocks]
    return model


def num_elements(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


# Predicted


def count(name: str, rule: dict[str, Any] | None) -> Counter[Operation]:
    """Operations of the optimizer's second step, on fake tensors with the kernels."""
    with FakeTensorMode():
        model = make_model(name)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        step = Step(model, rule, "triton")
        step.optimizer.step()
        with Tracker() as tracker:
            step.optimizer.step()
    return tracker.operations


def predict(name: str) -> dict[str, dict[str, float]]:
    """Bytes and operations of each rule besides AdamW's, their bytes relative to AdamW's, and seconds."""
    elements = num_elements(_fake_model(name))
    alone = count(name, None)
    plain = sum(operation.bytes for operation in alone.elements())
    figures: dict[str, dict[str, float]] = {}
    for title, rule in RULES.items():
        extra = count(name, rule) - alone
        moved = sum(operation.bytes for operation in extra.elements())
        num_triton = sum(each for operation, each in extra.items() if operation.is_triton)
        figures[title] = {
            "bytes": moved,
            "bytes_per_parameter": moved / elements,
            "over_adamw": moved / plain,
            "seconds": moved / GPUS[GPU].elementwise,
            "kernel_operations": num_triton,
            "other_operations": extra.total() - num_triton,
        }
    return figures


def _fake_model(name: str) -> nn.Module:
    with FakeTensorMode():
        return make_model(name)


# Measured


def measure(name: str, blocks: int | None, rounds: int) -> dict[str, Any]:
    """Seconds of each rule's step in turns, and medians of their ratios to AdamW's in the same round."""
    torch.manual_seed(0)
    model = make_model(name, blocks).to(DEVICE)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    backend: Backend = "triton" if DEVICE.type == "cuda" else "torch"
    steps = {title: Step(model, rule, backend) for title, rule in ({ADAMW: None} | RULES).items()}
    draw_gradients(model)
    steps[ADAMW].optimizer.step()
    for step in steps.values():
        step.optimizer.state = steps[ADAMW].optimizer.state
    seconds = [{title: step_seconds(step, model) for title, step in steps.items()} for _ in range(rounds + 1)]
    # The first round allocates.
    return {
        "model": name,
        "blocks": blocks,
        "tensors": len(list(model.parameters())),
        "parameters": num_elements(model),
        "rounds": seconds[1:],
        "summary": summarize(seconds[1:]),
    }


def draw_gradients(model: nn.Module) -> None:
    """Replaces all gradients by noise."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.normal_(std=SCALE)


def step_seconds(step: Step, model: nn.Module) -> float:
    """CPU seconds that a step takes of this process; on a GPU, the device's seconds."""
    draw_gradients(model)
    if DEVICE.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Meanwhile the host launches the step, as it does during a backward.
        torch.cuda._sleep(AHEAD_CYCLES)
        start.record()
        step.optimizer.step()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * start.elapsed_time(end)
    before = time.process_time()
    step.optimizer.step()
    return time.process_time() - before


def summarize(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Medians over rounds of the seconds of each step and of its ratio to AdamW's."""
    return {
        title: {
            "seconds": statistics.median(each[title] for each in rounds),
            "over_adamw": statistics.median(each[title] / each[ADAMW] for each in rounds),
        }
        for title in rounds[0]
    }


# Report


def report(results: dict[str, Any]) -> str:
    """Markdown, with predicted and measured figures apart."""
    measured = results["measured"]
    share = measured["parameters"] / results["parameters"][measured["model"]]
    lines = [
        "# Methods in weight space: extra time over AdamW",
        "",
        f"By `benchmarks/projections.py` at commit {results['commit']}. A step is the optimizer's, without ZeRO, "
        "on one rank; forward and backward are not part of it.",
        "",
        f"## Predicted for one {GPU.upper()}, not measured",
        "",
        "Bytes that a rule's hooks move with the kernels, each tensor read and written once per pass, at "
        f"{GPUS[GPU].elementwise / 1e12:.1f} TB/s. A kernel operation is one or two launches, whatever the number "
        "of tensors; the others are PyTorch's on vectors with an entry for each tensor or row. Where the "
        "coefficient of a tensor is 0, the kernels move less.",
        "",
        "| model | rule | GB | bytes per parameter | / AdamW's bytes | ms | operations: kernels, others |",
        "|---" * 7 + "|",
    ]
    for title, name in MODELS.items():
        for rule, row in results["predicted"].get(name, {}).items():
            lines.append(
                f"| {title} | {rule} | {row['bytes'] / 1e9:.2f} | {row['bytes_per_parameter']:.1f} "
                f"| {row['over_adamw']:.2f} | {1e3 * row['seconds']:.2f} "
                f"| {row['kernel_operations']:.0f}, {row['other_operations']:.0f} |"
            )
    lines += [
        "",
        f"## Measured on {'a CPU' if DEVICE.type == 'cpu' else results['device']}",
        "",
        f"{measured['model']} with {measured['blocks'] or 'all'} blocks in each tower: {measured['tensors']} "
        f"tensors, {measured['parameters'] / 1e6:.1f} M parameters ({100 * share:.0f} % of the model). Medians of "
        f"{len(measured['rounds'])} rounds in turns{CPU_REMARK if DEVICE.type == 'cpu' else ''}.",
        "",
        "| step | ms | / AdamW | ns per parameter besides AdamW |",
        "|---" * 4 + "|",
    ]
    alone = measured["summary"][ADAMW]["seconds"]
    for title, row in measured["summary"].items():
        extra = 1e9 * (row["seconds"] - alone) / measured["parameters"]
        lines.append(
            f"| {title} | {1e3 * row['seconds']:.2f} | {row['over_adamw']:.2f} "
            f"| {'-' if title == ADAMW else f'{extra:.3g}'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Predicts and measures; prints the report and writes it with all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-16", help="open_clip model that is measured")
    parser.add_argument(
        "--blocks", type=int, default=None if DEVICE.type == "cuda" else 3, help="measured blocks of each tower"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "build/benchmarks", help="folder")
    parser.add_argument("--no-plan", action="store_true", help="only measure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    planned = [] if options.no_plan else list(MODELS.values())
    names = dict.fromkeys([*planned, options.model])
    results = {
        "device": device_name(),
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "open_clip_torch")},
        "gpu": GPU,
        "parameters": {name: num_elements(_fake_model(name)) for name in names},
        "predicted": {name: predict(name) for name in planned},
        "measured": measure(options.model, options.blocks, options.rounds),
    }
    name = "projections" if DEVICE.type == "cpu" else f"{slug(device_name())}-projections"
    write_json(options.results / f"{name}.json", results)
    text = report(results)
    (options.results / f"{name}.md").write_text(text)
    print(text)
    extra = {
        title: 1e3 * (row["seconds"] - results["measured"]["summary"][ADAMW]["seconds"])
        for title, row in results["measured"]["summary"].items()
    }
    figures = ", ".join(f"{title} {extra[title]:.2f} ms" for title in RULES)
    print(f"measured: {figures}, besides AdamW's {1e3 * results['measured']['summary'][ADAMW]['seconds']:.2f}")


if __name__ == "__main__":
    main()
