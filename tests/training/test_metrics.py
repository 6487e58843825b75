"""metrics.jsonl: its lines, which of them a resume removes, a full disk, values that are not finite."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dive_fast.config.schema import TrainConfig
from dive_fast.distributed import Ranks
from dive_fast.training.metrics import Metrics, MetricsError

STEPS = 10


def make_metrics(folder: Path, first_step: int = 0, *state: Any, rank: int = 0, **train: Any) -> Metrics:
    """Metrics of a run of ten steps, two epochs, with 6 images a step."""
    run: Any = SimpleNamespace(
        config=SimpleNamespace(
            train=TrainConfig(**{"log_every": 1, "warmup_steps": 2, "precision": "bf16"} | train),
            data=SimpleNamespace(target=SimpleNamespace(batch_size=4)),
            objective=SimpleNamespace(reference_every=1),
        ),
        folder=folder,
        ranks=Ranks(rank, 1, torch.device("cpu")),
        engine=SimpleNamespace(
            method=SimpleNamespace(
                norms={"image_norm": "|u|"}, target_loss=None, needs=SimpleNamespace(reference=False)
            ),
            features_are_random=False,
        ),
        total_steps=STEPS,
        images_per_step=6,
        target_order=SimpleNamespace(steps_per_epoch=5),
    )
    batches: Any = SimpleNamespace(waited=0.0)
    return Metrics(run, first_step, batches, *state)


def values(loss: float, **others: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in ({"loss": loss} | others).items()}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fill_disk(folder: Path) -> Path:
    """Redirects metrics.jsonl to a device that is always full; returns where its lines are meanwhile."""
    path, kept = folder / "metrics.jsonl", folder / "kept"
    path.rename(kept)
    path.symlink_to("/dev/full")
    return kept


def test_line_has_values_of_device_and_host(tmp_path: Path) -> None:
    metrics = make_metrics(tmp_path)
    metrics.log(1, values(0.5, image_norm=2.0), learning_rate=1e-3)
    (line,) = lines(tmp_path)
    assert line.pop("images_per_second") > 0
    assert line == {
        "step": 1,
        "loss": 0.5,
        "image_norm": 2.0,
        "learning_rate": 1e-3,
        "data_wait": 0.0,
        "epoch": 0.2,
    }


def test_log_every_keeps_first_and_last_step(tmp_path: Path) -> None:
    metrics = make_metrics(tmp_path, log_every=4)
    for step in range(1, STEPS + 1):
        metrics.log(step, values(float(step)), 0.0)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1), (4, 4), (8, 8), (10, 10)]


def test_value_of_an_earlier_step_is_logged_again(tmp_path: Path) -> None:
    metrics = make_metrics(tmp_path)
    metrics.log(1, values(1.0, image_norm=2.0), 0.0)
    metrics.log(2, values(3.0), 0.0)
    assert [line["image_norm"] for line in lines(tmp_path)] == [2.0, 2.0]
    assert metrics.state_dict() == {"loss": 3.0, "image_norm": 2.0}
    make_metrics(tmp_path, 2, metrics.state_dict()).log(3, values(5.0), 0.0)
    assert lines(tmp_path)[-1]["image_norm"] == 2.0


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = make_metrics(tmp_path, rank=1)
    metrics.log(1, values(1.0), 0.0)
    metrics.write(1, {"accuracy/val": 0.5})
    assert metrics.close(1, {})["loss"] == 1.0
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    metrics = make_metrics(tmp_path)
    metrics.log(1, values(math.nan, gradient_norm=math.inf), 0.0)
    (line,) = lines(tmp_path)
    assert line["loss"] is line["gradient_norm"] is None
    assert metrics.state_dict() == {"loss": None, "gradient_norm": None}
    resumed = make_metrics(tmp_path, 1, metrics.state_dict())
    resumed.log(2, values(1.0), 0.0)
    assert lines(tmp_path)[-1]["gradient_norm"] is None


def test_resume_removes_lines_that_are_written_again(tmp_path: Path) -> None:
    metrics = make_metrics(tmp_path)
    for step in (1, 2, 3):
        metrics.log(step, values(float(step)), 0.0)
        metrics.write(step, {"accuracy/val": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('not JSON\n{"loss": 1.0}\n{"step": 2, "lo')
    make_metrics(tmp_path, 2)
    # The evaluation after step 2 is repeated, unless the checkpoint has it.
    kept = [(1, 1.0, None), (1, None, 0.1), (2, 2.0, None)]
    assert [(line["step"], line.get("loss"), line.get("accuracy/val")) for line in lines(tmp_path)] == kept
    make_metrics(tmp_path, 2, {}, {"accuracy/val": 0.7})
    assert lines(tmp_path)[-1] == {"step": 2, "accuracy/val": 0.7}
    assert len(lines(tmp_path)) == 4


def test_lines_wait_for_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = make_metrics(tmp_path)
    metrics.log(1, values(1.0), 0.0)
    kept = fill_disk(tmp_path)
    metrics.log(2, values(2.0), 0.0)
    metrics.log(3, values(3.0), 0.0)
    with pytest.raises(MetricsError, match=r"cannot write .*No space left on device"):
        metrics.write_waiting()
    with pytest.raises(MetricsError):
        metrics.close(3, {})
    assert capsys.readouterr().out.count("its lines wait in memory") == 1
    os.replace(kept, tmp_path / "metrics.jsonl")
    metrics.write_waiting()
    assert [line["loss"] for line in lines(tmp_path)] == [1.0, 2.0, 3.0]
    metrics.write_waiting()
    assert len(lines(tmp_path)) == 3


def test_full_disk_ends_a_run_that_stops_on_save_errors(tmp_path: Path) -> None:
    metrics = make_metrics(tmp_path, on_save_error="stop")
    fill_disk(tmp_path)
    with pytest.raises(MetricsError, match="No space left on device"):
        metrics.log(1, values(1.0), 0.0)


def test_close_returns_losses_of_the_exported_weights_only(tmp_path: Path) -> None:
    metrics = make_metrics(tmp_path)
    metrics.log(1, values(1.0), 0.0)
    last = metrics.close(1, {"accuracy/val": 0.5})
    assert (last["weights_step"], last["loss"], last["accuracy/val"]) == (1, 1.0, 0.5)
    best = metrics.close(2, {"accuracy/val": 0.5, "best_step": 1.0})
    assert best == {"weights_step": 1, "accuracy/val": 0.5, "best_step": 1.0}
    assert [line["step"] for line in lines(tmp_path)] == [1, 1, 2]


def test_pause_does_not_lower_images_per_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("dive_fast.training.metrics.time.perf_counter", lambda: now[0])
    metrics = make_metrics(tmp_path)
    now[0] += 2
    with metrics.paused():
        now[0] += 50
    metrics.log(1, values(1.0), 0.0)
    assert lines(tmp_path)[0]["images_per_second"] == 3.0


@pytest.mark.parametrize(("norm", "warns"), [(2.9, True), (3.1, False)])
def test_noise_above_a_third_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, norm: float, warns: bool
) -> None:
    metrics = make_metrics(tmp_path)
    metrics.log(1, values(1.0, image_norm=1.0), 0.0)
    metrics.log(2, values(1.0, image_norm=1.0), 0.0)
    assert caplog.text == ""
    # A resumed run reads the noise floor from the line of step 1.
    metrics = make_metrics(tmp_path, 2, metrics.state_dict())
    for step in (3, 4):
        metrics.log(step, values(1.0, image_norm=norm), 0.0)
    assert caplog.text.count("mean |u| is 2.9e+00 after the warm-up") == warns


def test_progress_names_the_step_of_its_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = make_metrics(tmp_path, log_every=4)
    for step in range(1, 4):
        metrics.log(step, values(step / 2, image_norm=2.0), 0.0)
    metrics._bar.close()
    line = capsys.readouterr().err
    assert line.startswith("train: 3/10 [")
    assert ", step 1: loss=0.5, u=2, img/s=" in line


def test_trackers_get_results_only_of_the_weights_of_their_step(tmp_path: Path) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    trackers = SimpleNamespace(
        start=lambda *_: None,
        log=lambda *line: logged.append(line),
        summarize=lambda final: logged.append((0, final)),
    )
    metrics = make_metrics(tmp_path, 0, {}, None, trackers)
    metrics.write(STEPS, {"accuracy/val": 0.5})
    metrics.close(STEPS, {"accuracy/val": 0.75, "best_step": 5.0})
    assert logged[0] == (STEPS, {"accuracy/val": 0.5})
    assert [(step, values["accuracy/val"]) for step, values in logged[1:]] == [(0, 0.75)]
    assert lines(tmp_path)[-1]["accuracy/val"] == 0.75
