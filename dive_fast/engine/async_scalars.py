"""Scalars read from the device without waiting for it."""

from typing import Any

import torch
from torch import Tensor


class AsyncScalars:
    """Numbers of the device on their way to the host, which does not wait for them."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        """Sets them off; what happens to the tensors afterwards does not reach the numbers.

        Args:
            values: ``()`` each, all on one device or on the CPU.
        """
        self._names = list(values)
        device = next((value.device for value in values.values() if value.is_cuda), torch.device("cpu"))
        wide = [value.detach().to(device, torch.float64, non_blocking=True) for value in values.values()]
        found = torch.stack(wide)
        self._copied: Any = None
        if device.type == "cuda":
            pinned = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            found = pinned.copy_(found, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._found = found

    def ready(self) -> bool:
        """Whether they have arrived."""
        return self._copied is None or bool(self._copied.query())

    def numbers(self) -> dict[str, float]:
        """Waits for them."""
        if self._copied is not None:
            self._copied.synchronize()
        return dict(zip(self._names, self._found.tolist(), strict=True))
