"""Tests of steps with TRACER and CaRot against float64, along every path, and of their teachers through a run."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
from distributed import run_ranks
from step_oracle import (
    TOTAL_STEPS,
    WIDTH,
    Stage,
    add_noise,
    assert_same_gradients,
    batches,
    in_float64,
    objective,
    self_distillation_as_written,
    self_distillation_oracle,
)
from torch import Tensor

from dive_fast.checkpoint.export import full_state
from dive_fast.checkpoint.manifest import checkpoint_path
from dive_fast.checkpoint.resume import load_checkpoint
from dive_fast.checkpoint.saver import Saver
from dive_fast.checkpoint.snapshot import RunRecord
from dive_fast.config.schema import ObjectiveConfig, TrainConfig
from dive_fast.engine.step import Engine, StepBatches, check_hooks
from dive_fast.errors import ConfigError
from dive_fast.methods import registry
from dive_fast.methods.method import Method, Part

STAGES = {1: (0, 2), 2: (0, 1, 2)}
"""Number of ranks -> ZeRO stages."""
METHODS = ("tracer", "carot", "tracer_dive")
PATHS: list[tuple[str, int | None]] = [("sequential", None), ("joint", 3), ("sequential", 3), ("joint", None)]
"""(schedule, micro-batch size); those with a reference half run all of them at the last stage."""
TRAIN = {"learning_rate": 1e-2, "warmup_steps": 0, "epsilon": 1e-3, "weight_decay": 0.1}
"""Options of a run; the large epsilon keeps AdamW from amplifying rounding to full steps."""
STEPS, LATE = 4, 3
RUNS: dict[str, dict[str, Any]] = {
    "tracer": {"name": "tracer", "feature_weight": 20.0},
    "sparse": {"name": "tracer", "feature_weight": 20.0, "teacher_every": 2, "kernel_clock": "updates"},
    "carot": {"name": "carot", "teacher_every": 2, "decay_ramp": 0.3},
}
"""Objectives of complete runs; FD's weight makes all terms count in a model of this size."""
RESUMED = {name: RUNS[name] for name in ("tracer", "carot")}
TOLERANCE = 5e-5


def method_of(**options: Any) -> Method:
    return registry.create(ObjectiveConfig.model_validate(options), WIDTH, total_steps=TOTAL_STEPS)


def batches_of(stage: Stage, engine: Engine) -> StepBatches:
    if not engine.method.needs.reference:
        return StepBatches(stage.target)
    return StepBatches(stage.target, stage.reference, stage.teacher(stage.reference))


def late_engine(stage: Stage, *args: Any, **options: Any) -> Engine:
    """An engine at a step with distillation, whose teacher has the pre-trained weights."""
    engine = stage.engine(*args, **options)
    engine.set_step(LATE)
    assert engine.teacher is not None
    frozen = open_clip.create_model(f"local-dir:{stage.folder}").state_dict()
    with torch.no_grad():
        for name, weight in engine.teacher.state():
            weight.copy_(frozen[engine.towers.exported_name(name)].reshape(weight.shape))
    return engine


def run_paths(folder: Path, stages: tuple[int, ...]) -> dict[Any, Any]:
    """Results of every path through the step, and of runs of some steps, on one rank."""
    Part.backend = "torch"
    stage, results = Stage(folder), {}
    for name in METHODS:
        paths = [(zero, path) for zero in stages for path in PATHS[:1]]
        paths += [(stages[-1], path) for path in (PATHS[1:] if name == "tracer_dive" else PATHS[2:3])]
        for zero, (schedule, micro) in paths:
            engine = late_engine(stage, zero, schedule, micro, name=name)
            batch = batches_of(stage, engine)
            results[name, zero, schedule, micro] = stage.gradients(engine, batch)
            engine.deepspeed.destroy()
    for name, options in RUNS.items():
        for zero, micro in ((stages[0], None), (stages[-1], 3)):
            engine = stage.engine(zero, "sequential", micro, method_of(**options), **TRAIN)
            results["run", name, zero, micro] = make_steps(stage, engine, STEPS)
            engine.deepspeed.destroy()
    results["skipped"] = skipped_step(stage, stages[-1])
    results["texts"] = teacher_inputs(stage)
    results["zero"] = {name: run_of_zero_weights(stage, stages[-1], name) for name in ("flyp", "tracer", "carot")}
    return results


def make_steps(stage: Stage, engine: Engine, count: int) -> dict[str, Tensor]:
    for _ in range(count):
        engine.step(batches_of(stage, engine))
    return state_of(engine)


def state_of(engine: Engine) -> dict[str, Tensor]:
    """Copies of weights, teacher and the method's state."""
    teacher = {} if engine.teacher is None else dict(engine.teacher.state())
    tensors = full_state(engine) | {f"teacher/{name}": p for name, p in teacher.items()} | engine.method.state()
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def skipped_step(stage: Stage, zero: int) -> dict[str, bool]:
    """Whether an overflow of fp16 on the last rank keeps teacher and sum, and whether the next step moves both."""
    engine = stage.engine(zero, method=method_of(**RUNS["tracer"]), precision="fp16", **TRAIN)
    make_steps(stage, engine, 1)
    before, target = state_of(engine), stage.target
    if stage.ranks.rank == stage.ranks.world_size - 1:
        target = dataclasses.replace(target, images=target.images * math.inf)
    engine.step(StepBatches(target))
    skipped = state_of(engine)
    after = make_steps(stage, engine, 1)
    sums = [kernel(method_of(**RUNS["tracer"]), k) for k in (0, 1, 3)]
    engine.deepspeed.destroy()
    return {
        "kept": all(torch.equal(before[name], skipped[name]) for name in before),
        "moves": any(not torch.equal(after[name], before[name]) for name in before if name.startswith("teacher/")),
        "sum": math.isclose(after["kernel_sum"].item(), sum(sums), rel_tol=1e-15),
    }


def kernel(method: Method, k: int) -> float:
    part: Any = method.target_loss
    return float(part._kernel(k))


def teacher_inputs(stage: Stage) -> dict[str, tuple[int, ...]]:
    """Sizes of the tokens that teacher and student embed."""
    engine = stage.engine(0, method=method_of(name="tracer"))
    sizes: dict[str, tuple[int, ...]] = {}
    assert engine.teacher is not None
    for name, towers in (("teacher", engine.teacher.towers), ("student", engine.towers)):

        def record(_: Any, inputs: Any, name: str = name) -> None:
            sizes[name] = tuple(inputs[0].shape)

        towers.text.register_forward_pre_hook(record)
    engine.accumulate(StepBatches(stage.target))
    engine.deepspeed.destroy()
    return sizes | {"batch": tuple(stage.target.text.tokens.shape), "pairs": tuple(stage.target.text.index.shape)}


def run_of_zero_weights(stage: Stage, zero: int, name: str) -> dict[str, Tensor]:
    """Weights after some steps with the weights of all terms 0."""
    options = registry.options_of(registry.table().presets[name])
    method = method_of(name=name, **{option: 0.0 for option in options if option.endswith("_weight")})
    engine = stage.engine(zero, method=method)
    for _ in range(3):
        engine.step(StepBatches(stage.target))
    weights = full_state(engine)
    engine.deepspeed.destroy()
    return {name: weight.clone() for name, weight in weights.items()}


# Plain PyTorch in float64


def run_oracle(folder: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of student and teacher after some steps, with everything written out."""
    pretrained = open_clip.create_model(f"local-dir:{folder}").eval()
    student = copy.deepcopy(pretrained)
    student.load_state_dict(add_noise(pretrained.state_dict()))
    student = student.double()
    teacher = copy.deepcopy(student)
    data = in_float64(batches(folder))
    group = {"params": list(student.parameters()), "weight_decay": TRAIN["weight_decay"]}
    optimizer = torch.optim.AdamW([group], lr=TRAIN["learning_rate"], eps=TRAIN["epsilon"])
    every, is_carot = options.get("teacher_every", 1), options["name"] == "carot"
    history, weights = [copy.deepcopy(student)], [beta_density(0)]
    for step in range(STEPS):
        for each in optimizer.param_groups:
            each["lr"] = TRAIN["learning_rate"] * 0.5 * (1 + math.cos(math.pi * step / TOTAL_STEPS))
        feature_weight = options.get("feature_weight", 2000)
        loss, _ = self_distillation_as_written(
            options["name"], student, teacher, data, first=step == 0, feature_weight=feature_weight
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every:
            continue
        history.append(copy.deepcopy(student))
        with torch.no_grad():
            if is_carot:
                decay = 0.05 + 0.85 * step / 3 if step < 3 else 0.9
                for p, q in zip(teacher.parameters(), student.parameters(), strict=True):
                    p.copy_(decay * p + (1 - decay) * q)
                continue
            # The mean of all weights so far, with the density as weights.
            weights.append(beta_density(len(weights) if every > 1 else step + 1))
            for p, *past in zip(teacher.parameters(), *(each.parameters() for each in history), strict=True):
                total = torch.stack([w * q for w, q in zip(weights, past, strict=True)]).sum(0)
                p.copy_(total / sum(weights))
    return dict(student.named_parameters()) | {f"teacher/{n}": p for n, p in teacher.named_parameters()}


def beta_density(k: int) -> float:
    tau = (k + 0.5) / (TOTAL_STEPS + 1)
    return 1 / (math.pi * math.sqrt(tau * (1 - tau)))


# Tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.write_model(path, tiny.FEW_TOKENS)
    return path


@pytest.fixture(scope="module", params=STAGES)
def by_rank(folder: Path, request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    """Results of each rank, for one rank and two."""
    return run_ranks(request.param, run_paths, folder, STAGES[request.param], init=False, timeout=300)


@pytest.mark.parametrize("name", METHODS)
def test_paths_have_the_gradients_of_float64(folder: Path, by_rank: list[dict[Any, Any]], name: str) -> None:
    expected, losses = self_distillation_oracle(folder, name)
    paths = [key for key in by_rank[0] if isinstance(key, tuple) and key[0] == name]
    assert len(paths) > len(STAGES[len(by_rank)])
    for results in by_rank:
        for path in paths:
            gradients, metrics = results[path]
            assert_same_gradients(gradients, expected, 1e-5)
            assert metrics.keys() - losses.keys() == {"logit_scale"}
            for key, value in losses.items():
                assert metrics[key] == pytest.approx(value, rel=1e-4), (path, key)


@pytest.mark.parametrize("name", RUNS)
def test_runs_have_the_weights_and_the_teacher_of_float64(
    folder: Path, by_rank: list[dict[Any, Any]], name: str
) -> None:
    expected = run_oracle(folder, RUNS[name])
    moved = [
        (expected[n.removeprefix("teacher/")] - p).abs().max().item()
        for n, p in expected.items()
        if "teacher/" in n
    ]
    assert max(moved) > 5 * TOLERANCE
    for path in (path for path in by_rank[0] if path[:2] == ("run", name)):
        state = {key.replace("text.", "", 1): value for key, value in by_rank[0][path].items()}
        errors = {key: (state[key].reshape(p.shape) - p).abs().max().item() for key, p in expected.items()}
        assert max(errors.values()) < TOLERANCE, (path, max(errors, key=lambda key: errors[key]))
        # Every rank has the same teacher, bit for bit; the others hold a part of the student's weights.
        for results in by_rank[1:]:
            for key, value in results[path].items():
                assert torch.equal(value, by_rank[0][path][key]), (path, key)


def test_skipped_step_keeps_the_teacher_and_its_sum(by_rank: list[dict[Any, Any]]) -> None:
    for results in by_rank:
        assert results["skipped"] == {"kept": True, "moves": True, "sum": True}


def test_teacher_embeds_the_distinct_trimmed_texts(by_rank: list[dict[Any, Any]]) -> None:
    for results in by_rank:
        sizes = results["texts"]
        assert sizes["teacher"] == sizes["student"]
        assert sizes["teacher"][0] == sizes["batch"][0] < sizes["pairs"][0]
        assert sizes["teacher"][1] < sizes["batch"][1]


def test_weights_zero_train_as_flyp_bit_for_bit(by_rank: list[dict[Any, Any]]) -> None:
    weights = by_rank[0]["zero"]
    for name in ("tracer", "carot"):
        assert weights["flyp"].keys() == weights[name].keys()
        assert all(torch.equal(weight, weights[name][n]) for n, weight in weights["flyp"].items())


def save_and_resume(folder: Path, path: Path) -> dict[str, Any]:
    """States after two more steps, uninterrupted and resumed; the teacher moves before and after."""
    Part.backend = "torch"
    stage, results = Stage(folder), {}
    for name, options in RESUMED.items():
        engine = stage.engine(2, method=method_of(**options), **TRAIN)
        make_steps(stage, engine, 2)
        saver = Saver(engine, path / name, TrainConfig(), RunRecord("run"))
        saver.save(2, {"best": None, "best_step": 0, "since_best": 0, "select": None}, {}, required=True)
        saver.finish(required=True)
        results["uninterrupted", name] = make_steps(stage, engine, 2)
        engine.deepspeed.destroy()
        results["resumed", name] = resume(stage, path / name, 2, options)
    return results


def resume(stage: Stage, path: Path, zero: int, options: dict[str, Any]) -> dict[str, Tensor]:
    engine = stage.engine(zero, method=method_of(**options), **TRAIN)
    load_checkpoint(engine, checkpoint_path(path, 2))
    state = make_steps(stage, engine, 2)
    engine.deepspeed.destroy()
    return state


def resume_on_one_rank(folder: Path, path: Path) -> dict[str, dict[str, Tensor]]:
    Part.backend = "torch"
    return {name: resume(Stage(folder), path / name, 0, options) for name, options in RESUMED.items()}


def test_run_resumes_bit_equal_and_on_another_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    by_rank = run_ranks(2, save_and_resume, folder, tmp_path)
    (on_one_rank,) = run_ranks(1, resume_on_one_rank, folder, tmp_path)
    for name in RESUMED:
        uninterrupted = by_rank[0]["uninterrupted", name]
        for results in by_rank:
            assert results["resumed", name].keys() == results["uninterrupted", name].keys()
            for key, value in results["uninterrupted", name].items():
                assert torch.equal(value, results["resumed", name][key]), (name, key)
        for key, value in uninterrupted.items():
            assert (on_one_rank[name][key] - value).abs().max() < TOLERANCE, (name, key)


@pytest.mark.parametrize("name", METHODS)
def test_zero_3_and_offload_are_refused_in_one_line(name: str) -> None:
    offload = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    for section, option in (({"stage": 3}, "stage = 3"), (offload, "offload_optimizer")):
        with pytest.raises(ConfigError, match=f"{option}: .*penalty, a teacher on the target half") as refused:
            check_hooks({"zero_optimization": section}, method_of(**objective(name)), "sequential")
        assert "\n" not in str(refused.value)
