"""Measures the cost of ZeRO on one rank: ``python benchmarks/zero.py --model ViT-B-32 --batch 8``.

Compares DiVE's step in plain PyTorch with every lever of the engine, in the engine without ZeRO, and with its
stages, on one batch. The steps take turns, so that ratios are within one run.
"""

import argparse
import copy
import dataclasses
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from loss_report import REPOSITORY, commit, device_name, slug, write_json
from losses import DEVICE
from measure_losses import peak_extra_bytes, timed
from peers.levers import DiveWithLevers, Levers
from steps import TOTAL_STEPS, Case, make_batches, make_engine, make_inputs, random_model, teacher_rows

from dive_fast.model.towers import Towers

PLAIN = "plain PyTorch"
UNALIGNED = "ZeRO 1, unaligned"
STEPS = {PLAIN: None, "no ZeRO": 0, "ZeRO 1": 1, UNALIGNED: 1, "ZeRO 2": 2, "ZeRO 3": 3}
"""ZeRO stage of each step."""
FIRST_STEPS = 16 if DEVICE.type == "cuda" else 3
"""Warm-up steps: fp16 skips some after an overflow, and optimizers allocate."""


def make_step(case: Case, stage: int | None, aligned: bool = True) -> Callable[[], Any]:
    """Creates a step with its own copy of the model.

    Args:
        stage: ZeRO stage; None: plain PyTorch.
        aligned: whether ZeRO 1 and 2 align parameters.
    """
    model = copy.deepcopy(random_model(case.model)).to(DEVICE)
    if stage is not None:
        linear, batches = F.linear, make_batches(case)[0]
        engine = make_engine(case, model, stage, {} if aligned else {"parameter_alignment": False})
        return with_linear(lambda: engine.step(dataclasses.replace(batches)), linear)
    on_gpu = DEVICE.type == "cuda"
    levers = Levers(half_precision=on_gpu, sequential=True, cached_teacher=True, trimmed_text=True)
    levers = levers._replace(distinct_texts=True, fused_losses=on_gpu)
    plain = DiveWithLevers(Towers(model), None, levers, total_steps=TOTAL_STEPS)
    return partial(plain.step, levers.prepare(make_inputs(*case.sizes), teacher_rows(*case.sizes)))


def with_linear(step: Callable[[], Any], original: Any) -> Callable[[], Any]:
    """Restores ``F.linear``, and wraps a step to use ZeRO-3's replacement of it only while it runs.

    Args:
        original: ``F.linear`` for all other steps.
    """
    replacement, F.linear = F.linear, original

    def wrapped_step() -> Any:
        F.linear = replacement
        try:
            return step()
        finally:
            F.linear = original

    return wrapped_step


def main() -> None:
    """Measures, prints a table and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "build/benchmarks")
    options = parser.parse_args()
    case = Case(options.model, options.batch, "dive_fast")
    make_batches(case)  # cached here, so that their memory does not count for the first step
    steps: dict[str, Callable[[], Any]] = {}

    def begin(name: str) -> None:
        steps[name] = make_step(case, STEPS[name], aligned=name != UNALIGNED)
        for _ in range(FIRST_STEPS):
            steps[name]()

    peaks = {name: peak_extra_bytes(partial(begin, name)) for name in STEPS}
    rounds = [{name: timed(step) for name, step in steps.items()} for _ in range(options.rounds)]
    ratios = {}
    print("| step | time | over plain PyTorch | peak memory |\n|---|---|---|---|")
    for name, peak in peaks.items():
        seconds = statistics.median(each[name] for each in rounds)
        ratios[name] = statistics.median(each[name] / each[PLAIN] for each in rounds)
        print(f"| {name} | {1e3 * seconds:.0f} ms | {ratios[name]:.2f} | {peak / 2**30:.2f} GiB |", flush=True)
    results = {"device": device_name(), "commit": commit(), "case": case._asdict()}
    results |= {"peak_bytes": peaks, "rounds": rounds}
    print("measured: over plain PyTorch: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))
    write_json(options.results / f"{slug(device_name())}-zero.json", results)


if __name__ == "__main__":
    main()
