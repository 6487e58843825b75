"""Tests of every hook of a method, by a toy part, against plain PyTorch in one process.

The oracle trains the same towers for a few steps in a plain loop, with one AdamW and each hook written out. The
engine has to end with the same weights at every ZeRO stage, on one and two ranks, with micro-batches and jointly.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from distributed import run_ranks
from safetensors.torch import load_file
from step_oracle import WIDTH, Stage, batches, contrastive_as_written
from torch import Tensor, nn

from dive_fast.checkpoint.export import full_state
from dive_fast.checkpoint.manifest import TEACHER, checkpoint_path
from dive_fast.checkpoint.resume import load_checkpoint
from dive_fast.checkpoint.saver import Saver
from dive_fast.checkpoint.snapshot import RunRecord
from dive_fast.config.schema import ObjectiveConfig, TrainConfig
from dive_fast.config.section import Section
from dive_fast.engine.step import Engine, StepBatches, check_hooks
from dive_fast.errors import ConfigError
from dive_fast.methods import registry
from dive_fast.methods.flyp import Contrastive
from dive_fast.methods.flyp_replay import Replay
from dive_fast.methods.method import (
    FirstStep,
    Group,
    ImageInfo,
    Loss,
    Method,
    Part,
    Setting,
    Student,
    TeacherOutputs,
    View,
    over_ranks,
)
from dive_fast.model.features import Outputs
from dive_fast.model.towers import Towers

STEPS, RATE, PENALTY, IMAGE_STEP, WEIGHT_STEP, VIEW_STEP = 3, 0.25, 0.05, 0.02, 0.01, 0.02
HOOKS = ("teacher", "penalty", "images", "weights", "views", "tuned")
TRAIN = {"learning_rate": 1e-2, "warmup_steps": 0, "epsilon": 1e-3, "weight_decay": 0.1}
"""Options of both loops; the large epsilon keeps AdamW from amplifying rounding to full steps."""
FROZEN = "text.token_embedding"
TOLERANCE = 5e-5
STAGES = {1: (0,), 2: (0, 2)}
PATHS: list[tuple[str, int | None]] = [("sequential", None), ("joint", 3), ("sequential", 3)]


class Toy(Contrastive):
    """The contrastive loss and all hooks; ``hooks`` says which of them do something."""

    name, title = "toy", "toy"
    updates: Tensor

    def __init__(self, hooks: tuple[str, ...]) -> None:
        super().__init__(self.Options(), Setting(WIDTH))
        self.enabled = hooks
        self.register_buffer("updates", torch.zeros(()))

    def loss(
        self, outputs: Outputs, labels: Tensor, group: Group = None, teacher: TeacherOutputs | None = None
    ) -> Loss:
        loss = super().loss(outputs, labels, group)
        for view in outputs.views:
            distance = (F.normalize(view.image) - F.normalize(outputs.image)).square().sum(1)
            loss = loss._replace(loss=loss.loss + over_ranks(distance.mean(), group))
        if teacher is None:
            return loss
        assert outputs.text is not None
        assert teacher.text is not None
        distance = (F.normalize(outputs.image) - teacher.image).square().sum(1)
        distance = distance + (F.normalize(outputs.text) - teacher.text).square().sum(1)
        return Loss(
            loss.loss + over_ranks(distance.mean(), group) * teacher.logit_scale.squeeze() / 10, loss.metrics
        )

    def teacher_rate(self, applied: Tensor) -> Tensor:
        # A schedule that counts updates; skipped steps do not count.
        self.updates += applied
        return RATE / self.updates.clamp(min=1)

    def penalty(self, towers: Towers) -> Tensor | None:
        if "penalty" not in self.enabled:
            return None
        return PENALTY * torch.stack([p.square().sum() for p in towers.parameters() if p.requires_grad]).sum()

    def change_images(self, images: Tensor, outputs: Any, info: ImageInfo) -> Tensor:
        if "images" not in self.enabled:
            return images
        assert info.labels is not None
        images = images.clone().requires_grad_()
        # Sample by sample, so that micro-batches change images as the whole batch does.
        (gradient,) = torch.autograd.grad(outputs(images).pairs.image.square().sum(), images)
        return images.detach() + IMAGE_STEP * gradient.sign()

    def change_weights(self, towers: nn.Module) -> contextlib.AbstractContextManager[None]:
        return shifted(towers, WEIGHT_STEP)

    def views(self, images: Tensor, student: Student, info: ImageInfo) -> Sequence[View]:
        assert not student.towers.training
        return View(0.5 * images), View(info.unchanged, lambda: shifted(student.towers, -VIEW_STEP))

    def tunes(self, parameter: str) -> bool:
        return "tuned" not in self.enabled or not parameter.startswith(FROZEN)


@contextlib.contextmanager
def shifted(towers: nn.Module, step: float) -> Iterator[None]:
    """A context in which every weight is moved by ``step`` times its sign."""
    before = {name: p.detach().clone() for name, p in towers.named_parameters()}
    with torch.no_grad():
        for p in towers.parameters():
            p += step * p.sign()
    yield
    with torch.no_grad():
        for name, p in towers.named_parameters():
            p.copy_(before[name])


class MovingTeacherToy(Toy):
    """The toy with a moving teacher."""

    teacher = "moving"


class FrozenTeacherToy(Toy):
    """The toy with a frozen teacher."""

    teacher = "frozen"


def toy(*hooks: str) -> Method:
    kind = MovingTeacherToy if "teacher" in hooks else FrozenTeacherToy if "frozen teacher" in hooks else Toy
    names = {"weights": "change_weights", "views": "views"}
    absent = {name: getattr(Part, name) for hook, name in names.items() if hook not in hooks}
    kind = type(kind.__name__, (kind,), absent)
    return Method(kind(hooks), Replay(Replay.Options(), Setting(WIDTH, 0.5)))


def oracle(
    stage: Stage, hooks: tuple[str, ...], steps: int = STEPS
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of student and teacher after some steps in one process, with every hook written out."""
    towers, teacher = (copy.deepcopy(stage.student).train() for _ in range(2))
    teacher.eval()
    data = batches(stage.folder)
    tuned = {n: p for n, p in towers.named_parameters() if "tuned" not in hooks or not n.startswith(FROZEN)}
    for name, p in towers.named_parameters():
        p.requires_grad_(name in tuned)
    groups = [{"params": list(tuned.values()), "weight_decay": TRAIN["weight_decay"]}]
    optimizer = torch.optim.AdamW(groups, lr=TRAIN["learning_rate"], eps=TRAIN["epsilon"])

    def encode(model: Towers, half: str, images: Tensor) -> tuple[Tensor, Tensor]:
        text = model.encode_text(data[f"{half}_tokens"])
        return F.normalize(model.encode_image(images), dim=-1), F.normalize(text, dim=-1)

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = TRAIN["learning_rate"] * 0.5 * (1 + math.cos(math.pi * step / 10))
        images = data["target_images"]
        if "images" in hooks:
            images = images.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(towers.encode_image(images).square().sum(), images)
            images = images.detach() + IMAGE_STEP * gradient.sign()
        with torch.no_grad():
            frozen = encode(teacher, "target", images)
        before = {name: p.detach().clone() for name, p in towers.named_parameters()}
        if "weights" in hooks:
            with torch.no_grad():
                for p in towers.parameters():
                    p += WEIGHT_STEP * p.sign()
        f, g = encode(towers, "target", images)
        loss = contrastive_as_written(f, g, towers.scale())
        if "views" in hooks:
            # At shifted weights, the graph of the other rows would read the weights of the view.
            other = copy.deepcopy(towers)
            with torch.no_grad():
                for p in other.parameters():
                    p -= VIEW_STEP * p.sign()
            shifted_rows, _ = encode(other, "target", data["target_images"])
            half, _ = encode(towers, "target", 0.5 * images)
            loss = loss + sum((rows - f).square().sum(1).mean() for rows in (half, shifted_rows))
        if "teacher" in hooks or "frozen teacher" in hooks:
            distance = (f - frozen[0]).square().sum(1) + (g - frozen[1]).square().sum(1)
            loss = loss + distance.mean() * teacher.scale().detach().squeeze() / 10
        loss.backward()
        if "views" in hooks:
            for p, q in zip(towers.parameters(), other.parameters(), strict=True):
                if p.requires_grad and q.grad is not None:
                    p.grad = q.grad if p.grad is None else p.grad + q.grad
        with torch.no_grad():
            for name, p in towers.named_parameters():
                p.copy_(before[name])
        f, g = encode(towers, "reference", data["reference_images"])
        loss = 0.5 * contrastive_as_written(f, g, towers.scale())
        if "penalty" in hooks:
            loss = loss + PENALTY * torch.stack([p.square().sum() for p in tuned.values()]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            if "teacher" in hooks:
                for (_, average), (_, student) in zip(
                    teacher.named_parameters(), towers.named_parameters(), strict=True
                ):
                    average.lerp_(student, RATE / (step + 1))
    weights = {name: p.detach().clone() for name, p in towers.named_parameters()}
    return weights, {name: p.detach().clone() for name, p in teacher.named_parameters()}


def make_steps(stage: Stage, engine: Engine, count: int = STEPS) -> dict[str, Tensor]:
    """Makes some steps and returns the metrics of the last one."""
    metrics: dict[str, Tensor] = {}
    for _ in range(count):
        metrics = engine.step(StepBatches(stage.target, stage.reference))
    return metrics


WITHOUT_WEIGHTS = tuple(hook for hook in HOOKS if hook not in ("weights", "views"))
CASES = [*((hook,) for hook in (*HOOKS, "frozen teacher")), HOOKS, WITHOUT_WEIGHTS]


def run_hooks(folder: Path, stages: tuple[int, ...]) -> dict[str, Any]:
    """Final weights, teacher and metrics of every case along every path on one rank."""
    Part.backend = "torch"
    stage, results = Stage(folder), {}
    for hooks in CASES:
        # The joint schedule cannot change the weights of one half.
        paths = {HOOKS: PATHS[:1], WITHOUT_WEIGHTS: PATHS[1:2]}.get(hooks)
        for zero, (schedule, micro) in itertools.product(stages, paths) if paths else [(stages[-1], PATHS[2])]:
            engine = stage.engine(zero, schedule, micro, toy(*hooks), **TRAIN)
            metrics = make_steps(stage, engine)
            teacher = {} if engine.teacher is None else dict(engine.teacher.state())
            results["+".join(hooks), zero, schedule, micro] = (
                full_state(engine),
                {name: p.clone() for name, p in teacher.items()},
                {name: float(value) for name, value in metrics.items()},
            )
            engine.deepspeed.destroy()
    for zero in stages:
        results["skipped", zero] = skipped_step(stage, zero)
    return results


def skipped_step(stage: Stage, zero: int) -> dict[str, bool]:
    """Whether a step with NaNs on the last rank keeps the state, and whether the next one changes it; fp16."""
    engine = stage.engine(zero, method=toy(*HOOKS), precision="fp16", **TRAIN)
    assert engine.teacher is not None
    make_steps(stage, engine, 1)

    def state() -> dict[str, Tensor]:
        assert engine.teacher is not None
        tensors = {f"teacher/{name}": p for name, p in engine.teacher.state()} | engine.method.state()
        tensors |= full_state(engine)
        return {name: tensor.clone() for name, tensor in tensors.items()}

    before, images = state(), stage.target.images
    if stage.ranks.rank == stage.ranks.world_size - 1:
        images = torch.full_like(images, math.nan)
    engine.step(StepBatches(replace(stage.target, images=images), stage.reference))
    after = state()
    make_steps(stage, engine, 1)
    moved = state()
    engine.deepspeed.destroy()
    return {
        "kept": all(torch.equal(before[name], after[name]) for name in before),
        "continues": float(moved["updates"]) == 2 and not torch.equal(moved["updates"], after["updates"]),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.write_model(path, tiny.FEW_TOKENS)
    return path


@pytest.fixture(scope="module")
def by_rank(folder: Path) -> dict[int, dict[Any, Any]]:
    return {ranks: run_ranks(ranks, run_hooks, folder, stages)[0] for ranks, stages in STAGES.items()}


def oracles(folder: Path) -> dict[str, Any]:
    Part.backend = "torch"
    stage = Stage(folder)
    return {"+".join(hooks): oracle(stage, hooks) for hooks in [*CASES, ()]}


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    weights: dict[str, Any] = run_ranks(1, oracles, folder)[0]
    return weights


def max_error(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    assert expected.keys() <= tensors.keys()
    return max(float((tensors[n].reshape(t.shape) - t).abs().max()) for n, t in expected.items())


def test_hooks_change_final_weights(expected: dict[str, Any]) -> None:
    plain = expected[""][0]
    for hooks in CASES:
        assert max_error(expected["+".join(hooks)][0], plain) > 5 * TOLERANCE, hooks


@pytest.mark.parametrize("ranks", STAGES)
def test_hooks_equal_plain_pytorch_along_every_path(
    by_rank: dict[int, Any], expected: dict[str, Any], ranks: int
) -> None:
    paths = {key: value for key, value in by_rank[ranks].items() if len(key) == 4}
    assert {hooks for hooks, *_ in paths} == {"+".join(hooks) for hooks in CASES}
    for (hooks, *path), (weights, teacher, _) in paths.items():
        assert max_error(weights, expected[hooks][0]) < TOLERANCE, (hooks, path)
        is_tuned = "tuned" not in hooks.split("+")
        frozen = f"{FROZEN}.weight"
        if "teacher" in hooks.split("+"):
            moved = {name: p for name, p in expected[hooks][1].items() if is_tuned or name != frozen}
            assert teacher.keys() == moved.keys()
            assert max_error(teacher, moved) < TOLERANCE, (hooks, path)
        if not is_tuned:
            assert torch.equal(weights[frozen], expected[hooks][0][frozen])


@pytest.mark.parametrize("ranks", STAGES)
def test_skipped_step_keeps_weights_and_teacher(by_rank: dict[int, Any], ranks: int) -> None:
    for zero in STAGES[ranks]:
        assert by_rank[ranks]["skipped", zero] == {"kept": True, "continues": True}, zero


def test_penalty_is_part_of_the_reported_loss(by_rank: dict[int, Any], expected: dict[str, Any]) -> None:
    metrics = by_rank[1]["penalty", STAGES[1][-1], "sequential", 3][2]
    parts = metrics["contrastive_loss"] + 0.5 * metrics["replay_loss"] + metrics["penalty"]
    assert metrics["loss"] == pytest.approx(parts, rel=1e-5)
    assert metrics["penalty"] > 0


def save_and_resume(folder: Path, path: Path) -> dict[str, Any]:
    """States after a third step, uninterrupted and resumed from a checkpoint of the second."""
    Part.backend = "torch"
    stage = Stage(folder)
    engine = stage.engine(2, method=toy(*HOOKS), **TRAIN)
    make_steps(stage, engine, 2)
    saver = Saver(engine, path, TrainConfig(), RunRecord("run"))
    saver.save(2, {"best": None, "best_step": 0, "since_best": 0, "select": None}, {}, required=True)
    saver.finish(required=True)
    make_steps(stage, engine, 1)
    uninterrupted = final_state(engine)
    engine.deepspeed.destroy()
    return {"uninterrupted": uninterrupted, "resumed": resume_step(stage, path, 2)}


def resume_on_one_rank(folder: Path, path: Path) -> dict[str, Tensor]:
    Part.backend = "torch"
    return resume_step(Stage(folder), path, 0)


def resume_step(stage: Stage, path: Path, zero: int) -> dict[str, Tensor]:
    """The state after one step from the checkpoint."""
    engine = stage.engine(zero, method=toy(*HOOKS), **TRAIN)
    load_checkpoint(engine, checkpoint_path(path, 2))
    make_steps(stage, engine, 1)
    return final_state(engine)


def final_state(engine: Engine) -> dict[str, Tensor]:
    """Copies of weights, teacher and the method's state."""
    assert engine.teacher is not None
    teacher = {f"teacher/{name}": p.clone() for name, p in engine.teacher.state()}
    return full_state(engine) | teacher | {name: value.clone() for name, value in engine.method.state().items()}


def test_moving_teacher_resumes_bit_equal_and_on_other_ranks(folder: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, save_and_resume, folder, tmp_path)
    assert first["uninterrupted"].keys() == first["resumed"].keys()
    for states in (first, second):
        for name, value in states["uninterrupted"].items():
            assert torch.equal(value, states["resumed"][name]), name
    files = sorted(checkpoint_path(tmp_path, 2).glob("*.safetensors"))
    names = [{name for name in load_file(file) if name.startswith(f"{TEACHER}/")} for file in files]
    assert len(names) == 2
    assert all(names)
    assert not names[0] & names[1]
    (on_one_rank,) = run_ranks(1, resume_on_one_rank, folder, tmp_path)
    assert max_error(on_one_rank, first["uninterrupted"]) < TOLERANCE


@pytest.mark.parametrize("hook", HOOKS[:-1])
def test_hooks_are_refused_with_zero_3_or_offload(hook: str) -> None:
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    for zero, option in (({"stage": 3}, "stage = 3"), (offload, "offload_optimizer")):
        with pytest.raises(ConfigError, match=f"{option}.*use stage 0, 1 or 2") as refused:
            check_hooks({"zero_optimization": zero}, method_with(hook), "joint")
        assert "\n" not in str(refused.value)
        check_hooks({"zero_optimization": zero}, registry.create(ObjectiveConfig(), WIDTH), "joint")
    check_hooks({"zero_optimization": {"stage": 2}}, method_with(hook), "joint")


def test_change_weights_is_refused_with_joint_schedule() -> None:
    for method in (
        toy("weights"),
        Method(Contrastive(Section(), Setting(WIDTH)), ReplayWithChangedWeights(Section(), Setting(WIDTH))),
    ):
        assert method.needs.sequential
        check_hooks({}, method, "sequential")
        with pytest.raises(ConfigError, match=r"^train\.schedule = joint: .*change_weights.*; use sequential$"):
            check_hooks({}, method, "joint")
    # A method without a reference half has nothing to join.
    assert not method_with("weights").needs.sequential


class ReplayWithChangedWeights(Replay):
    """Replay at changed weights."""

    change_weights = Toy.change_weights


def method_with(hook: str) -> Method:
    """A method that overrides this hook only."""
    names = {"images": "change_images", "weights": "change_weights"}
    if hook == "teacher":
        return Method(type("Only", (Contrastive,), {"teacher": "moving"})(Section(), Setting(WIDTH)))
    name = names.get(hook, hook)
    return Method(type("Only", (Contrastive,), {name: getattr(Toy, name)})(Section(), Setting(WIDTH)))


def test_check_first_step_calls_both_parts() -> None:
    calls: list[str] = []

    class Target(Contrastive):
        def check_first_step(self, first: FirstStep) -> None:
            calls.append(f"target {first.precision}")

    class Reference(Replay):
        def check_first_step(self, first: FirstStep) -> None:
            raise ConfigError("wrong teacher")

    method = Method(Target(Section(), Setting(WIDTH)), Reference(Section(), Setting(WIDTH)))
    with pytest.raises(ConfigError, match="wrong teacher"):
        method.check_first_step(FirstStep({}, "fp32", None))
    assert calls == ["target fp32"]
