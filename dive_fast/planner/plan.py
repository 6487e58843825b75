"""What a run will need, before it is started: FLOP, memory of a GPU by part, time of a step. No GPU, no data.

The engine itself runs one step on fake tensors, which have shapes and no memory: towers, losses, schedule,
micro-batches, DeepSpeed and its ZeRO buffers are the real ones, on the first of as many ranks as are planned for.
What differs from a GPU is put in its place: autocast computes layer norms in fp32 as on CUDA, the losses are the
Triton kernels', and attention stores its output and log-sum-exp, as the kernels of CUDA do and the CPU's, and no
matrix of probabilities.

Conventions: a multiply-add is two FLOP; element-wise operations count for none. Peak memory is what the tensors of
the steady state take, batches waiting on the GPU included. What a GPU needs besides is estimated by arithmetic, in
lines of its own, and counts in whether a plan fits: CUDA context and cuBLAS, NCCL's buffers, scratch memory inside
attention and the losses, what the allocator rounds up. DALI's buffers on the GPU are left out: gigabytes, which
depend on its threads and the images. Every prompt of a batch is taken to be distinct and as long as
``text_length``, or the model's context.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal, NamedTuple, get_args
from unittest import mock

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map

from dive_fast.config.schema import Config, ConfigError, ReferenceConfig, TargetConfig
from dive_fast.data.batch import ReferenceBatch, TargetBatch, Text
from dive_fast.data.prefetch import DEPTH
from dive_fast.data.prompts import read_class_names
from dive_fast.data.sources.source import DataError
from dive_fast.distributed import Ranks
from dive_fast.engine.deepspeed_config import deepspeed_section
from dive_fast.engine.step import Engine, StepBatches
from dive_fast.engine.update import zero_of
from dive_fast.kernels import backend
from dive_fast.methods import method as objective
from dive_fast.methods.method import Loss, Objective, Pairs
from dive_fast.model.towers import Features, Towers, create
from dive_fast.model.transformer_blocks import CHECKPOINTING, recompute_activations, recompute_blocks
from dive_fast.planner.gpu_specs import GPUS, Gpu
from dive_fast.planner.memory_tracker import Part, Stage, Tracker, Work
from dive_fast.teacher.build import loader_options
from dive_fast.teacher.teacher import OnlineTeacher
from dive_fast.train.setup import check_text_length

EFFICIENCY, SINGLE_EFFICIENCY = 0.45, 0.75
"""Shares of a GPU's peak arithmetic that a step is taken to reach, in 16 bits and in fp32. Assumptions, not
measurements: large models are usually trained at 0.4 to 0.5 of the dense 16-bit peak, memory-bound operations take
the rest of the time; in fp32, without matrix units, products take nearly all of it."""

LAUNCH_SECONDS = 1e-5
"""Of the host, for one operation of an eager step with autograd and autocast. An assumption too; it decides where
a GPU has so few pairs that it waits for its host."""


Estimate = Literal["context", "nccl", "scratch", "allocator"]

CONTEXT_BYTES = int(0.7 * 2**30)
"""Of a GPU, for the CUDA context with its loaded kernels and the workspaces of cuBLAS. An estimate."""

NCCL_BYTES = 2**30
"""Of a GPU, for the buffers of one communicator. An estimate: the number of channels depends on the links."""

NUM_COMMUNICATORS = 2
"""The world's group, and DeepSpeed's copy of it."""

ALLOCATOR_SHARE = 0.03
"""Of the tensors' bytes, for what the allocator rounds up and cannot use between them. An assumption."""


@dataclass(frozen=True)
class Plan:
    """What one step needs."""

    parameters: int
    ranks: int
    flop: dict[Work, int]
    """Of one rank, by stage and precision."""
    launches: int
    """Operations that the host of one rank sends to its GPU."""
    parts: dict[Part, int]
    """Bytes on one GPU at the moment of the peak."""
    estimates: dict[Estimate, int] = field(default_factory=dict)
    """Bytes on one GPU that no tensor of the plan takes, by arithmetic."""

    @property
    def peak_memory_bytes(self) -> int:
        """The tensors of one GPU."""
        return sum(self.parts.values())

    @property
    def needed_memory_bytes(self) -> int:
        """The tensors of one GPU, and the estimates."""
        return self.peak_memory_bytes + sum(self.estimates.values())

    @property
    def flop_per_step(self) -> int:
        """On all ranks."""
        return self.ranks * sum(self.flop.values())

    def flop_of(self, stage: Stage) -> int:
        """On all ranks."""
        return self.ranks * sum(flop for work, flop in self.flop.items() if work.stage == stage)

    def step_seconds(self, gpu: Gpu) -> float:
        """By :data:`EFFICIENCY`, or what the host needs if that is more; communication left out."""
        rates = {True: EFFICIENCY * gpu.half, False: SINGLE_EFFICIENCY * gpu.single}
        arithmetic = sum(flop / rates[work.is_half] for work, flop in self.flop.items())
        return max(arithmetic, self.launches * LAUNCH_SECONDS)

    def fits(self, gpu: Gpu) -> bool:
        """Whether the peak, estimates included, is within the GPU's memory."""
        return self.needed_memory_bytes <= gpu.memory


def plan(config: Config, ranks: int = 1) -> Plan:
    """Runs one step of a config on fake tensors. A process that has joined a process group cannot plan.

    Raises:
        ConfigError: the config contradicts itself, its batches cannot be dealt out to ``ranks``, the model's
            architecture cannot be had, or it offloads to the CPU, which is not planned.
    """
    zero = zero_of(config.deepspeed)
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device", "none") != "none":
            raise ConfigError(f"deepspeed.zero_optimization.{key}: offloading cannot be planned; remove it")
    tracker = Tracker()
    with _pretended(ranks) as first, _fakes(), tracker:
        return _Rehearsal(config, first, tracker).run()


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
            tried[overrides] = plan(_changed(config, overrides), planned.ranks)
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
    kind = objective.KINDS[config.objective.name]
    if kind.needs_reference and config.train.schedule == "joint":
        yield "train.schedule=sequential", parts.get("activations", 0) + parts.get("loss", 0)
    if kind.needs_teacher and config.teacher.mode == "online":
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
    with _fakes():
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


def as_json(planned: Plan, gpus: Sequence[str], advice: dict[str, Advice | None]) -> dict[str, Any]:
    """The plan as plain values: FLOP are of all ranks unless named otherwise, bytes of one GPU."""
    return {
        "parameters": planned.parameters,
        "ranks": planned.ranks,
        "flop_per_step": planned.flop_per_step,
        "flop_per_step_per_gpu": planned.flop_per_step // planned.ranks,
        "flop": {stage: planned.flop_of(stage) for stage in get_args(Stage)},
        "peak_memory_bytes": planned.peak_memory_bytes,
        "parts": {part: planned.parts.get(part, 0) for part in get_args(Part)},
        "needed_memory_bytes": planned.needed_memory_bytes,
        "estimates": {name: planned.estimates.get(name, 0) for name in get_args(Estimate)},
        "launches": planned.launches,
        "efficiency": EFFICIENCY,
        "step_seconds": {name: planned.step_seconds(GPUS[name]) for name in gpus},
        "fits": {name: planned.fits(GPUS[name]) for name in gpus},
        "advice": {name: None if found is None else found.as_json(GPUS[name]) for name, found in advice.items()},
    }


def table(planned: Plan, gpus: Sequence[str], advice: dict[str, Advice | None]) -> str:
    """The plan for people."""
    ranks = planned.ranks
    lines = [f"parameters       {planned.parameters:,}", f"FLOP per step    {_tera(planned.flop_per_step)}"]
    if ranks > 1:
        lines[-1] += f" on {ranks} GPUs, {_tera(planned.flop_per_step // ranks)} on each"
    names: dict[Stage, str] = {
        "target": "target half",
        "reference": "reference half",
        "teacher": "online teacher",
        "loss": "loss",
    }
    lines += [f"  {names[stage]:<16} {_tera(flop)}" for stage in names if (flop := planned.flop_of(stage))]
    lines.append(f"peak memory      {_gib(planned.peak_memory_bytes)} on each GPU")
    lines += [f"  {part:<16} {_gib(planned.parts[part])}" for part in get_args(Part) if planned.parts.get(part)]
    lines.append(f"with estimates   {_gib(planned.needed_memory_bytes)}, which has to fit")
    known_as: dict[Estimate, str] = {
        "context": "CUDA, cuBLAS",
        "nccl": "NCCL buffers",
        "scratch": "kernels' scratch",
        "allocator": "allocator",
    }
    lines += [f"  {known_as[name]:<16} {_gib(count)}" for name, count in planned.estimates.items() if count]
    lines.append("  left out: DALI's buffers where it decodes on the GPU")
    lines.append(f"step at {EFFICIENCY:.0%} of peak arithmetic, {SINGLE_EFFICIENCY:.0%} in fp32")
    for name in gpus:
        lines.append(f"  {name:<16} {planned.step_seconds(GPUS[name]):8.3f} s   {_verdict(planned, name, advice)}")
    return "\n".join(lines)


def _verdict(planned: Plan, name: str, advice: dict[str, Advice | None]) -> str:
    gpu = GPUS[name]
    if planned.fits(gpu):
        return "fits"
    found = advice[name]
    if found is None:
        return "does not fit, nor does any change that was tried; use more GPUs"
    seconds = found.plan.step_seconds(gpu)
    figures = f"{_gib(found.plan.needed_memory_bytes).strip()}, {seconds:.3f} s"
    return f"does not fit; {figures} with {' '.join(found.overrides)}"


def _tera(flop: int) -> str:
    return f"{flop / 1e12:8.2f} TFLOP" if flop >= 1e10 else f"{flop / 1e9:8.2f} GFLOP"


def _gib(count: int) -> str:
    return f"{count / 2**30:8.2f} GiB" if count >= 2**26 else f"{count / 2**20:8.2f} MiB"


def _power_of_two_below(count: int) -> int:
    """The largest power of two below ``count``, 1 at least."""
    return int(2 ** max((count - 1).bit_length() - 1, 0))


def _estimates(parts: dict[Part, int], scratch: int, ranks: int) -> dict[Estimate, int]:
    """Bytes on one GPU besides its tensors."""
    return {
        "context": CONTEXT_BYTES,
        "nccl": NUM_COMMUNICATORS * NCCL_BYTES if ranks > 1 else 0,
        "scratch": scratch,
        "allocator": int(ALLOCATOR_SHARE * sum(parts.values())),
    }


class _Rehearsal:
    """One rank of a run, its step and its batches."""

    def __init__(self, config: Config, ranks: Ranks, tracker: Tracker) -> None:
        self.config, self.ranks, self.tracker = config, ranks, tracker
        with tracker.within("weights"):
            towers = create(config.model, weights=False)
        check_text_length(config, towers)
        self.towers = towers
        self.width = towers.width
        goal = objective.create(config.objective, self.width)
        if goal.needs_head:
            with tracker.within("weights"):
                towers.head = nn.Linear(self.width, _num_classes(config.data.target))
        self.parameters = sum(parameter.numel() for parameter in towers.parameters())
        if backend.blocks is not None and self.width <= backend.blocks.MAX_WIDTH:
            goal.backend = "triton"
        self.online = None
        if goal.needs_teacher and config.teacher.mode == "online":
            with tracker.within("teacher"):
                self.online = OnlineTeacher(create(config.model, weights=False), ranks)
        self.engine = _Engine(config, towers, goal, ranks, tracker)

    def run(self) -> Plan:
        config, tracker = self.config, self.tracker
        target, reference = config.data.target, config.data.reference if self._needs_reference else None
        # The first update allocates the optimizer's state, whatever the batch.
        self._step(self._batches(target, reference, pairs=1), updating="optimizer")
        tracker.reset()
        batches = [self._batches(target, reference) for _ in range(1 + DEPTH)]
        self._step(batches[0])
        flop, launches, scratch = dict(tracker.flop), tracker.launches, tracker.workspace
        if config.train.schedule == "joint" and reference is not None:
            flop = _split_by_pairs(flop, target.batch_size, reference.batch_size)
        every = config.objective.reference_every
        if every > 1 and reference is not None:
            before, before_launches = tracker.flop.copy(), tracker.launches
            self._step(self._batches(target, None))
            without = tracker.flop - before
            flop = {work: (flop.get(work, 0) + (every - 1) * without[work]) // every for work in flop}
            launches = (launches + (every - 1) * (tracker.launches - before_launches)) // every
        ranks, parts = self.ranks.world_size, dict(+tracker.peak)
        return Plan(self.parameters, ranks, flop, launches, parts, _estimates(parts, scratch, ranks))

    @property
    def _needs_reference(self) -> bool:
        return self.engine.objective.needs_reference

    @property
    def _is_taught(self) -> bool:
        """Whether the teacher's rows come with the batches."""
        return self.engine.objective.needs_teacher and self.online is None

    def _step(self, batches: StepBatches, updating: Part = "gradients") -> None:
        tracker = self.tracker
        if self.online is not None and batches.reference is not None:
            tracker.stage = "teacher"
            with tracker.within("activations"):
                batches.teacher = self.online(batches.reference)
        with tracker.within("loss"):
            loss = self.engine.accumulate(batches)["loss"]
        with tracker.within(updating):
            self.engine.update(loss)

    def _batches(
        self, target: TargetConfig, reference: ReferenceConfig | None, pairs: int | None = None
    ) -> StepBatches:
        """This rank's batches as they lie on the GPU; of ``pairs`` pairs, if given."""
        with self.tracker.within("batches"):
            return StepBatches(
                self._target(target, pairs),
                None if reference is None else self._reference(reference, pairs),
                self._teacher(reference, pairs) if reference is not None and self._is_taught else None,
            )

    def _target(self, data: TargetConfig, pairs: int | None) -> TargetBatch:
        images, text = self._pairs(data, pairs)
        return TargetBatch(images, text, torch.zeros(len(images), dtype=torch.long), torch.empty(0), ())

    def _reference(self, data: ReferenceConfig, pairs: int | None) -> ReferenceBatch:
        return ReferenceBatch(*self._pairs(data, pairs), torch.empty(0), torch.empty(0), ())

    def _teacher(self, data: ReferenceConfig, pairs: int | None) -> Pairs:
        count = pairs or data.batch_size // self.ranks.world_size
        return Pairs(torch.empty(count, self.width), torch.empty(count, self.width))

    def _pairs(self, data: TargetConfig | ReferenceConfig, pairs: int | None) -> tuple[Tensor, Text]:
        count = pairs or data.batch_size // self.ranks.world_size
        on_gpu = Ranks(0, self.ranks.world_size, torch.device("cuda"))
        dtype = loader_options(self.config, data, on_gpu).dtype
        images = torch.empty(count, 3, *self.towers.preprocess.size, dtype=dtype)
        length = data.text_length or int(getattr(self.towers.text, "context_length", 77))
        tokens = torch.zeros(count, length, dtype=torch.long)
        return images, Text(tokens, torch.zeros(count, dtype=torch.long), length)


class _Engine(Engine):
    """The engine, telling the tracker where it is."""

    def __init__(self, config: Config, towers: Towers, goal: Objective, ranks: Ranks, tracker: Tracker) -> None:
        self.tracker = tracker
        for parameter in towers.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda tuned: tracker.assign([tuned.grad], "gradients")
                )
        with tracker.within("optimizer"):
            super().__init__(config, towers, goal, ranks, total_steps=1)
        held = [getattr(parameter, "ds_tensor", parameter) for parameter in towers.parameters()]
        tracker.assign([*held, *towers.buffers()], "weights")
        if self.deepspeed.zero_optimization_stage() == 3:
            zero = self.deepspeed.optimizer
            # Allocated once and for all.
            buckets = [bucket.buffer for bucket in zero.ipg_buckets.values()]
            tracker.assign([zero.grad_partitions_flat_buffer, *buckets], "gradients")

    def accumulate(self, batches: StepBatches) -> dict[str, Tensor]:
        whole = self.deepspeed
        self.deepspeed = _Sampled(whole, self.tracker)
        try:
            return super().accumulate(batches)
        finally:
            self.deepspeed = whole

    def _backward(self, half: Any) -> Loss:
        self.tracker.stage = "reference" if half.name == "reference" else "target"
        return super()._backward(half)


class _Sampled:
    """DeepSpeed's engine for one step, of whose micro-batches only some are run.

    Those of a half are alike: the first ones, the last one and the one that reduces are run, the others' work
    is taken from them.
    """

    ENOUGH = 1
    """Forwards without gradient, of those that are alike."""

    def __init__(self, engine: Any, tracker: Tracker) -> None:
        self._engine, self._tracker = engine, tracker
        self._boundary = False
        self._runs: Counter[Any] = Counter()
        self._shapes: dict[Any, list[Tensor | None]] = {}
        self._done: dict[Any, tuple[Counter[Work], int]] = {}
        self._alike: Any = None
        self._is_run = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self._boundary = is_boundary
        self._engine.set_gradient_accumulation_boundary(is_boundary)

    def __call__(self, images: Tensor, tokens: Tensor | None, length: int | None) -> Features:
        with_gradient = torch.is_grad_enabled()
        self._alike = self._tracker.stage, len(images), 0 if tokens is None else len(tokens), with_gradient
        self._runs[self._alike] += 1
        # The second backward is the first to find gradients already there.
        self._is_run = self._runs[self._alike] <= self.ENOUGH + with_gradient or (with_gradient and self._boundary)
        if not self._is_run:
            self._repeat("forward")
            like = self._shapes[self._alike]
            found = (
                tensor if tensor is None else torch.empty_like(tensor, device="cpu", requires_grad=with_gradient)
                for tensor in like
            )
            return Features._make(found)
        with self._counted("forward"), self._tracker.within("activations"):
            features: Features = self._engine(images, tokens, length)
        self._shapes[self._alike] = [
            None if tensor is None else torch.empty_like(tensor, device="meta") for tensor in features
        ]
        return features

    def backward(self, loss: Tensor) -> None:
        if not self._is_run:
            self._repeat("backward")
            loss.backward()
            return
        with self._counted("backward"), self._tracker.within("gradients"):
            self._engine.backward(loss)

    @contextlib.contextmanager
    def _counted(self, direction: str) -> Iterator[None]:
        flop, launches = self._tracker.flop.copy(), self._tracker.launches
        yield
        self._done[direction, self._alike] = self._tracker.flop - flop, self._tracker.launches - launches

    def _repeat(self, direction: str) -> None:
        flop, launches = self._done[direction, self._alike]
        self._tracker.flop.update(flop)
        self._tracker.launches += launches


def _as_on_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that autocast computes in fp32 on CUDA, and on the CPU in half precision."""

    @wraps(function)
    def in_fp32(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_in_fp32, (args, kwargs))
        return function(*args, **kwargs)

    return in_fp32


def _in_fp32(argument: Any) -> Any:
    is_half = isinstance(argument, Tensor) and argument.dtype in (torch.float16, torch.bfloat16)
    return argument.float() if is_half else argument


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


@contextlib.contextmanager
def _fakes() -> Iterator[None]:
    """Tensors without memory, and what cannot deal with them out of the way."""
    with contextlib.ExitStack() as stack:
        # Fake parameters refuse `Module.to`; everything is where it belongs.
        stack.enter_context(mock.patch.object(nn.Module, "_apply", lambda module, *_, **__: module))
        # ZeRO-3 puts its own in this place, for good.
        stack.enter_context(mock.patch.object(F, "linear", F.linear))
        for module in ("partition_parameters", "partitioned_param_coordinator", "stage3"):
            # The other ranks have nothing to say, and these compare numbers with theirs.
            name = f"deepspeed.runtime.zero.{module}.assert_ints_same_as_other_ranks"
            stack.enter_context(mock.patch(name, return_value=None))
        # timm reads its rates of drop path from one on the CPU, and fakes have no numbers.
        stack.enter_context(mock.patch.object(torch, "linspace", _readable(torch.linspace)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # Replaced, since a TorchFunctionMode does not see what a backward runs again.
        for home, function in ((F, "layer_norm"), (F, "group_norm"), (F, "softmax"), (torch, "softmax")):
            stack.enter_context(mock.patch.object(home, function, _as_on_cuda(getattr(home, function))))
        yield


class _Rates(np.ndarray[Any, Any]):
    """Numbers with what timm asks of a tensor of them."""

    def split(self, sizes: Sequence[int]) -> list[Any]:
        return np.split(self, np.cumsum(sizes)[:-1])


def _readable(linspace: Callable[..., Tensor]) -> Callable[..., Any]:
    def call(start: Any, end: Any, steps: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") != "cpu":
            return linspace(start, end, steps, **kwargs)
        return np.linspace(start, end, steps, dtype=np.float32).view(_Rates)

    return call


@contextlib.contextmanager
def _pretended(ranks: int) -> Iterator[Ranks]:
    """The first of so many ranks, of which there is no other: their collectives do nothing."""
    assert not dist.is_initialized(), "planned in a process of its own"
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in place.items()} | address):
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        try:
            deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
            yield Ranks(0, ranks, torch.device("cpu"))
        finally:
            dist.destroy_process_group()
            # DeepSpeed keeps them for the life of the process, which may plan for another number of ranks.
            deepspeed.comm.comm.cdb = None
            deepspeed.utils.groups._WORLD_GROUP = None
            deepspeed.utils.groups.mesh_device = None


def _num_classes(target: TargetConfig) -> int:
    """Of the target set, or ImageNet's where no file of names says how many: a head is a thousandth of a model."""
    with contextlib.suppress(DataError):
        return len(read_class_names(target.class_names or "imagenet"))
    return len(read_class_names("imagenet"))


def _split_by_pairs(flop: dict[Work, int], target: int, reference: int) -> dict[Work, int]:
    """FLOP of a joint graph, where a pair of either half costs the same, dealt out to the halves."""
    split: Counter[Work] = Counter()
    for work, count in flop.items():
        if work.stage == "target":
            share = count * reference // (target + reference)
            split[work._replace(stage="reference")] += share
            count -= share
        split[work] += count
    return dict(split)
