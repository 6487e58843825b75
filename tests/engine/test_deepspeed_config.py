"""Tests of the ``deepspeed`` section as the engine completes it."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from step_oracle import config

from dive_fast.engine.deepspeed_config import BUCKET_SIZE, deepspeed_section
from dive_fast.errors import ConfigError
from dive_fast.methods.run_config import RunConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.write_model(path)
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
