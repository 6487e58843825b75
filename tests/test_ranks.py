"""How ranks find one another: variables of launchers, names, ports, devices."""

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
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in NAMES or name.startswith(("SLURM_", "OMPI_", "PMI_")):
            monkeypatch.delenv(name)


def announce(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    # Set by join(); so it is put back at the end.
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_RANK")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_what_a_launcher_announces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() is None
    # What an interactive job has left there is no launcher.
    announce(monkeypatch, {"WORLD_SIZE": "8", "LOCAL_RANK": "3", "SLURM_NTASKS": "4"})
    assert launched() is None
    announce(monkeypatch, WHOLE | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert launched() == (1, 2, 1, 2, "127.0.0.1", 29500)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "0"}, "WORLD_SIZE and MASTER_ADDR and MASTER_PORT are not"),
        ({"RANK": ""}, "RANK and WORLD_SIZE and MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "unset RANK and WORLD_SIZE to run alone"),
        (WHOLE | {"MASTER_PORT": ""}, "RANK is set, but MASTER_PORT is not"),
        (WHOLE | {"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two': expected a number"),
        (WHOLE | {"RANK": "-1"}, "RANK = '-1': expected a number"),
        (WHOLE | {"RANK": "2"}, "RANK = 2 is not below WORLD_SIZE = 2"),
        (WHOLE | {"LOCAL_RANK": "x"}, "LOCAL_RANK = 'x'"),
        (WHOLE | {"MASTER_PORT": "99999"}, "MASTER_PORT = 99999"),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
            "2 tasks were started (SLURM_PROCID = 0), but RANK",
        ),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, "docs/reliability.md"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "unset OMPI_COMM_WORLD_RANK to run alone"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "2 tasks"),
    ],
)
def test_half_a_launcher_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    announce(monkeypatch, variables)
    with pytest.raises(UserError) as caught:
        join()
    assert says in str(caught.value)


def test_one_task_of_slurm_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"})
    assert launched() is None


def test_a_name_that_is_not_known_is_told_at_once_and_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    announce(monkeypatch, WHOLE | {"MASTER_ADDR": "no-such-host.invalid"})
    with pytest.raises(UserError, match=r"MASTER_ADDR = no-such-host\.invalid cannot be resolved"):
        join(timeout=0.1)
    assert "trying for 0 s" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        announce(monkeypatch, WHOLE | {"RANK": "0", "MASTER_PORT": str(port)})
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


def test_ranks_that_never_come_are_waited_for_with_lines_and_an_end() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lonely = os.environ | WHOLE | {"RANK": "0", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-P", "-c", WAITS]
    run = subprocess.run(command, env=lonely, capture_output=True, text=True, check=False, timeout=120)
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
def test_devices_of_ranks(monkeypatch: pytest.MonkeyPatch, count: int, local_rank: int, index: int | None) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if index is not None:
        assert module._device_index(local_rank) == index
        return
    with pytest.raises(UserError, match=rf"LOCAL_RANK = {local_rank}, but {count} GPUs are visible"):
        module._device_index(local_rank)


@pytest.mark.parametrize("visible", ["MIG-3fa5", "GPU-1b2c,GPU-77", "0,GPU-1b2c"])
def test_uuids_of_gpus_are_refused_where_deepspeed_reads_them_as_numbers(
    monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    monkeypatch.setattr(module, "_uses_cuda", lambda: True)
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,-1")
    module._refuse_uuids()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=rf"CUDA_VISIBLE_DEVICES = {visible}.*torchrun"):
        module._refuse_uuids()


def late() -> Any:
    """Rank 1 comes late to a barrier, and then both leave."""
    waiting.REPORT_SECONDS = 0.3
    ranks, said = join(), []
    module.report = waiting.report = said.append
    if ranks.rank == 1:
        time.sleep(1)
    ranks.barrier()
    ranks.leave()
    return said, torch.distributed.is_initialized()


def test_who_waits_for_ranks_says_so_and_a_clean_end_leaves_no_group() -> None:
    (waited, first), (_, second) = run_ranks(2, late, init=False)
    assert waited[0].startswith("rank 0 has waited 0 s for the other ranks")
    assert not first
    assert not second


def test_alone_there_is_nothing_to_wait_for() -> None:
    Ranks(0, 1, torch.device("cpu")).barrier()
