"""Plans a run: the engine's own step on fake tensors."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any
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

from dive_fast.config.schema import Config, ReferenceConfig, TargetConfig
from dive_fast.data.batch import ReferenceBatch, TargetBatch, Text
from dive_fast.data.loaders.loader import loader_options
from dive_fast.data.prefetch import DEPTH
from dive_fast.data.prompts import read_class_names
from dive_fast.distributed import Ranks
from dive_fast.engine.deepspeed_config import zero_of
from dive_fast.engine.step import Engine, StepBatches
from dive_fast.errors import ConfigError, DataError
from dive_fast.kernels import backend
from dive_fast.methods import registry
from dive_fast.methods.method import Loss, Method
from dive_fast.model.features import Features, Pairs
from dive_fast.model.towers import Towers, check_text_length, create
from dive_fast.planner.memory_tracker import Part, Tracker, Work
from dive_fast.planner.plan import Estimate, Plan
from dive_fast.teacher.teacher import OnlineTeacher

CONTEXT_BYTES = int(0.7 * 2**30)
"""Of a GPU, for the CUDA context with its loaded kernels and the workspaces of cuBLAS. An estimate."""

NCCL_BYTES = 2**30
"""Of a GPU, for the buffers of one communicator. An estimate: the number of channels depends on the links."""

NUM_COMMUNICATORS = 2
"""The world's group, and DeepSpeed's copy of it."""

ALLOCATOR_SHARE = 0.03
"""Of the tensors' bytes, for what the allocator rounds up and cannot use between them. An assumption."""


def plan_run(config: Config, ranks: int = 1) -> Plan:
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
    with _fake_process_group(ranks) as first, fake_tensors(), tracker:
        return _SimulatedStep(config, first, tracker).run()


def _estimates(parts: dict[Part, int], scratch: int, ranks: int) -> dict[Estimate, int]:
    """Bytes on one GPU besides its tensors."""
    return {
        "context": CONTEXT_BYTES,
        "nccl": NUM_COMMUNICATORS * NCCL_BYTES if ranks > 1 else 0,
        "scratch": scratch,
        "allocator": int(ALLOCATOR_SHARE * sum(parts.values())),
    }


class _SimulatedStep:
    """One rank of a run, its step and its batches."""

    def __init__(self, config: Config, ranks: Ranks, tracker: Tracker) -> None:
        self.config, self.ranks, self.tracker = config, ranks, tracker
        with tracker.within("weights"):
            towers = create(config.model, weights=False)
        check_text_length(config.data, towers)
        self.towers = towers
        self.width = towers.width
        method = registry.create(config.objective, self.width)
        if method.needs.head:
            with tracker.within("weights"):
                towers.head = nn.Linear(self.width, _num_classes(config.data.target))
        self.parameters = sum(parameter.numel() for parameter in towers.parameters())
        if backend.primitives is not None and self.width <= backend.primitives.MAX_WIDTH:
            for part in method.parts:
                part.backend = "triton"
        self.online = None
        if method.needs.reference_teacher and config.teacher.mode == "online":
            with tracker.within("teacher"):
                self.online = OnlineTeacher(create(config.model, weights=False), ranks)
        self.engine = _Engine(config, towers, method, ranks, tracker)

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
        return self.engine.method.needs.reference

    @property
    def _is_taught(self) -> bool:
        """Whether the teacher's rows come with the batches."""
        return self.engine.method.needs.reference_teacher and self.online is None

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

    def __init__(self, config: Config, towers: Towers, method: Method, ranks: Ranks, tracker: Tracker) -> None:
        self.tracker = tracker
        for parameter in towers.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda tuned: tracker.assign([tuned.grad], "gradients")
                )
        with tracker.within("optimizer"):
            super().__init__(config, towers, method, ranks, total_steps=1)
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


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
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
def _fake_process_group(ranks: int) -> Iterator[Ranks]:
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
