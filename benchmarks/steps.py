"""Measures time, memory and arithmetic of training steps relative to FLYP and DiVE as published.

``python benchmarks/steps.py --minutes 9`` measures, writes and draws; ``--draw RESULTS`` only draws
(README.md describes the competitors).
"""

import argparse
import copy
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from loss_report import REPOSITORY
from losses import DEVICE
from peers.dive_published import DivePublished
from peers.flyp import Flyp, Inputs
from peers.levers import DiveWithLevers, Levers, Prepared
from step_report import RESULTS, draw, results_path, step_ratios
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
"""Stage that ``auto`` selects on one rank."""
COMPILED = ("flyp_fast_compiled", "dive_fast_compiled")
"""Engines with ``train.compile`` instead of ``train.fast_blocks``."""
PLAIN, BF16, JOINT = "dive_fast_plain", "dive_fast_bf16", "dive_fast_joint"
ENGINES = ("flyp_fast", "dive_fast", PLAIN, *COMPILED, BF16, JOINT)
"""Competitors that are the project's engine."""
NEEDS_GPU = ("half_precision", "fused_losses", "compiled_blocks", *COMPILED, BF16)
TOTAL_STEPS = 25_020  # ten epochs of ImageNet at B = 512
NUM_TURNS = 32
"""Batches of texts that steps take turns with. Each has another number of distinct texts and another length, as in
training, so that a cost of each new shape is measured."""
CAPTION_TOKENS = 8, 30  # with start and end
LONGEST_CAPTION = 20, CAPTION_TOKENS[1]  # of a turn
REPEATED_CAPTIONS = 64  # at most one of so many captions of a turn repeats another
PROMPT_TOKENS = 17  # length of the longest of 512 drawn prompts
TEACHER_PIECE = 64  # pairs embedded at once for the cached rows

ENDS = ("flyp_published", "dive_fast", "dive_published", "flyp_fast")
COMPETITORS = ("flyp_published", "dive_published", *Levers._fields, *ENGINES)


class Case(NamedTuple):
    """One measurement: steps of B target pairs, and of B or B' reference pairs for DiVE."""

    model: str
    batch: int
    competitor: str
    reference_batch: int | None = None
    """B' if it differs from B."""

    def __str__(self) -> str:
        ending = "" if self.reference_batch is None else f"-{self.reference_batch}"
        return f"{self.model}-{self.batch}-{self.competitor}{ending}"

    @property
    def sizes(self) -> tuple[str, int, int]:
        """Model, B and B'."""
        return self.model, self.batch, self.reference_batch or self.batch


class Running(NamedTuple):
    """A competitor's step on the batches of a turn, and its loss scale."""

    step: Callable[[int], dict[str, Tensor]]
    """Takes the number of the turn, from 0; texts repeat after :data:`NUM_TURNS`."""
    loss_scale: Callable[[], float]
    """Decreases if a step is skipped because of an overflow."""
    optimizer: torch.optim.Optimizer


def cases() -> list[Case]:
    """All cases, the most informative first, since time may be limited."""
    if DEVICE.type != "cuda":
        return [*(Case("ViT-tiny", 8, name) for name in COMPETITORS), Case("ViT-tiny", 8, "dive_fast", 4)]
    # DiVE as published exceeds one GPU's memory at B = 512, so its levers are measured at half of it first.
    parts = [
        ("ViT-B-16", 512, (*ENDS, PLAIN, *COMPILED)),
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
def running(case: Case, zero: int, model: Any = None, teacher: Any = None) -> Iterator[Running]:
    """Creates a competitor.

    Args:
        zero: DeepSpeed's ZeRO stage, for the engine.
        model: open_clip model to train; default: a copy of its own.
        teacher: frozen open_clip model; default: a copy of its own.
    """

    def without_scale() -> float:
        return 1.0

    batches = make_batches(case)
    model = copy.deepcopy(random_model(case.model)).to(DEVICE) if model is None else model
    recipe = {"total_steps": TOTAL_STEPS}

    def frozen() -> Any:
        return copy.deepcopy(model) if teacher is None else teacher

    def in_turns(step: Callable[[Any], dict[str, Tensor]]) -> Callable[[int], dict[str, Tensor]]:
        return lambda turn: step(batches[turn % NUM_TURNS])

    if case.competitor == "flyp_published":
        flyp = Flyp(model, **recipe)
        yield Running(in_turns(flyp.step), without_scale, flyp.optimizer)
    elif case.competitor == "dive_published":
        published = DivePublished(model, frozen(), **recipe)
        yield Running(in_turns(published.step), without_scale, published.optimizer)
    elif case.competitor in Levers._fields:
        levers = levers_of(case)
        # The frozen towers are copied before levers change the modules of the tuned ones.
        towers = None if levers.cached_teacher else Towers(frozen())
        peer = DiveWithLevers(Towers(model), towers, levers, **recipe)
        yield Running(in_turns(peer.step), peer.scaler.get_scale, peer.optimizer)
    else:
        engine = make_engine(case, model, zero)
        try:
            # A step consumes its batches.
            step = in_turns(lambda each: engine.step(replace(each)))
            optimizer = getattr(engine.deepspeed.optimizer, "optimizer", engine.deepspeed.optimizer)
            yield Running(step, lambda: float(engine.scale.value), optimizer)
        finally:
            engine.deepspeed.destroy()


def levers_of(case: Case) -> Levers:
    """The levers of a competitor that is DiVE as published with one of them, and of the engine's texts."""
    if case.competitor in ENGINES:
        return Levers(trimmed_text=True, distinct_texts=True, cached_teacher=True)
    return Levers(**{case.competitor: True})


def make_engine(case: Case, model: Any, zero: int, zero_options: dict[str, Any] | None = None) -> Engine:
    """Creates the project's engine, which takes over the model.

    Args:
        zero: DeepSpeed's ZeRO stage.
        zero_options: further keys of ``deepspeed.zero_optimization``.
    """
    config = engine_config(case, PRECISION, zero)
    config.deepspeed["zero_optimization"] |= zero_options or {}
    towers = Towers(model)
    method = registry.create(config.objective, towers.width, total_steps=TOTAL_STEPS)
    return Engine(config, towers, method, join(), TOTAL_STEPS)


# Cases differ in their batches, which are no part of a case's memory.
@lru_cache(maxsize=1)
def make_batches(case: Case) -> list[Any]:
    """The batches of every turn, as the competitor's step takes them."""
    inputs = [make_inputs(*case.sizes, turn) for turn in range(NUM_TURNS)]
    if case.competitor.endswith("_published"):
        return inputs
    levers = levers_of(case)
    rows = [teacher_rows(*case.sizes, turn) if levers.cached_teacher else None for turn in range(NUM_TURNS)]
    frozen_model.cache_clear()
    prepared = [levers.prepare(each, teacher) for each, teacher in zip(inputs, rows, strict=True)]
    return [step_batches(case, each) for each in prepared] if case.competitor in ENGINES else prepared


def step_batches(case: Case, prepared: Prepared) -> StepBatches:
    """Batches of the engine's step."""
    unused = torch.zeros(0, dtype=torch.long)  # the step reads neither labels nor samples
    target = TargetBatch(prepared.target_images, prepared.target_text, unused, unused, ())
    if case.competitor.startswith("flyp"):
        return StepBatches(target)
    assert prepared.teacher is not None
    reference = ReferenceBatch(prepared.reference_images, prepared.reference_text, unused, unused, ())
    return StepBatches(target, reference, features.Pairs(*prepared.teacher))


def engine_config(case: Case, precision: str, zero: int) -> Config:
    """The shipped config with the case's sizes and its competitor's options.

    Args:
        precision: precision of all competitors that do not define their own.
    """
    section = json.loads(SHIPPED.read_text())["deepspeed"]
    section["zero_optimization"]["stage"] = zero
    _, batch, reference_batch = case.sizes
    data = {"format": "webdataset", "path": "-"}
    train = {
        "precision": "bf16" if case.competitor == BF16 else precision,
        "compile": case.competitor in COMPILED,
        "fast_blocks": case.competitor not in (PLAIN, *COMPILED),
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
def make_images(model: str, batch: int, reference_batch: int) -> list[Tensor]:
    """Noise, the same in every turn: images of the target and of the reference batch."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    size = random_model(model).visual.image_size
    return [torch.randn(count, 3, *size, device=DEVICE, generator=generator) for count in (batch, reference_batch)]


@lru_cache(maxsize=NUM_TURNS)
def make_inputs(model: str, batch: int, reference_batch: int, turn: int = 0) -> Inputs:
    """Inputs of a step: noise images, ImageNet's prompts drawn as in FLYP, captions of random words.

    Args:
        turn: selects the texts.
    """
    target_images, reference_images = make_images(model, batch, reference_batch)
    draws, tokenizer = random.Random(turn), open_clip.get_tokenizer(model)
    names, templates = open_clip.IMAGENET_CLASSNAMES, open_clip.OPENAI_IMAGENET_TEMPLATES
    prompts = tokenizer([draws.choice(templates)(draws.choice(names)) for _ in range(batch)])
    longest = draws.randint(*LONGEST_CAPTION) if turn else CAPTION_TOKENS[1]
    rows = []
    for _ in range(reference_batch):
        length = draws.randint(CAPTION_TOKENS[0], longest)
        words = draws.choices(range(1, tokenizer.sot_token_id), k=length - 2)
        padding = [0] * (prompts.shape[1] - length)
        rows.append([tokenizer.sot_token_id, *words, tokenizer.eot_token_id, *padding])
    for _ in range(draws.randint(0, reference_batch // REPEATED_CAPTIONS)):
        rows[draws.randrange(reference_batch)] = rows[draws.randrange(reference_batch)]
    return Inputs(target_images, prompts.to(DEVICE), reference_images, torch.tensor(rows, device=DEVICE))


@lru_cache(maxsize=1)
def frozen_model(model: str) -> Any:
    """The frozen model on the device."""
    return copy.deepcopy(random_model(model)).to(DEVICE).eval()


@lru_cache(maxsize=1)
@torch.no_grad()
def teacher_images(model: str, batch: int, reference_batch: int) -> Tensor:
    """Unit rows of the reference images by the frozen model in fp32, as in a teacher cache."""
    _, images = make_images(model, batch, reference_batch)
    return unit(torch.cat([frozen_model(model).encode_image(part) for part in images.split(TEACHER_PIECE)]))


@lru_cache(maxsize=NUM_TURNS)
@torch.no_grad()
def teacher_rows(model: str, batch: int, reference_batch: int, turn: int = 0) -> tuple[Tensor, Tensor]:
    """Unit rows of the reference batch of a turn by the frozen model in fp32, as in a teacher cache."""
    tokens = make_inputs(model, batch, reference_batch, turn).reference_tokens
    texts = torch.cat([frozen_model(model).encode_text(part) for part in tokens.split(TEACHER_PIECE)])
    return teacher_images(model, batch, reference_batch), unit(texts)


def main() -> int:
    """Measures all cases with pytest and draws the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=9, help="time limit; cases that may exceed it do not start"
    )
    parser.add_argument("--zero", type=int, default=ZERO, help="DeepSpeed's ZeRO stage")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON file and its picture")
    parser.add_argument("--draw", type=Path, metavar="RESULTS", help="only draw these results")
    options = parser.parse_args()
    if options.draw:
        print(draw(options.draw))
        return 0
    arguments = ["--minutes", options.minutes, "--zero", options.zero, "--results", options.results]
    code = pytest.main([str(Path(__file__).with_name("test_steps.py")), *map(str, arguments)])
    path = results_path(options.results)
    print(draw(path))
    ratios = (
        f"{model}, B = {row['batch']}: {row['dive_over_flyp_peer_time']:.2f}"
        for model, row in step_ratios(path).items()
        if "dive_over_flyp_peer_time" in row
    )
    print(f"measured: {', '.join(ratios) or 'DiVE or FLYP as published is missing'}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
