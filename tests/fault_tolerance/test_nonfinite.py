"""Skipped steps in a row: the limit is noticed, and the samples of just these steps are written down."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dive_fast.distributed import Ranks
from dive_fast.engine.async_scalars import AsyncScalars
from dive_fast.fault_tolerance import nonfinite
from dive_fast.fault_tolerance.nonfinite import NonFinite

RANKS = Ranks(1, 2, torch.device("cpu"))


def batches(step: int, reference: bool = True) -> Any:
    target = SimpleNamespace(keys=[f"target {step}"])
    return SimpleNamespace(target=target, reference=SimpleNamespace(keys=(f"pair {step}",)) if reference else None)


def run(counter: NonFinite, counts: list[int], start: int = 1) -> None:
    """Steps with these numbers of skipped steps in a row."""
    for step, count in enumerate(counts, start):
        counter.record_samples(step, batches(step, reference=step % 2 == 0))
        counter.record_outcome(step, torch.tensor(count))


def test_limit_counts_steps_in_a_row(tmp_path: Path) -> None:
    counter = NonFinite(3, tmp_path, RANKS)
    run(counter, [0, 1, 2, 0, 1, 2])
    assert not counter.limit_reached
    run(counter, [3], start=7)
    assert counter.limit_reached


def test_error_lists_the_samples_of_the_skipped_steps(tmp_path: Path) -> None:
    counter = NonFinite(2, tmp_path, RANKS)
    # Two more steps are made before all ranks have agreed to stop.
    run(counter, [0, 0, 1, 2, 3, 4])
    message = str(counter.error())
    assert "was not finite in 2 steps in a row, the last being step 4" in message
    assert f"their samples are listed in {tmp_path}/nonfinite." in message
    assert json.loads((tmp_path / "nonfinite/rank00001.json").read_text()) == [
        {"step": 3, "target": ["target 3"]},
        {"step": 4, "target": ["target 4"], "reference": ["pair 4"]},
    ]


def test_error_of_another_rank_lists_all_recent_samples(tmp_path: Path) -> None:
    counter = NonFinite(2, tmp_path, RANKS)
    run(counter, [0] * 100)
    counter.error()
    steps = [entry["step"] for entry in json.loads((tmp_path / "nonfinite/rank00001.json").read_text())]
    assert steps == list(range(100 - 2 - nonfinite.MAX_DELAY + 1, 101))


def test_late_numbers_are_waited_for_after_the_delay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncScalars, "ready", lambda _: False)
    counter = NonFinite(1, tmp_path, RANKS)
    run(counter, [1] + [0] * (nonfinite.MAX_DELAY - 1))
    assert not counter.limit_reached
    run(counter, [0], start=nonfinite.MAX_DELAY + 1)
    assert counter.limit_reached
