"""Locks: another process is refused or waits, and any end of the holder releases the lock despite its children."""

import fcntl
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks

from dive_fast import locks
from dive_fast.distributed import Ranks, join
from dive_fast.errors import UserError
from dive_fast.locks import FILE, LockedError, folder_lock
from dive_fast.training.run_folder import check_shared

FORK = multiprocessing.get_context("fork")


def _hold(folder: Path, connection: Any) -> None:
    alone = Ranks(0, 1, torch.device("cpu"))
    with folder_lock(folder, "run folder", ranks=alone):
        # A run checks that all ranks see its lock, and keeps it.
        check_shared(folder, alone)
        # A loader process survives a kill of the run for some seconds.
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        connection.send("held")
        connection.recv()


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_hold, args=(tmp_path / "run", theirs))
    process.start()
    assert ours.recv() == "held"
    yield process, ours
    if process.is_alive():
        process.kill()
    process.join()


def test_second_process_is_refused_and_names_the_holder(holder: Any, tmp_path: Path) -> None:
    process, connection = holder
    refused = f"run folder .*/run is in use by process {process.pid} on .*remove .*"
    with pytest.raises(LockedError, match=refused), folder_lock(tmp_path / "run", "run folder"):
        pass
    connection.send("end")
    process.join()
    assert not (tmp_path / "run" / FILE).exists()
    with folder_lock(tmp_path / "run", "run folder"):
        assert f"process {os.getpid()} on " in (tmp_path / "run" / FILE).read_text()


def test_killed_holder_releases_despite_its_children(holder: Any, tmp_path: Path) -> None:
    process, _ = holder
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "run" / FILE).exists()
    with folder_lock(tmp_path / "run", "run folder"):
        pass


def test_waiting_process_names_the_holder_and_continues(
    holder: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    process, connection = holder
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(locks.time, "sleep", lambda _: connection.send("end"))
    with folder_lock(tmp_path / "run", "teacher cache", wait=True):
        assert (tmp_path / "run" / FILE).read_text().startswith(f"process {os.getpid()} ")
    assert f"in use by process {process.pid} on " in capsys.readouterr().out


def test_unwritable_folder_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = r"run folder .*file: cannot write there: "
    with pytest.raises(UserError, match=refused), folder_lock(tmp_path / "file", "run folder"):
        pass


def test_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with caplog.at_level(logging.WARNING), folder_lock(tmp_path, "run folder"):
        assert "does not support locks (No locks available)" in caplog.text


def _on_two_ranks(folder: Path) -> list[str]:
    ranks, messages = join(), []
    with folder_lock(folder / "free", "run folder", ranks=ranks):
        # One rank holds the lock for both; another run is refused.
        ranks.barrier()
        if not ranks.is_main:
            try:
                with folder_lock(folder / "free", "run folder", ranks=Ranks(0, 1, ranks.device)):
                    pass
            except LockedError as error:
                messages.append(str(error))
        ranks.barrier()
    (folder / "file").touch()
    ranks.barrier()
    try:
        with folder_lock(folder / "file", "run folder", ranks=ranks):
            pass
    except UserError as error:
        messages.append(str(error))
    return messages


def test_ranks_share_one_lock_and_its_failure(tmp_path: Path) -> None:
    first, second = run_ranks(2, _on_two_ranks, tmp_path, init=False)
    assert len(first) == 1
    assert "cannot write there" in first[0] == second[1]
    assert "in use by process" in second[0]
