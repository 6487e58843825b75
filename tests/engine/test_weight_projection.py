"""Rules on DeepSpeed's shards against the float64 oracle, at every ZeRO stage and on one to three ranks.

Gradients are given: DeepSpeed, the update, AdamW, projection and checkpoints are the real ones, and only towers
and losses are left out. Clipping, fp16's loss scale and skipped steps are part of every trajectory.
"""

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import pytest
import tiny
import torch
from distributed import run_ranks
from step_oracle import WIDTH, Stage
from torch import Tensor, nn
from weight_space_oracle import Oracle

from dive_fast.checkpoint import zero_state
from dive_fast.checkpoint.manifest import checkpoint_path
from dive_fast.checkpoint.resume import load_checkpoint
from dive_fast.checkpoint.saver import Saver
from dive_fast.checkpoint.snapshot import RunRecord
from dive_fast.config.schema import ObjectiveConfig, ProjectionConfig, TrainConfig
from dive_fast.distributed import join
from dive_fast.engine import step as engine_step
from dive_fast.engine.deepspeed_config import deepspeed_section
from dive_fast.engine.optimizer import make_optimizer
from dive_fast.engine.step import Engine, StepBatches
from dive_fast.engine.update import DeviceUpdate, LossScale
from dive_fast.engine.weight_projection import METRICS, WeightProjection
from dive_fast.errors import ConfigError
from dive_fast.methods import registry
from dive_fast.methods.method import Part
from dive_fast.methods.run_config import RunConfig
from dive_fast.projections import rules as projections
from dive_fast.projections.anchored_group import PREVIOUS

WORLDS, STAGES = (1, 2, 3), (0, 1, 2)
STEPS, SKIPPED, SAVED = 7, (0, 3), 4
"""Number of steps, those with a gradient that is not finite on the last rank, and those before the checkpoint."""
RATE, CLIPPING = 0.05, 4.0
SHAPES = {
    "visual.matrix": (5, 7),
    "visual.bias": (7,),
    "visual.kernel": (3, 2, 2, 2),
    "visual.one": (1,),
    "visual.logit_scale": (1,),
    "head.weight": (4, 5),
    "head.bias": (4,),
}
"""On three ranks the matrix is cut inside a row, and no rank has a piece of every tensor."""
SMALL = ("visual.matrix", "visual.kernel", "visual.one", "visual.logit_scale")
"""Of these, the group without decay has so few elements that the third rank has none."""
SCALAR = ("visual.matrix", "visual.kernel", "visual.logit_scale")
"""Of these, no tensor of the group without decay takes part."""
TOLERANCE = 1e-5


class Case(NamedTuple):
    """A rule on some parameters."""

    projection: dict[str, Any]
    names: tuple[str, ...] = tuple(SHAPES)
    decays: bool = False
    """Whether matrices decay, in a group of their own."""
    has_head_anchor: bool = True

    @property
    def left_out(self) -> tuple[str, ...]:
        """The parameters that take no part."""
        heads = () if self.has_head_anchor else ("head.weight", "head.bias")
        return tuple(name for name in self.names if name in ("visual.logit_scale", *heads))


CASES = {
    "digrap": Case({"name": "digrap"}),
    "digrap row": Case({"name": "digrap", "cosine": "row"}),
    "digrap current": Case({"name": "digrap", "direction": "current"}),
    "spd": Case({"name": "spd", "strength": 3.0}),
    "ftp": Case({"name": "ftp", "k": 0.5}),
    "l2sp": Case({"name": "l2sp", "strength": 0.5}),
    "l2sp decoupled": Case({"name": "l2sp", "strength": 0.5, "form": "decoupled"}),
    "two groups": Case({"name": "digrap", "cosine": "row"}, decays=True, has_head_anchor=False),
    "two groups, ftp": Case({"name": "ftp"}, SMALL, decays=True),
    "group without part": Case({"name": "digrap"}, SCALAR, decays=True),
}
RESUMED = ("digrap", "digrap row", "spd", "ftp", "two groups, ftp", "group without part")


class Given(nn.Module):
    """Parameters whose gradient of the loss is given."""

    head: nn.Linear
    adapters = prompts = None

    def __init__(self, names: tuple[str, ...], head_seed: int) -> None:
        super().__init__()
        self.visual, self.head = nn.Module(), nn.Module()  # type: ignore[assignment]
        for index, (name, shape) in enumerate(SHAPES.items()):
            seed = head_seed if name.startswith("head.") else index
            values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            if name in names:
                section, _, last = name.partition(".")
                self.get_submodule(section).register_parameter(last, nn.Parameter(values))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return torch.stack([(p * gradients[name]).sum() for name, p in self.named_parameters()]).sum()


class GivenEngine(Engine):
    """The engine's update, projection and state around parameters with gradients that are given."""

    def __init__(self, case: Case, zero: int, head_seed: int = 100, changed_anchor: str | None = None) -> None:
        self.case, self.ranks, self.steps_done = case, join(), 0
        tree = {
            "model": {"name": "demo"},
            "data": {"target": {"format": "csv", "path": "-", "batch_size": 6}},
            "objective": {"name": "flyp"},
            "train": {
                "learning_rate": RATE,
                "precision": "fp16",
                "weight_decay": 0.1 * case.decays,
                "decay_all_parameters": not case.decays,
            },
            "deepspeed": {"zero_optimization": {"stage": zero}, "gradient_clipping": CLIPPING},
        }
        config = RunConfig.model_validate(tree)
        self.towers: Any = Given(case.names, head_seed)
        if changed_anchor is not None:
            with torch.no_grad():
                self.towers.get_parameter(changed_anchor).view(-1)[-1] += 1e-6
        section = deepspeed_section(config, self.ranks.world_size)
        engine_step._disable_deepspeed_grad_norm(section)
        optimizer = make_optimizer(config.train, self.towers, on_cpu=False)
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.towers,
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
            config=section,
        )
        rule = projections.create(ProjectionConfig(**case.projection))
        assert rule is not None
        has_anchor = case.has_head_anchor
        self.projection = WeightProjection(rule, self.deepspeed, optimizer, self.towers, has_anchor, "torch")
        self.average = self.teacher = None
        self.method = registry.create(ObjectiveConfig(name="flyp"), WIDTH)
        self.scale = LossScale("fp16", self.ranks.device)
        self._update = DeviceUpdate(self.deepspeed, optimizer, self.scale, CLIPPING)

    def make_step(self, index: int, is_skipped: bool = False) -> dict[str, float]:
        """A step on gradients whose mean over the ranks is that of :func:`gradients`."""
        rank, world = self.ranks.rank, self.ranks.world_size
        mine = {name: g + noise(name, index, rank, world) for name, g in gradients(self.case.names, index).items()}
        if is_skipped and rank == world - 1:
            mine["visual.matrix"].view(-1)[-1] = torch.inf
        loss = self.deepspeed(mine)
        self.deepspeed.backward(self._update.scale_loss(loss))
        self.update(torch.zeros(()))
        assert self.projection is not None
        return {name: float(value) for name, value in self.projection.metrics().items()}

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.towers.named_parameters()}

    def numbers(self, name: str) -> dict[str, float]:
        """A number of the rule by tensor."""
        assert self.projection is not None
        groups = self.projection.groups
        return {n: float(v) for group in groups for n, v in zip(group.shapes, group.value(name), strict=True)}

    def everything(self) -> dict[str, Tensor]:
        """Copies of all state on this rank: shards, their moments, and the rule's."""
        assert self.projection is not None
        zero, tensors = self.deepspeed.optimizer, self.projection.state()
        tensors |= {f"lp/{name}": p for name, p in self.weights().items()}
        for number, group in enumerate(self.projection.groups):
            tensors[f"updates/{number}"] = group.updates
            tensors |= {f"anchor/{number}/{index}": anchor for index, anchor in enumerate(group.anchors)}
        flats = getattr(zero, "single_partition_of_fp32_groups", list(self.towers.parameters()))
        optimizer = getattr(zero, "optimizer", zero)
        for number, flat in enumerate(flats):
            tensors[f"flat/{number}"] = flat.detach()
            tensors |= {f"{key}/{number}": value for key, value in optimizer.state[flat].items()}
        return {name: tensor.clone() for name, tensor in tensors.items()}


def factor(step: int) -> float:
    return 1 / (1 + step / 4)


def gradients(names: tuple[str, ...], index: int) -> dict[str, Tensor]:
    """The mean gradient of a step: a drift that turns back at some steps."""
    sign, result = (1.0, 1.0, -0.5, 1.0, 1.0, -0.3, 1.0)[index], {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        drift, change = (
            torch.randn(shape, generator=torch.Generator().manual_seed(1000 * (1 + i) + number))
            for i in (0, 1 + index)
        )
        if name in names:
            result[name] = sign * drift + 0.5 * change
    return result


def noise(name: str, index: int, rank: int, world: int) -> Tensor:
    """A rank's deviation from the mean gradient; those of all ranks cancel out."""
    number = list(SHAPES).index(name)

    def drawn(rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(10000 * (rank + 1) + 100 * index + number)
        return torch.randn(SHAPES[name], generator=generator)

    return drawn(rank) - drawn((rank + 1) % world)


def run_case(case: Case, zero: int) -> dict[str, Any]:
    """The trajectory of a case on this rank."""
    engine = GivenEngine(case, zero)
    assert engine.projection is not None
    keys = [name for name in ("omega", "radius") if name in engine.projection.rule.layout.values]
    result: dict[str, Any] = {"weights": [], "numbers": [], "metrics": [], "kept": [], "layout": layout(engine)}
    for index in range(STEPS):
        before = engine.everything() if index else engine.weights()
        result["metrics"].append(engine.make_step(index, index in SKIPPED))
        if index in SKIPPED:
            after = engine.everything() if index else engine.weights()
            result["kept"].append([name for name in before if not equal(before[name], after[name])])
        result["weights"].append(engine.weights())
        result["numbers"].append({key: engine.numbers(key) for key in keys})
    result["updates"] = [int(group.updates) for group in engine.projection.groups]
    result["skipped_steps"] = int(engine.scale.skipped_steps)
    result["remark"], result["left_out"] = engine.projection.remark, engine.projection.left_out
    engine.deepspeed.destroy()
    return result


def equal(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def layout(engine: GivenEngine) -> list[dict[str, tuple[int, int]]]:
    """First element and length of the pieces of each group on this rank."""
    assert engine.projection is not None
    return [{s.name: (s.start, len(s.weights)) for s in group.segments} for group in engine.projection.groups]


def oracle_of(case: Case) -> dict[str, Any]:
    """Weights, numbers and distances after each step by the oracle."""
    options = projections.resolve(ProjectionConfig(**case.projection)).model_dump()
    start = {name: p.detach() for name, p in Given(case.names, 100).named_parameters()}
    decays = {name: 0.1 * (case.decays and len(SHAPES[name]) > 1) for name in start}
    oracle = Oracle(case.projection["name"], options, start, weight_decay=decays, left_out=case.left_out)
    plain = Oracle("none", {}, start, weight_decay=decays)
    result: dict[str, Any] = {"weights": [], "numbers": [], "distances": [], "plain": []}
    for index in range(STEPS):
        if index not in SKIPPED:
            step = gradients(case.names, index)
            norm = float(torch.stack([g.double().square().sum() for g in step.values()]).sum().sqrt())
            clipped = {name: g.double() / max(1.0, norm / CLIPPING) for name, g in step.items()}
            for each in (oracle, plain):
                each.step(clipped, RATE * factor(index))
        result["weights"].append(oracle.weights())
        result["plain"].append(plain.weights())
        result["numbers"].append({"omega": oracle.numbers("omega"), "radius": oracle.numbers("gamma")})
    return result


def run_world(folder: Path) -> dict[str, Any]:
    """All cases on this rank; two ranks write checkpoints, which others resume."""
    world = join().world_size
    result: dict[str, Any] = {}
    for (name, case), zero in itertools.product(CASES.items(), STAGES):
        result[name, zero] = run_case(case, zero)
    for name in RESUMED:
        if world == 2:
            result["uninterrupted", name] = save(CASES[name], folder / name)
            result["resumed", name, 2] = resume(CASES[name], 2, folder / name)
            result["resumed", name, 0] = resume(CASES[name], 0, folder / name)
        else:
            result["resumed", name, 2 - world // 2] = resume(CASES[name], 2 - world // 2, folder / name)
    if world == 2:
        result["changed"] = [changed(zero, folder / "digrap") for zero in STAGES]
    return result


def save(case: Case, folder: Path) -> dict[str, Any]:
    """Saves after some steps, of which some were skipped, and continues."""
    engine = GivenEngine(case, 2)
    for index in range(SAVED):
        engine.make_step(index, index in SKIPPED)
    saver = Saver(engine, folder, TrainConfig(), RunRecord("run"))
    saver.save(SAVED, {"best": None, "best_step": 0, "since_best": 0, "select": None}, {}, required=True)
    saver.finish(required=True)
    return finish(engine)


def resume(case: Case, zero: int, folder: Path) -> dict[str, Any]:
    """Continues from the checkpoint; the head starts at random, as a resumed run's does."""
    engine = GivenEngine(case, zero, head_seed=200)
    load_checkpoint(engine, checkpoint_path(folder, SAVED))
    return finish(engine)


def finish(engine: GivenEngine) -> dict[str, Any]:
    metrics = [engine.make_step(index) for index in range(SAVED, STEPS)]
    result = {"everything": engine.everything(), "weights": engine.weights(), "metrics": metrics}
    gathered = {p.name: p.moments.get(PREVIOUS) for p in zero_state.gather(engine)}
    engine.deepspeed.destroy()
    return result | {"previous": gathered}


def changed(zero: int, folder: Path) -> str:
    """The error of a resume from other pre-trained weights, of which one element differs."""
    engine = GivenEngine(CASES["digrap"], zero, changed_anchor="visual.kernel")
    with pytest.raises(ConfigError) as refused:
        load_checkpoint(engine, checkpoint_path(folder, SAVED))
    engine.deepspeed.destroy()
    return str(refused.value)


@pytest.fixture(scope="module")
def by_world(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[Any, Any]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    # Two ranks first: they write the checkpoints.
    return {world: run_ranks(world, run_world, folder) for world in sorted(WORLDS, key=lambda world: world != 2)}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return {name: oracle_of(case) for name, case in CASES.items()}


def error(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert tensors.keys() == expected.keys()
    return max(float((tensors[name].double() - t).abs().max()) for name, t in expected.items())


LAYOUTS = list(itertools.product(WORLDS, STAGES))


def test_shards_have_cut_rows_ranks_without_pieces_and_padding(by_world: dict[int, Any]) -> None:
    for zero in (1, 2):
        for world in (2, 3):
            ranks = [result["digrap", zero]["layout"][0] for result in by_world[world]]
            starts = [pieces["visual.matrix"][0] for pieces in ranks if "visual.matrix" in pieces]
            missing = [set(SHAPES) - {"visual.logit_scale"} - set(pieces) for pieces in ranks]
            assert all(missing)
            if world == 3:
                assert any(start % 7 for start in starts)
        _, flat_group = zip(*(result["two groups, ftp", zero]["layout"] for result in by_world[3]), strict=True)
        assert any(not pieces for pieces in flat_group)


@pytest.mark.parametrize("name", CASES)
def test_trajectory_is_not_that_of_adamw(expected: dict[str, Any], name: str) -> None:
    assert error(expected[name]["weights"][-1], expected[name]["plain"][-1]) > 100 * TOLERANCE


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("world", "zero"), LAYOUTS)
def test_trajectory_on_shards_equals_the_oracle(
    by_world: dict[int, Any], expected: dict[str, Any], world: int, zero: int, name: str
) -> None:
    for rank, result in enumerate(by_world[world]):
        run = result[name, zero]
        for index in range(STEPS):
            assert error(run["weights"][index], expected[name]["weights"][index]) < TOLERANCE, (rank, index)
            for key, numbers in run["numbers"][index].items():
                assert numbers == pytest.approx(expected[name]["numbers"][index][key], rel=1e-3, abs=1e-5), index


@pytest.mark.parametrize(("world", "zero"), LAYOUTS)
def test_skipped_step_leaves_all_state_on_all_ranks(by_world: dict[int, Any], world: int, zero: int) -> None:
    for rank, result in enumerate(by_world[world]):
        for name in CASES:
            run = result[name, zero]
            assert run["kept"] == [[], []], (name, rank)
            assert set(run["updates"]) == {STEPS - len(SKIPPED)}, (name, rank)
            assert run["skipped_steps"] == len(SKIPPED)


@pytest.mark.parametrize("name", CASES)
def test_ranks_and_stages_agree(by_world: dict[int, Any], name: str) -> None:
    first = by_world[1][0][name, 0]
    for world, zero in LAYOUTS:
        for result in by_world[world]:
            run = result[name, zero]
            for metrics, others in zip(first["metrics"], run["metrics"], strict=True):
                # In skipped steps too, whose gradients are not finite.
                assert all(math.isfinite(value) for value in others.values())
                assert others == pytest.approx(metrics, rel=1e-3, abs=1e-6)
            assert all(
                equal(t, by_world[world][0][name, zero]["weights"][-1][n]) for n, t in run["weights"][-1].items()
            )


@pytest.mark.parametrize("name", CASES)
def test_metrics_are_those_of_the_tensors(by_world: dict[int, Any], expected: dict[str, Any], name: str) -> None:
    case, run = CASES[name], by_world[3][0][name, 2]
    part = [key for key in case.names if key not in case.left_out]
    start = {key: p.detach().double() for key, p in Given(case.names, 100).named_parameters()}
    metrics = run["metrics"][-1]
    norm = float(sum(start[key].square().sum() for key in part)) ** 0.5
    assert metrics[f"{METRICS}relative_distance"] == pytest.approx(metrics[f"{METRICS}distance"] / norm, rel=1e-5)
    # Before the last update, or after it.
    distances = [
        float(sum((weights[key] - start[key]).square().sum() for key in part)) ** 0.5
        for weights in expected[name]["weights"][-2:]
    ]
    assert any(metrics[f"{METRICS}distance"] == pytest.approx(each, rel=1e-4) for each in distances)
    if case.projection["name"] == "digrap":
        omegas = [run["numbers"][-1]["omega"][key] for key in part]
        assert metrics[f"{METRICS}omega"] == pytest.approx(sum(omegas) / len(omegas), rel=1e-5)
        assert 0 < metrics[f"{METRICS}applied"] <= metrics[f"{METRICS}triggered"] <= 1


def test_left_out_tensors_are_named(by_world: dict[int, Any]) -> None:
    run = by_world[3][0]["two groups", 2]
    assert set(run["left_out"]) == {"visual.logit_scale", "head.weight", "head.bias"}
    assert run["remark"].startswith("projection digrap: 4 of 7 tuned tensors, 67 parameters; left out: ")
    assert all(name in run["remark"] for name in run["left_out"])


@pytest.mark.parametrize("name", RESUMED)
def test_resume_on_the_same_layout_is_bit_equal(by_world: dict[int, Any], name: str) -> None:
    for result in by_world[2]:
        uninterrupted, resumed = result["uninterrupted", name], result["resumed", name, 2]
        assert uninterrupted["everything"].keys() == resumed["everything"].keys()
        for key, tensor in uninterrupted["everything"].items():
            assert equal(tensor, resumed["everything"][key]), key
        assert uninterrupted["metrics"] == resumed["metrics"]


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize(("world", "zero"), [(1, 2), (2, 0), (3, 1)])
def test_resume_on_another_layout_continues(
    by_world: dict[int, Any], expected: dict[str, Any], world: int, zero: int, name: str
) -> None:
    uninterrupted = by_world[2][0]["uninterrupted", name]
    for result in by_world[world]:
        resumed = result["resumed", name, zero]
        assert error(resumed["weights"], expected[name]["weights"][-1]) < TOLERANCE
        for metrics, others in zip(uninterrupted["metrics"], resumed["metrics"], strict=True):
            assert others == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        for key, previous in uninterrupted["previous"].items():
            if previous is not None:
                assert error({"": resumed["previous"][key]}, {"": previous}) < TOLERANCE, key


def test_other_pretrained_weights_are_refused_on_all_ranks(by_world: dict[int, Any]) -> None:
    for result in by_world[2]:
        for message in result["changed"]:
            assert message.startswith("projection: the weights that visual.kernel starts from differ")
            assert "\n" not in message


# The complete engine


def paths(folder: Path) -> list[tuple[dict[str, Tensor], dict[str, float]]]:
    """Omegas and weights after some steps in halves, in micro-batches, and jointly."""
    Part.backend = "torch"
    stage, ends = Stage(folder), []
    for schedule, micro in (("sequential", None), ("joint", None), ("sequential", 3)):
        engine = stage.engine(2, schedule, micro, name="flyp_replay", projection={"name": "digrap"}, **TRAIN)
        for _ in range(4):
            metrics = engine.step(StepBatches(stage.target, stage.reference))
        assert engine.projection is not None
        (group,) = engine.projection.groups
        ends.append(
            (
                {n: v.clone() for n, v in zip(group.shapes, group.value("omega"))},
                float(metrics["projection/omega"]),
            )
        )
        engine.deepspeed.destroy()
    return ends


TRAIN = {"learning_rate": 1e-2, "warmup_steps": 0, "epsilon": 1e-3, "weight_decay": 0.0}
"""The large epsilon keeps AdamW from amplifying rounding to full steps."""


def test_micro_batches_and_joint_steps_have_the_same_omegas(tmp_path: Path) -> None:
    tiny.write_model(tmp_path)
    (whole, mean), *others = run_ranks(2, paths, tmp_path)[0]
    assert mean > 0.01
    for omegas, other_mean in others:
        assert other_mean == pytest.approx(mean, rel=1e-3)
        assert error(omegas, {name: omega.double() for name, omega in whole.items()}) < 1e-3


@pytest.mark.parametrize("rule", sorted(projections.table()))
def test_zero_3_and_offload_are_refused_in_one_line(rule: str) -> None:
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    section = ProjectionConfig(name=rule)
    for zero, option in (({"stage": 3}, "stage = 3"), (offload, "offload_optimizer")):
        pattern = rf"^deepspeed\.zero_optimization\.{option}: projection\.name = {rule} .*use stage 0, 1 or 2 "
        with pytest.raises(ConfigError, match=pattern) as refused:
            engine_step.check_projection({"zero_optimization": zero}, section)
        assert "\n" not in str(refused.value)
        engine_step.check_projection({"zero_optimization": zero}, ProjectionConfig())
    engine_step.check_projection({"zero_optimization": {"stage": 2}}, section)
