"""Tracks a computation's memory and work: bytes of live storages by part, operations by stage.

Works on real tensors and on fake tensors, which have shapes but no memory.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dive_fast.kernels import backend
from dive_fast.planner.operations import (
    Operation,
    Stage,
    arguments_by_name,
    distillation_terms,
    is_loss_kernel,
    operation_of,
)

if backend.primitives is not None:
    from dive_fast.kernels import contrastive, distillation

Part = Literal[
    "weights",
    "gradients",
    "optimizer",
    "average",
    "projection",
    "teacher",
    "target_teacher",
    "batches",
    "activations",
    "loss",
]
_ATTENTION_BACKWARDS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_backward,
}


@dataclass
class _Storage:
    bytes: int
    part: Part


class Tracker(TorchDispatchMode):
    """Dispatch mode that counts memory and operations.

    Scratch memory inside one operation is only estimated, in ``workspace``; rounding and fragmentation of an
    allocator are not seen.
    """

    def __init__(self) -> None:
        """Starts empty: earlier allocations are counted from their first use on."""
        super().__init__()
        self.part: Part = "activations"
        """Part of the next allocations; while autograd runs, the node that it differentiates decides."""
        self.stage: Stage = "target"
        """Stage of the next operations, except those of the loss kernels."""
        self.operations: Counter[Operation] = Counter()
        """Operations that the host launches on the device, each taken as one kernel."""
        self.live: Counter[Part] = Counter()
        """Bytes allocated now."""
        self.peak: Counter[Part] = Counter()
        """Value of ``live`` when its sum was largest."""
        self.workspace = 0
        """Bytes of the largest scratch memory of one operation, by :func:`_workspace`."""
        self._storages: dict[int, _Storage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and _is_unknown(args[0]):
            # Any norm or loss scale will do, so 1; 0 for a flag such as overflow.
            return 1.0 if args[0].is_floating_point() else 0
        result = func(*args, **(kwargs or {}))
        operation = operation_of(func, args, kwargs or {}, result, self.stage)
        if operation is not None:
            self.operations[operation] += 1
        self.workspace = max(self.workspace, _workspace(func, args))
        part = self._part_of(func)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._add(tensor.untyped_storage(), part)
        return result

    @contextmanager
    def within(self, part: Part) -> Iterator[None]:
        """Counts allocations in the context under ``part``."""
        previous, self.part = self.part, part
        try:
            yield
        finally:
            self.part = previous

    def assign(self, tensors: Iterable[Tensor | None], part: Part) -> None:
        """Moves the storages of tensors that are already counted to ``part``."""
        for tensor in tensors:
            storage = None if tensor is None else self._storages.get(tensor.untyped_storage()._cdata)
            if storage is not None:
                self.live[storage.part] -= storage.bytes
                self.live[part] += storage.bytes
                storage.part = part

    def reset(self) -> None:
        """Resets the peak and the operation counts; live storages are kept."""
        self.operations.clear()
        self.workspace = 0
        self.peak = self.live.copy()

    def _part_of(self, func: Any) -> Part:
        if is_loss_kernel(func):
            return "loss"
        if torch._C._current_graph_task_id() < 0:
            return self.part
        node = torch._C._current_autograd_node()
        is_leaf = node is None or node.name() == "torch::autograd::AccumulateGrad"
        return "gradients" if is_leaf else "activations"

    def _add(self, storage: torch.UntypedStorage, part: Part) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = _Storage(size, part)
        self.live[part] += size
        weakref.finalize(storage, self._free, key)
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def _free(self, key: int) -> None:
        storage = self._storages.pop(key)
        self.live[storage.part] -= storage.bytes


def _is_unknown(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.constant is None


def _workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Scratch memory of one operation on CUDA, in bytes.

    For 16-bit inputs, flash attention's backward sums the queries' gradients in fp32, with lengths padded to 128
    and head widths to 32. The loss kernels' chunked gradients store a chunk of weights and its sums.
    """
    if func._overloadpacket in _ATTENTION_BACKWARDS and args[1].element_size() == 2:
        batch, heads, length, width = args[1].shape
        return int(4 * batch * heads * -(-length // 128) * 128 * -(-width // 32) * 32)
    if is_loss_kernel(func) and "backward" in func._schema.name:
        named = arguments_by_name(func, args)
        if "packed" in named:
            saved = (named[name] for name in ("packed", "count", "total", "first", "width"))
            if "teacher_scale" in named:
                return distillation.scratch_bytes(distillation.saved_shape(*saved), distillation_terms(named))
            return contrastive.scratch_bytes(contrastive.saved_shape(*saved))
    return 0
