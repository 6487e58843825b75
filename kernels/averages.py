"""Moving averages of tensors over time, which are state: they are moved in place and have no gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dive_fast.kernels import backend as backends
from dive_fast.kernels import checks, direct, naive
from dive_fast.kernels.backend import Backend

if backends.primitives is not None:
    # The import registers the custom op, which must happen before anything is traced.
    from dive_fast.kernels import moving_average


class MovingAverage:
    """Moves fp32 tensors towards others, in place and in one launch.

    ::

        psi <- psi + w (theta - psi)        w = 0 changes no bit, whatever theta is

    The tensors may be moved to other memory between two calls, by an assignment to ``.data``, as long as their
    shapes stay.
    """

    def __init__(self, averages: Sequence[Tensor], values: Sequence[Tensor], backend: Backend = "auto") -> None:
        """Keeps the tensors.

        Args:
            averages: psi, fp32, any shapes.
            values: theta, in the same order, of the same shapes and on the same device.
            backend: "triton", "torch", or "auto": triton where it can run (see :mod:`dive_fast.kernels.backend`)
                and all tensors are contiguous.

        Raises:
            ValueError: a tensor has the wrong shape, dtype or device, or "triton" cannot run on it.
        """
        checks.check_averages(averages, values)
        self._averages, self._values, self._backend = list(averages), list(values), backend
        self._table: moving_average.Table | None = None
        is_contiguous = all(tensor.is_contiguous() for tensor in (*averages, *values))
        if backend == "triton" and not is_contiguous:
            raise ValueError('backend: "triton" needs contiguous tensors; use "auto" or "torch"')

    @torch.no_grad()
    def move(self, rate: Tensor) -> None:
        """Moves all averages; the host does not wait for the device.

        Args:
            rate: w, ``()`` or ``(1,)`` fp32, on the tensors' device.

        Raises:
            ValueError: the rate has the wrong shape, dtype or device, or the backend cannot run.
        """
        if not self._averages:
            return
        averages, values = self._averages, self._values
        checks.check_rate(rate, averages[0])
        if not self._uses_triton(rate):
            naive.move_averages(averages, values, rate)
        elif not direct.is_eager(rate, *averages, *values):
            moving_average.operator(averages, values, rate)
        else:
            if self._table is None or not self._table.is_valid(averages, values):
                self._table = moving_average.Table(averages, values)
            moving_average.launch(self._table, rate)

    def _uses_triton(self, rate: Tensor) -> bool:
        if not backends.uses_triton(self._backend, rate.reshape(1)):
            return False
        return all(tensor.is_contiguous() for tensor in (*self._averages, *self._values))
