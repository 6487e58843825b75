"""What a run tells while it goes: progress bar, ``metrics.jsonl``, DeepSpeed's monitor."""

import errno
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor

from dive_fast.engine.async_scalars import AsyncScalars as AsyncScalars
from dive_fast.io.atomic_files import write_atomic
from dive_fast.train.monitors import forget_after
from dive_fast.train.setup import Batches, Run

logger = logging.getLogger(__name__)

MAX_NOISE_SHARE = 1 / 3
"""Share of rounding in a difference vector, above which its gradient is no longer that of fp32: at a third the
cosine is 0.97 in fp16 (docs/precision.md)."""


class MetricsError(Exception):
    """Lines could not be written, which the first rank alone knows of; the message is one line."""


class Metrics:
    """Written by the first rank, known to all; the loop never waits for the device's numbers."""

    def __init__(
        self,
        run: Run,
        first_step: int,
        batches: Batches,
        newest: Mapping[str, float | None] | None = None,
        evaluation: Mapping[str, float | None] | None = None,
    ) -> None:
        """Starts or resumes a run: lines of steps and evaluations that will be made again are removed.

        Args:
            newest: as :meth:`state_dict` had them after ``first_step`` steps.
            evaluation: after ``first_step`` steps, if it was made and will not be made again.
        """
        self._run, self._batches, self._options = run, batches, run.config.train
        self._enabled = run.ranks.is_main
        device = run.ranks.device
        self._newest = {
            name: torch.tensor(math.nan if value is None else value, dtype=torch.float64, device=device)
            for name, value in (newest or {}).items()
        }
        self._last: dict[str, float] = {}
        self._underway: deque[_Line] = deque()
        self._since, self._since_step, self._since_waited = time.perf_counter(), first_step, 0.0
        self._floor: dict[str, float] = {}
        self._unwritten = ""
        if self._enabled:
            self._path = run.folder / "metrics.jsonl"
            kept = self._lines_up_to(first_step)
            if evaluation is not None:
                kept.append(json.dumps({"step": first_step} | dict(evaluation)))
            write_atomic(self._path, "".join(f"{line}\n" for line in kept).encode())
            first = json.loads(kept[0]) if kept else {}
            if first.get("step") == 1:
                self._floor = {name: value for name, value in first.items() if value is not None}
            if run.engine.deepspeed.monitor.enabled:
                forget_after(run.engine.deepspeed.monitor, first_step * run.config.data.target.batch_size)
        self._bar = run.ranks.progress(run.total_steps, "train", "step", done=first_step)

    def log(self, step: int, values: dict[str, Tensor], learning_rate: float) -> None:
        """Takes the metrics of one step; those of every ``train.log_every`` steps are written once they are here.

        Args:
            values: ``()`` each, on the device.
        """
        self._bar.update()
        # Those of the reference half are of the last step that had one.
        self._newest |= values
        if step % self._options.log_every == 0 or step in (1, self._run.total_steps):
            self._underway.append(_Line(step, AsyncScalars(self._newest), self._of_the_loop(step, learning_rate)))
        while self._underway and self._underway[0].reading.ready():
            self._take(self._underway.popleft())

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes numbers that the host has, after those of the steps before them.

        Raises:
            MetricsError: they cannot be written, and ``train.on_save_error`` is ``stop``.
        """
        self.flush()
        if self._enabled and values:
            self._write(step, values)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens meanwhile is no step: its time does not count against images per second."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    def state_dict(self) -> dict[str, float | None]:
        """The newest of each, which those of the reference half may remain for some steps."""
        self.flush()
        numbers = AsyncScalars(self._newest).numbers()
        return {name: value if math.isfinite(value) else None for name, value in numbers.items()}

    def flush(self) -> None:
        """Writes what is under way."""
        while self._underway:
            self._take(self._underway.popleft())

    def write_waiting(self) -> None:
        """Writes lines that could not be written before: a checkpoint without them would lose them.

        Raises:
            MetricsError: they still cannot be.
        """
        if self._unwritten:
            self._append()

    def close(self, step: int, results: dict[str, float]) -> dict[str, float]:
        """Writes results of the whole run, which has ended after ``step``; returns what belongs to its weights.

        Returns:
            ``weights_step``, the step that the exported weights are of; the results; and the metrics of the last
            step, if the weights are of that one.

        Raises:
            MetricsError: some line could not be written.
        """
        self.write(step, results)
        self.write_waiting()
        self._bar.close()
        weights_step = int(results.get("best_step", step))
        # Losses of the last step say nothing of the weights of another.
        return {"weights_step": weights_step} | (self._last if weights_step == step else {}) | results

    def _of_the_loop(self, step: int, learning_rate: float) -> dict[str, float]:
        """What the host knows."""
        now = time.perf_counter()
        images = (step - self._since_step) * self._run.images_per_step
        found = {
            "learning_rate": learning_rate,
            "images_per_second": images / (now - self._since),
            # Of the loop's time, on this rank, what it spent waiting for a batch: 0 where the loaders keep up.
            "data_wait": (self._batches.waited - self._since_waited) / (now - self._since),
            "epoch": step / self._run.target_order.steps_per_epoch,
        }
        self._since, self._since_step, self._since_waited = now, step, self._batches.waited
        return found

    def _take(self, line: "_Line") -> None:
        step, self._last = line.step, line.reading.numbers() | line.of_the_loop
        if not self._enabled:
            return
        norms = {symbol.strip("|"): name for name, symbol in self._run.engine.method.norms.items()}
        names = {"loss": "loss", **norms, "img/s": "images_per_second", "wait": "data_wait"}
        shown = {short: f"{self._last[name]:.3g}" for short, name in names.items() if name in self._last}
        self._bar.set_postfix(shown, refresh=False)
        self._write(step, self._last)
        if self._run.engine.is_random:
            return  # a floor of what is dropped, and not of rounding
        if step == 1:
            self._floor = self._last
        elif step > self._options.warmup_steps:
            self._warn_of_noise()

    def _warn_of_noise(self) -> None:
        """Once: says so if rounding, which is all there was before the first update, drowns difference vectors."""
        floor, self._floor = self._floor, {}
        for name, symbol in self._run.engine.method.norms.items():
            if name in floor and floor[name] > MAX_NOISE_SHARE * self._last[name]:
                logger.warning(
                    "mean %s is %.1e after the warm-up, of which rounding in %s alone makes %.1e: above a third "
                    "the gradient of AVL + PVL points elsewhere than in fp32 (docs/precision.md); fp16 rounds an "
                    "eighth of what bf16 does, fp32 next to nothing",
                    symbol,
                    self._last[name],
                    self._options.precision,
                    floor[name],
                )

    def _write(self, step: int, values: dict[str, float]) -> None:
        # JSON has no infinity, which is the norm of a gradient that overflowed.
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        is_first_failure = not self._unwritten
        self._unwritten += json.dumps({"step": step} | numbers) + "\n"
        try:
            self._append()
        except MetricsError as error:
            if self._options.on_save_error == "stop":
                raise
            if is_first_failure:
                self._run.ranks.print(f"warning: {error}; its lines wait, as train.on_save_error says")
        monitor = self._run.engine.deepspeed.monitor
        if monitor.enabled:
            pairs = step * self._run.config.data.target.batch_size
            monitor.write_events([(f"train/{name}", value, pairs) for name, value in values.items()])

    def _append(self) -> None:
        """Writes the lines that are there, and loses none if that fails."""
        lines = self._unwritten.encode()
        try:
            with self._path.open("ab", buffering=0) as file:
                # A disk that fills up takes what it can.
                if (written := file.write(lines)) < len(lines):
                    file.truncate(file.tell() - written)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise MetricsError(f"cannot write {self._path}: {error}") from error
        self._unwritten = ""

    def _lines_up_to(self, last_step: int) -> list[str]:
        """Of the run so far, without a line that a kill cut off and results of the last step's weights."""
        kept = []
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            with suppress(ValueError, LookupError, TypeError):
                values = json.loads(line)
                if values["step"] < last_step or (values["step"] == last_step and "loss" in values):
                    kept.append(line)
        return kept


class _Line(NamedTuple):
    """Of metrics.jsonl, to be."""

    step: int
    reading: AsyncScalars
    of_the_loop: dict[str, float]
