"""Plans a run by executing the engine's step on fake tensors."""

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, cast
from unittest import mock

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map

from dive_fast.config.schema import Config, ReferenceConfig, TargetConfig
from dive_fast.data.batch import ReferenceBatch, TargetBatch, Text
from dive_fast.data.loaders.loader import loader_options
from dive_fast.data.prefetch import DEPTH
from dive_fast.data.prompt_files import Template, read_class_names, read_templates
from dive_fast.distributed import Ranks
from dive_fast.engine import trained_parameters
from dive_fast.engine.deepspeed_config import zero_section
from dive_fast.engine.step import Engine, StepBatches
from dive_fast.errors import ConfigError, DataError
from dive_fast.kernels import backend
from dive_fast.methods import registry
from dive_fast.methods.method import Loss, Method, Start, TeacherOutputs, View
from dive_fast.model.adapters import is_factor
from dive_fast.model.fast_blocks import FastModule
from dive_fast.model.features import Features, Pairs
from dive_fast.model.towers import Towers, check_text_length, create
from dive_fast.planner.memory_tracker import Part, Tracker
from dive_fast.planner.operations import Operation
from dive_fast.planner.plan import Estimate, Plan
from dive_fast.teacher.teacher import OnlineTeacher

CONTEXT_BYTES = int(0.7 * 2**30)
"""Estimated memory of the CUDA context with its loaded kernels and of cuBLAS's workspaces, per GPU."""

NCCL_BYTES = 2**30
"""Estimated memory of one communicator's buffers, per GPU: the number of channels depends on the links."""

ASSUMED_STEPS, ASSUMED_EPOCHS = 10_000, 10
"""Steps and epochs of a planned run, whose data are not opened; costs of a step do not depend on them."""

NUM_COMMUNICATORS = 2
"""The default process group and DeepSpeed's copy of it."""

ALLOCATOR_SHARE = 0.03
"""Share of the tensors' bytes assumed lost to the allocator's rounding and fragmentation."""


def plan_run(config: Config, ranks: int = 1) -> Plan:
    """Plans one step of a config on fake tensors, in a process that has not joined a process group.

    Raises:
        ConfigError: the config contradicts itself, its batches are not divisible by ``ranks``, the model's
            architecture is not available, or it offloads to the CPU, which is not supported.
    """
    zero = zero_section(config.deepspeed)
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device", "none") != "none":
            raise ConfigError(f"deepspeed.zero_optimization.{key}: offloading cannot be planned; remove it")
    tracker = Tracker()
    with _fake_process_group(ranks) as first, fake_tensors(), tracker:
        return _SimulatedStep(config, first, tracker).run()


def _estimates(parts: dict[Part, int], scratch: int, ranks: int) -> dict[Estimate, int]:
    """Estimated bytes on one GPU besides its tensors."""
    return {
        "context": CONTEXT_BYTES,
        "nccl": NUM_COMMUNICATORS * NCCL_BYTES if ranks > 1 else 0,
        "scratch": scratch,
        "allocator": int(ALLOCATOR_SHARE * sum(parts.values())),
    }


class _SimulatedStep:
    """The step and the batches of one rank of a run."""

    def __init__(self, config: Config, ranks: Ranks, tracker: Tracker) -> None:
        self.config, self.ranks, self.tracker = config, ranks, tracker
        with tracker.within("weights"):
            towers = create(config.model, weights=False)
        check_text_length(config.data, towers)
        self.towers = towers
        self.width = towers.width
        method = registry.create(
            config.objective,
            self.width,
            total_steps=ASSUMED_STEPS,
            steps_per_epoch=ASSUMED_STEPS // ASSUMED_EPOCHS,
            seed=config.train.seed,
        )
        if method.needs.head:
            with tracker.within("weights"):
                towers.head = nn.Linear(self.width, len(_class_names(config.data.target)))
        if _has_kernels(self.width):
            for part in method.parts:
                part.backend = "triton"
        self.online = None
        if method.needs.reference_teacher and config.teacher.mode == "online":
            with tracker.within("teacher"):
                self.online = OnlineTeacher(create(config.model, weights=False), ranks)
        _start_method(method, towers, config.data.target)
        with tracker.within("weights"):
            trained_parameters.adapt(config.model, towers, method, config.train.seed)
        self.parameters = sum(parameter.numel() for parameter in towers.parameters())
        self.engine = _TrackedEngine(config, towers, method, ranks, tracker)
        simulate_fast_blocks(towers)
        if self.engine.teacher is not None:
            simulate_fast_blocks(self.engine.teacher.towers)

    def run(self) -> Plan:
        config, tracker = self.config, self.tracker
        target, reference = config.data.target, config.data.reference if self._needs_reference else None
        # The planned step is the second one: some methods have no distillation at the first.
        self._first_step(target, reference)
        tracker.reset()
        batches = [self._batches(target, reference) for _ in range(1 + DEPTH)]
        self._step(batches[0])
        operations, scratch = dict[Operation, float](tracker.operations), tracker.workspace
        if config.train.schedule == "joint" and reference is not None:
            operations = _split_by_pairs(operations, target.batch_size, reference.batch_size)
        every = config.objective.reference_every
        if every > 1 and reference is not None:
            previous = tracker.operations.copy()
            self._step(self._batches(target, None))
            operations = _mean_of_steps(operations, tracker.operations - previous, every)
        ranks, parts = self.ranks.world_size, dict(+tracker.peak)
        tuned = (parameter for parameter in self.towers.parameters() if parameter.requires_grad)
        trained = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in tuned)
        return Plan(self.parameters, ranks, operations, parts, _estimates(parts, scratch, ranks), trained)

    @property
    def _needs_reference(self) -> bool:
        return self.engine.method.needs.reference

    @property
    def _reads_cache(self) -> bool:
        """Whether batches include the teacher's rows, read from a cache."""
        return self.engine.method.needs.reference_teacher and self.online is None

    def _step(self, batches: StepBatches, updating: Part = "gradients") -> None:
        tracker = self.tracker
        if self.online is not None and batches.reference is not None:
            tracker.stage = "teacher"
            with tracker.within("activations"):
                batches.teacher = self.online(batches.reference)
        tracker.stage = "target"
        with tracker.within("loss"):
            loss = self.engine.accumulate(batches)["loss"]
        tracker.stage = "update"
        with tracker.within(updating):
            self.engine.update(loss)

    def _first_step(self, target: TargetConfig, reference: ReferenceConfig | None) -> None:
        """The first update, which allocates the optimizer's state; this depends neither on batch nor on loss."""
        engine, tracker = self.engine, self.tracker
        if engine.deepspeed.zero_optimization_stage() == 3:
            # Parameters are empty outside of a forward.
            self._step(self._batches(target, reference, pairs=1), updating="optimizer")
            return
        tracker.stage = "update"
        with tracker.within("loss"):
            # No forward: this sum reaches all parameters, in less time.
            loss = torch.stack([each.sum() for each in self.towers.parameters() if each.requires_grad]).sum()
            engine.deepspeed.set_gradient_accumulation_boundary(True)
            engine.deepspeed.backward(loss)
        with tracker.within("optimizer"):
            engine.update(loss.detach())

    def _batches(
        self, target: TargetConfig, reference: ReferenceConfig | None, pairs: int | None = None
    ) -> StepBatches:
        """This rank's batches on the GPU: the config's batch sizes, or ``pairs`` pairs a half."""
        with self.tracker.within("batches"):
            return StepBatches(
                self._target(target, pairs),
                None if reference is None else self._reference(reference, pairs),
                self._teacher(reference, pairs) if reference is not None and self._reads_cache else None,
            )

    def _target(self, data: TargetConfig, pairs: int | None) -> TargetBatch:
        images, text = self._pairs(data, pairs)
        second = self._text(data, len(images)) if self.engine.method.needs.second_prompts else None
        labels = torch.zeros(len(images), dtype=torch.long)
        return TargetBatch(images, text, labels, labels, (), second)

    def _reference(self, data: ReferenceConfig, pairs: int | None) -> ReferenceBatch:
        images, text = self._pairs(data, pairs)
        samples = torch.zeros(len(images), dtype=torch.long)
        return ReferenceBatch(images, text, samples, samples, ())

    def _teacher(self, data: ReferenceConfig, pairs: int | None) -> Pairs:
        count = pairs or data.batch_size // self.ranks.world_size
        return Pairs(torch.empty(count, self.width), torch.empty(count, self.width))

    def _pairs(self, data: TargetConfig | ReferenceConfig, pairs: int | None) -> tuple[Tensor, Text]:
        count = pairs or data.batch_size // self.ranks.world_size
        on_gpu = Ranks(0, self.ranks.world_size, torch.device("cuda"))
        dtype = loader_options(self.config, data, on_gpu).dtype
        images = torch.empty(count, 3, *self.towers.preprocess.size, dtype=dtype)
        return images, self._text(data, count)

    def _text(self, data: TargetConfig | ReferenceConfig, count: int) -> Text:
        """Texts that differ and fill the context."""
        length = data.text_length or int(getattr(self.towers.text, "context_length", 77))
        tokens = torch.zeros(count, length, dtype=torch.long)
        return Text(tokens, torch.zeros(count, dtype=torch.long), length)


class _TrackedEngine(Engine):
    """The engine, which reports its parts and stages to a tracker."""

    def __init__(self, config: Config, towers: Towers, method: Method, ranks: Ranks, tracker: Tracker) -> None:
        self.tracker = tracker
        for parameter in towers.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda tuned: tracker.assign([tuned.grad], "gradients")
                )
        with tracker.within("optimizer"):
            super().__init__(config, towers, method, ranks, ASSUMED_STEPS)
        weights = [getattr(parameter, "ds_tensor", parameter) for parameter in towers.parameters()]
        tracker.assign([*weights, *towers.buffers()], "weights")
        if self.teacher is not None:
            tracker.assign([*self.teacher.copies.values(), *self.teacher.towers.buffers()], "target_teacher")
        if self.average is not None:
            tracker.assign(self.average.weights.values(), "average")
        if self.projection is not None:
            tracker.assign(self.projection.memory(), "projection")
        if self.deepspeed.zero_optimization_stage() == 3:
            zero = self.deepspeed.optimizer
            # These buffers are allocated once and reused.
            buckets = [bucket.buffer for bucket in zero.ipg_buckets.values()]
            tracker.assign([zero.grad_partitions_flat_buffer, *buckets], "gradients")

    def accumulate(self, batches: StepBatches) -> dict[str, Tensor]:
        engine = self.deepspeed
        self.deepspeed = _SampledMicroBatches(engine, self.tracker)
        try:
            return super().accumulate(batches)
        finally:
            self.deepspeed = engine

    def _teach(self, images: Tensor, text: Text | None) -> TeacherOutputs:
        assert self.teacher is not None
        tracker, teacher = self.tracker, self.teacher
        towers, sampled = teacher.towers, _SampledTowers(teacher.towers, tracker)
        tracker.stage, teacher.towers = "target_teacher", cast("Towers", sampled)
        try:
            with tracker.within("activations"):
                return super()._teach(images, text)
        finally:
            tracker.stage, teacher.towers = "target", towers

    def _change_images(self, *arguments: Any) -> Tensor:
        with self.tracker.within("activations"):
            return super()._change_images(*arguments)

    def _views(self, *arguments: Any) -> tuple[View, ...]:
        with self.tracker.within("activations"):
            return super()._views(*arguments)

    def _encode_images(self, images: Tensor) -> Tensor:
        with self.tracker.within("activations"):
            return super()._encode_images(images)

    def _encode_classes(self, rows: Sequence[int]) -> Tensor:
        with self.tracker.within("activations"):
            return super()._encode_classes(rows)

    def _backward(self, half: Any) -> Loss:
        self.tracker.stage = "reference" if half.name == "reference" else "target"
        return super()._backward(half)


class _SampledTowers:
    """Wraps a teacher's towers for one step: of each shape one piece is executed and counts for all."""

    def __init__(self, towers: Towers, tracker: Tracker) -> None:
        self._towers, self._tracker = towers, tracker
        self._executed: dict[Any, tuple[Tensor, Counter[Operation]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._towers, name)

    def encode_image(self, images: Tensor) -> Tensor:
        return self._encode(self._towers.encode_image, images)

    def encode_text(self, tokens: Tensor, length: int | None = None) -> Tensor:
        return self._encode(self._towers.encode_text, tokens, length)

    def _encode(self, encode: Callable[..., Tensor], rows: Tensor, *arguments: Any) -> Tensor:
        key, operations = (encode.__name__, rows.shape, *arguments), self._tracker.operations
        if key in self._executed:
            features, counts = self._executed[key]
            operations.update(counts)
            return torch.empty_like(features, device=rows.device)
        previous = operations.copy()
        features = encode(rows, *arguments)
        self._executed[key] = torch.empty_like(features, device="meta"), operations - previous
        return features


class _SampledMicroBatches:
    """Wraps DeepSpeed's engine for one step and executes only a sample of the micro-batches.

    Micro-batches of one half and one shape do equal work: the first ones of each shape and the one that reduces
    gradients are executed, and their counts stand for the others.
    """

    MAX_FORWARDS = 1
    """Forwards without gradient that are executed for each shape; one more with gradient."""

    def __init__(self, engine: Any, tracker: Tracker) -> None:
        self._engine, self._tracker = engine, tracker
        self._boundary = False
        self._calls: Counter[Any] = Counter()
        self._features: dict[Any, list[Tensor | None]] = {}
        self._counts: dict[Any, Counter[Operation]] = {}
        self._key: Any = None
        self._is_executed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self._boundary = is_boundary
        self._engine.set_gradient_accumulation_boundary(is_boundary)

    def __call__(self, images: Tensor, tokens: Tensor | None, length: int | None) -> Features:
        with_gradient = torch.is_grad_enabled()
        self._key = self._tracker.stage, len(images), 0 if tokens is None else len(tokens), with_gradient
        self._calls[self._key] += 1
        # Gradients exist only from the second backward on, so two are executed.
        is_new = self._calls[self._key] <= self.MAX_FORWARDS + with_gradient
        self._is_executed = is_new or (with_gradient and self._boundary)
        if not self._is_executed:
            self._repeat_counts("forward")
            return Features._make(
                tensor if tensor is None else torch.empty_like(tensor, device="cpu", requires_grad=with_gradient)
                for tensor in self._features[self._key]
            )
        with self._store_counts("forward"), self._tracker.within("activations"):
            features: Features = self._engine(images, tokens, length)
        self._features[self._key] = [
            None if tensor is None else torch.empty_like(tensor, device="meta") for tensor in features
        ]
        return features

    def backward(self, loss: Tensor) -> None:
        if not self._is_executed:
            self._repeat_counts("backward")
            loss.backward()
            return
        with self._store_counts("backward"), self._tracker.within("gradients"):
            self._engine.backward(loss)

    @contextlib.contextmanager
    def _store_counts(self, direction: str) -> Iterator[None]:
        previous = self._tracker.operations.copy()
        yield
        self._counts[direction, self._key] = self._tracker.operations - previous

    def _repeat_counts(self, direction: str) -> None:
        self._tracker.operations.update(self._counts[direction, self._key])


def simulate_fast_blocks(towers: Towers) -> None:
    """Makes fast blocks use the Triton kernels for fake tensors, where the kernels can run on a GPU."""
    for module in towers.modules():
        # Layer norms keep complete rows in registers; no parameter but a factor has fewer elements than a row.
        if isinstance(module, FastModule):
            sizes = [len(each) for name, each in module.named_parameters() if not is_factor(name)]
            if _has_kernels(min(sizes)):
                module.backend = "triton"


def _has_kernels(width: int) -> bool:
    return backend.primitives is not None and width <= backend.primitives.MAX_WIDTH


def _as_on_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function that autocast computes in fp32 on CUDA only, so that it does on the CPU as well."""

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
    """Creates tensors without memory in the context, and patches functions that cannot handle such tensors."""
    with contextlib.ExitStack() as stack:
        # Fake parameters do not support `Module.to`, and need not move.
        stack.enter_context(mock.patch.object(nn.Module, "_apply", lambda module, *_, **__: module))
        # ZeRO-3 replaces F.linear and does not restore it; the patch does.
        stack.enter_context(mock.patch.object(F, "linear", F.linear))
        for zero_module in ("partition_parameters", "partitioned_param_coordinator", "stage3"):
            # These compare numbers with the other ranks', which do not exist.
            name = f"deepspeed.runtime.zero.{zero_module}.assert_ints_same_as_other_ranks"
            stack.enter_context(mock.patch(name, return_value=None))
        # timm reads its drop path rates from a tensor on the CPU, and fake tensors have no values.
        stack.enter_context(mock.patch.object(torch, "linspace", _with_values_on_cpu(torch.linspace)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # Patched one by one, since a TorchFunctionMode does not see functions that a backward recomputes.
        for module, function in ((F, "layer_norm"), (F, "group_norm"), (F, "softmax"), (torch, "softmax")):
            stack.enter_context(mock.patch.object(module, function, _as_on_cuda(getattr(module, function))))
        yield


class _Rates(np.ndarray[Any, Any]):
    """An array with the tensor methods that timm calls on drop path rates."""

    def split(self, sizes: Sequence[int]) -> list[Any]:
        return np.split(self, np.cumsum(sizes)[:-1])


def _with_values_on_cpu(linspace: Callable[..., Tensor]) -> Callable[..., Any]:
    """Wraps ``torch.linspace`` so that it returns NumPy values, not a fake tensor, for ``device="cpu"``."""

    def call(start: Any, end: Any, steps: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") != "cpu":
            return linspace(start, end, steps, **kwargs)
        return np.linspace(start, end, steps, dtype=np.float32).view(_Rates)

    return call


@contextlib.contextmanager
def _fake_process_group(ranks: int) -> Iterator[Ranks]:
    """Makes this process the first of ``ranks`` ranks, without others: collectives do nothing."""
    assert not dist.is_initialized(), "a process that has joined a process group cannot plan"
    rank_variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in rank_variables.items()} | address):
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        try:
            deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
            yield Ranks(0, ranks, torch.device("cpu"))
        finally:
            dist.destroy_process_group()
            # DeepSpeed never resets these, and the process may plan for another number of ranks.
            deepspeed.comm.comm.cdb = None
            deepspeed.utils.groups._WORLD_GROUP = None
            deepspeed.utils.groups.mesh_device = None


def _class_names(target: TargetConfig) -> tuple[str, ...]:
    """Class names of the target set; ImageNet's if it names no file: a head is a thousandth of a model."""
    with contextlib.suppress(DataError):
        return read_class_names(target.class_names or "imagenet")
    return read_class_names("imagenet")


def _templates(target: TargetConfig) -> tuple[Template, ...]:
    """Templates of the target set; CLIP's for ImageNet if their file does not exist here."""
    with contextlib.suppress(DataError):
        return read_templates(target.templates)
    return read_templates("imagenet")


def _start_method(method: Method, towers: Towers, target: TargetConfig) -> None:
    """Calls the parts' ``start`` with fake embeddings and with a tokenizer that needs no files."""
    context, width, vocabulary = towers.context_length or 77, towers.width, towers.vocabulary
    end = vocabulary - 1 if isinstance(towers.pooled_at, str) else towers.pooled_at or 0

    def tokenize(texts: list[str]) -> Tensor:
        """Each word as the token 0."""
        rows = torch.zeros(len(texts), context, dtype=torch.long)
        for row, text in enumerate(texts):
            rows[row, min(len(text.split()), context - 1)] = end
        return rows

    # Parts read the values of tokens, which fake tensors lack.
    with unset_fake_temporarily() as mode:
        assert mode is not None

        def embed(texts: Sequence[str]) -> Tensor:
            with mode:
                return torch.empty(len(texts), width)

        names, templates = _class_names(target), _templates(target)
        method.start(Start(embed, tokenize, vocabulary, towers.pooled_at, names, templates, towers))


def _mean_of_steps(
    with_reference: dict[Operation, float], without: Counter[Operation], every: int
) -> dict[Operation, float]:
    """Operations of a mean step if every ``every``-th step has a reference half."""
    return {
        operation: (with_reference.get(operation, 0) + (every - 1) * without[operation]) / every
        for operation in with_reference.keys() | without.keys()
    }


def _split_by_pairs(operations: dict[Operation, float], target: int, reference: int) -> dict[Operation, float]:
    """Splits operations of a joint graph between the halves in proportion to their pairs, which cost the same."""
    split: defaultdict[Operation, float] = defaultdict(float)
    for operation, count in operations.items():
        if operation.stage == "target":
            share = reference / (target + reference)
            split[operation._replace(stage="reference")] += share * count
            count *= 1 - share
        split[operation] += count
    return dict(split)
