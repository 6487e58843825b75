"""``dive-fast sweep``: runs in processes, interruption and resumption, and the files that it writes."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image
from run_folders import row, write_run

from dive_fast.commands import sweep as command
from dive_fast.config.schema import EvaluateConfig
from dive_fast.errors import ConfigError
from dive_fast.sweep.grid import Planned, Value, parse_over
from dive_fast.sweep.runner import Interrupted, Outcome, Runner, last_line
from dive_fast.sweep.sweep_summary import Selection, Sweep, id_validation, summarize, text_of, write_summary


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tree = tiny.write_config(tmp_path, max_steps=2)
    del tree["train"]["output"]
    target = {key: tree["data"]["target"][key] for key in tiny.EVALUATION}
    tree["evaluate"] = {
        "sets": {"val": target | {"role": "id"}, "other": target | {"role": "ood"}}, "workers": 0, "batch_size": 24
    }  # fmt: skip
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(tree))
    return path


@contextmanager
def stopping_when(condition: Callable[[], bool]) -> Iterator[None]:
    """Sends SIGTERM to this process as soon as the condition holds in the block."""
    ended = threading.Event()

    def wait() -> None:
        while not ended.wait(0.05):
            if condition():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.slow
def test_killed_sweep_resumes_and_shares_one_teacher_cache(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    output = tmp_path / "sweep"
    arguments = ["--config", str(config), "--over", "objective.weight=1,10", "--output", str(output)]
    with stopping_when((output / "weight-10" / "log.txt").exists):
        assert command.main(arguments) == 75
    shown = capsys.readouterr()
    assert "restart the same command to resume" in shown.err
    assert "No recommendation yet: 1 of 2 runs" in shown.out
    assert not (output / "weight-10" / "report.json").exists()
    cache = {path.name: path.stat().st_mtime_ns for path in (output / "teacher").iterdir()}
    weights = (output / "weight-1" / "model.safetensors").stat().st_mtime_ns

    # The first run has measured the pre-trained model; the second one takes its values, here changed ones.
    copied = output / "weight-10" / "measurements.json"
    values = json.loads(copied.read_text())
    copied.write_text(json.dumps({key: each | {"scores": {"top1": 0.123}} for key, each in values.items()}))

    assert command.main(arguments) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (output / "teacher").iterdir()} == cache
    assert (output / "weight-1" / "model.safetensors").stat().st_mtime_ns == weights
    shown = capsys.readouterr()
    assert {row["before"] for row in json.loads((output / "weight-10" / "report.json").read_text())["rows"]} == {
        0.123
    }
    assert "[1/2] objective.weight=1: val " in shown.out
    assert "finished before" in shown.out
    assert "Recommended: objective.weight=" in shown.out
    assert f"To train it in full: dive-fast train --config {config} objective.weight=" in shown.out
    assert f" teacher.path={output}/teacher\n" in shown.out
    content = json.loads((output / "sweep.json").read_text())
    assert [run["state"] for run in content["runs"]] == ["finished", "finished"]
    assert (content["id"], content["kept"]) == ("val", ["other"])
    for run in content["runs"]:
        report = json.loads((output / run["name"] / "report.json").read_text())
        assert run["id"] == report["rows"][0]["after"]
        assert run["sets"]["val"]["samples"] == 24


def runner(script: str) -> Runner:
    return Runner(lambda overrides: [sys.executable, "-S", "-c", script, *overrides], dict(os.environ))


def planned(name: str, settings: str = "a", **values: str) -> Planned:
    keys = {f"train.{key}": Value(value) for key, value in values.items()}
    return Planned(name, keys, (), settings, name)


def test_failed_run_is_reported_with_the_last_line_of_its_log(tmp_path: Path) -> None:
    run = planned("run")
    outcome = runner("print('error: it broke\\n'); raise SystemExit(3)").run(run, tmp_path / "run")
    assert not outcome.is_finished
    assert outcome.error == "exit code 3: error: it broke"
    assert runner("").run(run, tmp_path / "run").error == "no report was written: no output"
    assert last_line(tmp_path / "none") == "no log"


def test_finished_run_is_started_again_only_if_something_changed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    working = Runner(lambda _: ["/bin/sh", "-c", f"echo {{}} > {folder}/report.json"], dict(os.environ))
    assert not working.run(planned("run"), folder).was_finished
    assert working.run(planned("run"), folder).was_finished
    assert not working.run(planned("run", "other settings"), folder).was_finished
    assert not working.run(planned("run"), folder).was_finished
    record = folder / "sweep_record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"seconds": 99.0}))
    assert working.run(planned("run"), folder, again=True) == Outcome(True, 99.0)
    (folder / "report.json").write_text("other")
    assert not working.run(planned("run"), folder).was_finished


def test_run_that_was_stopped_ends_the_sweep(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        runner("raise SystemExit(75)").run(planned("run"), tmp_path / "run")


def test_signal_is_passed_on_once_and_ends_the_sweep(tmp_path: Path) -> None:
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: (print('got it', flush=True), sys.exit(75)))\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    stopped, folder = runner(script), tmp_path / "run"

    def interrupt() -> None:
        while last_line(folder / "log.txt") != "ready":
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    # A shell starts background processes with the signal ignored, and then the sweep ignores it too.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.start()
        with stopped.handling_signals(), pytest.raises(Interrupted):
            stopped.run(planned("run"), folder)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert last_line(folder / "log.txt") == "got it"
    with pytest.raises(Interrupted):
        stopped.run(planned("other"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--over", "objective.wight=1,2"], "objective"),
        (["--over", "objective.weight=1,-2"], "objective.weight = -2"),
        (["--over", "objective.weight=1,2", "--id", "vale"], "--id vale: no set of this name"),
        (["--over", "objective.weight=1,2", "--kept", "othre"], "did you mean other?"),
        (["--over", "objective.weight=1,2", "--kept", "val", "--id", "val"], "it is the ID validation too"),
        (["--over", "objective.weight=1,2", "--kept", "other", "train.epoch=1"], "unknown key train.epoch"),
        (["--over", "objective.weight=1,2", "--steps", "1", "train.max_steps=2"], "--steps sets train.max_steps"),
        (["--over", "train.epochs=1,2", "--epochs", "1"], "--epochs sets train.epochs"),
    ],
)
def test_mistake_is_one_line_before_anything_runs(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    output = tmp_path / "sweep"
    assert command.main(["--config", str(config), "--output", str(output), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not output.exists()


def test_id_validation_is_named_selected_or_of_role_id() -> None:
    tree: dict[str, Any] = {"a": {"path": "a"}, "b": {"path": "b", "role": "id"}, "c": {"path": "c"}}
    options = EvaluateConfig.model_validate({"sets": tree})
    assert id_validation(options, None, ()) == "b"
    assert id_validation(options, "c", ()) == "c"
    selecting = EvaluateConfig.model_validate({"sets": tree, "select": "a", "every_steps": 1})
    assert id_validation(selecting, None, ()) == "a"
    known = EvaluateConfig.model_validate({"sets": {"x": {"path": "x", "dataset": "imagenet1k"}}})
    assert id_validation(known, None, ()) == "x"
    with pytest.raises(ConfigError, match=r"no set is known as ID validation.*--id"):
        id_validation(EvaluateConfig.model_validate({"sets": {"a": {"path": "a"}}}), None, ())
    with pytest.raises(ConfigError, match="sets: none"):
        id_validation(EvaluateConfig(), None, ())


def test_summary_has_means_over_seeds_failures_and_a_chart(tmp_path: Path) -> None:
    over = parse_over(["objective.weight=1,10,100"], "0,1")
    runs, outcomes = [], []
    for weight, ids in {"1": (0.90, 0.92), "10": (0.90, 0.91), "100": (0.93, None)}.items():
        for seed, id_ in enumerate(ids):
            values = {"objective.weight": Value(weight), "train.seed": Value(str(seed))}
            name = f"weight-{weight}_seed-{seed}"
            runs.append(Planned(name, values, (), "", name))
            outcomes.append(Outcome(id_ is not None, 60.0, "" if id_ else "exit code 1: error: it broke"))
            if id_ is not None:
                write_run(tmp_path / name, [row("val", id_), row("zs", float(weight) / 200, "zero_shot")])
    full = ("dive-fast", "train", "--config", "my config.yaml")
    sweep = Sweep(tmp_path, over, tuple(runs), Selection("val", (), 0.01), full)
    summary = summarize(sweep, outcomes)
    assert summary.choice is not None
    assert str(summary.choice.point.values["objective.weight"]) == "10"
    text = text_of(summary)
    assert "| 1                | 91.0 ± 1.4 |" in text
    assert "within the margin" in text
    assert "not finished" in text
    assert "10 is the largest weight tried; try 30 too." in text
    assert "dive-fast train --config 'my config.yaml' objective.weight=10" in text
    assert write_summary(summary) == ["sweep.md", "sweep.json", "sweep.png"]
    with Image.open(tmp_path / "sweep.png") as image:
        assert image.width >= 830
    page = (tmp_path / "sweep.md").read_text()
    assert "failed, exit code 1: error: it broke" in page
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["recommended"]["values"] == {"objective.weight": 10}
    assert [run["state"] for run in content["runs"]].count("failed") == 1
