"""Steps of Lipsum-FT, StarFT and CAR-FT against their equations written out in float64, along every path."""

import copy
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from distributed import run_ranks
from step_oracle import LABELS, PROMPTS, WIDTH, Stage, add_noise, assert_same_gradients, batches
from torch import Tensor

from dive_fast.config.schema import ModelConfig, ObjectiveConfig
from dive_fast.data.prompt_files import Template
from dive_fast.data.prompts import pack
from dive_fast.engine.step import Engine, StepBatches
from dive_fast.evaluation.text_features import embed_texts
from dive_fast.methods import registry
from dive_fast.methods.method import Method, Part, Start
from dive_fast.model.towers import create, tokenizer_of

STEP, PER_EPOCH, STEPS, SEED = 12, 10, 30, 7
"""Step 12 is in the second of three epochs."""
OPTIONS: dict[str, dict[str, Any]] = {
    "lipsum": {"distillation_weight": 0.5, "random_texts": 5, "random_tokens": 3},
    "starft": {"distillation_weight": 30.0},
    "car_ft": {"distillation_weight": 100.0},
}
TERM = {"lipsum": "random_text_loss", "starft": "second_prompt_loss", "car_ft": "context_loss"}
SECOND_PROMPTS = [
    f"{prompt} {'on a wall' if row % 3 else 'in the rain at dusk'}." for row, prompt in enumerate(PROMPTS)
]
TEMPLATES, NAMES = ("a photo of a {}", "a {} at night", "the {} in a box."), ("ant", "bee", "cat", "dog", "elk")
STAGES = {1: (0,), 2: (0, 1, 2)}
"""Number of ranks -> ZeRO stages of Lipsum-FT; the others run at the last one."""
PATHS: list[tuple[str, int | None]] = [("sequential", None), ("sequential", 3)]


def make_method(name: str, **options: Any) -> Method:
    objective = ObjectiveConfig(name=name, **(OPTIONS[name] | options))
    return registry.create(objective, WIDTH, total_steps=STEPS, steps_per_epoch=PER_EPOCH, seed=SEED)


def oracle(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Parameter gradients and losses in float64, on one process, by open_clip's model."""
    frozen = open_clip.create_model(f"local-dir:{folder}").eval()
    student = copy.deepcopy(frozen)
    student.load_state_dict(add_noise(frozen.state_dict()))
    if name != "starft":
        # Teacher and student share the frozen text tower and the scale.
        shared = {key: value for key, value in student.state_dict().items() if not key.startswith("visual.")}
        frozen.load_state_dict(frozen.state_dict() | shared)
    frozen, student = frozen.double(), student.double()
    data, tokenizer = batches(folder), tokenizer_of(ModelConfig(name=f"local-dir:{folder}"))
    images, labels, scale = data["target_images"].double(), torch.tensor(LABELS), frozen.logit_scale.exp().detach()

    def texts(model: Any, tokens: Tensor) -> Tensor:
        return F.normalize(model.encode_text(tokens), dim=-1)

    f, f0 = F.normalize(student.encode_image(images)), F.normalize(frozen.encode_image(images)).detach()
    if name == "starft":
        second = tokenizer(SECOND_PROMPTS)
        g, term = texts(student, data["target_tokens"]), torch.zeros(())
        logits = student.logit_scale.exp() * f @ g.T
        diagonal = torch.arange(len(f))
        first = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
        g2, g02 = texts(student, second), texts(frozen, second).detach()
        for i in range(len(f)):
            others = [j for j in range(len(f)) if LABELS[j] != LABELS[i]]
            p, p0 = (
                torch.softmax(torch.stack([scale * rows[i] @ columns[j] for j in others]), 0)
                for rows, columns in ((f, g2), (f0, g02))
            )
            term = term + (p0 * (p0.log() - p.log())).sum() / len(f)
        parameters, values = dict(student.named_parameters()), {"contrastive_loss": first}
        factor = 1 - 2 / 3
    else:
        head = {part: data[part].double().requires_grad_() for part in ("head.weight", "head.bias")}
        first = F.cross_entropy(f @ head["head.weight"].T + head["head.bias"], labels)
        if name == "lipsum":
            generator = np.random.Generator(np.random.Philox(key=[SEED, 4], counter=[0, 0, STEP, 0]))
            rows = [[49406, *row, 49407] for row in generator.integers(0, 49406, (5, 3)).tolist()]
            r = texts(frozen, F.pad(torch.tensor(rows), (0, 72))).detach()
            change = [(scale * (r @ f[i] - r @ f0[i])).square().sum() / (2 * len(r)) for i in range(len(f))]
        else:
            c = torch.stack([texts(frozen, tokenizer([t.format(n) for n in NAMES])).mean(0) for t in TEMPLATES])
            c = F.normalize(c).detach()
            p, p0 = torch.softmax(scale * f @ c.T, 1), torch.softmax(scale * f0 @ c.T, 1)
            change = [(p0[i] * (p0[i] / p[i]).log()).sum() for i in range(len(f))]
        term, factor = torch.stack(change).mean(), 1.0
        parameters = {n: p for n, p in student.named_parameters() if n.startswith("visual.")} | head
        values = {"cross_entropy": first}
    loss = first + factor * OPTIONS[name]["distillation_weight"] * term
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    values |= {"loss": loss, TERM[name]: term}
    return dict(zip(parameters, gradients, strict=True)), {key: value.item() for key, value in values.items()}


class TextStage(Stage):
    """The oracle's batches with second prompts."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        model = ModelConfig(name=f"local-dir:{folder}")
        self.pretrained, self.tokenizer = create(model), tokenizer_of(model)
        rows = list(self.ranks.local_range(len(LABELS)))
        second = pack(self.tokenizer(SECOND_PROMPTS)[rows], "argmax")
        self.target = dataclasses.replace(self.target, second_text=second)

    def started(self, name: str, zero: int, schedule: str, micro: int | None, **options: Any) -> Engine:
        """An engine at the oracle's step, whose teacher has the pre-trained weights that the student lacks."""
        method = options.pop("method", None) or make_method(name, **options)
        towers = self.student.eval()
        method.start(
            Start(
                lambda texts: embed_texts(towers, self.tokenizer, texts, self.ranks),
                *(self.tokenizer, towers.vocabulary, towers.pooled_at),
                *(NAMES, tuple(map(Template, TEMPLATES))),
            )
        )
        engine = self.engine(zero, schedule, micro, method, name=name)
        engine.set_step(STEP)
        pretrained = dict(self.pretrained.named_parameters())
        assert engine.teacher is not None
        with torch.no_grad():
            for key, parameter in engine.teacher.copies.items():
                parameter.copy_(pretrained[key])
        return engine

    def accumulate(self, engine: Engine) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Gradients and metrics of one step."""
        step = super().accumulate(engine)
        engine.deepspeed.destroy()
        return step


def run_paths(folder: Path, stages: tuple[int, ...]) -> dict[Any, Any]:
    Part.backend = "torch"
    stage = TextStage(folder)
    results: dict[Any, Any] = {}
    for name, (schedule, micro) in itertools.product(OPTIONS, PATHS):
        for zero in stages if name == "lipsum" else stages[-1:]:
            results[name, zero, schedule, micro] = stage.accumulate(stage.started(name, zero, schedule, micro))
    if stage.ranks.world_size == 1:
        results["joint"] = {
            schedule: joint_with_reference(stage, schedule) for schedule in ("sequential", "joint")
        }
        results["weight 0"] = {name: without_distillation(stage, name) for name in OPTIONS}
        results["skipped"] = step_after_skipped(stage)
    return results


def joint_with_reference(stage: TextStage, schedule: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """StarFT on the target half with DiVE on the reference half, in micro-batches."""
    objective = {
        "name": None,
        "target": {"name": "starft", **OPTIONS["starft"]},
        "reference": "dive",
        "weight": 9.0,
    }
    method = registry.create(
        ObjectiveConfig.model_validate(objective), WIDTH, total_steps=STEPS, steps_per_epoch=PER_EPOCH
    )
    return stage.accumulate(stage.started("dive", 0, schedule, 3, method=method))


def without_distillation(stage: TextStage, name: str) -> tuple[bool, bool]:
    """Whether gradients and loss without distillation are those of the method below it, bit for bit."""
    base = "flyp" if name == "starft" else "vanilla_ft"
    expected, values = stage.accumulate(stage.engine(0, name=base))
    engine, with_second = stage.started(name, 0, "sequential", None, distillation_weight=0.0), stage.target
    # As the run's data, since there are no templates.
    stage.target = dataclasses.replace(with_second, second_text=None)
    gradients, metrics = stage.accumulate(engine)
    stage.target = with_second
    are_equal = all(torch.equal(gradients[key], gradient) for key, gradient in expected.items())
    return are_equal and gradients.keys() == expected.keys(), values == metrics


def step_after_skipped(stage: TextStage) -> list[float]:
    """Losses of Lipsum-FT where the step before is skipped and where it is not made: texts count steps."""
    losses = []
    for is_made in (True, False):
        engine = stage.started("lipsum", 0, "sequential", None)
        if is_made:
            engine.steps_done = STEP - 1
            bad = dataclasses.replace(stage.target, images=stage.target.images * math.nan)
            engine.step(StepBatches(bad))
        losses.append(float(engine.accumulate(StepBatches(stage.target))["random_text_loss"]))
        engine.deepspeed.destroy()
    return losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.write_model(path)
    return path


@pytest.fixture(scope="module")
def by_ranks(folder: Path) -> dict[int, list[dict[Any, Any]]]:
    return {count: run_ranks(count, run_paths, folder, stages, init=False) for count, stages in STAGES.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_path_has_the_gradients_of_the_equations(
    folder: Path, by_ranks: dict[int, list[dict[Any, Any]]], name: str
) -> None:
    expected, losses = oracle(folder, name)
    paths = [(key, path) for ranks in by_ranks.values() for path in ranks for key in path if key[0] == name]
    assert len(paths) >= 6
    for key, path in paths:
        gradients, metrics = path[key]
        assert_same_gradients(gradients, expected, 1e-5)
        for metric, value in losses.items():
            assert metrics[metric] == pytest.approx(value, rel=1e-4), (key, metric)
        assert metrics.keys() - losses.keys() <= {"logit_scale"}
    # The distillation is a visible part of the gradient.
    assert losses[TERM[name]] > 1e-3


def test_joint_step_with_reference_loss_equals_sequential_one(by_ranks: dict[int, list[dict[Any, Any]]]) -> None:
    (sequential, losses), (joint, joint_losses) = by_ranks[1][0]["joint"].values()
    assert_same_gradients(joint, sequential, 1e-5)
    assert joint_losses == pytest.approx(losses, rel=1e-4)
    assert {"second_prompt_loss", "average_loss"} <= losses.keys()


def test_weight_zero_has_the_bits_of_the_method_below(by_ranks: dict[int, list[dict[Any, Any]]]) -> None:
    assert by_ranks[1][0]["weight 0"] == dict.fromkeys(OPTIONS, (True, True))


def test_random_texts_count_skipped_steps(by_ranks: dict[int, list[dict[Any, Any]]]) -> None:
    after_skipped, alone = by_ranks[1][0]["skipped"]
    assert after_skipped == alone > 0
