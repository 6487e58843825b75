"""The ``deepspeed`` section: what is filled in, what has its home elsewhere, what DeepSpeed makes of it."""

import difflib
import json
from typing import Any

import pydantic
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

from dive_fast.config.schema import Config
from dive_fast.errors import ConfigError

BUCKET = 50_000_000
"""Elements that ZeRO reduces and gathers at once, unless told otherwise. DeepSpeed's default is ten times as many,
1.9 GiB of each GPU, and more than these models have parameters."""


KINDS = {bool: "true or false", float: "a number", int: "a whole number", str: "a string"}
"""Of values that DeepSpeed takes as they are and only fails at, or silently misreads, when it trains."""


def deepspeed_section(config: Config, world_size: int) -> dict[str, Any]:
    """The ``deepspeed`` section with the keys filled in that have their home elsewhere in the config.

    Raises:
        ConfigError: the section contradicts the rest of the config, or a batch cannot be dealt out to the ranks.
    """
    section = dict(config.deepspeed)
    for half in ("target", "reference"):
        data = getattr(config.data, half)
        if data is not None and data.batch_size % world_size:
            raise ConfigError(f"data.{half}.batch_size = {data.batch_size} is not divisible by {world_size} ranks")
    homes = {
        "optimizer": "train.learning_rate, train.weight_decay, train.betas",
        "scheduler": "train.warmup_steps, train.epochs",
        "fp16": "train.precision",
        "bf16": "train.precision",
        "torch_autocast": "train.precision",
    }
    for key, home in homes.items():
        value = section.get(key)
        if value is not None and not (isinstance(value, dict) and value.get("enabled") is False):
            raise ConfigError(f"deepspeed.{key} has its home in {home}: set it there and remove it here")
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"deepspeed.zero_optimization = {json.dumps(zero)}: expected an object")
    stage = zero.get("stage", 0)
    if stage != "auto" and (type(stage) is not int or stage not in range(4)):
        raise ConfigError(f"deepspeed.zero_optimization.stage = {json.dumps(stage)}: expected auto, 0, 1, 2 or 3")
    if config.train.compile and zero_section(section).get("stage", 0) == 3:
        raise ConfigError(
            "train.compile: ZeRO-3 brings each block's parameters by hooks that cannot be compiled; turn it off, "
            "or take deepspeed.zero_optimization.stage = 2"
        )
    batch_size = config.data.target.batch_size
    filled = {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // world_size,
        "gradient_accumulation_steps": 1,
    }
    for key, value in filled.items():
        if section.setdefault(key, value) != value:
            raise ConfigError(f"deepspeed.{key} = {section[key]} contradicts {value}, which the config implies")
    if zero := zero_section(section):
        buckets = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        section["zero_optimization"] = buckets | zero
        if zero.get("stage") == "auto":
            # One rank has nothing to share out: ZeRO would only copy weights and gradients.
            stage = 0 if world_size == 1 and not offloads_optimizer(section) else 1
            section["zero_optimization"]["stage"] = stage
    # DeepSpeed clips at 1.0 unless told otherwise; the paper does not clip.
    section.setdefault("gradient_clipping", 0.0)
    # Else it waits for the device twice a step, to tell a throughput that the metrics have.
    section.setdefault("timers", {"throughput": {"enabled": False}})
    return section


def check_deepspeed(config: Config, world_size: int) -> None:
    """Lets DeepSpeed read its section, once this process has joined the group.

    Raises:
        ConfigError: as :func:`deepspeed_section`; DeepSpeed refuses a key or value, or would pass over a typo.
    """
    section = _Section(deepspeed_section(config, world_size))
    try:
        DeepSpeedConfig(section)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"deepspeed: {place}, in {error.title}: {first['msg']}") from error
    except (AssertionError, DeepSpeedConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"deepspeed: {error}") from error
    for key, default in section.defaults.items():
        kind = next((kind for kind in (bool, float, int, str) if type(default) is kind), None)
        if key in section and kind is not None and type(section[key]) not in (kind, *([int] * (kind is float))):
            raise ConfigError(f"deepspeed.{key} = {json.dumps(section[key])}: expected {KINDS[kind]}")
    for key, least in (("gradient_clipping", 0), ("steps_per_print", 1)):
        value = section.get(key)
        if value is not None and (type(value) not in (int, float) or value < least):
            raise ConfigError(f"deepspeed.{key} = {json.dumps(value)}: expected a number from {least} on")
    for key in section.keys() - section.asked:
        # Some keys it looks for in ways that are not seen here; what it does not look for it does not miss.
        if near := difflib.get_close_matches(key, section.asked, cutoff=0.8):
            raise ConfigError(f"unknown key deepspeed.{key}; did you mean deepspeed.{near[0]}?")


class _Section(dict[str, Any]):
    """Remembers which keys it was asked for, and the defaults of those with one."""

    def __init__(self, section: dict[str, Any]) -> None:
        super().__init__(section)
        self.asked: set[str] = set()
        self.defaults: dict[str, Any] = {}

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        self.defaults.setdefault(key, default)
        return super().get(key, default)


def updates_on_device(section: dict[str, Any]) -> bool:
    """Whether :class:`DeviceUpdate` does for this ``deepspeed`` section."""
    return zero_section(section).get("stage", 0) < 3 and not offloads_optimizer(section)


def offloads_optimizer(section: dict[str, Any]) -> bool:
    """Whether the optimizer runs on the CPU."""
    offload = zero_section(section).get("offload_optimizer") or {}
    return bool(offload.get("device", "none") != "none")


def zero_section(section: dict[str, Any]) -> dict[str, Any]:
    """Its ``zero_optimization``; empty where there is none, or what DeepSpeed will refuse."""
    zero = section.get("zero_optimization")
    return zero if isinstance(zero, dict) else {}
