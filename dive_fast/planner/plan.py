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

from dataclasses import dataclass, field
from typing import Literal

from dive_fast.planner.gpu_specs import Gpu
from dive_fast.planner.memory_tracker import Part, Stage, Work

EFFICIENCY, SINGLE_EFFICIENCY = 0.45, 0.75
"""Shares of a GPU's peak arithmetic that a step is taken to reach, in 16 bits and in fp32. Assumptions, not
measurements: large models are usually trained at 0.4 to 0.5 of the dense 16-bit peak, memory-bound operations take
the rest of the time; in fp32, without matrix units, products take nearly all of it."""

LAUNCH_SECONDS = 1e-5
"""Of the host, for one operation of an eager step with autograd and autocast. An assumption too; it decides where
a GPU has so few pairs that it waits for its host."""


Estimate = Literal["context", "nccl", "scratch", "allocator"]


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
