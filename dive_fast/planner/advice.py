"""Overrides that make a run fit a GPU."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from dive_fast.config.schema import NO_PROJECTION, Config, DataConfig
from dive_fast.engine.deepspeed_config import deepspeed_section, zero_section
from dive_fast.errors import ConfigError
from dive_fast.methods import registry
from dive_fast.model.towers import create
from dive_fast.model.transformer_blocks import CHECKPOINTING, recompute_activations, recompute_blocks
from dive_fast.planner.gpu_specs import GPUS, Gpu
from dive_fast.planner.plan import Plan
from dive_fast.planner.simulate import ALLOCATOR_SHARE, fake_tensors, plan_run


class Advice(NamedTuple):
    """Overrides of a config and the plan of the changed config."""

    overrides: tuple[str, ...]
    """In the form of the command line."""
    plan: Plan

    def as_json(self, gpu: Gpu) -> dict[str, Any]:
        """The overrides and the figures of their plan on ``gpu``."""
        return {
            "overrides": list(self.overrides),
            "peak_memory_bytes": self.plan.peak_memory_bytes,
            "needed_memory_bytes": self.plan.needed_memory_bytes,
            "flop_per_step": self.plan.flop_per_step,
            "step_seconds": self.plan.step_seconds(gpu),
        }


def advise(config: Config, plan: Plan, gpus: Sequence[str]) -> dict[str, Advice | None]:
    """Finds the cheapest overrides that make a config fit each GPU it does not fit; each candidate is planned.

    The first candidates cost no FLOP and are tried one at a time: ``train.schedule=sequential``,
    ``teacher.mode=cache``, higher ZeRO stages, ``train.activation_checkpointing=selective`` (which costs some
    FLOP under ZeRO-3). Then all of them together. Then ``full`` instead of ``selective``, at most one more
    forward. Then no checkpointing but micro-batches of the largest power of two that fits, one more forward. Last,
    texts of 32 tokens as well, which truncates longer ones. A change that cannot save enough is skipped.

    Args:
        plan: the config's own plan.
        gpus: names in :data:`dive_fast.planner.gpu_specs.GPUS`.

    Returns:
        An entry for each GPU that the plan does not fit; None if no candidate fits.
    """
    plans: dict[tuple[str, ...], Plan] = {}

    def plan_with(*overrides: str) -> Plan:
        if overrides not in plans:
            plans[overrides] = plan_run(_with_overrides(config, overrides), plan.ranks)
        return plans[overrides]

    too_small = [name for name in gpus if not plan.fits(GPUS[name])]
    checkpointing = _more_checkpointing(config) if too_small else []
    return {name: _advice(config, GPUS[name], plan, checkpointing, plan_with) for name in too_small}


def _advice(
    config: Config, gpu: Gpu, plan: Plan, checkpointing: list[str], plan_with: Callable[..., Plan]
) -> Advice | None:
    def advice_if_fits(overrides: Sequence[str], max_saving: int) -> Advice | None:
        if not overrides or plan.needed_memory_bytes - max_saving * (1 + ALLOCATOR_SHARE) > gpu.memory:
            return None
        changed = plan_with(*overrides)
        return Advice(tuple(overrides), changed) if changed.fits(gpu) else None

    activations = plan.parts.get("activations", 0)
    free = dict(_free_changes(config, plan))
    # Selective checkpointing stores as much as it drops.
    selective = {f"{CHECKPOINTING}=selective": activations // 2} if "selective" in checkpointing else {}
    full = {f"{CHECKPOINTING}=full": activations} if "full" in checkpointing else {}
    single = [{override: saving} for override, saving in (free | selective).items()]
    for changes in (*single, free, free | selective, free | full):
        advice = advice_if_fits(_drop_replaced(changes), sum(changes.values()))
        if advice is not None:
            return advice
    for overrides in (_drop_replaced(free), [*_drop_replaced(free), *_shorter_texts(config.data)]):
        advice = _largest_micro_batch(config.data, gpu, plan, overrides, plan_with)
        if advice is not None:
            return advice
    return None


def _free_changes(config: Config, plan: Plan) -> Iterator[tuple[str, int]]:
    """Overrides that add no FLOP, each with an upper bound on the bytes that it saves."""
    parts = plan.parts
    needs = registry.needs(config.objective)
    if needs.reference and config.train.schedule == "joint":
        yield "train.schedule=sequential", parts.get("activations", 0) + parts.get("loss", 0)
    if needs.reference_teacher and config.teacher.mode == "online":
        yield "teacher.mode=cache", parts.get("teacher", 0) + parts.get("activations", 0)
    stage = zero_section(deepspeed_section(config, plan.ranks)).get("stage", 0)
    state = sum(parts.get(part, 0) for part in ("weights", "gradients", "optimizer"))
    needs_weights = needs.all_weights or config.train.ema is not None or config.projection.name != NO_PROJECTION
    if plan.ranks > 1:
        yield from (
            (f"deepspeed.zero_optimization.stage={higher}", state)
            for higher in ((1, 2) if needs_weights else (1, 2, 3))
            if higher > stage
        )


def _more_checkpointing(config: Config) -> list[str]:
    """Values of ``train.activation_checkpointing`` that store less than the config's and its towers support."""
    functions = {"selective": recompute_activations, "full": recompute_blocks}
    current = config.train.activation_checkpointing
    supported: list[str] = []
    if current == "full":
        return supported
    with fake_tensors():
        towers = create(config.model, weights=False)
        for value, recompute in functions.items():
            if value != current:
                with contextlib.suppress(ConfigError):
                    recompute(towers)
                    supported.append(value)
    return supported


def _drop_replaced(overrides: Iterable[str]) -> list[str]:
    """Drops each override whose key a later one sets again."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


def _shorter_texts(data: DataConfig) -> list[str]:
    halves = {"target": data.target, "reference": data.reference}
    return [f"data.{half}.text_length=32" for half, section in halves.items() if section is not None]


def _largest_micro_batch(
    data: DataConfig, gpu: Gpu, plan: Plan, overrides: list[str], plan_with: Callable[..., Plan]
) -> Advice | None:
    """The largest power of two that fits, searched from the size expected if activations scale with the batch."""
    halves = [half for half in (data.target, data.reference) if half is not None]
    pairs = max(half.batch_size for half in halves) // plan.ranks
    activations = max(plan.parts.get("activations", 0), 1)
    available = max(gpu.memory - (plan.needed_memory_bytes - activations), 1)
    if plan.ranks == 1 and sum(plan.parts.get(part, 0) for part in ("weights", "optimizer")) > gpu.memory:
        return None
    largest = _power_of_two_below(pairs)
    expected = min(_power_of_two_below(pairs * available // activations), largest)

    def advice_of(size: int) -> Advice:
        changes = (*overrides, f"train.micro_batch_size={size}")
        return Advice(changes, plan_with(*changes))

    size, advice = expected, advice_of(expected)
    while size > 1 and not advice.plan.fits(gpu):
        size //= 2
        advice = advice_of(size)
    if not advice.plan.fits(gpu):
        return None
    while size == expected < largest and (larger := advice_of(2 * size)).plan.fits(gpu):
        size, expected, advice = 2 * size, 2 * expected, larger
    return advice


def _power_of_two_below(count: int) -> int:
    """The largest power of two below ``count``; at least 1."""
    return int(2 ** max((count - 1).bit_length() - 1, 0))


def _with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """The config with overrides applied, in the form of the command line; a key may be new."""
    tree = config.model_dump(mode="json")
    for override in overrides:
        path, _, text = override.partition("=")
        *sections, key = path.split(".")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = json.loads(text) if text.isdecimal() else text
    return Config.model_validate_json(json.dumps(tree))
