"""Detection of steps whose loss or gradient is not finite; too many in a row stop the run."""

import json
from collections import deque
from pathlib import Path
from typing import Any

from torch import Tensor

from dive_fast.distributed import Ranks
from dive_fast.engine.async_scalars import AsyncScalars
from dive_fast.engine.step import StepBatches
from dive_fast.errors import AllRanksError
from dive_fast.io.atomic_files import write_atomic

MAX_DELAY = 64
"""Steps by which the device's numbers may be late; the samples of as many more steps are remembered."""


class NonFiniteError(AllRanksError):
    """``train.nonfinite_limit`` steps in a row were skipped; the one-line message says where their samples are."""


class NonFinite:
    """Counts skipped steps in a row without waiting for the device, and remembers the samples of recent steps."""

    def __init__(self, limit: int, folder: Path, ranks: Ranks) -> None:
        """Starts with no steps.

        Args:
            limit: number of skipped steps in a row at which the run stops.
            folder: run folder, where the names of the samples are written.
        """
        self._limit, self._folder, self._ranks = limit, folder, ranks
        self._samples: deque[dict[str, Any]] = deque(maxlen=limit + MAX_DELAY)
        self._pending: deque[tuple[int, AsyncScalars]] = deque()
        self._last_step: int | None = None

    def record_samples(self, step: int, batches: StepBatches) -> None:
        """Remembers the samples of a step, before it is made."""
        samples: dict[str, Any] = {"step": step}
        for name, batch in (("target", batches.target), ("reference", batches.reference)):
            if batch is not None:
                samples[name] = list(batch.keys)
        self._samples.append(samples)

    def record_outcome(self, step: int, in_row: Tensor) -> None:
        """Records the outcome of a step.

        Args:
            in_row: ``()``, number of steps in a row that were skipped up to this one, on the device.
        """
        self._pending.append((step, AsyncScalars({"in_row": in_row})))
        is_late = len(self._pending) > MAX_DELAY
        while self._pending and (is_late or self._pending[0][1].ready()):
            step, scalars = self._pending.popleft()
            is_late = False
            if self._last_step is None and scalars.numbers()["in_row"] >= self._limit:
                self._last_step = step

    @property
    def limit_reached(self) -> bool:
        """Whether the limit is reached, by the numbers that have arrived from the device."""
        return self._last_step is not None

    def error(self) -> NonFiniteError:
        """Writes this rank's samples of the skipped steps to a file; returns the error to raise on all ranks."""
        last = self._last_step
        steps = [
            samples for samples in self._samples if last is None or last - self._limit < samples["step"] <= last
        ]
        path = self._folder / "nonfinite" / f"rank{self._ranks.rank:05d}.json"
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, (json.dumps(steps, indent=2) + "\n").encode())
        return NonFiniteError(
            f"the loss or gradient was not finite in {self._limit} steps in a row, the last being step "
            f"{steps[-1]['step']}; their samples are listed in {path.parent}. The weights are those before these "
            "steps: check the samples, lower train.learning_rate or objective.weight, and restart the same "
            "command to resume from the newest checkpoint"
        )
