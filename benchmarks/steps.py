"""Time, memory and arithmetic of a training step, against FLYP's and DiVE's as published.

``python benchmarks/steps.py --minutes 9`` measures, writes and draws; ``--draw RESULTS`` only draws
(README.md says what is compared).
"""

import argparse
import copy
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from loss_report import REPOSITORY
from losses import DEVICE
from peers.dive_published import DivePublished
from peers.flyp import Flyp, Inputs
from peers.levers import DiveWithLevers, Levers
from step_report import RESULTS, draw, results_path
from torch import Tensor

from dive_fast.config.schema import Config
from dive_fast.data.batch import ReferenceBatch, TargetBatch
from dive_fast.distributed import join
from dive_fast.engine.step import Engine, StepBatches
from dive_fast.methods import registry
from dive_fast.methods.run_config import RunConfig
from dive_fast.model import features
from dive_fast.model.towers import Towers, unit

open_clip.add_model_config(Path(__file__).with_name("models"))
SHIPPED = REPOSITORY / "launch/configs/vitb16_dive.json"
# CPUs compute fp16 many times slower than fp32.
PRECISION = "fp16" if DEVICE.type == "cuda" else "fp32"
ZERO = 0
"""What the shipped config's ``auto`` is on one rank."""
COMPILED = ("flyp_fast_compiled", "dive_fast_compiled")
BF16, JOINT = "dive_fast_bf16", "dive_fast_joint"
ENGINES = ("flyp_fast", "dive_fast", *COMPILED, BF16, JOINT)
"""Competitors that are the project's engine."""
NEEDS_GPU = ("half_precision", "fused_losses", "compiled_blocks", *COMPILED, BF16)
TOTAL_STEPS = 25_020  # ten epochs of ImageNet at B = 512
CAPTION_TOKENS = 8, 30  # start and end included
PROMPT_TOKENS = 17  # of the longest of 512 that are drawn
TEACHER_PIECE = 64  # pairs embedded at once for the cached rows

ENDS = ("flyp_published", "dive_fast", "dive_published", "flyp_fast")
COMPETITORS = ("flyp_published", "dive_published", *Levers._fields, *ENGINES)


class Case(NamedTuple):
    """One figure: steps of B target pairs, and of as many reference pairs where there is DiVE."""

    model: str
    batch: int
    competitor: str
    reference_batch: int | None = None
    """B', where it is not B."""

    def __str__(self) -> str:
        ending = "" if self.reference_batch is None else f"-{self.reference_batch}"
        return f"{self.model}-{self.batch}-{self.competitor}{ending}"

    @property
    def sizes(self) -> tuple[str, int, int]:
        """Model, B and B'."""
        return self.model, self.batch, self.reference_batch or self.batch


class Running(NamedTuple):
    """A competitor, ready to go."""

    step: Callable[[], dict[str, Tensor]]
    loss_scale: Callable[[], float]
    """Falls where a step is skipped for an overflow."""


def cases() -> list[Case]:
    """The most telling first: time may not suffice for all."""
    if DEVICE.type != "cuda":
        return [*(Case("ViT-tiny", 8, name) for name in COMPETITORS), Case("ViT-tiny", 8, "dive_fast", 4)]
    # DiVE as published needs more memory at B = 512 than one GPU has: its levers are measured at half of it.
    parts = [
        ("ViT-B-16", 512, (*ENDS, *COMPILED)),
        ("ViT-B-16", 256, ENDS),
        ("ViT-B-16", 256, Levers._fields),
        ("ViT-L-14", 256, (*ENDS, *COMPILED)),
        ("ViT-B-16", 256, (BF16, JOINT)),
        ("ViT-B-16", 512, Levers._fields),
    ]
    compared = (Case(model, batch, name) for model, batch, names in parts for name in names)
    fewer = (Case("ViT-B-16", 512, "dive_fast", reference_batch) for reference_batch in (256, 128, 64))
    scaled = (Case("ViT-B-16", batch, "dive_fast") for batch in (128, 64, 1024))
    return [*compared, *fewer, *scaled]


CASES = cases()


@contextmanager
def running(case: Case, zero: int) -> Iterator[Running]:
    """A competitor's step on the same batch again and again.

    Args:
        zero: DeepSpeed's ZeRO stage, for the engine.
    """

    def without_scale() -> float:
        return 1.0

    inputs = make_inputs(*case.sizes)
    model = copy.deepcopy(random_model(case.model)).to(DEVICE)
    recipe = {"total_steps": TOTAL_STEPS}
    if case.competitor == "flyp_published":
        yield Running(partial(Flyp(model, **recipe).step, inputs), without_scale)
    elif case.competitor == "dive_published":
        peer = DivePublished(model, copy.deepcopy(model), **recipe)
        yield Running(partial(peer.step, inputs), without_scale)
    elif case.competitor in Levers._fields:
        levers = Levers(**{case.competitor: True})
        rows = teacher_rows(*case.sizes)
        teacher = rows if levers.cached_teacher else Towers(copy.deepcopy(model))
        lever = DiveWithLevers(Towers(model), teacher, levers, **recipe)
        yield Running(partial(lever.step, levers.prepare(inputs)), lever.scaler.get_scale)
    else:
        engine, batches = make_engine(case, model, inputs, zero)
        try:
            yield Running(lambda: engine.step(replace(batches)), lambda: float(engine.scale.value))
        finally:
            engine.deepspeed.destroy()


def make_engine(case: Case, model: Any, inputs: Inputs, zero: int) -> tuple[Engine, StepBatches]:
    """The project's engine, and the batches of every step."""
    config = engine_config(case, PRECISION, zero)
    towers = Towers(model)
    method = registry.create(config.objective, towers.width)
    engine = Engine(config, towers, method, join(), TOTAL_STEPS)
    prepared = Levers(trimmed_text=True, distinct_texts=True).prepare(inputs)
    nothing = torch.zeros(0, dtype=torch.long)  # the step reads neither labels nor samples
    target = TargetBatch(prepared.target_images, prepared.target_text, nothing, nothing, ())
    if not method.needs.reference:
        return engine, StepBatches(target)
    reference = ReferenceBatch(prepared.reference_images, prepared.reference_text, nothing, nothing, ())
    return engine, StepBatches(target, reference, features.Pairs(*teacher_rows(*case.sizes)))


def engine_config(case: Case, precision: str, zero: int) -> Config:
    """The shipped config with the case's sizes and its competitor's options.

    Args:
        precision: of all competitors but those that are there for another.
    """
    section = json.loads(SHIPPED.read_text())["deepspeed"]
    section["zero_optimization"]["stage"] = zero
    _, batch, reference_batch = case.sizes
    data = {"format": "webdataset", "path": "-"}
    train = {
        "precision": "bf16" if case.competitor == BF16 else precision,
        "compile": case.competitor in COMPILED,
        "schedule": "joint" if case.competitor == JOINT else "sequential",
    }
    tree = {
        "model": {"name": case.model},
        "data": {
            "target": data | {"batch_size": batch, "class_names": "imagenet", "text_length": PROMPT_TOKENS},
            "reference": data | {"batch_size": reference_batch, "text_length": CAPTION_TOKENS[1]},
        },
        "objective": {"name": case.competitor.split("_fast")[0]},
        "train": train,
        "deepspeed": section,
    }
    return RunConfig.model_validate_json(json.dumps(tree))


# Cases of one size follow one another.
@lru_cache(maxsize=1)
def random_model(name: str) -> Any:
    """An open_clip model with random weights, on the CPU; the same for every competitor."""
    torch.manual_seed(0)
    return open_clip.create_model(name, force_custom_text=True)


@lru_cache(maxsize=1)
def make_inputs(model: str, batch: int, reference_batch: int) -> Inputs:
    """Noise for images; ImageNet's prompts as FLYP draws them; captions as long as those of the web."""
    generator, draws = torch.Generator(DEVICE).manual_seed(0), random.Random(0)
    size = random_model(model).visual.image_size
    images = [
        torch.randn(count, 3, *size, device=DEVICE, generator=generator) for count in (batch, reference_batch)
    ]
    tokenizer = open_clip.get_tokenizer(model)
    names, templates = open_clip.IMAGENET_CLASSNAMES, open_clip.OPENAI_IMAGENET_TEMPLATES
    prompts = tokenizer([draws.choice(templates)(draws.choice(names)) for _ in range(batch)])
    words = " ".join(names).split()
    captions = tokenizer([" ".join(draws.choices(words, k=CAPTION_TOKENS[1])) for _ in range(reference_batch)])
    for row in captions:
        length = draws.randint(*CAPTION_TOKENS)
        row[length - 1] = row.max()  # the end of a text has the largest id
        row[length:] = 0
    return Inputs(images[0], prompts.to(DEVICE), images[1], captions.to(DEVICE))


@lru_cache(maxsize=1)
@torch.no_grad()
def teacher_rows(model: str, batch: int, reference_batch: int) -> tuple[Tensor, Tensor]:
    """The reference batch by the frozen model in fp32, as a teacher cache has it."""
    inputs = make_inputs(model, batch, reference_batch)
    frozen = copy.deepcopy(random_model(model)).to(DEVICE).eval()
    images = [frozen.encode_image(part) for part in inputs.reference_images.split(TEACHER_PIECE)]
    texts = [frozen.encode_text(part) for part in inputs.reference_tokens.split(TEACHER_PIECE)]
    return unit(torch.cat(images)), unit(torch.cat(texts))


def main() -> int:
    """Measures by way of pytest, and draws what it wrote."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9, help="no case is begun that may end later")
    parser.add_argument("--zero", type=int, default=ZERO, help="DeepSpeed's ZeRO stage")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON file and its picture")
    parser.add_argument("--draw", type=Path, metavar="RESULTS", help="only draw these results")
    options = parser.parse_args()
    if options.draw:
        print(draw(options.draw))
        return 0
    arguments = ["--minutes", options.minutes, "--zero", options.zero, "--results", options.results]
    code = pytest.main([str(Path(__file__).with_name("test_steps.py")), *map(str, arguments)])
    print(draw(results_path(options.results)))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
