"""The plan of a run: FLOP, bytes, memory of a GPU by part, and time of a step, predicted without a GPU or data.

:mod:`dive_fast.planner.simulate` makes a plan: the engine runs one step on fake tensors, which have shapes but no
memory. Towers, losses, schedule, micro-batches, DeepSpeed and its ZeRO buffers are the real ones, on the first of
the planned ranks. Differences from a GPU are corrected: autocast computes layer norms in fp32 as on CUDA, and the
losses are the Triton kernels'. Attention stores its output and log-sum-exp but no matrix of probabilities, on the
CPU as on CUDA.

The time of a step is that of the GPU or of the host, whichever is longer. The GPU's is a sum over operations: for
a matrix product its FLOP at a rate that depends on the length of its sums, or its bytes if they take longer; for
attention its FLOP at another rate; for any other operation its bytes. :mod:`dive_fast.planner.gpu_specs` has the
rates. The host's is :data:`LAUNCH_SECONDS` for each operation, or :data:`TRITON_SECONDS` for a Triton kernel's.
Communication and compilation are left out.

Conventions: a multiply-add is two FLOP; element-wise operations count for none. Bytes are those of
:mod:`dive_fast.planner.operations`. Peak memory is the memory of the tensors in the steady state, including
batches that wait on the GPU. Other memory of a GPU is estimated by arithmetic, listed separately, and included
in whether a plan fits: CUDA context and cuBLAS, NCCL's buffers, scratch memory of attention and the losses,
rounding by the allocator. DALI's buffers on the GPU are left out: they take gigabytes, which depend on its
threads and the images. All prompts of a batch are assumed to be distinct and as long as ``text_length``, or the
model's context.

The teacher of the target half has lines of its own: its weights, as far as it does not share them with the
student, and its forward. Its move is part of the update. The planned step is not the first of a run, at which
some methods have no distillation.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from dive_fast.planner.gpu_specs import Gpu
from dive_fast.planner.memory_tracker import Part
from dive_fast.planner.operations import Kind, Operation, Stage

LAUNCH_SECONDS = 1e-5
"""Host time of one operation of an eager step with autograd and autocast. An assumption; it decides when a
GPU has so few pairs that it waits for its host."""

TRITON_SECONDS = 5e-5
"""Host time of one Triton operation with its allocations and autograd. An assumption as well: Triton's launcher
alone took about 30 us a kernel on a slow CPU with a mock driver."""

Estimate = Literal["context", "nccl", "scratch", "allocator"]


class StepSeconds(NamedTuple):
    """Predicted seconds of one step by part."""

    product: float
    """Matrix products, convolutions and loss kernels."""
    attention: float
    elementwise: float
    """All other operations of the GPU."""
    host: float
    """The host's, at the same time as the GPU's."""

    @property
    def device(self) -> float:
        """Seconds of the GPU."""
        return self.product + self.attention + self.elementwise

    @property
    def step(self) -> float:
        """Seconds of the step: the GPU's, or the host's if the GPU waits for it."""
        return max(self.device, self.host)


@dataclass(frozen=True)
class Plan:
    """Predicted work and memory of one step."""

    parameters: int
    ranks: int
    operations: dict[Operation, float]
    """How often the host of one rank launches each operation in a step; a mean if steps differ."""
    parts: dict[Part, int]
    """Bytes on one GPU when memory peaks."""
    estimates: dict[Estimate, int] = field(default_factory=dict)
    """Bytes on one GPU besides the plan's tensors, estimated by arithmetic."""
    trained: int = 0
    """The parameters that are trained."""

    @property
    def peak_memory_bytes(self) -> int:
        """Bytes of the tensors on one GPU."""
        return sum(self.parts.values())

    @property
    def needed_memory_bytes(self) -> int:
        """Bytes of the tensors on one GPU and of the estimates."""
        return self.peak_memory_bytes + sum(self.estimates.values())

    @property
    def launches(self) -> int:
        """Operations that the host of one rank launches on its GPU."""
        return round(sum(self.operations.values()))

    @property
    def flop_per_step(self) -> int:
        """FLOP of one step on all ranks."""
        return sum(self.flop_of(stage) for stage in get_args(Stage))

    def flop_of(self, stage: Stage) -> int:
        """FLOP of a stage on all ranks."""
        flop = sum(count * each.flop for each, count in self.operations.items() if each.stage == stage)
        return self.ranks * round(flop)

    def bytes_of(self, stage: Stage | None = None, kind: Kind = "elementwise") -> int:
        """Bytes that operations of a kind read and write on one GPU, of one stage or of all."""
        counts = self.operations.items()
        return round(
            sum(n * each.bytes for each, n in counts if each.kind == kind and stage in (None, each.stage))
        )

    def seconds(self, gpu: Gpu) -> StepSeconds:
        """Predicted time of a step by part, without communication."""
        device: dict[Kind, float] = dict.fromkeys(get_args(Kind), 0.0)
        for operation, count in self.operations.items():
            device[operation.kind] += count * _seconds(operation, gpu)
        num_triton = round(sum(count for each, count in self.operations.items() if each.is_triton))
        host = (self.launches - num_triton) * LAUNCH_SECONDS + num_triton * TRITON_SECONDS
        return StepSeconds(**device, host=host)

    def step_seconds(self, gpu: Gpu) -> float:
        """Predicted time of a step, without communication."""
        return self.seconds(gpu).step

    def efficiency(self, gpu: Gpu) -> float:
        """Share of the GPU's dense 16-bit peak that the predicted step reaches."""
        seconds = self.step_seconds(gpu)
        return self.flop_per_step / self.ranks / (seconds * gpu.half) if seconds else 0.0

    def fits(self, gpu: Gpu) -> bool:
        """Whether the peak with the estimates is within the GPU's memory."""
        return self.needed_memory_bytes <= gpu.memory


def _seconds(operation: Operation, gpu: Gpu) -> float:
    if operation.kind == "elementwise":
        return operation.bytes / gpu.elementwise
    if not operation.is_half:
        rate = gpu.single_product
    elif operation.kind == "attention":
        rate = gpu.half_attention
    else:
        rate = gpu.product_rate(operation.reduction)
    arithmetic = operation.flop / rate if operation.flop else 0.0
    return max(arithmetic, operation.bytes / gpu.copy)
