"""Steps whose loss or gradient is not finite: counted, and after too many in a row a reason to stop."""

import json
from collections import deque
from pathlib import Path
from typing import Any

from torch import Tensor

from dive_fast.distributed import Ranks
from dive_fast.engine.async_scalars import AsyncScalars as AsyncScalars
from dive_fast.engine.step import StepBatches
from dive_fast.errors import AllRanksError
from dive_fast.io.atomic_files import write_atomic

BEHIND = 64
"""Steps that the device's numbers may be late by; the samples of so many more are remembered."""


class NonFiniteError(AllRanksError):
    """``train.nonfinite_limit`` steps in a row were skipped; the message is one line and says whose samples."""


class NonFinite:
    """Watches the count without waiting for the device, and knows which samples the last steps had."""

    def __init__(self, limit: int, folder: Path, ranks: Ranks) -> None:
        """Remembers nothing yet.

        Args:
            limit: steps in a row.
            folder: of the run, where the samples' names are written.
        """
        self._limit, self._folder, self._ranks = limit, folder, ranks
        self._samples: deque[dict[str, Any]] = deque(maxlen=limit + BEHIND)
        self._underway: deque[tuple[int, AsyncScalars]] = deque()
        self._reached: int | None = None

    def record_samples(self, step: int, batches: StepBatches) -> None:
        """Remembers what goes into a step."""
        samples: dict[str, Any] = {"step": step}
        for name, batch in (("target", batches.target), ("reference", batches.reference)):
            if batch is not None:
                samples[name] = list(batch.keys)
        self._samples.append(samples)

    def record_outcome(self, step: int, in_row: Tensor) -> None:
        """Takes note of a step's outcome.

        Args:
            in_row: ``()``, how many in a row have been skipped, on the device.
        """
        self._underway.append((step, AsyncScalars({"in_row": in_row})))
        late = len(self._underway) > BEHIND
        while self._underway and (late or self._underway[0][1].ready()):
            step, reading = self._underway.popleft()
            late = False
            if self._reached is None and reading.numbers()["in_row"] >= self._limit:
                self._reached = step

    @property
    def limit_reached(self) -> bool:
        """Whether the limit is, as far as this rank has heard."""
        return self._reached is not None

    def error(self) -> NonFiniteError:
        """Writes down which samples this rank had in those steps; what to raise, once all ranks know of it."""
        last = self._reached
        steps = [
            samples for samples in self._samples if last is None or last - self._limit < samples["step"] <= last
        ]
        path = self._folder / "nonfinite" / f"rank{self._ranks.rank:05d}.json"
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, (json.dumps(steps, indent=2) + "\n").encode())
        return NonFiniteError(
            f"the loss or gradient was not finite in {self._limit} steps in a row, the last being "
            f"{steps[-1]['step']}; their samples are in {path.parent}. Weights are as before these steps: look at "
            "the samples, lower train.learning_rate or objective.weight, and start again to go on from the newest "
            "checkpoint"
        )
