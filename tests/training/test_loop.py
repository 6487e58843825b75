"""Complete runs, from config to exported model: resumed, cached, on one and two ranks, at every ZeRO stage."""

import contextlib
import gzip
import io
import json
import re
import shutil
import unittest.mock
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tiny
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from dive_fast.checkpoint import manifest as checkpoint
from dive_fast.config.schema import Config
from dive_fast.data.prepared import convert
from dive_fast.data.prepared.raw import RawSource
from dive_fast.data.prepared.write import prepare
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.distributed import Ranks, join
from dive_fast.engine import profiler as trace
from dive_fast.engine.profiler import RANGES, WAIT_STEPS, WARMUP_STEPS
from dive_fast.errors import ConfigError
from dive_fast.methods.dive import Dive
from dive_fast.methods.method import Part
from dive_fast.methods.noise_floor import NOISE_FLOOR, check_noise_floor
from dive_fast.methods.run_config import RunConfig
from dive_fast.training import loop as train
from dive_fast.training import metrics

STAGES = (0, 2)
OTHER_STAGES = (1, 3)
"""Stages of the slow tests: every stage resumes to equal bits in test_option_combinations.py too."""
STEPS = 6
EMA = {0: 0.5, 2: 0.9}
"""Stages that average the weights, with the decay."""


class KilledError(Exception):
    """Ends a run before its end."""


def load(tree: dict[str, Any], **train_options: Any) -> Config:
    return RunConfig.model_validate_json(json.dumps(tree | {"train": tree["train"] | train_options}))


def run(tree: dict[str, Any], output: Path, ranks: Ranks, kill_at: int | None = None, **options: Any) -> Any:
    """Trains; ``kill_at`` raises :class:`KilledError` after that many steps."""
    config = load(tree, output=str(output), **options)
    log = train.Metrics.log

    def log_until(self: train.Metrics, step: int, *values: Any) -> None:
        log(self, step, *values)
        if step == kill_at:
            raise KilledError

    train.Metrics.log = log_until  # type: ignore[method-assign]
    try:
        return train.train(config, output, ranks)
    finally:
        train.Metrics.log = log  # type: ignore[method-assign]


def copied(complete: Path, folder: Path, ranks: Ranks) -> Path:
    """A copy of a run folder."""
    if ranks.is_main:
        shutil.copytree(complete, folder)
    ranks.barrier()
    return folder


def run_stages(folder: Path, ranks: Ranks, stages: Sequence[int]) -> dict[str, Any]:
    """At each ZeRO stage a complete run, and one that is killed and resumed."""
    tree = json.loads((folder / "config.json").read_text())
    results: dict[str, Any] = {}
    # Interpreted kernels would take most of the time: one run uses them, all others use PyTorch.
    Part.backend = "torch"
    for stage in stages:
        tree["deepspeed"]["zero_optimization"]["stage"] = stage
        ema = {"ema": EMA[stage]} if stage in EMA else {}
        results[f"complete{stage}"] = run(tree, folder / f"complete{stage}", ranks, **ema)
        resumed = folder / f"resumed{stage}"
        with pytest.raises(KilledError):
            run(tree, resumed, ranks, kill_at=5, checkpoint_every=2, **ema)
        ranks.barrier()
        results[f"resumed{stage}"] = run(tree, resumed, ranks, checkpoint_every=2, **ema)
    return results


def run_cases(folder: Path) -> dict[str, Any]:
    """Runs on one of two ranks."""
    ranks = join()
    results = run_stages(folder, ranks, STAGES)
    tree = json.loads((folder / "config.json").read_text())
    # The average of a checkpoint does not depend on the stage that wrote it.
    moved = copied(folder / "complete2", folder / "moved", ranks)
    tree["deepspeed"]["zero_optimization"]["stage"] = 0
    results["moved"] = run(tree, moved, ranks, ema=EMA[2], export_ema=True)
    prepared = json.loads((folder / "prepared.json").read_text())
    results["fast"] = run(prepared, folder / "fast", ranks)
    with pytest.raises(KilledError):
        run(prepared, folder / "resumed-fast", ranks, kill_at=3, checkpoint_every=2)
    ranks.barrier()
    run(prepared, folder / "resumed-fast", ranks)
    Part.backend = "triton"
    tree["teacher"] = {"mode": "online"}
    results["online"] = run(tree, folder / "online", ranks, schedule="joint", micro_batch_size=3)
    return results


def run_other_stages(folder: Path) -> None:
    """Runs of the slow tests on one of two ranks."""
    run_stages(folder, join(), OTHER_STAGES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    # Two parameter groups, each with its own moments to save. With Adam's default epsilon, tokens that only
    # captions have would make a full first step along the rounding of student and teacher, whose blocks differ.
    tree = tiny.write_config(path, epochs=2, learning_rate=1e-4, decay_all_parameters=False, epsilon=1e-3)
    # So small a weight that the teacher's rounding has no effect.
    tree["objective"] = {"weight": 1.0}
    tree["data"]["reference"]["batch_size"] = 4
    tree["evaluate"] = {"sets": {"seen": {k: tree["data"]["target"][k] for k in tiny.EVALUATION}}, "workers": 0}
    (path / "config.json").write_text(json.dumps(tree))
    for half, text, loader in (("target", ".cls", "dali"), ("reference", ".txt", "ffcv")):
        raw = open_webdataset(tree["data"][half]["path"], text)
        prepare(RawSource(raw), path / f"{half}-beton", convert.Options("beton"), workers=1)
        tree["data"][half] |= {"format": "prepared", "path": str(path / f"{half}-beton"), "loader": loader}
    (path / "prepared.json").write_text(json.dumps(tree))
    return path


@pytest.fixture(scope="module")
def by_rank(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(2, run_cases, folder, init=False, timeout=400)


@pytest.fixture(scope="module")
def other_stages(folder: Path) -> None:
    run_ranks(2, run_other_stages, folder, init=False, timeout=400)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_run_resumes_to_the_same_weights(by_rank: list[Any], folder: Path, stage: int) -> None:
    assert_resumed_alike(folder, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", OTHER_STAGES)
def test_killed_run_of_other_stages_resumes_to_the_same_weights(
    other_stages: None, folder: Path, stage: int
) -> None:
    assert_resumed_alike(folder, stage)


def assert_resumed_alike(folder: Path, stage: int) -> None:
    complete, resumed = weights(folder / f"complete{stage}"), weights(folder / f"resumed{stage}")
    assert all(torch.equal(complete[name], resumed[name]) for name in complete)
    # So are its metrics: one line per step, in order.
    losses = [
        [line["loss"] for line in lines(folder / f"{run}{stage}") if "loss" in line]
        for run in ("complete", "resumed")
    ]
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]


@pytest.mark.parametrize("stage", EMA)
def test_killed_run_resumes_to_the_same_average(by_rank: list[Any], folder: Path, stage: int) -> None:
    paths = [folder / f"{run}{stage}" / "ema.safetensors" for run in ("complete", "resumed")]
    complete, resumed = map(load_file, paths)
    assert all(torch.equal(complete[name], resumed[name]) for name in complete)
    raw = weights(folder / f"complete{stage}")
    assert any(not torch.equal(raw[name], complete[name]) for name in raw)


def test_average_is_exported_at_another_stage(by_rank: list[Any], folder: Path) -> None:
    exported, average = weights(folder / "moved"), load_file(folder / "complete2/ema.safetensors")
    assert all(torch.equal(exported[name], average[name]) for name in average)
    assert not (folder / "moved/ema.safetensors").exists()
    assert not (folder / "fast/ema.safetensors").exists()
    # Losses are those of the raw weights.
    assert {"accuracy/seen", "weights_step"} <= by_rank[0]["moved"].keys()
    assert "loss" not in by_rank[0]["moved"]


def test_zero_stages_train_alike(by_rank: list[Any], folder: Path) -> None:
    assert_trained_alike(folder, STAGES[1:])


@pytest.mark.slow
def test_other_zero_stages_train_alike(by_rank: list[Any], other_stages: None, folder: Path) -> None:
    assert_trained_alike(folder, OTHER_STAGES)


def assert_trained_alike(folder: Path, stages: Sequence[int]) -> None:
    expected = weights(folder / "complete0")
    start = open_clip.create_model(f"local-dir:{folder}/model").state_dict()
    for stage in stages:
        tuned = weights(folder / f"complete{stage}")
        for name, value in expected.items():
            # A key's bias has no gradient in exact arithmetic; Adam makes full steps of its rounding.
            if not name.endswith("in_proj_bias"):
                moved = (value - start[name]).norm()
                assert (tuned[name] - value).norm() < 0.05 * moved, (stage, name)


def test_online_teacher_and_joint_micro_batches_train_alike(by_rank: list[Any], folder: Path) -> None:
    for cached, online in zip(lines(folder / "complete2"), lines(folder / "online"), strict=True):
        if "loss" in cached:
            assert online["contrastive_loss"] == pytest.approx(cached["contrastive_loss"], rel=1e-3)
            # At the first step the norm is the rounding of the teacher.
            if cached["step"] > 1:
                assert online["image_norm"] == pytest.approx(cached["image_norm"], rel=2e-2)


def test_fast_loaders_train_alike_and_resume(by_rank: list[Any], folder: Path) -> None:
    for plain, fast in zip(lines(folder / "complete0"), lines(folder / "fast"), strict=True):
        if "loss" in plain:
            assert fast["contrastive_loss"] == pytest.approx(plain["contrastive_loss"], rel=1e-3)
            assert 0 <= fast["data_wait"] <= 1
    # With different pixels for teacher and student, the first difference vectors would be longer.
    assert lines(folder / "fast")[0]["image_norm"] < NOISE_FLOOR["fp32"]
    complete, resumed = weights(folder / "fast"), weights(folder / "resumed-fast")
    assert all(torch.equal(complete[name], resumed[name]) for name in complete)


def test_exported_model_loads_in_open_clip(by_rank: list[Any], folder: Path) -> None:
    tiny_config = Path(str(folder / "model"))
    model = open_clip.create_model(f"local-dir:{tiny_config}", load_weights=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    open_clip.load_checkpoint(model, str(folder / "complete2/model.safetensors"))
    after = model.state_dict()
    assert after["logit_scale"].shape == ()
    assert any(not torch.equal(before[name], after[name]) for name in after)


def test_run_writes_metrics_and_provenance(by_rank: list[Any], folder: Path) -> None:
    written = lines(folder / "complete0")
    assert [line["step"] for line in written] == [1, 2, 3, 4, 5, 6, 6]
    assert {"loss", "image_norm", "text_norm", "logit_scale", "learning_rate", "images_per_second"} <= written[
        0
    ].keys()
    # The student equals the teacher at first, and differs from it later.
    assert written[0]["image_norm"] < NOISE_FLOOR["fp32"] < written[3]["image_norm"]
    assert 0 <= written[-1]["accuracy/seen"] <= 1
    assert (
        by_rank[0]["complete0"]["accuracy/seen"]
        == by_rank[1]["complete0"]["accuracy/seen"]
        == written[-1]["accuracy/seen"]
    )
    provenance = json.loads((folder / "complete0/config.json").read_text())
    assert provenance["config"]["train"]["weight_decay"] == 0.1
    assert provenance["versions"]["torch"] == version("torch")
    assert provenance["ranks"] == 2


def complete_checkpoints(folder: Path) -> list[Path]:
    return [path for path in checkpoint.list_checkpoints(folder) if checkpoint.is_complete(path)]


def test_run_keeps_only_the_newest_checkpoints(by_rank: list[Any], folder: Path) -> None:
    kept = complete_checkpoints(folder / "resumed2/checkpoints")
    assert [path.name for path in kept] == ["step00000004", "step00000006"]


def alone(tmp_path: Path, **options: Any) -> tuple[dict[str, Any], Path]:
    tree = tiny.write_config(tmp_path, max_steps=2, **options)
    return tree, tmp_path / "run"


def run_alone(tree: dict[str, Any], output: Path) -> Any:
    return run_each_alone([tree], output)[0]


def run_each_alone(trees: Sequence[dict[str, Any]], output: Path) -> list[Any]:
    """Outcomes of runs in one process, each of which resumes the one before."""
    return run_ranks(1, _run_alone, trees, output, init=False)[0]


def _run_alone(trees: Sequence[dict[str, Any]], output: Path) -> list[Any]:
    ranks, outcomes = join(), list[Any]()
    Part.backend = "torch"
    for tree in trees:
        try:
            outcomes.append(run(tree, output, ranks))
        except ConfigError as error:
            outcomes.append(str(error))
    return outcomes


def test_cache_of_other_data_or_model_is_refused(tmp_path: Path) -> None:
    tree, output = alone(tmp_path)
    run_alone(tree, output)
    shutil.rmtree(tmp_path / "reference")
    tree["data"]["reference"] = tiny.write_reference(tmp_path / "reference", count=25)
    tree["model"]["name"] = tiny.write_model(tmp_path / "other", tiny.FEW_TOKENS, seed=1)
    tree["teacher"] = {"path": str(output / "teacher")}
    message = run_alone(tree, tmp_path / "other run")
    assert "teacher cache" in message
    assert all(f"{field}: the cache has" in message for field in ("data", "weights"))
    assert "views" not in message


def test_wrong_cache_rows_are_refused_before_the_first_update(tmp_path: Path) -> None:
    tree, output = alone(tmp_path)
    run_alone(tree, output)
    audited = json.loads((output / "audit.json").read_text())
    assert audited["pairs"] == 24
    assert 0 <= audited["image_max"] < 1e-5
    rows = np.load(output / "teacher/text.npy")
    np.save(output / "teacher/text.npy", rows[::-1])
    shutil.rmtree(output / "checkpoints")
    refused = run_each_alone(
        [tree | {"teacher": options} for options in ({}, {"verify": False}, {"verify": False, "audit": 0})], output
    )
    for message, part in zip(
        refused,
        (
            "text.npy: rows 0 to 23 have changed since they were written",
            "Most likely the captions or the tokenizer changed",
            "mean |v| before the first update is",
        ),
        strict=True,
    ):
        assert part in message


def _warned(tree: dict[str, Any], output: Path) -> list[list[str]]:
    """Warnings of noise of a slow run in bf16, of the same killed and resumed, and of a run in fp32."""
    ranks, warnings = join(), []
    Part.backend = "torch"
    slow = {"learning_rate": 1e-7, "warmup_steps": 2, "log_every": 1, "max_steps": 4, "precision": "bf16"}

    def warnings_of(name: str, **options: Any) -> None:
        messages: list[str] = []
        warning = metrics.logger.warning
        metrics.logger.warning = lambda text, *values: messages.append(text % values)  # type: ignore[method-assign]
        try:
            run(tree, output / name, ranks, **slow | options)
        except KilledError:
            pass
        finally:
            metrics.logger.warning = warning  # type: ignore[method-assign]
        warnings.append([message for message in messages if "after the warm-up" in message])

    warnings_of("bf16")
    warnings_of("killed", kill_at=2, checkpoint_every=1)
    warnings_of("killed")
    warnings_of("fp32", precision="fp32", learning_rate=1e-3)
    return warnings


@pytest.mark.slow
def test_noise_above_a_third_is_reported_once_per_run(tmp_path: Path) -> None:
    tree, output = alone(tmp_path)
    (complete, killed, resumed, fp32) = run_ranks(1, _warned, tree, output, init=False)[0]
    assert len(complete) == 2
    assert complete[0].startswith("mean |u| is ")
    assert "rounding in bf16 alone makes" in complete[0]
    assert complete[1].startswith("mean |v| is ")
    assert (killed, resumed, fp32) == ([], complete, [])


def _traced(tree: dict[str, Any], output: Path) -> tuple[Counter[str], str, list[str]]:
    """Ranges in the trace of three steps, its printed summary, and the warnings of a run too short for a trace."""
    ranks = join()
    Part.backend = "torch"
    with contextlib.redirect_stdout(io.StringIO()) as output_text:
        run(tree, output, ranks, epochs=20, max_steps=WAIT_STEPS + WARMUP_STEPS + 3, trace_steps=3)
    events = json.loads(gzip.decompress((output / "trace.json.gz").read_bytes()))["traceEvents"]
    ranges = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    with unittest.mock.patch.object(trace.logger, "warning") as warned:
        run(tree, output.with_name("short"), ranks, epochs=20, max_steps=WAIT_STEPS, trace_steps=3)
    assert not output.with_name("short").joinpath("trace.json.gz").exists()
    return ranges, output_text.getvalue(), [call.args[0] % call.args[1:] for call in warned.call_args_list]


@pytest.mark.slow
def test_trace_contains_the_parts_of_a_step(tmp_path: Path) -> None:
    tree, output = alone(tmp_path)
    tree["teacher"] = {"mode": "online"}
    ((ranges, printed, warned),) = run_ranks(1, _traced, tree, output, init=False)
    # A traced step ends with the wait for the batch of the next one.
    assert {name: ranges[name] for name in RANGES} == {
        "load": 3,
        "teacher": 3,
        "target": 3,
        "reference": 3,
        "joint": 0,
        "loss": 6,
        "optimizer": 3,
    }
    assert f"{output}/trace.json.gz: trace of 3 steps" in printed
    assert re.search(r"^  target +\d+\.\d\d$", printed, re.MULTILINE)
    assert warned == [f"no trace: the run is shorter than {WAIT_STEPS + WARMUP_STEPS + 1} steps"]


def test_noise_floor_allows_the_tolerance_of_the_audit(tmp_path: Path) -> None:
    tree = tiny.write_config(tmp_path)

    def check(length: float, **teacher: Any) -> None:
        values = {"image_norm": torch.tensor(0.0), "text_norm": torch.tensor(length)}
        config = RunConfig.model_validate(tree | {"teacher": teacher})
        check_noise_floor(train._first_step(values, config.train, config.teacher), Dive.norms)

    for allowed, refused, teacher in (
        (9e-5, 2e-4, {}),
        (9e-4, 2e-3, {"dtype": "float16"}),
        (9e-3, 2e-2, {"dtype": "float16", "tolerance": 1e-2}),
        (9e-5, 2e-4, {"mode": "online", "tolerance": 1e-2}),
    ):
        check(allowed, **teacher)
        with pytest.raises(ConfigError, match=r"mean \|v\| before the first update"):
            check(refused, **teacher)
