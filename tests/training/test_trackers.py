"""Trackers through their real clients: files read back, resumes, clients that fail or hang, missing packages."""

import json
import math
import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError
from dive_fast.methods.run_config import RunConfig
from dive_fast.training import trackers
from dive_fast.training.trackers import Trackers, check_trackers, flat

ALONE = Ranks(0, 1, torch.device("cpu"))
RUN = "0123456789abcdef"
NAMES = [name for name in trackers.PACKAGES if name != "trackio" or find_spec("trackio")]
REWINDING = "tensorboard"
CONFIG = {"train": {"learning_rate": 1e-3, "betas": [0.9, 0.99]}, "model": {"pretrained": None}, "deepspeed": {}}


def provenance(**train: Any) -> dict[str, Any]:
    config = CONFIG | {"train": CONFIG["train"] | train}  # type: ignore[operator]
    return {"config": config, "steps": 5, "versions": {"torch": "2"}, "device": "cpu", "ranks": 1, "commit": None}


def make(folder: Path, *names: str, ranks: Ranks = ALONE) -> Trackers:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(provenance()))
    return Trackers(names, folder, RUN, ranks)


def line(step: int, **values: float) -> str:
    return json.dumps({"step": step} | values)


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        for name in ("MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, environment: None) -> Path:
    """A run that fails after step 4, resumes from step 2, finishes after step 5, and is exported again."""
    folder = tmp_path_factory.mktemp("runs") / "my run"
    first = make(folder, *NAMES)
    first.start(0, [], [])
    for step in range(1, 5):
        first.log(step, {"loss": 1 / step, "gradient_norm": math.inf if step == 1 else 1.0})
        if step % 2 == 0:
            first.log(step, {"accuracy/val": step / 10})
    first.close("failed")
    logged = [line(step, loss=1 / step, gradient_norm=1.0) for step in range(1, 5)]
    logged += [line(step, **{"accuracy/val": step / 10}) for step in (2, 4)]
    (folder / "config.json").write_text(json.dumps(provenance(log_every=2)))
    resumed = Trackers(NAMES, folder, RUN, ALONE)
    resumed.start(2, [each for each in logged if json.loads(each)["step"] <= 2], logged)
    resumed.log(2, {"accuracy/val": 0.2})  # repeated, since the checkpoint did not have it
    for step in range(3, 6):
        resumed.log(step, {"loss": 1 / step, "gradient_norm": 1.0})
        if step == 4:
            resumed.log(step, {"accuracy/val": 0.4})
    final = {"weights_step": 5, "accuracy/val": 0.7}
    resumed.log(5, {"accuracy/val": 0.7})
    resumed.log(5, {"accuracy/val": 0.7, "weights_step": 5.0})  # the end repeats the last evaluation
    resumed.summarize(final)
    resumed.close("finished")
    logged += [line(5, loss=0.2, gradient_norm=1.0), line(5, **{"accuracy/val": 0.7})]
    again = Trackers(NAMES, folder, RUN, ALONE)
    again.start(5, logged, logged)
    again.log(5, {"accuracy/val": 0.7})
    again.summarize(final)
    again.close("finished")
    return folder


LOSSES = [(step, 1 / step) for step in range(1, 6)]
ACCURACIES = [(2, 0.2), (4, 0.4), (5, 0.7)]


def test_tensorboard_has_each_step_once(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder / "tracking/tensorboard"))
    events.Reload()

    def scalars(name: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in events.Scalars(name)]

    assert scalars("loss") == [(step, pytest.approx(value)) for step, value in LOSSES]
    assert scalars("accuracy/val") == [(step, pytest.approx(value)) for step, value in ACCURACIES]
    assert scalars("final/accuracy/val") == [(5, pytest.approx(0.7))]
    assert scalars("gradient_norm")[0] == (1, math.inf)
    config = events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| train.learning_rate | 0.001 |" in config
    assert "| train.betas | [0.9, 0.99] |" in config
    contents = [HParamsPluginData.FromString(each) for each in events.PluginTagToContent("hparams").values()]
    started = next(each for each in contents if each.HasField("session_start_info")).session_start_info
    assert started.hparams["train.learning_rate"].number_value == 1e-3


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: protocol buffers in LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # complete, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_segments(folder: Path) -> list[list[Any]]:
    """The records of each time that a run was started or resumed."""
    paths = sorted((folder / "tracking/wandb").glob("offline-run-*/run-*.wandb"))
    return [list(wandb_records(path)) for path in paths]


def wandb_history(segments: list[list[Any]]) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each metric."""
    history: dict[str, list[tuple[int, float]]] = {}
    for record in (record for segment in segments for record in segment if record.HasField("history")):
        values = {item.key or item.nested_key[-1]: json.loads(item.value_json) for item in record.history.item}
        for name in ("loss", "accuracy/val"):
            if name in values:
                history.setdefault(name, []).append((values["_step"], values[name]))
    return history


def wandb_exits(segments: list[list[Any]]) -> list[int]:
    return [next(record.exit.exit_code for record in segment if record.HasField("exit")) for segment in segments]


def test_wandb_has_each_step_once(folder: Path) -> None:
    records = wandb_segments(folder)
    assert wandb_history(records) == {"loss": LOSSES, "accuracy/val": ACCURACIES}
    runs = [next(record.run for record in segment if record.HasField("run")) for segment in records]
    assert {(run.run_id, run.display_name, run.project) for run in runs} == {(RUN, "my run", "dive_fast")}
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert (config["train.learning_rate"], config["device"]) == (1e-3, "cpu")
    assert wandb_exits(records) == [1, 0, 0]
    summary = {}
    for record in (record for record in records[1] if record.HasField("summary")):
        summary |= {item.key or item.nested_key[-1]: json.loads(item.value_json) for item in record.summary.update}
    assert (summary["final/accuracy/val"], summary["state"]) == (0.7, "finished")


def test_mlflow_has_each_step_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "tracking/mlflow").as_uri())
    experiment = client.get_experiment_by_name("dive_fast")
    (run,) = client.search_runs([experiment.experiment_id])

    def history(name: str) -> list[tuple[int, float]]:
        return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]

    assert history("loss") == LOSSES
    assert history("accuracy/val") == ACCURACIES
    assert history("final/accuracy/val") == [(5, 0.7)]
    assert (run.info.run_name, run.info.status, run.data.tags["state"]) == ("my run", "FINISHED", "finished")
    assert run.data.params["train.learning_rate"] == "0.001"
    assert run.data.params["train.log_every"] == "2"


def test_trackio_has_each_step_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", folder / "tracking/trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", folder / "tracking/trackio")
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs("dive_fast") == ["my run"]
    logs = SQLiteStorage.get_logs("dive_fast", "my run")
    assert [(each["step"], each["loss"]) for each in logs if "loss" in each] == LOSSES
    assert [(each["step"], each["accuracy/val"]) for each in logs if "accuracy/val" in each] == ACCURACIES
    assert [each["state"] for each in logs if "state" in each] == ["failed", "finished", "finished"]
    assert [each["final/accuracy/val"] for each in logs if "final/accuracy/val" in each] == [0.7]


def test_state_of_a_failed_run_reaches_tensorboard(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = sorted((folder / "tracking/tensorboard").glob("events*"))
    states = [
        value.tensor.string_val[0].decode()
        for file in files
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.tag.startswith("state")
    ]
    assert states == ["failed", "finished", "finished"]


def test_tracker_that_joins_later_receives_earlier_lines(
    tmp_path: Path, environment: None, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = [line(1, loss=1.0), line(2, loss=0.5), line(2, gradient_norm=None)]  # type: ignore[arg-type]
    late = make(tmp_path / "run", "wandb")
    late.start(2, kept, [*kept, line(3, loss=0.3)])
    late.log(3, {"loss": 0.25})
    late.close("stopped")
    assert wandb_history(wandb_segments(tmp_path / "run")) == {"loss": [(1, 1.0), (2, 0.5), (3, 0.25)]}
    assert "cannot rewind" not in capfd.readouterr().out


def test_client_that_fails_is_reported_once_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "nowhere")
    failing = make(tmp_path / "run", "wandb")
    failing.start(0, [], [])
    for step in range(1, 4):
        failing.log(step, {"loss": 1.0})
    failing.close("finished")
    reported, missed = capfd.readouterr().out.splitlines()
    assert reported.startswith("track: wandb: ")
    assert reported.endswith(f"the run continues without it (log: {tmp_path}/run/tracking/wandb.log)")
    assert missed == "track: wandb: misses 3 of the lines that metrics.jsonl has"
    assert "Traceback" in (tmp_path / "run/tracking/wandb.log").read_text()


def test_client_that_hangs_or_is_killed_delays_nothing(
    tmp_path: Path, environment: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    for number, ending in (
        (signal.SIGSTOP, "did not finish within 0 s and was ended"),
        (signal.SIGKILL, "code -9"),
    ):
        stopped = make(tmp_path / number.name, "wandb")
        stopped.start(0, [], [])
        (process,) = stopped._processes
        os.kill(process._process.pid, number)
        if number == signal.SIGKILL:
            process._process.wait()
        # More than the buffer of a pipe.
        for step in range(2000):
            stopped.log(step, {f"metric {index}": 1.0 for index in range(10)})
        stopped.close("finished")
        printed = capfd.readouterr().out.splitlines()
        assert ending in printed[0], printed
        assert process._process.returncode == -signal.SIGKILL


def test_killed_run_is_failed(tmp_path: Path, environment: None) -> None:
    killed = make(tmp_path / "run", "wandb")
    killed.start(0, [], [])
    killed.log(1, {"loss": 1.0})
    (process,) = killed._processes
    while process._waiting:
        process._write()
    # All that is left of a process that is killed: its end of the pipe is closed.
    assert process._process.stdin is not None
    process._process.stdin.close()
    process._process.wait(60)
    segments = wandb_segments(tmp_path / "run")
    assert (wandb_history(segments), wandb_exits(segments)) == ({"loss": [(1, 1.0)]}, [1])


def test_other_ranks_track_nothing(tmp_path: Path) -> None:
    other = make(tmp_path / "run", *NAMES, ranks=Ranks(1, 2, torch.device("cpu")))
    other.start(0, [], [])
    other.log(1, {"loss": 1.0})
    other.close("finished")
    assert not (tmp_path / "run/tracking").exists()


def test_kept_values_of_a_resumed_run_are_reported(
    folder: Path, tmp_path: Path, environment: None, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking/wandb.json").write_text('{"at": "x", "final": {}}')
    resumed = make(tmp_path, "wandb")
    resumed.start(2, [], [line(step, loss=1.0) for step in (1, 2, 3, 4)])
    resumed.close("failed")
    assert "track: wandb: cannot rewind: the values of steps 3 to 4 stay" in capfd.readouterr().out


@pytest.mark.parametrize("name", trackers.PACKAGES)
def test_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    message = rf"^track: {name} needs the package {trackers.PACKAGES[name]}: pip install 'dive_fast\[{name}\]'$"
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=message):
        check_trackers([name])
    # A folder of this name, such as the one that wandb writes, is not the package.
    (tmp_path / "other_name").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(trackers, "find_spec", lambda _: find_spec("other_name"))
    with pytest.raises(ConfigError, match=message):
        check_trackers([name])


def test_wandb_without_a_key_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    remedy = "run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline"
    with pytest.raises(ConfigError, match=f"^track: wandb has no API key: {remedy}$"):
        check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(ConfigError, match=f"^track: wandb: .*must have 40.*: {remedy}$"):
        check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    check_trackers(["wandb"])
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])


def test_settings_are_flat() -> None:
    expected = {"a.b": 1, "a.c.d": None, "e": "[1, 2]", "f": "{}"}
    assert flat({"a": {"b": 1, "c": {"d": None}}, "e": [1, 2], "f": {}}) == expected


TREE: dict[str, Any] = {
    "model": {"name": "demo"},
    "data": {half: {"format": "csv", "path": "x"} for half in ("target", "reference")},
}


def test_track_takes_one_name_or_several() -> None:
    assert RunConfig.model_validate(TREE | {"track": "wandb"}).track == ["wandb"]
    assert RunConfig.model_validate(TREE | {"track": ["mlflow", "wandb", "mlflow"]}).track == ["mlflow", "wandb"]
    assert RunConfig.model_validate(TREE).track == []
    for wrong in ("comet", ["wandb", "neptune"], [1], 3):
        with pytest.raises(ValueError, match="track"):
            RunConfig.model_validate(TREE | {"track": wrong})


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "csv_monitor", "comet"])
def test_monitors_of_deepspeed_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"deepspeed\.{name}: DeepSpeed's monitors are not used; "):
        RunConfig.model_validate(TREE | {"deepspeed": {name: {"enabled": True}}})
