"""Every hook of a method, by a toy part that fills it in, against plain PyTorch on one process.

The oracle trains the same towers for a few steps in a loop of its own, with one AdamW and each hook written out.
The engine has to end with its weights at every ZeRO stage, on one and two ranks, micro-batched and in one graph.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator, Mapping
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
    TeacherOutputs,
    over_ranks,
)
from dive_fast.methods.projection import FlatGroup, Projection, Segment
from dive_fast.model.features import Outputs
from dive_fast.model.towers import Towers

STEPS, RATE, PENALTY, IMAGE_STEP, WEIGHT_STEP, PULL = 3, 0.25, 0.05, 0.02, 0.01, 0.2
HOOKS = ("teacher", "penalty", "images", "weights", "projection", "tuned")
TRAIN = {"learning_rate": 1e-2, "warmup_steps": 0, "epsilon": 1e-3, "weight_decay": 0.1}
"""A large epsilon, so that AdamW does not turn rounding into signs."""
FROZEN = "text.token_embedding"
TOLERANCE = 5e-5
STAGES = {1: (0, 2), 2: (0, 1, 2)}
PATHS: list[tuple[str, int | None]] = [("sequential", None), ("joint", 3), ("sequential", 3)]


class Pull(Projection):
    """Adds the gradient of a pull to the anchor before the step, and moves weights back after it.

    Both need a sum over the whole tensor, of which a rank may hold a piece or none.
    """

    def start(self, groups: list[FlatGroup]) -> None:
        self.anchors = {
            (group.index, segment.name): segment.weights.clone() for group in groups for segment in group.segments
        }

    def _norms(self, group: FlatGroup) -> dict[str, Tensor]:
        sums = torch.zeros(len(group.names))
        for segment in group.segments:
            sums[group.names.index(segment.name)] = self._difference(group, segment).square().sum()
        group.reduce(sums)
        return dict(zip(group.names, sums.sqrt(), strict=True))

    def _difference(self, group: FlatGroup, segment: Segment) -> Tensor:
        return segment.weights - self.anchors[group.index, segment.name]

    def before_step(self, group: FlatGroup) -> None:
        norms = self._norms(group)
        for segment in group.segments:
            if (gradient := segment.gradient()) is not None:
                gradient += group.gradient_scale * PULL * norms[segment.name] * self._difference(group, segment)

    def after_step(self, group: FlatGroup) -> None:
        norms = self._norms(group)
        for segment in group.segments:
            back = (PULL * (1 - group.skipped) * norms[segment.name]).clamp(max=1.0)
            segment.weights.sub_(back * self._difference(group, segment))


class Toy(Contrastive):
    """The contrastive loss and all hooks; ``hooks`` says which of them do something."""

    name, title = "toy", "toy"
    updates: Tensor

    def __init__(self, hooks: tuple[str, ...]) -> None:
        super().__init__(self.Options(), Setting(WIDTH))
        self.on = hooks
        self.register_buffer("updates", torch.zeros(()))

    def loss(
        self, outputs: Outputs, labels: Tensor, group: Group = None, teacher: TeacherOutputs | None = None
    ) -> Loss:
        loss = super().loss(outputs, labels, group)
        if teacher is None:
            return loss
        assert outputs.text is not None
        assert teacher.text is not None
        far = (F.normalize(outputs.image) - teacher.image).square().sum(1)
        far = far + (F.normalize(outputs.text) - teacher.text).square().sum(1)
        return Loss(loss.loss + over_ranks(far.mean(), group) * teacher.logit_scale.squeeze() / 10, loss.metrics)

    def teacher_rate(self, applied: Tensor) -> Tensor:
        # A schedule of its own, which a skipped step leaves alone.
        self.updates += applied
        return RATE / self.updates.clamp(min=1)

    def penalty(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        if "penalty" not in self.on:
            return None
        return PENALTY * torch.stack([p.square().sum() for p in parameters.values() if p.requires_grad]).sum()

    def change_images(self, images: Tensor, outputs: Any, info: ImageInfo) -> Tensor:
        if "images" not in self.on:
            return images
        assert info.labels is not None
        images = images.clone().requires_grad_()
        # Sample by sample, so that micro-batches change images as the whole batch does.
        (gradient,) = torch.autograd.grad(outputs(images).pairs.image.square().sum(), images)
        return images.detach() + IMAGE_STEP * gradient.sign()

    @contextlib.contextmanager
    def change_weights(self, towers: nn.Module) -> Iterator[None]:
        before = {name: p.detach().clone() for name, p in towers.named_parameters()}
        with torch.no_grad():
            for p in towers.parameters():
                p += WEIGHT_STEP * p.sign()
        yield
        with torch.no_grad():
            for name, p in towers.named_parameters():
                p.copy_(before[name])

    def tunes(self, parameter: str) -> bool:
        return "tuned" not in self.on or not parameter.startswith(FROZEN)

    def projection(self) -> Projection | None:
        return Pull() if "projection" in self.on else None


class Taught(Toy):
    """The toy with a moving teacher."""

    teacher = "moving"


class FrozenTaught(Toy):
    """The toy with a frozen teacher."""

    teacher = "frozen"


def toy(*hooks: str) -> Method:
    kind = Taught if "teacher" in hooks else FrozenTaught if "frozen teacher" in hooks else Toy
    if "weights" not in hooks:
        kind = type(kind.__name__, (kind,), {"change_weights": Part.change_weights})
    return Method(kind(hooks), Replay(Replay.Options(), Setting(WIDTH, 0.5)))


def oracle(
    stage: Stage, hooks: tuple[str, ...], steps: int = STEPS
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of student and teacher after some steps, every hook written out; on one process."""
    towers, teacher = (copy.deepcopy(stage.student).train() for _ in range(2))
    teacher.eval()
    data = batches(stage.folder)
    tuned = {n: p for n, p in towers.named_parameters() if "tuned" not in hooks or not n.startswith(FROZEN)}
    for name, p in towers.named_parameters():
        p.requires_grad_(name in tuned)
    anchors = {name: p.detach().clone() for name, p in tuned.items()}
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
            frozen = encode(teacher, "target", data["target_images"])
        before = {name: p.detach().clone() for name, p in towers.named_parameters()}
        if "weights" in hooks:
            with torch.no_grad():
                for p in towers.parameters():
                    p += WEIGHT_STEP * p.sign()
        f, g = encode(towers, "target", images)
        loss = contrastive_as_written(f, g, towers.scale())
        if "teacher" in hooks or "frozen teacher" in hooks:
            far = (f - frozen[0]).square().sum(1) + (g - frozen[1]).square().sum(1)
            loss = loss + far.mean() * teacher.scale().detach().squeeze() / 10
        loss.backward()
        with torch.no_grad():
            for name, p in towers.named_parameters():
                p.copy_(before[name])
        f, g = encode(towers, "reference", data["reference_images"])
        loss = 0.5 * contrastive_as_written(f, g, towers.scale())
        if "penalty" in hooks:
            loss = loss + PENALTY * torch.stack([p.square().sum() for p in tuned.values()]).sum()
        loss.backward()
        with torch.no_grad():
            for name, p in tuned.items():
                if "projection" in hooks:
                    difference = p - anchors[name]
                    p.grad += PULL * difference.norm() * difference
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, p in tuned.items():
                if "projection" in hooks:
                    difference = p - anchors[name]
                    p -= (PULL * difference.norm()).clamp(max=1.0) * difference
            if "teacher" in hooks:
                for (_, ours), (_, theirs) in zip(
                    teacher.named_parameters(), towers.named_parameters(), strict=True
                ):
                    ours.lerp_(theirs, RATE / (step + 1))
    weights = {name: p.detach().clone() for name, p in towers.named_parameters()}
    return weights, {name: p.detach().clone() for name, p in teacher.named_parameters()}


def steps_of(stage: Stage, engine: Engine, count: int = STEPS) -> dict[str, Tensor]:
    """Makes some steps; returns the newest metrics."""
    metrics: dict[str, Tensor] = {}
    for _ in range(count):
        metrics = engine.step(StepBatches(stage.target, stage.reference))
    return metrics


WITHOUT_WEIGHTS = tuple(hook for hook in HOOKS if hook != "weights")
CASES = [*((hook,) for hook in (*HOOKS, "frozen teacher")), HOOKS, WITHOUT_WEIGHTS]


def run_hooks(folder: Path, stages: tuple[int, ...]) -> dict[str, Any]:
    """On one rank: every case along every path; what the first rank ends with."""
    Part.backend = "torch"
    stage, found = Stage(folder), {}
    for hooks in CASES:
        # The joint schedule cannot change the weights of one half.
        paths = {HOOKS: PATHS[:1], WITHOUT_WEIGHTS: PATHS[1:2]}.get(hooks)
        for zero, (schedule, micro) in itertools.product(stages, paths) if paths else [(stages[-1], PATHS[2])]:
            engine = stage.engine(zero, schedule, micro, toy(*hooks), **TRAIN)
            metrics = steps_of(stage, engine)
            teacher = {} if engine.teacher is None else dict(engine.teacher.state())
            found["+".join(hooks), zero, schedule, micro] = (
                full_state(engine),
                {name: p.clone() for name, p in teacher.items()},
                {name: float(value) for name, value in metrics.items()},
            )
            engine.deepspeed.destroy()
    for zero in stages:
        found["skipped", zero] = skipped_step(stage, zero)
        found["two groups", zero] = two_groups(stage, zero)
    return found


def skipped_step(stage: Stage, zero: int) -> dict[str, bool]:
    """Whether a step with a NaN on the last rank leaves weights, teacher and its schedule alone; fp16."""
    engine = stage.engine(zero, method=toy(*HOOKS), precision="fp16", **TRAIN)
    assert engine.teacher is not None
    steps_of(stage, engine, 1)

    def state() -> dict[str, Tensor]:
        assert engine.teacher is not None
        named = {f"teacher/{name}": p for name, p in engine.teacher.state()} | engine.method.state()
        named |= full_state(engine)
        return {name: tensor.clone() for name, tensor in named.items()}

    before, images = state(), stage.target.images
    if stage.ranks.rank == stage.ranks.world_size - 1:
        images = torch.full_like(images, math.nan)
    engine.step(StepBatches(replace(stage.target, images=images), stage.reference))
    after = state()
    steps_of(stage, engine, 1)
    moved = state()
    engine.deepspeed.destroy()
    return {
        "alone": all(torch.equal(before[name], after[name]) for name in before),
        "moves on": float(moved["updates"]) == 2 and not torch.equal(moved["updates"], after["updates"]),
    }


def two_groups(stage: Stage, zero: int) -> dict[str, Tensor]:
    """The weights after some steps of a projection over two parameter groups, of which one decays."""
    options = TRAIN | {"decay_all_parameters": False, "weight_decay": 0.0}
    engine = stage.engine(zero, method=toy("projection"), **options)
    steps_of(stage, engine)
    weights = full_state(engine)
    engine.deepspeed.destroy()
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.write_model(path)
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
    found: dict[str, Any] = run_ranks(1, oracles, folder)[0]
    return found


def far(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    assert wanted.keys() <= found.keys()
    return max(float((found[n].reshape(w.shape) - w).abs().max()) for n, w in wanted.items())


def test_hooks_change_what_is_trained(expected: dict[str, Any]) -> None:
    plain = expected[""][0]
    for hooks in CASES:
        assert far(expected["+".join(hooks)][0], plain) > 5 * TOLERANCE, hooks


@pytest.mark.parametrize("ranks", STAGES)
def test_hooks_along_every_path_equal_plain_pytorch(
    by_rank: dict[int, Any], expected: dict[str, Any], ranks: int
) -> None:
    along = {key: value for key, value in by_rank[ranks].items() if len(key) == 4}
    assert len(along) > len(CASES)
    for (hooks, *path), (weights, teacher, _) in along.items():
        assert far(weights, expected[hooks][0]) < TOLERANCE, (hooks, path)
        if "teacher" in hooks.split("+"):
            assert far(teacher, expected[hooks][1]) < TOLERANCE, (hooks, path)
        if "tuned" in hooks.split("+"):
            frozen = f"{FROZEN}.weight"
            assert torch.equal(weights[frozen], expected[hooks][0][frozen])


@pytest.mark.parametrize("ranks", STAGES)
def test_skipped_step_leaves_teacher_and_weights_alone(by_rank: dict[int, Any], ranks: int) -> None:
    for zero in STAGES[ranks]:
        assert by_rank[ranks]["skipped", zero] == {"alone": True, "moves on": True}, zero


def test_projection_over_two_groups_equals_one_group(by_rank: dict[int, Any]) -> None:
    found = {(ranks, zero): by_rank[ranks]["two groups", zero] for ranks in STAGES for zero in STAGES[ranks]}
    first = found[1, 0]
    for path, weights in found.items():
        assert far({n: w for n, w in weights.items() if n in first}, first) < TOLERANCE, path


def test_penalty_is_part_of_the_reported_loss(by_rank: dict[int, Any], expected: dict[str, Any]) -> None:
    metrics = by_rank[1]["penalty", 2, "sequential", 3][2]
    parts = metrics["contrastive_loss"] + 0.5 * metrics["replay_loss"] + metrics["penalty"]
    assert metrics["loss"] == pytest.approx(parts, rel=1e-5)
    assert metrics["penalty"] > 0


def save_and_resume(folder: Path, path: Path) -> dict[str, Any]:
    """Two steps, a checkpoint, one more step; then that step again from the checkpoint."""
    Part.backend = "torch"
    stage = Stage(folder)
    engine = stage.engine(2, method=toy(*HOOKS), **TRAIN)
    steps_of(stage, engine, 2)
    saver = Saver(engine, path, TrainConfig(), RunRecord("run"))
    saver.save(2, {"best": None, "best_step": 0, "since_best": 0, "select": None}, {}, required=True)
    saver.finish(required=True)
    steps_of(stage, engine, 1)
    whole = ended(engine)
    engine.deepspeed.destroy()
    return {"whole": whole, "resumed": resume_step(stage, path, 2)}


def resume_alone(folder: Path, path: Path) -> dict[str, Tensor]:
    Part.backend = "torch"
    return resume_step(Stage(folder), path, 0)


def resume_step(stage: Stage, path: Path, zero: int) -> dict[str, Tensor]:
    """One step from the checkpoint."""
    engine = stage.engine(zero, method=toy(*HOOKS), **TRAIN)
    load_checkpoint(engine, checkpoint_path(path, 2))
    steps_of(stage, engine, 1)
    return ended(engine)


def ended(engine: Engine) -> dict[str, Tensor]:
    """Weights, teacher and the method's state."""
    assert engine.teacher is not None
    teacher = {f"teacher/{name}": p.clone() for name, p in engine.teacher.state()}
    return full_state(engine) | teacher | {name: value.clone() for name, value in engine.method.state().items()}


def test_moving_teacher_resumes_bit_for_bit_and_on_other_ranks(folder: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, save_and_resume, folder, tmp_path)
    assert first["whole"].keys() == first["resumed"].keys()
    for ended_here in (first, second):
        for name, value in ended_here["whole"].items():
            assert torch.equal(value, ended_here["resumed"][name]), name
    files = sorted(checkpoint_path(tmp_path, 2).glob("*.safetensors"))
    held = [{name for name in load_file(file) if name.startswith(f"{TEACHER}/")} for file in files]
    assert len(held) == 2
    assert all(held)
    assert not held[0] & held[1]
    (alone,) = run_ranks(1, resume_alone, folder, tmp_path)
    assert far(alone, first["whole"]) < TOLERANCE


@pytest.mark.parametrize("hook", HOOKS[:-1])
def test_hooks_with_zero_3_or_offload_are_refused_in_one_line(hook: str) -> None:
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    for zero, place in (({"stage": 3}, "stage = 3"), (offload, "offload_optimizer")):
        with pytest.raises(ConfigError, match=f"{place}.*take stage 0, 1 or 2") as refused:
            check_hooks({"zero_optimization": zero}, only(hook), "joint")
        assert "\n" not in str(refused.value)
        check_hooks({"zero_optimization": zero}, registry.create(ObjectiveConfig(), WIDTH), "joint")
    check_hooks({"zero_optimization": {"stage": 2}}, only(hook), "joint")


def test_changed_weights_of_one_half_with_joint_schedule_are_refused() -> None:
    for method in (
        toy("weights"),
        Method(Contrastive(Section(), Setting(WIDTH)), ChangedReplay(Section(), Setting(WIDTH))),
    ):
        assert method.needs.sequential
        check_hooks({}, method, "sequential")
        with pytest.raises(ConfigError, match=r"^train\.schedule = joint: .*change_weights.*; take sequential$"):
            check_hooks({}, method, "joint")
    # Without a second half there is nothing to join.
    assert not only("weights").needs.sequential


class ChangedReplay(Replay):
    """Replay under changed weights."""

    change_weights = Toy.change_weights


def only(hook: str) -> Method:
    """A method that fills in one hook and no other."""
    names = {"images": "change_images", "weights": "change_weights"}
    if hook == "teacher":
        return Method(type("Only", (Contrastive,), {"teacher": "moving"})(Section(), Setting(WIDTH)))
    name = names.get(hook, hook)
    return Method(type("Only", (Contrastive,), {name: getattr(Toy, name)})(Section(), Setting(WIDTH)))


def test_check_after_the_first_step_reaches_both_parts() -> None:
    seen: list[str] = []

    class Target(Contrastive):
        def check_first_step(self, first: FirstStep) -> None:
            seen.append(f"target {first.precision}")

    class Reference(Replay):
        def check_first_step(self, first: FirstStep) -> None:
            raise ConfigError("wrong from the start")

    method = Method(Target(Section(), Setting(WIDTH)), Reference(Section(), Setting(WIDTH)))
    with pytest.raises(ConfigError, match="wrong from the start"):
        method.check_first_step(FirstStep({}, "fp32", None))
    assert seen == ["target fp32"]
