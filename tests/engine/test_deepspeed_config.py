"""The ``deepspeed`` section as the engine fills it in."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from step_oracle import config

from dive_fast.engine.deepspeed_config import BUCKET, deepspeed_section
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
        ({"optimizer": {"type": "Adam"}}, r"deepspeed\.optimizer has its home in train\.learning_rate"),
        ({"fp16": {"enabled": True}}, r"deepspeed\.fp16 has its home in train\.precision"),
        ({"scheduler": {"type": "WarmupLR"}}, r"deepspeed\.scheduler has its home in train\.warmup_steps"),
    ],
)
def test_a_deepspeed_key_that_contradicts_the_config_is_an_error(
    folder: Path, section: dict[str, Any], message: str
) -> None:
    tree = config(folder, 2, "sequential", None).model_dump()
    with pytest.raises(ConfigError, match=message):
        deepspeed_section(RunConfig.model_validate_json(json.dumps(tree | {"deepspeed": section})), world_size=2)


def test_a_batch_that_cannot_be_dealt_out_is_an_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.target\.batch_size = 8 is not divisible by 3 ranks"):
        deepspeed_section(config(folder, 2, "sequential", None), world_size=3)


def test_deepspeed_does_not_clip_unless_told_to(folder: Path) -> None:
    assert deepspeed_section(config(folder, 2, "sequential", None), world_size=2)["gradient_clipping"] == 0


def test_buckets_are_of_the_models_size_unless_told_otherwise(folder: Path) -> None:
    settings = config(folder, 2, "sequential", None)
    zero = deepspeed_section(settings, world_size=2)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (BUCKET, BUCKET)
    settings.deepspeed["zero_optimization"]["reduce_bucket_size"] = 7
    assert deepspeed_section(settings, world_size=2)["zero_optimization"]["reduce_bucket_size"] == 7
    assert "allgather_bucket_size" not in settings.deepspeed["zero_optimization"]


def test_a_stage_left_to_the_engine_shares_out_what_there_is_to_share(folder: Path) -> None:
    settings = config(folder, 2, "sequential", None)
    zero = settings.deepspeed["zero_optimization"]
    zero["stage"] = "auto"
    assert [deepspeed_section(settings, ranks)["zero_optimization"]["stage"] for ranks in (1, 2)] == [0, 1]
    zero["offload_optimizer"] = {"device": "cpu"}  # of which DeepSpeed knows nothing without ZeRO
    assert deepspeed_section(settings, 1)["zero_optimization"]["stage"] == 1
    assert zero["stage"] == "auto"
