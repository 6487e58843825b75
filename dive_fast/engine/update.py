"""The update after the backward: loss scale, gradient norm, clipping, AdamW and its learning rate.

With ZeRO 0 to 2 nothing is read from the device, so the host runs ahead and the GPU never waits for it: PyTorch's
fused AdamW divides each gradient by ``grad_scale`` and skips the update where ``found_inf`` is 1, and both are
tensors. DeepSpeed's update, which ZeRO-3 and optimizers on the CPU need, reads the gradient's norm at every step.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

INITIAL_SCALE, MIN_SCALE, GROWTH_INTERVAL = 2.0**16, 1.0, 2000
COUNTS = ("good_steps", "skipped_steps", "nonfinite_steps", "nonfinite_in_row")
STATE = ("value", *COUNTS)
"""Saved tensors of :class:`LossScale`; the first two belong to a precision, the others count steps of the run."""


class LossScale:
    """Dynamic loss scale and counts of skipped steps, as tensors on the device.

    A step is skipped on every rank if the loss or the gradient of one rank is not finite. With fp16, a finite loss
    and a scale above its minimum, the scale has overflowed: it is halved, and doubled after 2000 steps without an
    overflow. Otherwise a smaller scale would not help, and the step counts as ``nonfinite``.

    DeepSpeed's loss scale is not used: in its autocast mode each rank decides by its own partition whether to skip
    a step, so that ranks diverge, and gradients are cast to half precision for communication.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        """Starts with the initial scale for fp16; bf16 and fp32 have the range and are not scaled."""
        self.dynamic = precision == "fp16"
        self.value = torch.full((), INITIAL_SCALE if self.dynamic else 1.0, device=device)
        for name in COUNTS:
            setattr(self, name, torch.zeros((), dtype=torch.int32, device=device))

    good_steps: Tensor
    skipped_steps: Tensor
    nonfinite_steps: Tensor
    nonfinite_in_row: Tensor

    def update(self, skipped: Tensor, loss_is_finite: Tensor) -> None:
        """Updates the scale and the counts after a step.

        Args:
            skipped: ``()`` fp32, 1 where the step was skipped, otherwise 0.
            loss_is_finite: ``()`` bool, whether the losses of all ranks are finite.
        """
        overflow = skipped * (loss_is_finite & (self.value > MIN_SCALE) if self.dynamic else 0.0)
        nonfinite = (skipped - overflow).int()
        self.skipped_steps += skipped.int()
        self.nonfinite_steps += nonfinite
        self.nonfinite_in_row.add_(1).mul_(nonfinite)
        if self.dynamic:
            value, good_steps = self.value.clone(), self.good_steps.clone()
            torch._amp_update_scale_(self.value, self.good_steps, overflow, 2.0, 0.5, GROWTH_INTERVAL)
            self.value.clamp_(min=MIN_SCALE)
            # Nonfinite steps leave the scale and its count of good steps unchanged.
            self.value.copy_(torch.where(nonfinite > 0, value, self.value))
            self.good_steps.copy_(torch.where(nonfinite > 0, good_steps, self.good_steps))

    def metrics(self) -> dict[str, Tensor]:
        """Copies of the counts and the scale, which later steps do not change."""
        counts = {name: getattr(self, name).clone() for name in ("skipped_steps", "nonfinite_steps")}
        return counts | ({"loss_scale": self.value.clone()} if self.dynamic else {})

    def state_dict(self) -> dict[str, float]:
        """The state as plain numbers."""
        return {name: getattr(self, name).item() for name in STATE} | {"dynamic": self.dynamic}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores the counts, and the scale if both runs scale the loss or neither does."""
        names = STATE if state["dynamic"] == self.dynamic else STATE[2:]
        for name in names:
            getattr(self, name).fill_(state[name])


class DeviceUpdate:
    """Update under ZeRO 0 to 2 with torch's fused AdamW; the host reads nothing from the device."""

    skipped: Tensor
    """``()`` fp32, 1 where the last update was skipped, otherwise 0."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, scale: LossScale, clipping: float) -> None:
        """Wraps an optimizer.

        Args:
            engine: DeepSpeed's, configured without loss scale and clipping.
            clipping: largest norm of the gradient; 0 for no clipping.
        """
        self._engine, self._optimizer, self.scale, self._clipping = engine, optimizer, scale, clipping

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, to be differentiated."""
        return loss * self.scale.value

    def apply(self, loss: Tensor) -> Tensor:
        """Updates weights unless loss or gradient is not finite on some rank; returns the gradient's norm, ``()``.

        Args:
            loss: ``()``, this rank's loss.
        """
        square, loss_is_finite = self._reduce(loss)
        scaled_norm = square.sqrt()
        skipped = (~(torch.isfinite(scaled_norm) & loss_is_finite)).float()
        norm = scaled_norm / self.scale.value
        divisor = self.scale.value
        if self._clipping > 0:
            divisor = divisor * ((norm + 1e-6) / self._clipping).clamp(min=1.0)
        optimizer: Any = self._optimizer
        optimizer.grad_scale, optimizer.found_inf = divisor, skipped
        self._engine.step()
        self.scale.update(skipped, loss_is_finite)
        self.skipped = skipped
        return norm

    def _reduce(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Squared norm of the scaled gradient, and whether all ranks' losses are finite, in one collective."""
        device = self.scale.value.device
        if self._engine.zero_optimization_stage() == 0:
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            share = 1 / dist.get_world_size()
        else:
            # ZeRO 1 and 2 have reduced the gradient into one part for each rank.
            gradients = [part for group in self._engine.optimizer.averaged_gradients.values() for part in group]
            share = 1.0
        square = torch.nn.utils.get_total_norm(gradients).to(device).square() * share
        sums = torch.stack([square, (~torch.isfinite(loss)).to(square)])
        if dist.get_world_size() > 1:
            dist.all_reduce(sums)
        return sums[0], sums[1] == 0


class DeepSpeedUpdate:
    """Update under ZeRO-3 or on the CPU: DeepSpeed scales, clips and skips; the host waits for the norm."""

    skipped: Tensor
    """``()`` fp32, 1 where the last update was skipped, otherwise 0."""

    def __init__(self, engine: Any, scale: LossScale) -> None:
        """Wraps DeepSpeed's engine.

        Args:
            scale: a loss scale on the CPU, where DeepSpeed reads it.
        """
        self._engine, self.scale = engine, scale

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss as it is; DeepSpeed multiplies it by the scale that is set here."""
        self._engine.optimizer.override_loss_scale(self.scale.value.item())
        return loss

    def apply(self, loss: Tensor) -> Tensor:
        """Updates weights unless the gradient is not finite on some rank; returns the gradient's norm, ``()``.

        Args:
            loss: ``()``, this rank's loss.
        """
        nonfinite = (~torch.isfinite(loss)).float()
        if dist.get_world_size() > 1:
            dist.all_reduce(nonfinite)
        self._engine.step()
        # All ranks skip the same steps, since DeepSpeed checks the norm over all partitions.
        applied = self._engine.was_step_applied()
        if not applied:
            # The learning rate is a function of the step, skipped or not.
            self._engine.lr_scheduler.step()
        self.skipped = torch.tensor(float(not applied))
        self.scale.update(self.skipped, nonfinite.cpu() == 0)
        return torch.as_tensor(self._engine.get_global_grad_norm())
