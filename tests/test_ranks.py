"""Joining a process group: launcher variables, names, ports, devices."""

import os
import socket
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from distributed import run_ranks

from dive_fast import distributed as module
from dive_fast import waiting
from dive_fast.distributed import Ranks, join, launched
from dive_fast.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
COMPLETE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in NAMES or name.startswith(("SLURM_", "OMPI_", "PMI_")):
            monkeypatch.delenv(name)


def announce(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    # join() sets it; this restores it at the end.
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_RANK")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_launched_reads_the_launchers_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() is None
    # Variables left by an interactive job are not those of a launcher.
    announce(monkeypatch, {"WORLD_SIZE": "8", "LOCAL_RANK": "3", "SLURM_NTASKS": "4"})
    assert launched() is None
    announce(monkeypatch, COMPLETE | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert launched() == (1, 2, 1, 2, "127.0.0.1", 29500)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "0"}, "WORLD_SIZE and MASTER_ADDR and MASTER_PORT are not"),
        ({"RANK": ""}, "RANK and WORLD_SIZE and MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "unset RANK and WORLD_SIZE to run alone"),
        (COMPLETE | {"MASTER_PORT": ""}, "RANK is set, but MASTER_PORT is not"),
        (COMPLETE | {"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two': expected a number"),
        (COMPLETE | {"RANK": "-1"}, "RANK = '-1': expected a number"),
        (COMPLETE | {"RANK": "2"}, "RANK = 2 is not below WORLD_SIZE = 2"),
        (COMPLETE | {"LOCAL_RANK": "x"}, "LOCAL_RANK = 'x'"),
        (COMPLETE | {"MASTER_PORT": "99999"}, "MASTER_PORT = 99999"),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
            "2 tasks were started (SLURM_PROCID = 0), but RANK",
        ),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, "docs/reliability.md"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "unset OMPI_COMM_WORLD_RANK to run alone"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "2 tasks"),
    ],
)
def test_incomplete_launcher_variables_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    announce(monkeypatch, variables)
    with pytest.raises(UserError) as caught:
        join()
    assert says in str(caught.value)


def test_single_slurm_task_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"})
    assert launched() is None


def test_unknown_master_name_is_reported_and_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    announce(monkeypatch, COMPLETE | {"MASTER_ADDR": "no-such-host.invalid"})
    with pytest.raises(UserError, match=r"MASTER_ADDR = no-such-host\.invalid cannot be resolved"):
        join(timeout=0.1)
    assert "trying for 0 s" in capsys.readouterr().err


def test_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        announce(monkeypatch, COMPLETE | {"RANK": "0", "MASTER_PORT": str(port)})
        with pytest.raises(UserError, match=rf"port {port} is in use on .*--master_port"):
            run_in_this_process()


def run_in_this_process() -> None:
    try:
        join(timeout=20)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


WAITS = """
from dive_fast import waiting
waiting.REPORT_SECONDS = 0.2
from dive_fast.distributed import join
join(timeout=1)
"""


def test_missing_ranks_are_reported_until_the_timeout() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | COMPLETE | {"RANK": "0", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-P", "-c", WAITS]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 76, run.stderr
    lines = [line for line in run.stderr.splitlines() if "rank 0 has waited" in line]
    assert len(lines) >= 2
    assert all(
        f"for 2 ranks to meet at 127.0.0.1:{port}; to run alone: unset RANK WORLD_SIZE" in line for line in lines
    )
    assert lines[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("count", "local_rank", "index"), [(8, 3, 3), (1, 0, 0), (1, 5, 0), (2, 2, None), (0, 0, None)]
)
def test_device_index_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, count: int, local_rank: int, index: int | None
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if index is not None:
        assert module._device_index(local_rank) == index
        return
    with pytest.raises(UserError, match=rf"LOCAL_RANK = {local_rank}, but {count} GPUs are visible"):
        module._device_index(local_rank)


@pytest.mark.parametrize("visible", ["MIG-3fa5", "GPU-1b2c,GPU-77", "0,GPU-1b2c"])
def test_gpu_uuids_are_refused_if_deepspeed_reads_numbers(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setattr(module, "_uses_cuda", lambda: True)
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,-1")
    module._refuse_uuids()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=rf"CUDA_VISIBLE_DEVICES = {visible}.*torchrun"):
        module._refuse_uuids()


def late() -> Any:
    """Rank 1 reaches a barrier late, and then both leave."""
    waiting.REPORT_SECONDS = 0.3
    ranks, lines = join(), []
    module.report = waiting.report = lines.append
    if ranks.rank == 1:
        time.sleep(1)
    ranks.barrier()
    ranks.leave()
    return lines, torch.distributed.is_initialized()


def test_barrier_reports_a_wait_and_leave_ends_the_group() -> None:
    (waited, first), (_, second) = run_ranks(2, late, init=False)
    assert waited[0].startswith("rank 0 has waited 0 s for the other ranks")
    assert not first
    assert not second


def test_barrier_of_a_single_rank_returns() -> None:
    Ranks(0, 1, torch.device("cpu")).barrier()


def test_progress_without_a_terminal_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(0, 1, torch.device("cpu"))
    with ranks.progress(50, "train", "step", done=10) as bar:
        for step in range(11, 51):
            bar.set_postfix_str(f"step {step}: loss=1", refresh=False)
            bar.update()
            ranks.print("a line between")
        bar.update(0)
    printed = capsys.readouterr()
    assert printed.out == "a line between\n" * 40
    # A short loop has only its last line.
    (line,) = printed.err.splitlines()
    assert line.startswith("train: 50/50 [")
    assert line.endswith(", step 50: loss=1]")
    assert "\r" not in printed.err
    other = Ranks(1, 2, ranks.device)
    with ranks.progress(50, "nothing", "step", done=10), other.progress(3, "other", "x") as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_progress_lines_become_rarer(capsys: pytest.CaptureFixture[str]) -> None:
    bar: Any = Ranks(0, 1, torch.device("cpu")).progress(1000, "train", "step")
    now = bar.start_t = bar.last_print_t = 0.0
    bar._time = lambda: now
    times = []
    for _ in range(1000):
        now += 4.0
        bar.update()
        times += [now] * len(capsys.readouterr().err.splitlines())
    bar.close()
    gaps = [after - before for before, after in zip([0.0, *times], times)]
    assert (gaps[0], gaps[-1]) == (12.0, 60.0)
    assert gaps == sorted(gaps)
    assert 4000 / 60 < len(gaps) < 130
