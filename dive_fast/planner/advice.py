"""Changes to a config that would make a run fit or run faster."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from dive_fast.config.schema import Config
from dive_fast.engine.deepspeed_config import deepspeed_section, zero_of
from dive_fast.errors import ConfigError
from dive_fast.methods import registry
from dive_fast.model.towers import create
from dive_fast.model.transformer_blocks import CHECKPOINTING, recompute_activations, recompute_blocks
from dive_fast.planner.gpu_specs import GPUS, Gpu
from dive_fast.planner.plan import Plan
from dive_fast.planner.simulate import ALLOCATOR_SHARE, fake_tensors, plan_run


class Advice(NamedTuple):
    """Changes of a config, and what they lead to."""

    overrides: tuple[str, ...]
    """As on the command line."""
    plan: Plan

    def as_json(self, gpu: Gpu) -> dict[str, Any]:
        """What to add to the command line, and the figures it leads to on this GPU."""
        return {
            "overrides": list(self.overrides),
            "peak_memory_bytes": self.plan.peak_memory_bytes,
            "needed_memory_bytes": self.plan.needed_memory_bytes,
            "flop_per_step": self.plan.flop_per_step,
            "step_seconds": self.plan.step_seconds(gpu),
        }


def advise(config: Config, planned: Plan, gpus: Sequence[str]) -> dict[str, Advice | None]:
    """What makes a config fit the GPUs that it does not fit, found by planning it: the least extra work first.

    First changes that cost no FLOP, each alone (``train.schedule=sequential``, ``teacher.mode=cache``, higher ZeRO
    stages, ``train.activation_checkpointing=selective``, which costs some under ZeRO-3), then all at once. Then
    ``full`` in the place of ``selective``, at most another forward; then neither, but micro-batches, a whole
    forward, of the largest power of two that fits; last, texts of 32 tokens on top, which cuts what is longer. A
    change whose best case is known to be too little is passed over.

    Args:
        planned: the config's own plan.
        gpus: names in :data:`dive_fast.planner.gpu_specs.GPUS`.

    Returns:
        By the name of each GPU that the plan does not fit; None if nothing that is tried does.
    """
    tried: dict[tuple[str, ...], Plan] = {}

    def attempt(*overrides: str) -> Plan:
        if overrides not in tried:
            tried[overrides] = plan_run(_changed(config, overrides), planned.ranks)
        return tried[overrides]

    unfit = [name for name in gpus if not planned.fits(GPUS[name])]
    recomputed = _lighter_checkpointing(config) if unfit else []
    return {name: _advice(config, GPUS[name], planned, recomputed, attempt) for name in unfit}


def _advice(
    config: Config, gpu: Gpu, planned: Plan, recomputed: list[str], attempt: Callable[..., Plan]
) -> Advice | None:
    def fitting(changes: Sequence[str], saved_at_most: int) -> Advice | None:
        if not changes or planned.needed_memory_bytes - saved_at_most * (1 + ALLOCATOR_SHARE) > gpu.memory:
            return None
        found = attempt(*changes)
        return Advice(tuple(changes), found) if found.fits(gpu) else None

    activations = planned.parts.get("activations", 0)
    free = dict(_free_changes(config, planned))
    # What it lets go of is as large as what it keeps in its place.
    selective = {f"{CHECKPOINTING}=selective": activations // 2} if "selective" in recomputed else {}
    full = {f"{CHECKPOINTING}=full": activations} if "full" in recomputed else {}
    alone = [{change: saved} for change, saved in (free | selective).items()]
    for changes in (*alone, free, free | selective, free | full):
        advice = fitting(_latest(changes), sum(changes.values()))
        if advice is not None:
            return advice
    for overrides in (_latest(free), [*_latest(free), *_shorter_texts(config)]):
        advice = _largest_micro_batch(config, gpu, planned, overrides, attempt)
        if advice is not None:
            return advice
    return None


def _free_changes(config: Config, planned: Plan) -> Iterator[tuple[str, int]]:
    """Overrides that change no FLOP for the worse, with the most bytes that each can save."""
    parts = planned.parts
    needs = registry.needs(config.objective)
    if needs.reference and config.train.schedule == "joint":
        yield "train.schedule=sequential", parts.get("activations", 0) + parts.get("loss", 0)
    if needs.reference_teacher and config.teacher.mode == "online":
        yield "teacher.mode=cache", parts.get("teacher", 0) + parts.get("activations", 0)
    stage = zero_of(deepspeed_section(config, planned.ranks)).get("stage", 0)
    state = sum(parts.get(part, 0) for part in ("weights", "gradients", "optimizer"))
    if planned.ranks > 1:
        yield from (
            (f"deepspeed.zero_optimization.stage={higher}", state) for higher in (1, 2, 3) if higher > stage
        )


def _lighter_checkpointing(config: Config) -> list[str]:
    """Values of ``train.activation_checkpointing`` that keep less than the config's and that its towers allow."""
    kinds = {"selective": recompute_activations, "full": recompute_blocks}
    present = config.train.activation_checkpointing
    allowed: list[str] = []
    if present == "full":
        return allowed
    with fake_tensors():
        towers = create(config.model, weights=False)
        for kind, recompute in kinds.items():
            if kind != present:
                with contextlib.suppress(ConfigError):
                    recompute(towers)
                    allowed.append(kind)
    return allowed


def _latest(overrides: Iterable[str]) -> list[str]:
    """Without those that a later one of the same key makes void."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


def _shorter_texts(config: Config) -> list[str]:
    halves = {"target": config.data.target, "reference": config.data.reference}
    return [f"data.{half}.text_length=32" for half, data in halves.items() if data is not None]


def _largest_micro_batch(
    config: Config, gpu: Gpu, planned: Plan, overrides: list[str], attempt: Callable[..., Plan]
) -> Advice | None:
    """The largest power of two that fits, tried from the one that activations in proportion lead to expect."""
    halves = [half for half in (config.data.target, config.data.reference) if half is not None]
    pairs = max(half.batch_size for half in halves) // planned.ranks
    activations = max(planned.parts.get("activations", 0), 1)
    room = max(gpu.memory - (planned.needed_memory_bytes - activations), 1)
    if planned.ranks == 1 and sum(planned.parts.get(part, 0) for part in ("weights", "optimizer")) > gpu.memory:
        return None
    largest = _power_of_two_below(pairs)
    expected = min(_power_of_two_below(pairs * room // activations), largest)

    def of(size: int) -> Advice:
        changes = (*overrides, f"train.micro_batch_size={size}")
        return Advice(changes, attempt(*changes))

    size, found = expected, of(expected)
    while size > 1 and not found.plan.fits(gpu):
        size //= 2
        found = of(size)
    if not found.plan.fits(gpu):
        return None
    while size == expected < largest and (larger := of(2 * size)).plan.fits(gpu):
        size, expected, found = 2 * size, 2 * expected, larger
    return found


def _power_of_two_below(count: int) -> int:
    """The largest power of two below ``count``, 1 at least."""
    return int(2 ** max((count - 1).bit_length() - 1, 0))


def _changed(config: Config, overrides: Iterable[str]) -> Config:
    """The config with overrides of keys that exist or may be added, given as on the command line."""
    tree = config.model_dump(mode="json")
    for override in overrides:
        place, _, text = override.partition("=")
        *sections, key = place.split(".")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = json.loads(text) if text.isdecimal() else text
    return Config.model_validate_json(json.dumps(tree))
