"""Exponential moving average of the tuned weights (``train.ema``), next to the weights that are trained."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dive_fast.kernels import MovingAverage
from dive_fast.kernels.backend import Backend
from dive_fast.model.towers import Towers


class WeightAverage:
    """An fp32 copy of the tuned parameters that follows them.

    ::

        average <- decay average + (1 - decay) weights        after each update that was not skipped

    It begins with the pre-trained weights. Parameters that are not tuned and buffers are equal to the model's own.
    The average is that of ``torch.optim.swa_utils.get_ema_multi_avg_fn``, which takes a number as its decay: the
    host would have to wait for the device at each step to know whether the update was skipped.
    """

    def __init__(self, towers: Towers, decay: float, is_exported: bool, backend: Backend = "auto") -> None:
        """Copies the tuned parameters.

        Args:
            towers: the trained towers on their device, complete on each rank.
            is_exported: whether the averaged weights are those of ``model.safetensors``.
        """
        tuned = {name: parameter for name, parameter in towers.named_parameters() if parameter.requires_grad}
        self.weights = {name: parameter.detach().clone() for name, parameter in tuned.items()}
        """The averages, by name."""
        self.is_exported = is_exported
        self._decay = decay
        # The parameters themselves, whose `.data` DeepSpeed may move to other memory.
        self._average = MovingAverage(list(self.weights.values()), list(tuned.values()), backend)

    @torch.no_grad()
    def move(self, skipped: Tensor) -> None:
        """Moves the averages towards the weights unless the update was skipped; never waits for the device.

        Args:
            skipped: ``()``, 1 where the last update was skipped, otherwise 0.
        """
        rate = (1.0 - self._decay) * (1.0 - skipped.float())
        device = next(iter(self.weights.values())).device
        self._average.move(rate.to(device, non_blocking=True))

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The averages, by name."""
        yield from self.weights.items()

    def replace(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state of the towers with the averages instead of the tuned parameters, on the devices of the state."""
        return {
            name: self.weights[name].to(tensor.device) if name in self.weights else tensor
            for name, tensor in state.items()
        }
