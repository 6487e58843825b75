"""The process of one experiment tracker: passes events from its standard input to the tracker's client.

:class:`dive_fast.training.trackers.Trackers` starts one for each tracker. A client that fails, waits for a server
or leaves threads behind can neither stop nor delay training. Events are lines of JSON; replies on standard output
are ``{"at": ...}``, where the tracker writes, and ``{"error": ..., "events": ...}``, why it ended and after
how many events. All other output goes to a log. The end of the input without a last event means that the run was
killed. ``<tracker>.json`` next to the tracker's folder says where it writes; it exists once the tracker knows the
run.
"""

import json
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

PROJECT = "dive_fast"
"""Name of the project or experiment that runs belong to; each client has a variable for another one."""
FINAL = "final/"
"""Prefix of the metrics of the exported weights at the end of a run."""
END_SECONDS = 600
"""Time after which a process ends that cannot finish."""
Values = Mapping[str, float]


class TrackedRun(NamedTuple):
    """A run as its trackers see it."""

    name: str
    """Name of the run folder."""
    id: str
    """Id that stays when the run resumes."""
    folder: str
    """Folder for the tracker's files, inside the run folder."""
    settings: dict[str, Any]
    """Config and machine as numbers, flags, texts and None, by dotted key."""
    step: int
    """Step after which the run starts or resumes."""
    is_known: bool
    """Whether the tracker has events of this run already."""


class Client(Protocol):
    """Access to one tracker."""

    at: str
    """Folder or address where the tracker writes."""

    def __init__(self, run: TrackedRun) -> None:
        """Starts or resumes the run."""

    def log(self, step: int, values: Values) -> None:
        """Writes metrics of a step."""

    def close(self, step: int, final: Values, changed: Values, state: str) -> None:
        """Ends the run.

        Args:
            step: the last step.
            final: metrics of the exported weights; empty unless the run has finished.
            changed: the part of ``final`` that an earlier end of the same run did not write.
            state: ``finished``, ``stopped`` or ``failed``.
        """


class TensorBoard:
    """Event files, which a resumed run continues: events after its step are purged."""

    def __init__(self, run: TrackedRun) -> None:
        """Opens a file."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        purge_step = run.step + 1 if run.is_known else None
        # A killed machine loses the events of a few seconds.
        self._writer: Any = SummaryWriter(run.folder, purge_step=purge_step, flush_secs=10)
        self.at = run.folder
        settings = {key: "null" if value is None else value for key, value in run.settings.items()}
        rows = "".join(f"| {key} | {value} |\n" for key, value in settings.items())
        self._writer.add_text("config", f"| key | value |\n|---|---|\n{rows}", run.step)
        # Without the experiment's summary, TensorBoard shows all scalars in the table of hyper-parameters.
        _, start, self._end = hparams(settings, {})
        self._add_summary(start)

    def log(self, step: int, values: Values) -> None:
        """Writes scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, step: int, final: Values, changed: Values, state: str) -> None:
        """Writes the status of the hyper-parameters' session."""
        from tensorboard.plugins.hparams.api_pb2 import Status  # type: ignore[import-untyped]
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[import-untyped]

        self.log(step, {f"{FINAL}{name}": value for name, value in changed.items()})
        self._writer.add_text("state", state, step)
        plugin_data = self._end.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(plugin_data.content)
        statuses = {"finished": "STATUS_SUCCESS", "failed": "STATUS_FAILURE", "stopped": "STATUS_UNKNOWN"}
        content.session_end_info.status = Status.Value(statuses[state])
        plugin_data.content = content.SerializeToString()
        self._add_summary(self._end)
        self._writer.close()

    def _add_summary(self, summary: Any) -> None:
        self._writer.file_writer.add_summary(summary)


class Wandb:
    """Weights & Biases, online or with ``WANDB_MODE=offline``; a resumed run has the same id."""

    def __init__(self, run: TrackedRun) -> None:
        """Starts or resumes the run."""
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.id,
            resume="allow",
            dir=Path(run.folder).parent,  # wandb adds its own folder
            config=run.settings,
            allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True),
        )
        command = f"wandb sync {shlex.quote(str(Path(self._run.dir).parent))}"
        self.at = f"offline; upload by: {command}" if self._run.offline else str(self._run.url)

    def log(self, step: int, values: Values) -> None:
        """Sends metrics; wandb drops those of a step before its last one."""
        self._run.log(dict(values), step=step)

    def close(self, step: int, final: Values, changed: Values, state: str) -> None:
        """Sends the summary and waits until all is sent."""
        self._run.summary.update({f"{FINAL}{name}": value for name, value in final.items()} | {"state": state})
        if state == "stopped" and not self._run.offline:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if state == "finished" else 1)


class Mlflow:
    """MLflow, at ``MLFLOW_TRACKING_URI`` or in files; a resumed run is the one with the same tag."""

    TAG = "dive_fast.run"
    MAX_PARAMETERS, MAX_LENGTH = 100, 6000
    """MLflow's limits for one request and for the text of a value."""

    def __init__(self, run: TrackedRun) -> None:
        """Creates or finds the run."""
        # The files of mlflow-skinny, which has no database; without the first, MLflow 3.17 refuses them.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        address = os.environ.get("MLFLOW_TRACKING_URI") or Path(run.folder).resolve().as_uri()
        self._client = MlflowClient(tracking_uri=address)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        known = self._client.search_runs([experiment_id], f"tags.`{self.TAG}` = '{run.id}'")
        if known:
            self._run = known[0]
            self._client.update_run(self._run.info.run_id, status="RUNNING")
        else:
            self._run = self._client.create_run(experiment_id, run_name=run.name, tags={self.TAG: run.id})
        self.at = f"{address}, run {self._run.info.run_id}"
        before = self._run.data.params
        settings = {key: str(value)[: self.MAX_LENGTH] or '""' for key, value in run.settings.items()}
        new = [Param(key, value) for key, value in settings.items() if key not in before]
        for start in range(0, len(new), self.MAX_PARAMETERS):
            self._client.log_batch(self._run.info.run_id, params=new[start : start + self.MAX_PARAMETERS])
        for key, value in settings.items():
            if before.get(key, value) != value:  # a parameter cannot be changed
                self._client.set_tag(self._run.info.run_id, f"changed.{key}", value)

    def log(self, step: int, values: Values) -> None:
        """Writes metrics in one request."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run.info.run_id, metrics=metrics)

    def close(self, step: int, final: Values, changed: Values, state: str) -> None:
        """Sets the status of the run."""
        self.log(step, {f"{FINAL}{name}": value for name, value in changed.items()})
        self._client.set_tag(self._run.info.run_id, "state", state)
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[state]
        self._client.set_terminated(self._run.info.run_id, status)


class Trackio:
    """trackio, in ``TRACKIO_DIR``, by default in the run folder, or on the Space or server of its variables."""

    def __init__(self, run: TrackedRun) -> None:
        """Starts or resumes the run of this name."""
        os.environ.setdefault("TRACKIO_DIR", run.folder)  # read when the package is imported
        import trackio  # type: ignore[import-not-found]

        self._run: Any = trackio.init(
            project=PROJECT,
            name=run.name,
            config=run.settings,
            # In a shared project, another run folder may have the same name.
            resume="allow" if run.is_known else "never",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        self.at = (
            os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL") or os.environ["TRACKIO_DIR"]
        )

    def log(self, step: int, values: Values) -> None:
        """Queues metrics."""
        self._run.log(dict(values), step=step)

    def close(self, step: int, final: Values, changed: Values, state: str) -> None:
        """Logs the state, since trackio has none, and waits until all is sent."""
        self._run.log({f"{FINAL}{name}": value for name, value in changed.items()} | {"state": state}, step=step)
        self._run.finish()


CLIENTS: dict[str, type[Client]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def check_login() -> None:
    """Prints why wandb would ask for a login, in one line; nothing if it would not."""
    remedy = "run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline"
    try:
        import wandb

        settings = wandb.setup(wandb.Settings(silent=True)).settings
        needs_login = settings.mode not in ("offline", "dryrun", "disabled")
        if needs_login and not wandb.login(prompt=False, verify=False):
            print(f"wandb has no API key: {remedy}")
    except Exception as error:
        print(f"wandb: {first_line(error)}: {remedy}")


def first_line(error: BaseException) -> str:
    """An error as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def run_client(kind: type[Client], events: Iterator[str], replies: TextIO) -> None:
    """Passes events to a client until the last one.

    Args:
        events: lines of JSON: a :class:`TrackedRun`; ``[step, values]`` of each event; and at last
            ``[step, metrics of the exported weights, state]``.
    """

    def reply(**content: Any) -> None:
        print(json.dumps(content), file=replies, flush=True)

    count = 0
    try:
        run = TrackedRun(*json.loads(next(events)))
        notes = Path(f"{run.folder}.json")
        earlier = json.loads(notes.read_text())["final"] if run.is_known else {}
        client, step = kind(run), run.step
        notes.write_text(json.dumps({"at": client.at, "final": earlier}))
        reply(at=client.at)
        final, state = dict[str, float](), "failed"
        for line in events:
            step, values, *last = json.loads(line)
            if last:
                final, state = values, last[0]
                break
            client.log(step, values)
            count += 1
        signal.alarm(END_SECONDS)
        client.close(step, final, {key: value for key, value in final.items() if earlier.get(key) != value}, state)
        notes.write_text(json.dumps({"at": client.at, "final": final or earlier}))
    except BaseException as error:
        traceback.print_exc()
        reply(error=first_line(error), events=count)
        sys.stderr.flush()
        os._exit(1)  # what the client does at exit may wait forever


def main() -> None:
    """Runs the client that the first argument names, or :func:`check_login`."""
    if sys.argv[1] == "check":
        return check_login()
    # Launchers send signals to all processes of a job; this one ends with its input.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        run_client(CLIENTS[sys.argv[1]], iter(sys.stdin), replies)
    return None


if __name__ == "__main__":
    main()
