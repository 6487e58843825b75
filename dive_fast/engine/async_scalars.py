"""Scalars read from the device without waiting for it."""

from typing import Any

import torch
from torch import Tensor


class AsyncScalars:
    """Scalars that are copied from the device to the host in the background."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        """Starts the copy; later changes of the tensors do not affect it.

        Args:
            values: ``()`` each, all on one device or on the CPU.
        """
        self._names = list(values)
        device = next((value.device for value in values.values() if value.is_cuda), torch.device("cpu"))
        scalars = [value.detach().to(device, torch.float64, non_blocking=True) for value in values.values()]
        stacked = torch.stack(scalars)
        self._copied: Any = None
        if device.type == "cuda":
            pinned = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            stacked = pinned.copy_(stacked, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._stacked = stacked

    def ready(self) -> bool:
        """Whether the copy has finished."""
        return self._copied is None or bool(self._copied.query())

    def numbers(self) -> dict[str, float]:
        """Waits for the copy and returns the values by name."""
        if self._copied is not None:
            self._copied.synchronize()
        return dict(zip(self._names, self._stacked.tolist(), strict=True))
