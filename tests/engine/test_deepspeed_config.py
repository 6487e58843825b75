"""Tests of the ``deepspeed`` section as the engine completes it."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_ranks
from step_oracle import Stage, config
from torch import Tensor

from dive_fast.checkpoint import zero_state
from dive_fast.checkpoint.export import full_state
from dive_fast.engine.deepspeed_config import BUCKET_SIZE, check_deepspeed, deepspeed_section
from dive_fast.engine.step import Engine, StepBatches
from dive_fast.errors import ConfigError
from dive_fast.methods.method import Part
from dive_fast.methods.run_config import RunConfig

STEPS = 3
"""Updates before a state is compared."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.write_model(path, tiny.FEW_TOKENS)
    return path


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"train_batch_size": 3}, r"deepspeed\.train_batch_size = 3 contradicts 8"),
        ({"gradient_accumulation_steps": 2}, r"deepspeed\.gradient_accumulation_steps = 2 contradicts 1"),
        ({"optimizer": {"type": "Adam"}}, r"deepspeed\.optimizer belongs to train\.learning_rate"),
        ({"fp16": {"enabled": True}}, r"deepspeed\.fp16 belongs to train\.precision"),
        ({"scheduler": {"type": "WarmupLR"}}, r"deepspeed\.scheduler belongs to train\.warmup_steps"),
    ],
)
def test_deepspeed_section_refuses_contradicting_keys(folder: Path, section: dict[str, Any], message: str) -> None:
    tree = config(folder, 2, "sequential", None).model_dump()
    with pytest.raises(ConfigError, match=message):
        deepspeed_section(RunConfig.model_validate_json(json.dumps(tree | {"deepspeed": section})), world_size=2)


def test_deepspeed_section_refuses_batch_not_divisible_by_ranks(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.target\.batch_size = 8 is not divisible by 3 ranks"):
        deepspeed_section(config(folder, 2, "sequential", None), world_size=3)


def test_deepspeed_section_does_not_clip_by_default(folder: Path) -> None:
    assert deepspeed_section(config(folder, 2, "sequential", None), world_size=2)["gradient_clipping"] == 0


def test_deepspeed_section_bucket_sizes_have_own_defaults(folder: Path) -> None:
    settings = config(folder, 2, "sequential", None)
    zero = deepspeed_section(settings, world_size=2)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (BUCKET_SIZE, BUCKET_SIZE)
    settings.deepspeed["zero_optimization"]["reduce_bucket_size"] = 7
    assert deepspeed_section(settings, world_size=2)["zero_optimization"]["reduce_bucket_size"] == 7
    assert "allgather_bucket_size" not in settings.deepspeed["zero_optimization"]


def test_stage_auto_partitions_on_several_ranks_or_with_offload(folder: Path) -> None:
    settings = config(folder, 2, "sequential", None)
    zero = settings.deepspeed["zero_optimization"]
    zero["stage"] = "auto"
    assert [deepspeed_section(settings, ranks)["zero_optimization"]["stage"] for ranks in (1, 2)] == [0, 1]
    zero["offload_optimizer"] = {"device": "cpu"}  # ignored by DeepSpeed without ZeRO
    assert deepspeed_section(settings, 1)["zero_optimization"]["stage"] == 1
    assert zero["stage"] == "auto"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parameters_are_aligned_by_default_where_they_share_a_buffer(folder: Path, stage: int) -> None:
    settings = config(folder, stage, "sequential", None)
    aligned = deepspeed_section(settings, world_size=2)["zero_optimization"].get("parameter_alignment")
    assert aligned is (True if stage in (1, 2) else None)
    settings.deepspeed["zero_optimization"]["parameter_alignment"] = False
    assert deepspeed_section(settings, world_size=2)["zero_optimization"]["parameter_alignment"] is False


def compare_alignment(folder: Path) -> dict[Any, Any]:
    """Training on one rank with aligned parameters (by default, None) and without, by stage and precision."""
    Part.backend = "torch"
    stage, results = Stage(folder), {}
    for zero, aligned in itertools.product((0, 3), (True, False)):
        settings = config(folder, zero, "sequential", None, zero_options={"parameter_alignment": aligned})
        check_deepspeed(settings, world_size=2)
        engine = stage.engine(zero, zero_options={"parameter_alignment": aligned})
        results[zero, "fp32", aligned] = train(stage, engine)
    for zero, precision, aligned in itertools.product((1, 2), ("fp32", "fp16"), (None, False)):
        options = {} if aligned is None else {"parameter_alignment": aligned}
        engine = stage.engine(zero, precision=precision, clipping=0.5, zero_options=options)
        results[zero, precision, aligned] = train(stage, engine)
    return results


def train(stage: Stage, engine: Engine) -> dict[str, Any]:
    """Addresses of the parameters modulo 16, the gradient's norms, and weights with moments, on the first rank."""
    frozen = stage.teacher(stage.reference)

    def step() -> float:
        return float(engine.step(StepBatches(stage.target, stage.reference, frozen))["gradient_norm"])

    norms = [step() for _ in range(STEPS)]
    states = {state.name: state for state in zero_state.gather(engine)}
    weights = full_state(engine)
    # A checkpoint's tensors return to the places from which they were gathered.
    zero_state.scatter(engine, states.__getitem__, STEPS)
    restored = full_state(engine)
    assert all(torch.equal(restored[name], value) for name, value in weights.items())
    norms.append(step())
    addresses = [parameter.data_ptr() % 16 for parameter in engine.towers.parameters()]
    weights = full_state(engine)
    moments = {f"{name} {key}": rows for name, state in states.items() for key, rows in state.moments.items()}
    engine.deepspeed.destroy()
    return {"addresses": addresses, "norms": norms, "weights": weights | moments}


@pytest.mark.slow
def test_aligned_parameters_train_as_without_padding(folder: Path) -> None:
    for results in run_ranks(2, compare_alignment, folder, init=False):
        for (zero, precision, aligned), plain in results.items():
            if aligned is not False:
                continue
            padded = results[zero, precision, None if zero in (1, 2) else True]
            if zero in (1, 2):
                assert set(padded["addresses"]) == {0}, (zero, precision)
                # Without padding most are misaligned, so that this test would notice its absence.
                assert sum(map(bool, plain["addresses"])) > len(plain["addresses"]) / 2
            assert padded["norms"] == pytest.approx(plain["norms"], rel=1e-6), (zero, precision)
            assert padded["weights"].keys() == plain["weights"].keys()
            for name, value in padded["weights"].items():
                # Products and vector code round by alignment, on some processors and in some precisions.
                value, expected = without_key(name, value), without_key(name, plain["weights"][name])
                assert (value - expected).norm() <= 1e-5 * expected.norm(), (zero, precision, name)


def without_key(name: str, value: Tensor) -> Tensor:
    """A tensor without a key's bias, whose gradient is 0 in exact arithmetic: Adam makes steps of its rounding."""
    return value.reshape(3, -1)[[0, 2]] if "in_proj_bias" in name else value
