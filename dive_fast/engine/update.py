"""The update that follows the backward: loss scale, gradient norm, clipping, AdamW and its learning rate.

With ZeRO 0 to 2 none of it asks the device for a number, so the host runs ahead and the GPU never waits for it:
PyTorch's fused AdamW divides each gradient by ``grad_scale`` and leaves weights and moments alone where
``found_inf`` is 1, and both are tensors. DeepSpeed's own update reads the gradient's norm at every step; ZeRO-3
and optimizers on the CPU need it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

INITIAL_SCALE, MIN_SCALE, GROWTH_INTERVAL = 2.0**16, 1.0, 2000
COUNTS = ("good_steps", "skipped_steps", "nonfinite_steps", "nonfinite_in_row")
STATE = ("value", *COUNTS)
"""Of :class:`LossScale`; the first two belong to a precision, the others count steps of the run."""


class LossScale:
    """Dynamic loss scaling, and which steps are skipped; all on the device.

    A step is skipped on every rank where the loss or the gradient of one is not finite. With fp16, a finite loss
    and room below, that is the scale's doing: it is halved, and doubled after 2000 steps without. Else no smaller
    scale would mend it, and it counts as ``nonfinite``.

    The scale lives here and not in DeepSpeed, whose autocast mode lets each rank decide on its own partition
    whether to skip a step, so that ranks part ways; and it casts gradients to half precision on the wire.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        """fp16 needs scaling; bf16 and fp32 have the range."""
        self.dynamic = precision == "fp16"
        self.value = torch.full((), INITIAL_SCALE if self.dynamic else 1.0, device=device)
        for name in COUNTS:
            setattr(self, name, torch.zeros((), dtype=torch.int32, device=device))

    good_steps: Tensor
    skipped_steps: Tensor
    nonfinite_steps: Tensor
    nonfinite_in_row: Tensor

    def update(self, skipped: Tensor, loss_is_finite: Tensor) -> None:
        """Takes note of a step.

        Args:
            skipped: ``()`` fp32, 1 where it was skipped, else 0.
            loss_is_finite: ``()`` bool, of all ranks' losses.
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
            # Steps that are nobody's doing here count neither way.
            self.value.copy_(torch.where(nonfinite > 0, value, self.value))
            self.good_steps.copy_(torch.where(nonfinite > 0, good_steps, self.good_steps))

    def metrics(self) -> dict[str, Tensor]:
        """As they are now, whatever follows."""
        found = {name: getattr(self, name).clone() for name in ("skipped_steps", "nonfinite_steps")}
        return found | ({"loss_scale": self.value.clone()} if self.dynamic else {})

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {name: getattr(self, name).item() for name in STATE} | {"dynamic": self.dynamic}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Resumes from there; the scale of a run without scaling, or for one, stays the initial one."""
        names = STATE if state["dynamic"] == self.dynamic else STATE[2:]
        for name in names:
            getattr(self, name).fill_(state[name])


class DeviceUpdate:
    """ZeRO 0 to 2 with torch's fused AdamW: nothing is read by the host."""

    skipped: Tensor
    """``()`` fp32, 1 where the last update was skipped, otherwise 0."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, scale: LossScale, clipping: float) -> None:
        """Takes the parts that the update needs.

        Args:
            engine: DeepSpeed's, told neither of a loss scale nor of clipping.
            clipping: largest norm of the gradient; 0 for none.
        """
        self._engine, self._optimizer, self.scale, self._clipping = engine, optimizer, scale, clipping

    def scaled(self, loss: Tensor) -> Tensor:
        """What to differentiate in the place of a loss."""
        return loss * self.scale.value

    def apply(self, loss: Tensor) -> Tensor:
        """Updates weights, unless loss or gradient is not finite on some rank; returns the latter's norm, ``()``.

        Args:
            loss: ``()``, of this rank.
        """
        square, loss_is_finite = self._over_ranks(loss)
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

    def _over_ranks(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The squared norm of the whole scaled gradient, and whether all losses are finite, in one collective."""
        device = self.scale.value.device
        if self._engine.zero_optimization_stage() == 0:
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            share = 1 / dist.get_world_size()
        else:
            # ZeRO 1 and 2 have reduced it into one part for each rank.
            gradients = [part for group in self._engine.optimizer.averaged_gradients.values() for part in group]
            share = 1.0
        square = torch.nn.utils.get_total_norm(gradients).to(device).square() * share
        found = torch.stack([square, (~torch.isfinite(loss)).to(square)])
        if dist.get_world_size() > 1:
            dist.all_reduce(found)
        return found[0], found[1] == 0


class DeepSpeedUpdate:
    """ZeRO-3, or an optimizer on the CPU: DeepSpeed scales, clips and skips; the host waits for the norm."""

    skipped: Tensor
    """``()`` fp32, 1 where the last update was skipped, otherwise 0."""

    def __init__(self, engine: Any, scale: LossScale) -> None:
        """Takes the parts that the update needs.

        Args:
            scale: on the CPU, where DeepSpeed wants it.
        """
        self._engine, self.scale = engine, scale

    def scaled(self, loss: Tensor) -> Tensor:
        """What to differentiate in the place of a loss: DeepSpeed, told of the scale, multiplies by it itself."""
        self._engine.optimizer.override_loss_scale(self.scale.value.item())
        return loss

    def apply(self, loss: Tensor) -> Tensor:
        """Updates weights, unless the gradient is not finite on some rank; returns its norm, ``()``.

        Args:
            loss: ``()``, of this rank.
        """
        nonfinite = (~torch.isfinite(loss)).float()
        if dist.get_world_size() > 1:
            dist.all_reduce(nonfinite)
        self._engine.step()
        # DeepSpeed skips on every rank alike, since it looks at the norm over all partitions.
        applied = self._engine.was_step_applied()
        if not applied:
            # The learning rate is a function of the step, skipped or not.
            self._engine.lr_scheduler.step()
        self.skipped = torch.tensor(float(not applied))
        self.scale.update(self.skipped, nonfinite.cpu() == 0)
        return torch.as_tensor(self._engine.get_global_grad_norm())
