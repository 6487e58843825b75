"""The plan of a run: FLOP, memory of a GPU by part, and time of a step, predicted without a GPU or data.

:mod:`dive_fast.planner.simulate` makes a plan: the engine runs one step on fake tensors, which have shapes but no
memory. Towers, losses, schedule, micro-batches, DeepSpeed and its ZeRO buffers are the real ones, on the first of
the planned ranks. Differences from a GPU are corrected: autocast computes layer norms in fp32 as on CUDA, and the
losses are the Triton kernels'. Attention stores its output and log-sum-exp but no matrix of probabilities, on the
CPU as on CUDA.

Conventions: a multiply-add is two FLOP; element-wise operations count for none. Peak memory is the memory of the
tensors in the steady state, including batches that wait on the GPU. Other memory of a GPU is estimated by
arithmetic, listed separately, and included in whether a plan fits: CUDA context and cuBLAS, NCCL's buffers,
scratch memory of attention and the losses, rounding by the allocator. DALI's buffers on the GPU are left out: they
take gigabytes, which depend on its threads and the images. All prompts of a batch are assumed to be distinct and
as long as ``text_length``, or the model's context.
"""

from dataclasses import dataclass, field
from typing import Literal

from dive_fast.planner.gpu_specs import Gpu
from dive_fast.planner.memory_tracker import Part, Stage, Work

EFFICIENCY, SINGLE_EFFICIENCY = 0.45, 0.75
"""Shares of a GPU's peak arithmetic that a step is assumed to reach, in 16 bits and in fp32. Assumptions, not
measurements: large models are usually trained at 0.4 to 0.5 of the dense 16-bit peak, since memory-bound
operations take the rest of the time; in fp32, without matrix units, products take nearly all of it."""

LAUNCH_SECONDS = 1e-5
"""Host time of one operation of an eager step with autograd and autocast. Also an assumption; it decides when a
GPU has so few pairs that it waits for its host."""

Estimate = Literal["context", "nccl", "scratch", "allocator"]


@dataclass(frozen=True)
class Plan:
    """Predicted FLOP, memory and launches of one step."""

    parameters: int
    ranks: int
    flop: dict[Work, int]
    """FLOP of one rank, by stage and precision."""
    launches: int
    """Operations that the host of one rank launches on its GPU."""
    parts: dict[Part, int]
    """Bytes on one GPU when memory peaks."""
    estimates: dict[Estimate, int] = field(default_factory=dict)
    """Bytes on one GPU besides the plan's tensors, estimated by arithmetic."""

    @property
    def peak_memory_bytes(self) -> int:
        """Bytes of the tensors on one GPU."""
        return sum(self.parts.values())

    @property
    def needed_memory_bytes(self) -> int:
        """Bytes of the tensors on one GPU and of the estimates."""
        return self.peak_memory_bytes + sum(self.estimates.values())

    @property
    def flop_per_step(self) -> int:
        """FLOP of one step on all ranks."""
        return self.ranks * sum(self.flop.values())

    def flop_of(self, stage: Stage) -> int:
        """FLOP of a stage on all ranks."""
        return self.ranks * sum(flop for work, flop in self.flop.items() if work.stage == stage)

    def step_seconds(self, gpu: Gpu) -> float:
        """Predicted time of a step by :data:`EFFICIENCY`, or the host's time if longer; without communication."""
        rates = {True: EFFICIENCY * gpu.half, False: SINGLE_EFFICIENCY * gpu.single}
        arithmetic = sum(flop / rates[work.is_half] for work, flop in self.flop.items())
        return max(arithmetic, self.launches * LAUNCH_SECONDS)

    def fits(self, gpu: Gpu) -> bool:
        """Whether the peak with the estimates is within the GPU's memory."""
        return self.needed_memory_bytes <= gpu.memory
