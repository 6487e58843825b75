"""The ``deepspeed`` section: keys filled in from the rest of the config, and validation by DeepSpeed."""

import difflib
import json
from typing import Any

import pydantic
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

from dive_fast.config.schema import Config
from dive_fast.errors import ConfigError

BUCKET_SIZE = 50_000_000
"""Default number of elements that ZeRO reduces and gathers at once. DeepSpeed's default is ten times as many,
1.9 GiB of each GPU, and more than these models have parameters."""

ALIGNED_STAGES = (1, 2)
"""Stages that lay out all parameters in one buffer. Without padding, ``logit_scale`` with its one element comes
first, and every other parameter begins 4 bytes after a multiple of 16, where CUDA's layer norms, casts and
products cannot use vector loads. The padding is at most 12 bytes a parameter and changes no value."""

TYPE_NAMES = {bool: "true or false", float: "a number", int: "an integer", str: "a string"}
"""Types of values that DeepSpeed does not validate, so that it would fail in training or misread them silently."""


def deepspeed_section(config: Config, world_size: int) -> dict[str, Any]:
    """Completes the ``deepspeed`` section by keys that belong to other sections of the config.

    Raises:
        ConfigError: the section contradicts the rest of the config, or a batch is not divisible by the ranks.
    """
    section = dict(config.deepspeed)
    for half in ("target", "reference"):
        data = getattr(config.data, half)
        if data is not None and data.batch_size % world_size:
            raise ConfigError(f"data.{half}.batch_size = {data.batch_size} is not divisible by {world_size} ranks")
    keys_elsewhere = {
        "optimizer": "train.learning_rate, train.weight_decay, train.betas",
        "scheduler": "train.warmup_steps, train.epochs",
        "fp16": "train.precision",
        "bf16": "train.precision",
        "torch_autocast": "train.precision",
    }
    for key, sections in keys_elsewhere.items():
        value = section.get(key)
        if value is not None and not (isinstance(value, dict) and value.get("enabled") is False):
            raise ConfigError(f"deepspeed.{key} belongs to {sections}: set it there and remove it here")
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"deepspeed.zero_optimization = {json.dumps(zero)}: expected an object")
    stage = zero.get("stage", 0)
    if stage != "auto" and (type(stage) is not int or stage not in range(4)):
        raise ConfigError(f"deepspeed.zero_optimization.stage = {json.dumps(stage)}: expected auto, 0, 1, 2 or 3")
    if config.train.compile and zero_section(section).get("stage", 0) == 3:
        raise ConfigError(
            "train.compile: ZeRO-3 gathers each block's parameters by hooks that cannot be compiled; turn it off, "
            "or use deepspeed.zero_optimization.stage = 2"
        )
    if config.train.ema is not None and zero_section(section).get("stage", 0) == 3:
        raise ConfigError(
            "train.ema: under ZeRO-3 no rank has all weights to average; remove it, or use "
            "deepspeed.zero_optimization.stage = 2"
        )
    batch_size = config.data.target.batch_size
    implied = {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // world_size,
        "gradient_accumulation_steps": 1,
    }
    for key, value in implied.items():
        if section.setdefault(key, value) != value:
            raise ConfigError(f"deepspeed.{key} = {section[key]} contradicts {value}, which the config implies")
    if zero := zero_section(section):
        buckets = {"reduce_bucket_size": BUCKET_SIZE, "allgather_bucket_size": BUCKET_SIZE}
        section["zero_optimization"] = buckets | zero
        if zero.get("stage") == "auto":
            # On one rank there is nothing to partition: ZeRO would only copy weights and gradients.
            is_plain = (world_size == 1 or config.train.optimizer == "sgd") and not offloads_optimizer(section)
            stage = 0 if is_plain else 1
            section["zero_optimization"]["stage"] = stage
        stage = section["zero_optimization"].get("stage", 0)
        if config.train.optimizer == "sgd" and (stage > 0 or offloads_optimizer(section)):
            option = f"stage = {stage}" if stage > 0 else "offload_optimizer"
            raise ConfigError(
                f"deepspeed.zero_optimization.{option}: train.optimizer = sgd is for a few parameters and is not "
                "partitioned; use stage 0 without offload, or adamw"
            )
        if section["zero_optimization"].get("stage") in ALIGNED_STAGES:
            section["zero_optimization"].setdefault("parameter_alignment", True)
    # DeepSpeed clips at 1.0 by default; the paper does not clip.
    section.setdefault("gradient_clipping", 0.0)
    # DeepSpeed's throughput timer synchronizes twice per step; the metrics log throughput instead.
    section.setdefault("timers", {"throughput": {"enabled": False}})
    return section


def check_deepspeed(config: Config, world_size: int) -> None:
    """Validates the ``deepspeed`` section by DeepSpeed; the process group has to exist.

    Raises:
        ConfigError: as :func:`deepspeed_section`; DeepSpeed refuses a key or value, or a key is misspelled.
    """
    section = _RecordingSection(deepspeed_section(config, world_size))
    try:
        DeepSpeedConfig(section)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        location = ".".join(map(str, first["loc"]))
        raise ConfigError(f"deepspeed: {location}, in {error.title}: {first['msg']}") from error
    except (AssertionError, DeepSpeedConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"deepspeed: {error}") from error
    for key, default in section.defaults.items():
        kind = next((kind for kind in (bool, float, int, str) if type(default) is kind), None)
        if key in section and kind is not None and type(section[key]) not in (kind, *([int] * (kind is float))):
            raise ConfigError(f"deepspeed.{key} = {json.dumps(section[key])}: expected {TYPE_NAMES[kind]}")
    for key, minimum in (("gradient_clipping", 0), ("steps_per_print", 1)):
        value = section.get(key)
        if value is not None and (type(value) not in (int, float) or value < minimum):
            raise ConfigError(f"deepspeed.{key} = {json.dumps(value)}: expected a number of at least {minimum}")
    for key in section.keys() - section.requested:
        # Not all lookups are recorded, so an unrequested key is refused only if it resembles a requested one.
        if near := difflib.get_close_matches(key, section.requested, cutoff=0.8):
            raise ConfigError(f"unknown key deepspeed.{key}; did you mean deepspeed.{near[0]}?")


class _RecordingSection(dict[str, Any]):
    """Records the keys that are requested, and their defaults."""

    def __init__(self, section: dict[str, Any]) -> None:
        super().__init__(section)
        self.requested: set[str] = set()
        self.defaults: dict[str, Any] = {}

    def __contains__(self, key: object) -> bool:
        self.requested.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.requested.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.requested.add(key)
        self.defaults.setdefault(key, default)
        return super().get(key, default)


def updates_on_device(section: dict[str, Any]) -> bool:
    """Whether :class:`~dive_fast.engine.update.DeviceUpdate` supports this ``deepspeed`` section."""
    return zero_section(section).get("stage", 0) < 3 and not offloads_optimizer(section)


def offloads_optimizer(section: dict[str, Any]) -> bool:
    """Whether the optimizer runs on the CPU."""
    offload = zero_section(section).get("offload_optimizer") or {}
    return bool(offload.get("device", "none") != "none")


def zero_section(section: dict[str, Any]) -> dict[str, Any]:
    """The ``zero_optimization`` section; empty if it is missing or not an object."""
    zero = section.get("zero_optimization")
    return zero if isinstance(zero, dict) else {}
