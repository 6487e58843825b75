"""Metrics of a running run: progress bar, ``metrics.jsonl`` and trackers."""

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

from dive_fast.engine.async_scalars import AsyncScalars
from dive_fast.io.atomic_files import write_atomic
from dive_fast.training.guard_rails import ReferenceShare
from dive_fast.training.setup import Batches, Run
from dive_fast.training.trackers import Trackers

logger = logging.getLogger(__name__)

MAX_NOISE_SHARE = 1 / 3
"""Largest share of rounding in a difference vector at which its gradient is close to that of fp32: at a third, the
cosine is 0.97 in fp16 (docs/precision.md)."""


class MetricsError(Exception):
    """Lines could not be written; only rank 0 knows of it. The message is one line."""


class Metrics:
    """The metrics of a run, known to all ranks and written by rank 0, without waiting for the device."""

    def __init__(
        self,
        run: Run,
        first_step: int,
        batches: Batches,
        latest: Mapping[str, float | None] | None = None,
        evaluation: Mapping[str, float | None] | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        """Starts or resumes a run: lines of steps and evaluations that will be made again are removed.

        Args:
            latest: the values of :meth:`state_dict` after ``first_step`` steps.
            evaluation: results of the evaluation after ``first_step`` steps, unless it is repeated.
            trackers: started here; they receive each line.
        """
        self._run, self._batches, self._options, self._trackers = run, batches, run.config.train, trackers
        self._enabled = run.ranks.is_main
        device = run.ranks.device
        self._latest = {
            name: torch.tensor(math.nan if value is None else value, dtype=torch.float64, device=device)
            for name, value in (latest or {}).items()
        }
        self._last: dict[str, float] = {}
        """The values of the last line."""
        self._pending: deque[_Line] = deque()
        self._since, self._since_step, self._since_waited = time.perf_counter(), first_step, 0.0
        self._noise_floor: dict[str, float] = {}
        """The values of step 1 until they are compared with those after the warm-up; then empty."""
        self._unwritten = ""
        if self._enabled:
            self._reference_share = ReferenceShare(run.config, run.engine.method, run.total_steps, first_step)
            self._path = run.folder / "metrics.jsonl"
            logged, lines = self._read_lines(first_step)
            if evaluation is not None:
                lines.append(json.dumps({"step": first_step} | dict(evaluation)))
            write_atomic(self._path, "".join(f"{line}\n" for line in lines).encode())
            first = json.loads(lines[0]) if lines else {}
            if first.get("step") == 1:
                self._noise_floor = {name: value for name, value in first.items() if value is not None}
            if trackers is not None:
                trackers.start(first_step, lines, logged)
        self._bar = run.ranks.progress(run.total_steps, "train", "step", done=first_step)

    def log(self, step: int, values: dict[str, Tensor], learning_rate: float) -> None:
        """Records the metrics of a step; every ``train.log_every`` steps a line is written once it is on the host.

        Args:
            values: ``()`` each, on the device.
        """
        self._bar.update()
        # Values of the reference half stay those of the last step with a reference batch.
        self._latest |= values
        if self._enabled:
            self._reference_share.add(step, values)
        if step % self._options.log_every == 0 or step in (1, self._run.total_steps):
            self._pending.append(_Line(step, AsyncScalars(self._latest), self._host_values(step, learning_rate)))
        while self._pending and self._pending[0].scalars.ready():
            self._finish(self._pending.popleft())

    def write(self, step: int, values: dict[str, float], is_tracked: bool = True) -> None:
        """Writes a line of values on the host, after the lines of earlier steps.

        Args:
            is_tracked: whether trackers get the values too.

        Raises:
            MetricsError: the line cannot be written, and ``train.on_save_error`` is ``stop``.
        """
        self.flush()
        if self._enabled and values:
            self._write(step, values, is_tracked)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside from ``images_per_second``."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def state_dict(self) -> dict[str, float | None]:
        """The latest value of each metric; that of the reference half may be from an earlier step."""
        self.flush()
        numbers = AsyncScalars(self._latest).numbers()
        return {name: value if math.isfinite(value) else None for name, value in numbers.items()}

    def flush(self) -> None:
        """Writes all pending lines."""
        while self._pending:
            self._finish(self._pending.popleft())

    def write_waiting(self) -> None:
        """Writes the lines that could not be written before; a checkpoint of this step would lose them.

        Raises:
            MetricsError: they still cannot be written.
        """
        if self._unwritten:
            self._append()

    def close(self, step: int, results: dict[str, float]) -> dict[str, float]:
        """Writes the results of a run that has ended after ``step``; returns the metrics of its exported weights.

        Returns:
            ``weights_step``, the step of the exported weights; the results; and the metrics of the last step, if
            it is the step of the weights.

        Raises:
            MetricsError: some line could not be written.
        """
        weights_step = int(results.get("best_step", step))
        # Trackers show results of another step's weights only as the final ones, not as values of this step.
        self.write(step, results, is_tracked=weights_step == step)
        self.write_waiting()
        if self._enabled:
            self._reference_share.close()
        self._bar.close()
        # The losses of the last step are not those of the weights of another step, nor of averaged weights.
        has_losses = weights_step == step and not self._options.export_ema
        final = {"weights_step": weights_step} | (self._last if has_losses else {}) | results
        if self._trackers is not None:
            self._trackers.summarize(final)
        return final

    def _host_values(self, step: int, learning_rate: float) -> dict[str, float]:
        """The metrics that are measured on the host."""
        now = time.perf_counter()
        images = (step - self._since_step) * self._run.images_per_step
        values = {
            "learning_rate": learning_rate,
            "images_per_second": images / (now - self._since),
            # Share of this rank's time that was spent waiting for a batch: 0 where the loaders keep up.
            "data_wait": (self._batches.waited - self._since_waited) / (now - self._since),
            "epoch": step / self._run.target_order.steps_per_epoch,
        }
        self._since, self._since_step, self._since_waited = now, step, self._batches.waited
        return values

    def _finish(self, line: "_Line") -> None:
        """Shows and writes a line whose scalars have arrived, or waits for them."""
        step, self._last = line.step, line.scalars.numbers() | line.host_values
        if not self._enabled:
            return
        norms = {symbol.strip("|"): name for name, symbol in self._run.engine.method.norms.items()}
        names = {"loss": "loss", **norms, "img/s": "images_per_second", "wait": "data_wait"}
        shown = [f"{short}={self._last[name]:.3g}" for short, name in names.items() if name in self._last]
        # The bar is ahead of its values: the device is never waited for.
        self._bar.set_postfix_str(f"step {step}: {', '.join(shown)}", refresh=False)
        self._write(step, self._last)
        if self._run.engine.features_are_random:
            return  # the floor would be that of dropped features, not of rounding
        if step == 1:
            self._noise_floor = self._last
        elif step > self._options.warmup_steps:
            self._warn_of_noise()

    def _warn_of_noise(self) -> None:
        """Warns, once, if difference vectors are little longer than at step 1, where they were rounding alone."""
        floor, self._noise_floor = self._noise_floor, {}
        for name, symbol in self._run.engine.method.norms.items():
            if name in floor and floor[name] > MAX_NOISE_SHARE * self._last[name]:
                logger.warning(
                    "mean %s is %.1e after the warm-up, and rounding in %s alone makes %.1e: above a third of it, "
                    "the gradient differs in direction from that in fp32 (docs/precision.md); fp16 rounds an "
                    "eighth of what bf16 does, fp32 next to nothing",
                    symbol,
                    self._last[name],
                    self._options.precision,
                    floor[name],
                )

    def _write(self, step: int, values: dict[str, float], is_tracked: bool = True) -> None:
        # JSON has no infinity, the norm of a gradient that overflowed.
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        is_first_failure = not self._unwritten
        self._unwritten += json.dumps({"step": step} | numbers) + "\n"
        try:
            self._append()
        except MetricsError as error:
            if self._options.on_save_error == "stop":
                raise
            if is_first_failure:
                self._run.ranks.print(
                    f"warning: {error}; its lines wait in memory (train.on_save_error = continue)"
                )
        if self._trackers is not None and is_tracked:
            self._trackers.log(step, values)

    def _append(self) -> None:
        """Appends the unwritten lines to the file; keeps all of them if that fails."""
        lines = self._unwritten.encode()
        try:
            with self._path.open("ab", buffering=0) as file:
                # On a disk that fills up, part of the lines may be written.
                if (written := file.write(lines)) < len(lines):
                    file.truncate(file.tell() - written)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise MetricsError(f"cannot write {self._path}: {error}") from error
        self._unwritten = ""

    def _read_lines(self, last_step: int) -> tuple[list[str], list[str]]:
        """All complete lines, and those up to a step without the evaluation at the step; each is parsed once."""
        logged, kept = [], []
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            with suppress(ValueError, LookupError, TypeError):
                values = json.loads(line)
                step = values["step"]
                is_kept = step < last_step or (step == last_step and "loss" in values)
                logged.append(line)
                kept += [line] * is_kept
        return logged, kept


class _Line(NamedTuple):
    """A line of metrics.jsonl that is not yet written."""

    step: int
    scalars: AsyncScalars
    """The metrics that are computed on the device."""
    host_values: dict[str, float]
