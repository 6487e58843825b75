"""Faults and their required outcomes; the table in docs/reliability.md is generated from them.

``make test`` runs those marked quick, ``make test-all`` all. Every case is real: processes, signals, files.
"""

import functools
import itertools
import json
import os
import re
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from jobs import REPOSITORY, STEPS, At, Job, Outcome, config
from safetensors.torch import load_file

from dive_fast.data.prepared import convert
from dive_fast.data.prepared.raw import RawSource
from dive_fast.data.prepared.write import prepare
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.fault_tolerance.heartbeat import LOST, STOPPED

SAME = "the same bits"
"""Weights and metrics are those of an undisturbed run."""
SAVED = f"all ranks save and exit {STOPPED}; restarted: {SAME}"
RESTARTED = f"restarted: {SAME}"
KILLED = -signal.SIGKILL

LATE = At("step 6", "SIGKILL")
"""The checkpoint of step 2 is complete by then, since that of step 4 waits for it; the latter may be, too."""
STEP = "dive_fast.engine.step:Engine.step"
WRITE = "dive_fast.checkpoint.saver:_Save._write"


class Fault(NamedTuple):
    """A row of the table, and its test."""

    name: str
    outcome: str
    run: Callable[["Case"], None]
    quick: bool


class Material(NamedTuple):
    """Data and models of all cases."""

    tree: dict[str, Any]
    """The config."""
    prepared: dict[str, str]
    """Folder of the prepared set of each half, for the fast loaders."""
    dropping: str
    """Name of a model that drops patches at random."""
    undisturbed: Callable[[tuple[str, ...], int], tuple[dict[str, torch.Tensor], list[dict[str, Any]]]]
    """Returns weights and metrics of an undisturbed run with these overrides and number of ranks."""


class Case:
    """A run folder in which a fault happens."""

    def __init__(self, folder: Path, material: Material) -> None:
        self.material, self.tree = material, material.tree
        self.job = Job(folder, material.tree)

    def same(self, *overrides: str, ranks: int = 2) -> None:
        """Restarts the job and compares its result with that of an undisturbed run."""
        outcome = self.job.go(overrides=overrides, ranks=ranks)
        assert outcome.codes == [0] * ranks, outcome.output
        (weights, lines), (expected, expected_lines) = (
            self.job.result(),
            self.material.undisturbed(overrides, ranks),
        )
        assert len([line for line in lines if "loss" in line]) == STEPS
        assert lines == expected_lines
        assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []


FAULTS: list[Fault] = []


def fault(name: str, outcome: str, *, quick: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a row to the table."""

    def add(run: Callable[..., None]) -> Callable[..., None]:
        FAULTS.append(Fault(name, outcome, run, quick))
        return run

    return add


def check(outcome: Outcome, *codes: int, says: str = "") -> None:
    """Checks exit codes and output of a job; a user sees a traceback only of a bug."""
    assert outcome.codes == list(codes), outcome.output
    assert says in outcome.output, outcome.output
    if KILLED not in codes and "a bug" not in says:
        assert "Traceback" not in outcome.output, outcome.output


# Kills in every kind of run.


def killed_in_the_middle(overrides: tuple[str, ...], case: Case) -> None:
    check(case.job.go(LATE, overrides=overrides), KILLED, KILLED)
    assert case.job.checkpoints()[0].name == "step00000002"
    case.same(*overrides)


for stage in range(4):
    fault(f"`kill -9` of both ranks, ZeRO-{stage}", RESTARTED, quick=stage == 3)(
        functools.partial(killed_in_the_middle, (f"deepspeed.zero_optimization.stage={stage}",))
    )
for variant, chosen in {
    "online teacher": ("teacher.mode=online",),
    "micro-batches": ("train.micro_batch_size=3",),
    "joint schedule": ("train.schedule=joint",),
    "fp16": ("train.precision=fp16",),
    "activation checkpointing": ("train.activation_checkpointing=full",),
    "LP-FT": ("objective.name=lp_ft", "objective.weight=null"),
    "loader processes": ("data.target.workers=1", "data.reference.workers=1"),
}.items():
    fault(f"`kill -9` of both ranks, {variant}", RESTARTED)(functools.partial(killed_in_the_middle, chosen))


@fault("`kill -9` of both ranks, DALI and FFCV", RESTARTED)
def _(case: Case) -> None:
    prepared = case.material.prepared
    killed_in_the_middle(
        tuple(
            f"data.{half}.{key}={value}"
            for half, loader in (("target", "dali"), ("reference", "ffcv"))
            for key, value in (("format", "prepared"), ("path", prepared[half]), ("loader", loader))
        ),
        case,
    )


@fault("`kill -9` of both ranks, a model that drops patches at random", RESTARTED)
def _(case: Case) -> None:
    killed_in_the_middle((f"model.name={case.material.dropping}",), case)


@fault("`kill -9` of both ranks, between two steps with a reference batch", RESTARTED, quick=True)
def _(case: Case) -> None:
    options = ("objective.reference_every=2", "train.checkpoint_every=1", "train.keep_last=9")
    check(case.job.go(LATE, overrides=options), KILLED, KILLED)
    for later in case.job.checkpoints()[3:]:
        shutil.rmtree(later)
    case.same(*options)


@fault("`kill -9` of a run on one rank", RESTARTED)
def _(case: Case) -> None:
    check(case.job.go(LATE, ranks=1), KILLED)
    case.same(ranks=1)


@fault("`kill -9` three times in one run", RESTARTED)
def _(case: Case) -> None:
    for step in (2, 4, 5):
        check(case.job.go(At(f"step {step}", "SIGKILL"), overrides=("train.checkpoint_every=1",)), KILLED, KILLED)
    case.same("train.checkpoint_every=1")


@fault("`kill -9` while the teacher cache is written", RESTARTED)
def _(case: Case) -> None:
    # The first rank alone writes a set as small as this.
    check(case.job.go(At("dive_fast.teacher.cache_files:Writer.write", "SIGKILL")), KILLED, LOST)
    case.same()


@fault("`kill -9` before a checkpoint has its name", RESTARTED, quick=True)
def _(case: Case) -> None:
    check(case.job.go(At("dive_fast.checkpoint.saver:_Save._commit", "SIGKILL", rank=0, call=2)), KILLED, LOST)
    assert [path.name for path in case.job.checkpoints()] == ["step00000002"]
    case.same()
    assert not list((case.job.run / "checkpoints").glob(".*"))


@fault("`kill -9` in the middle of a checkpoint's file", RESTARTED)
def _(case: Case) -> None:
    check(case.job.go(At("dive_fast.checkpoint.saver:_fsync", "SIGKILL", rank=1, call=2)), LOST, KILLED)
    case.same()


@fault("`kill -9` while an old checkpoint is removed", RESTARTED)
def _(case: Case) -> None:
    options = ("train.keep_last=1",)
    removing = At("dive_fast.checkpoint.saver:_remove", "SIGKILL", rank=0)
    check(case.job.go(removing, overrides=options), KILLED, LOST)
    case.same(*options)


@fault("`kill -9` while the final model is exported", RESTARTED)
def _(case: Case) -> None:
    check(case.job.go(At("dive_fast.model.towers:save", "SIGKILL")), KILLED, LOST)
    assert not (case.job.run / "model.safetensors").exists()
    case.same()


@fault("a kill that truncates a line of `metrics.jsonl`", RESTARTED)
def _(case: Case) -> None:
    check(case.job.go(LATE), KILLED, KILLED)
    with (case.job.run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 3, "lo')
    case.same()


# Stop requests.


def stopped(name: str, rank: int | None, case: Case, ranks: int = 2) -> None:
    check(
        case.job.go(At("step 3", name, rank=rank), ranks=ranks),
        *[STOPPED] * ranks,
        says="saved after step",
    )
    # The monitor thread needs a moment, and the decision on the votes of a step is known after the next one.
    assert case.job.checkpoints()[-1].name in ("step00000003", "step00000004", "step00000005")
    case.same(ranks=ranks)


for name, rank in (("SIGTERM", 0), ("SIGTERM", 1), ("SIGUSR1", 1), ("SIGINT", None), ("SIGTERM", None)):
    receiver = "both ranks" if rank is None else f"rank {rank} of 2"
    fault(f"{name} to {receiver}", SAVED, quick=(name, rank) == ("SIGTERM", 1))(
        functools.partial(stopped, name, rank)
    )
fault("SIGUSR1 to a run on one rank", SAVED)(functools.partial(stopped, "SIGUSR1", 0, ranks=1))


@fault("SIGTERM to the ranks and their loader processes, from outside", SAVED)
def _(case: Case) -> None:
    options = ("data.target.workers=1", "data.reference.workers=1")
    job = case.job.start(At("dive_fast.engine.step:Engine.step", "lingers", call=3, until=4), overrides=options)
    job.until_step(2)
    for rank in range(2):
        job.kill_all_of(rank, signal.SIGTERM)
    check(job.wait(), STOPPED, STOPPED)
    case.same(*options)


def stopped_as_a_group(ranks: int, threads: int, case: Case) -> None:
    """As by ``timeout``: all processes of the group get the signal, a rank's loader processes before the rank."""
    options = ("data.target.workers=1", "data.reference.workers=1")
    job = case.job.start(
        At("dive_fast.engine.step:Engine.step", "lingers", call=3, until=4),
        ranks=ranks,
        overrides=options,
        environment={"OMP_NUM_THREADS": str(threads)},
    )
    job.until_step(2)
    for rank in range(ranks):
        job.kill_all_of(rank, signal.SIGTERM)
    check(job.wait(), *[STOPPED] * ranks, says="saved after step")
    assert case.job.checkpoints()[-1].name >= "step00000003"


for ranks, threads in ((1, 2), (1, 4), (2, 4)):
    name = f"SIGTERM to all processes of a run on {ranks} rank{'s' * (ranks > 1)}, {threads} threads in each"
    fault(name, f"all ranks save and exit {STOPPED}")(functools.partial(stopped_as_a_group, ranks, threads))

NO_BATCH = At("dive_fast.data.loaders.plain:_Decode.__call__", "hangs", call=4)
"""In a loader process, which prefetches some batches: none arrives for step 4."""


def stopped_without_a_batch(ranks: int, case: Case) -> None:
    options = ("data.target.workers=1", "data.reference.workers=1")
    job = case.job.start(NO_BATCH, ranks=ranks, overrides=options)
    job.until_step(3)
    time.sleep(0.5)  # a signal before the wait for step 4 would end the run without it
    start = time.monotonic()
    job.kill(ranks - 1, signal.SIGTERM)
    check(job.wait(), *[STOPPED] * ranks, says="saved after step 3 of 6, no batch has come")
    assert time.monotonic() - start < 30
    assert case.job.checkpoints()[-1].name == "step00000003"
    case.same(*options, ranks=ranks)


for ranks in (1, 2):
    fault(
        f"SIGTERM while a loader process hangs, {ranks} rank{'s' * (ranks > 1)}",
        f"within seconds {SAVED}",
        quick=ranks == 2,
    )(functools.partial(stopped_without_a_batch, ranks))


@fault(
    "SIGTERM while one rank gets no batch and the other is in the step",
    f"all ranks exit {STOPPED} and report that nothing is saved; {RESTARTED}",
)
def _(case: Case) -> None:
    options = ("train.checkpoint_every=1",)
    job = case.job.start(
        At("dive_fast.fault_tolerance.heartbeat:Watch.should_leave", "hangs", rank=1, call=4), overrides=options
    )
    job.until_step(2)
    job.kill(0, signal.SIGTERM)
    check(job.wait(), STOPPED, STOPPED, says="exited without saving, because no step ends")
    case.same(*options)


def stopped_at_the_start(place: str, case: Case) -> None:
    job = case.job.start(At(place, "hangs", rank=0))
    deadline = time.monotonic() + 60
    while not (job.folder / "run").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    start = time.monotonic()
    job.kill(1, signal.SIGTERM)
    check(job.wait(), STOPPED, STOPPED, says="SIGTERM: exited while starting; restart the same command to resume")
    assert time.monotonic() - start < 20
    case.same()


for activity, place in (
    ("the teacher cache is written", "dive_fast.teacher.cache_files:Writer.write"),
    ("the teacher cache is audited", "dive_fast.teacher.build:audit"),
):
    fault(
        f"SIGTERM while {activity}",
        f"all ranks exit {STOPPED} within seconds; {RESTARTED}",
        quick="written" in activity,
    )(functools.partial(stopped_at_the_start, place))


@fault("SIGTERM during an evaluation", f"all ranks exit {STOPPED} within seconds; {RESTARTED}")
def _(case: Case) -> None:
    measured = {key: case.tree["data"]["target"][key] for key in tiny.EVALUATION}
    options = ("evaluate.every_steps=3", f"evaluate.sets={json.dumps({'seen': measured})}", "evaluate.workers=0")
    # The first call measures the pre-trained model.
    measures = "dive_fast.training.run_evaluation:measure_sets"
    job = case.job.start(At(measures, "hangs", call=2), overrides=options)
    while not (job.checkpoints() and job.checkpoints()[-1].name == "step00000003"):
        time.sleep(0.05)
    time.sleep(1)
    job.kill(1, signal.SIGTERM)
    start = time.monotonic()
    check(job.wait(), STOPPED, STOPPED, says="SIGTERM: exited while evaluating after step 3")
    # Otherwise the other rank's silence would end it, after a minute.
    assert time.monotonic() - start < 45
    case.same(*options)
    assert [line["step"] for line in case.job.metrics() if "accuracy/seen" in line] == [3, 6, 6]


@fault(
    "SIGTERM during an evaluation whose checkpoint could not be written",
    "the evaluation ends first; " + SAVED,
)
def _(case: Case) -> None:
    measured = {key: case.tree["data"]["target"][key] for key in tiny.EVALUATION}
    options = ("evaluate.every_steps=3", f"evaluate.sets={json.dumps({'seen': measured})}", "evaluate.workers=0")
    outcome = case.job.go(
        At(WRITE, "disk full", rank=1, call=2),
        At("evaluation 3", "SIGTERM", rank=1),
        At("dive_fast.training.run_evaluation:measure_sets", "lingers", call=2),
        overrides=options,
    )
    check(outcome, STOPPED, STOPPED, says="saved after step")
    assert case.job.checkpoints()[-1].name in ("step00000004", "step00000005")
    case.same(*options)


@fault("Ctrl-C that also ends the reader of the output (`tee`)", SAVED)
def _(case: Case) -> None:
    check(case.job.go(At("step 2", "output closed"), At("step 3", "SIGINT")), STOPPED, STOPPED)
    case.same()


@fault("Ctrl-C that reaches one rank after the other's has already made it save", SAVED)
def _(case: Case) -> None:
    late = At(WRITE, "SIGINT", rank=1, call=2)
    check(case.job.go(At("step 3", "SIGINT", rank=0), late), STOPPED, STOPPED, says="saved after step")
    case.same()


@fault("a stop request while a rank is slow to end", f"it exits {STOPPED} too; {RESTARTED}")
def _(case: Case) -> None:
    slow = At("dive_fast.data.prefetch:Prefetcher.close", "lingers long", rank=1)
    check(case.job.go(At("step 3", "SIGTERM", rank=0), slow), STOPPED, STOPPED, says="saved after step")
    case.same()


@fault("SIGTERM before the first step", f"all ranks exit {STOPPED}; {RESTARTED}")
def _(case: Case) -> None:
    check(
        case.job.go(At("dive_fast.training.setup:Engine", "SIGTERM")),
        STOPPED,
        STOPPED,
        says="SIGTERM: exited while",
    )
    case.same()


@fault("Ctrl-C twice", f"exits 130 at once; {RESTARTED}")
def _(case: Case) -> None:
    job = case.job.start(At(STEP, "hangs", call=4))
    job.until_step(3)
    for _ in range(2):
        for rank in range(2):
            job.kill(rank, signal.SIGINT)
        time.sleep(2)
    check(job.wait(), 130, 130, says="exited without saving")
    case.same()


@fault("SIGTERM to a run that hangs, then Ctrl-C", f"exits 130 at once; {RESTARTED}")
def _(case: Case) -> None:
    job = case.job.start(At(STEP, "hangs", call=4))
    job.until_step(3)
    for number in (signal.SIGTERM, signal.SIGINT):
        for rank in range(2):
            job.kill(rank, number)
        time.sleep(2)
    check(job.wait(), 130, 130, says="exited without saving")
    case.same()


# Lost ranks.


def lost(event: At, codes: tuple[int, int], says: str, case: Case, seconds: float = 60) -> None:
    outcome = case.job.go(event, overrides=("train.rank_timeout=15",))
    check(outcome, *codes, says=says)
    assert outcome.seconds < seconds, outcome.output
    case.same("train.rank_timeout=15")


for dead, codes in ((1, (LOST, KILLED)), (0, (KILLED, LOST))):
    fault(f"`kill -9` of rank {dead} of 2", f"the other names it and exits {LOST}; {RESTARTED}", quick=dead == 1)(
        functools.partial(lost, At("step 4", "SIGKILL", rank=dead), codes, f"rank {dead}")
    )


@fault("a rank hangs in a step", f"all name it and its step within the timeout, exit {LOST}; {RESTARTED}")
def _(case: Case) -> None:
    # The step of the other rank does not end either: it waits for the gradients of this one.
    hanging = At("dive_fast.fault_tolerance.heartbeat:Watch.should_leave", "hangs", rank=1, call=4)
    lost(hanging, (LOST, LOST), "rank 1 waiting for the batch of step 4", case)


@fault("a rank is frozen (SIGSTOP)", f"the other names it and exits {LOST}; {RESTARTED}")
def _(case: Case) -> None:
    job = case.job.start(At("step 4", "SIGSTOP", rank=1), overrides=("train.rank_timeout=15",))
    outcome = job.wait(ranks=(0,), seconds=60)
    check(outcome, LOST, KILLED, says="rank 1")
    case.same("train.rank_timeout=15")


@fault(
    "all ranks are frozen for longer than `train.rank_timeout` (SIGSTOP, SIGCONT)", f"the run continues: {SAME}"
)
def _(case: Case) -> None:
    options = ("train.rank_timeout=6",)
    job = case.job.start(At(STEP, "lingers", call=3, until=4), overrides=options)
    job.until_step(2)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in range(2):
            job.kill(rank, number)
        time.sleep(9 * (number == signal.SIGSTOP))
    check(job.wait(), 0, 0)
    case.same(*options)


@fault(
    "the data is missing on one rank",
    f"it exits 2 with the reason, the other names it and exits {LOST}",
    quick=True,
)
def _(case: Case) -> None:
    outcome = case.job.go(At("dive_fast.training.setup:open_target", "data missing", rank=1))
    check(outcome, LOST, 2, says="failed starting: DataError: data.target: no tar there")
    case.same()


for event, says in (("out of memory", "CUDA out of memory"), ("CUDA error", "an illegal memory access")):

    @fault(
        f"{event} on one rank, while the other is silent",
        "reported at once with its cause; both exit 1, since a restart would fail too",
        quick=event == "out of memory",
    )
    def _(case: Case, event: str = event, says: str = says) -> None:
        # The other rank is late, and must not be reported as the cause.
        silent = At("dive_fast.fault_tolerance.heartbeat:Watch.should_leave", "lingers long", rank=0, call=4)
        outcome = case.job.go(At(STEP, event, rank=1, call=4), silent, overrides=("train.rank_timeout=15",))
        check(outcome, 1, 1, says=f"failed in step 4: {'CUDA error: ' * (event != 'out of memory')}{says}")
        assert "rank 0 on" not in outcome.output
        hint = "--dry-run predicts the memory" if event == "out of memory" else "rank 1: error: CUDA error"
        assert hint in outcome.output


@fault("a bug raises on one rank", f"the other names it with the error and exits {LOST}; {RESTARTED}")
def _(case: Case) -> None:
    failing = At(STEP, "fails", rank=1, call=4)
    lost(failing, (LOST, 1), "failed in step 4: ZeroDivisionError: a bug of one rank", case)


def with_a_broken_image(run: Callable[[str], None], case: Case) -> None:
    """Calls ``run`` with the name of an image whose bytes in the target's tar are zero during the call."""
    shard = Path(case.tree["data"]["target"]["path"]) / "shard-00000.tar"
    original = shard.read_bytes()
    with tarfile.open(shard) as tar:
        image = next(member for member in tar if member.name.endswith(".jpg"))
    content = bytearray(original)
    content[image.offset_data : image.offset_data + image.size] = bytes(image.size)
    try:
        shard.write_bytes(content)
        run(image.name.removesuffix(".jpg"))
    finally:
        shard.write_bytes(original)


@fault(
    "an image in the target's tar cannot be decoded", "reported by name and replaced by the next sample; exit 0"
)
def _(case: Case) -> None:
    def start(name: str) -> None:
        check(case.job.go(), 0, 0, says=f"{name}: cannot decode the image")

    with_a_broken_image(start, case)


@fault("the target data changes between a kill and the restart", f"exit 2 with the reason; restored: {SAME}")
def _(case: Case) -> None:
    def start(name: str) -> None:
        check(case.job.go(), 2, 2, says="(data.target: other data, or changed since)")

    check(case.job.go(LATE), KILLED, KILLED)
    with_a_broken_image(start, case)
    case.same()


@fault("no batch arrives for a while", "reported after 30 s, and the run continues: " + SAME)
def _(case: Case) -> None:
    outcome = case.job.go(
        At("dive_fast.fault_tolerance.heartbeat:Watch.should_leave", "lingers", rank=1, call=3),
        At("dive_fast.training.loop:build", "impatient"),
    )
    check(outcome, 0, 0, says="rank 1 has waited")
    case.same()


# Disks.


@fault("the disk is full at a checkpoint", "a warning, and the run continues: " + SAME, quick=True)
def _(case: Case) -> None:
    check(case.job.go(At(WRITE, "disk full", rank=1)), 0, 0, says="rank 1 cannot write checkpoint")
    assert [path.name for path in case.job.checkpoints()] == ["step00000004", "step00000006"]
    case.same()


@fault("the disk hangs for a while at a checkpoint", "reported after 30 s, and the run continues: " + SAME)
def _(case: Case) -> None:
    # Steps continue until the next checkpoint is due.
    outcome = case.job.go(At(WRITE, "lingers", rank=1), At("dive_fast.training.loop:build", "impatient"))
    check(outcome, 0, 0, says="s for the checkpoint of step 4 or the one before it")
    case.same()


@fault("the disk is full at lines of `metrics.jsonl`", "warned of, and they wait: " + SAME)
def _(case: Case) -> None:
    full = At("dive_fast.training.metrics:Metrics._append", "ten bytes left", rank=0, call=3, until=4)
    outcome = case.job.go(full)
    check(outcome, 0, 0, says="its lines wait")
    assert outcome.output.count("its lines wait") == 1
    case.same()


@fault("the disk is full at the last line of `metrics.jsonl`", f"exit 1; {RESTARTED}")
def _(case: Case) -> None:
    full = At("dive_fast.training.metrics:Metrics._append", "ten bytes left", rank=0, call=6, until=9)
    outcome = case.job.go(full)
    check(outcome, 1, 1, says="metrics.jsonl: [Errno 28]")
    assert [path.name for path in case.job.checkpoints()] == ["step00000002", "step00000004"]
    case.same()


@fault("the disk is full at a checkpoint, `on_save_error=stop`", f"exit 1, the last one is unchanged; {RESTARTED}")
def _(case: Case) -> None:
    options = ("train.on_save_error=stop",)
    outcome = case.job.go(At(WRITE, "disk full", rank=0, call=2), overrides=options)
    check(outcome, 1, 1, says="rank 0 cannot write checkpoint")
    assert [path.name for path in case.job.checkpoints()] == ["step00000002"]
    case.same(*options)


@fault("the disk is full at the last checkpoint", f"exit 1; {RESTARTED}")
def _(case: Case) -> None:
    check(case.job.go(At(WRITE, "disk full", rank=0, call=3)), 1, 1, says="rank 0 cannot write checkpoint")
    case.same()


@fault("the disk is full at the checkpoint of a stop request", f"exit 1, the last one is unchanged; {RESTARTED}")
def _(case: Case) -> None:
    outcome = case.job.go(At("step 3", "SIGTERM", rank=0), At(WRITE, "disk full", rank=1, call=2, until=3))
    check(outcome, 1, 1, says="rank 1 cannot write checkpoint")
    assert [path.name for path in case.job.checkpoints()] == ["step00000002"]
    case.same()


@fault("the folder of checkpoints cannot be created", "exit 2 before the first step; repaired: " + SAME)
def _(case: Case) -> None:
    case.job.run.mkdir()
    (case.job.run / "checkpoints").write_text("in the way")
    check(case.job.go(), 2, 2, says="checkpoints: not a folder; remove or rename it")
    (case.job.run / "checkpoints").unlink()
    case.same()


# Checkpoints that are corrupt or belong to another run.


def corrupt(damage: Callable[[Path], None], says: str, case: Case) -> None:
    """Damages the newest of several complete checkpoints: the run resumes from the one before."""
    check(case.job.go(LATE, overrides=("train.checkpoint_every=1",)), KILLED, KILLED)
    *_, older, newest = case.job.checkpoints()
    damage(newest)
    first_step = f"data {int(older.name.removeprefix('step')) + 1}"
    check(case.job.go(At(first_step, "SIGKILL")), KILLED, KILLED, says=says)
    case.same()


def _truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "rank00001.safetensors", 1000)


def _flip(checkpoint: Path) -> None:
    with (checkpoint / "rank00000.safetensors").open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def _manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        path = checkpoint / "manifest.json"
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(change(manifest) or manifest))

    return damage


def _link(checkpoint: Path) -> None:
    file = checkpoint / "rank00000.safetensors"
    outside = checkpoint.parents[2] / "outside.safetensors"
    shutil.move(file, outside)
    file.symlink_to(outside)


SKIPPED = "skipped a corrupt checkpoint: "
for condition, damage, says in (
    ("is truncated", _truncate, SKIPPED),
    ("has one bit flipped", _flip, SKIPPED),
    ("lacks its manifest", lambda path: (path / "manifest.json").unlink(), ""),
    (
        "has a garbled manifest",
        lambda path: (path / "manifest.json").write_bytes(b"\xff{[[" * 100),
        SKIPPED,
    ),
    ("lacks `trainer.json`", lambda path: (path / "trainer.json").unlink(), SKIPPED),
    ("has a manifest that points outside", _manifest(lambda m: m["files"].update({"../../x": {}})), SKIPPED),
    ("is a link to a file outside", _link, SKIPPED),
):
    fault(
        f"the newest checkpoint {condition}", f"resumes from the one before: {SAME}", quick="flipped" in condition
    )(functools.partial(corrupt, damage, says))


@fault("every checkpoint is corrupt", "exit 2 with their names and what to do; nothing is overwritten", quick=True)
def _(case: Case) -> None:
    check(case.job.go(LATE), KILLED, KILLED)
    checkpoints = case.job.checkpoints()
    for path, damage in zip(checkpoints, itertools.cycle((_truncate, _flip))):
        damage(path)
    check(case.job.go(), 2, 2, says="are corrupt")
    assert case.job.checkpoints() == checkpoints


@fault("the checkpoint belongs to another model", "exit 2, names each key that differs")
def _(case: Case) -> None:
    check(case.job.go(LATE), KILLED, KILLED)
    other = tiny.write_model(case.job.folder / "other", tiny.FEW_TOKENS | {"embed_dim": 16})
    overrides = (f"model.name={other}", f"teacher.path={case.job.folder}/other-teacher")
    check(
        case.job.go(overrides=overrides),
        2,
        2,
        says="belongs to a run with other settings (model.architecture.embed_dim: 24 there",
    )


@fault("the checkpoint belongs to another objective", "exit 2, names each key that differs")
def _(case: Case) -> None:
    check(case.job.go(LATE), KILLED, KILLED)
    check(case.job.go(overrides=("objective.name=flyp_replay",)), 2, 2, says='(objective.name: "dive" there')


# Other numbers of ranks, other stages.


def resume_with(case: Case, ranks: int, *overrides: str) -> None:
    """Resumes and compares with an undisturbed run, up to the rounding of sums in another order."""
    outcome = case.job.go(ranks=ranks, overrides=overrides)
    assert outcome.codes == [0] * ranks, outcome.output
    (weights, lines), (expected, expected_lines) = case.job.result(), case.material.undisturbed((), 2)
    losses = [[line["loss"] for line in each] for each in (lines, expected_lines)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    start = load_file(Path(case.tree["model"]["name"].removeprefix("local-dir:")) / "open_clip_model.safetensors")
    for name, value in expected.items():
        # The bias of keys has no gradient in exact arithmetic, and Adam turns its rounding into full steps.
        if not name.endswith("in_proj_bias"):
            assert (weights[name] - value).norm() < 0.05 * (value - start[name]).norm(), name


for ranks, stage in ((1, 2), (3, 2), (2, 0), (2, 3), (1, 3)):

    @fault(
        f"a run on 2 ranks with ZeRO-2 resumes with {ranks} and ZeRO-{stage}",
        "the same losses to 1e-4, the same weights up to rounding",
        quick=(ranks, stage) == (1, 3),
    )
    def _(case: Case, ranks: int = ranks, stage: int = stage) -> None:
        check(case.job.go(LATE), KILLED, KILLED)
        resume_with(case, ranks, f"deepspeed.zero_optimization.stage={stage}")


@fault("a run on 2 ranks, then 1, then 3, killed in between", "the same losses to 1e-4")
def _(case: Case) -> None:
    check(case.job.go(LATE), KILLED, KILLED)
    check(case.job.go(LATE, ranks=1), KILLED)
    resume_with(case, 3)


# Non-finite numbers.


def _columns(case: Case, name: str) -> list[float]:
    return [line[name] for line in case.job.metrics() if "loss" in line]


@fault(
    "NaN in one rank's batch",
    "the step is skipped on all ranks and counted; weights stay finite; the run continues",
    quick=True,
)
def _(case: Case) -> None:
    for stage in (1, 3):
        overrides = (f"deepspeed.zero_optimization.stage={stage}",)
        check(case.job.go(At(STEP, "nan images", rank=1, call=3), overrides=overrides), 0, 0)
        assert _columns(case, "nonfinite_steps") == [0, 0, 1, 1, 1, 1]
        assert all(torch.isfinite(value).all() for value in case.job.result()[0].values())
        shutil.rmtree(case.job.run)


@fault("NaN in one rank's batch, ZeRO 0 and 2, then a kill", f"counted; {RESTARTED}")
def _(case: Case) -> None:
    for stage in (0, 2):
        options = (f"deepspeed.zero_optimization.stage={stage}", "train.checkpoint_every=1")
        check(case.job.go(At(STEP, "nan images", rank=0, call=3), overrides=options), 0, 0)
        weights, lines = case.job.result()
        shutil.rmtree(case.job.run / "checkpoints")
        events = At(STEP, "nan images", rank=0, call=3), LATE
        check(case.job.go(*events, overrides=options), KILLED, KILLED)
        check(case.job.go(overrides=options), 0, 0)
        assert _columns(case, "nonfinite_steps") == [0, 0, 1, 1, 1, 1]
        again, lines_again = case.job.result()
        assert lines == lines_again
        assert all(torch.equal(weights[name], again[name]) for name in weights)
        shutil.rmtree(case.job.run)


@fault("NaN in every batch", "exit 1 after `nonfinite_limit` steps; the names of the samples are written down")
def _(case: Case) -> None:
    options = ("train.nonfinite_limit=3",)
    outcome = case.job.go(At(STEP, "nan images", rank=1, call=2, until=9), overrides=options)
    check(outcome, 1, 1, says="was not finite in 3 steps in a row, the last being step 4")
    kept = json.loads((case.job.run / "nonfinite/rank00001.json").read_text())
    assert [step["step"] for step in kept] == [2, 3, 4]
    assert all(len(step["target"]) == 6 for step in kept)
    assert all(re.fullmatch(r".*\d{4}", key) for step in kept for key in step["target"])
    assert [path.name for path in case.job.checkpoints()] == ["step00000002", "step00000004"]


@fault("fp16's loss scale overflows", "the step is skipped, the scale halved; not counted as non-finite")
def _(case: Case) -> None:
    check(case.job.go(At(STEP, "overflow", call=3), overrides=("train.precision=fp16",)), 0, 0)
    assert _columns(case, "nonfinite_steps") == [0] * STEPS
    # From its initial 2^16 it overflows without the fault too.
    before, after = _columns(case, "skipped_steps")[1:3]
    assert after == before + 1
    assert _columns(case, "loss_scale")[2] == 2.0**126


@fault("the teacher cache belongs to other weights", "exit 2 before the first step")
def _(case: Case) -> None:
    check(case.job.go(), 0, 0)
    shutil.rmtree(case.job.run / "checkpoints")
    other = tiny.write_model(case.job.folder / "other", tiny.FEW_TOKENS, seed=1)
    check(case.job.go(overrides=(f"model.name={other}",)), 2, 2, says="belongs to another configuration")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("data")
    tree, prepared = config(folder), {}
    for half, text in (("target", ".cls"), ("reference", ".txt")):
        raw = RawSource(open_webdataset(tree["data"][half]["path"], text))
        prepare(raw, folder / f"{half}-beton", convert.Options("beton"), workers=1)
        prepared[half] = str(folder / f"{half}-beton")
    vision = tiny.VISION | {"patch_dropout": 0.5}
    dropping = tiny.write_model(folder / "dropping", tiny.FEW_TOKENS | {"vision_cfg": vision})

    @functools.cache
    def undisturbed(overrides: tuple[str, ...], ranks: int) -> Any:
        job = Job(tmp_path_factory.mktemp("undisturbed") / "job", tree)
        check(job.go(ranks=ranks, overrides=overrides), *[0] * ranks)
        return job.result()

    return Material(tree, prepared, dropping, undisturbed)


CASES = [pytest.param(each, id=each.name, marks=() if each.quick else pytest.mark.slow) for each in FAULTS]


@pytest.mark.parametrize("row", CASES)
def test_fault(row: Fault, material: Material, tmp_path: Path) -> None:
    case = Case(tmp_path / "job", material)
    try:
        row.run(case)
    finally:
        case.job.end()


BEGIN, END = "<!-- faults -->\n", "<!-- end of faults -->"


def table() -> str:
    """All rows, for docs/reliability.md."""
    rows = [f"| {each.name} | {each.outcome} |" for each in FAULTS]
    return "\n".join(["| fault | outcome |", "|---|---|", *rows]) + "\n"


def test_table_of_faults_is_up_to_date() -> None:
    assert len(FAULTS) >= 40
    path = REPOSITORY / "docs/reliability.md"
    text = path.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    expected = before + BEGIN + table() + END + after
    if "DIVE_WRITE_TABLE" in os.environ:
        path.write_text(expected)
    assert path.read_text() == expected, "update it: DIVE_WRITE_TABLE=1 pytest tests/faults -k table"
