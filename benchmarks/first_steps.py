"""Whether DiVE's first steps should be spared its difference losses: ``python benchmarks/first_steps.py``.

At step 1 the tuned model is the frozen one, so AVL + PVL is the square of rounding, and its gradient is rounding
times lambda. AdamW divides by the gradient's size and makes full steps of it. The demo's model takes some steps
with plain PyTorch, in fp32 and in fp64, from the same weights on the same pairs. How far the two are apart,
relative to how far they have moved, says what share of the movement is rounding; the losses on other pairs say
whether it matters.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dive_fast.config import load
from dive_fast.demo import world
from dive_fast.kernels import naive
from dive_fast.towers import create, tokenizer_of

CONFIGS = Path(__file__).parents[1] / "launch/configs"
RISE = 15
WAYS: dict[str, Callable[[int], float]] = {
    "step 1 (the paper)": lambda step: 1.0,
    "step 2": lambda step: float(step > 1),
    f"step 2, rising over {RISE}": lambda step: min(1.0, (step - 1) / RISE),
}
"""From when on, and the share of lambda at a step counted from 1."""


class Pairs(NamedTuple):
    """Images ``(B, 3, H, W)`` and tokens ``(B, L)``."""

    images: Tensor
    tokens: Tensor


class Outcome(NamedTuple):
    """All weights in one vector after each step of interest; losses on pairs that were not trained on."""

    weights: dict[int, Tensor]
    contrastive: float
    difference: float


def pairs(towers: Any, tokenize: Any, split: str, count: int, first: int) -> Pairs:
    """Pairs ``first ...`` of a split of the demo's world."""
    samples = [world.sample(split, index) for index in range(first, first + count)]
    preprocess = towers.preprocess
    images = [preprocess.tensor(preprocess.cut(sample.image, None)).float() for sample in samples]
    return Pairs(torch.stack(images), torch.as_tensor(tokenize([sample.text for sample in samples])))


def fine_tune(
    towers: Any, batches: list[tuple[Pairs, Pairs]], heldout: tuple[Pairs, Pairs], **options: Any
) -> Outcome:
    """Steps by AdamW as the demo's config has it, in the dtype of ``towers``."""
    weight, share, steps = options["weight"], options["share"], options["steps"]
    dtype = next(towers.parameters()).dtype
    frozen = copy.deepcopy(towers).requires_grad_(False)
    average = torch.zeros(towers.width, dtype=dtype)
    optimizer = torch.optim.AdamW(towers.parameters(), lr=6e-4, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / RISE))

    def features(model: Any, batch: Pairs) -> tuple[Tensor, Tensor]:
        return model.encode_image(batch.images.to(dtype)), model.encode_text(batch.tokens)

    def losses(target: Pairs, reference: Pairs) -> tuple[Tensor, naive.DifferenceLoss]:
        with torch.no_grad():
            teacher = [naive.unit(rows) for rows in features(frozen, reference)]
        contrastive = naive.contrastive_loss(*features(towers, target), towers.scale())
        return contrastive, naive.difference_loss(*features(towers, reference), *teacher, average)

    def vector() -> Tensor:
        return torch.cat([parameter.detach().double().flatten() for parameter in towers.parameters()])

    weights = {0: vector()}
    for step, (target, reference) in enumerate(batches, start=1):
        optimizer.zero_grad()
        contrastive, difference = losses(target, reference)
        (contrastive + weight * share(step) * difference.loss).backward()
        average = difference.average_vector
        optimizer.step()
        schedule.step()
        if step in steps:
            weights[step] = vector()
    with torch.no_grad():
        contrastive, difference = losses(*heldout)
    return Outcome(weights, contrastive.item(), difference.loss.item())


def main() -> None:
    """Trains, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", nargs="+", type=float, default=[0.1, 1000.0], help="lambda")
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[1, 10, 30], help="after which the two are compared"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="B, and B'")
    options = parser.parse_args()
    config, count = load("demo", [], CONFIGS).model, options.batch_size
    towers, tokenize = create(config), tokenizer_of(config)
    batches = [
        (pairs(towers, tokenize, "target", count, first), pairs(towers, tokenize, "reference", count, first))
        for first in range(0, count * max(options.steps), count)
    ]
    heldout = (
        pairs(towers, tokenize, "target", 128, count * max(options.steps)),
        pairs(towers, tokenize, "reference", 128, count * max(options.steps)),
    )
    print("| lambda | difference losses from | " + " | ".join(f"after {step}" for step in options.steps), end="")
    print(
        " | contrastive loss, fp32 / fp64 | AVL + PVL, fp32 / fp64 |\n" + "|---" * (4 + len(options.steps)) + "|"
    )
    for weight in options.weights:
        for way, share in WAYS.items():
            single, double = (
                fine_tune(
                    copy.deepcopy(towers).to(dtype),
                    batches,
                    heldout,
                    weight=weight,
                    share=share,
                    steps=options.steps,
                )
                for dtype in (torch.float32, torch.float64)
            )
            start = double.weights[0]
            apart = [
                float((single.weights[step] - double.weights[step]).norm() / (double.weights[step] - start).norm())
                for step in options.steps
            ]
            figures = [f"{share:.2%}" for share in apart]
            figures += [f"{single.contrastive:.3f} / {double.contrastive:.3f}"]
            figures += [f"{single.difference:.2e} / {double.difference:.2e}"]
            print(f"| {weight:g} | {way} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
