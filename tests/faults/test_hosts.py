"""A run on two hosts: the same as on one, ended where the network is gone, and continued when it is back."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
import torch
from hosts import Host, Hosts, two_hosts, why_not
from safetensors.torch import load_file

from dive_fast.fault_tolerance.heartbeat import LOST

ROOT = Path(__file__).parents[2]
MASTER = "10.77.0.1"
STEPS, CUT_AFTER = 36, 6
CLOCKS = {"images_per_second", "data_wait"}
SILENCE_SECONDS = 20.0
"""``train.rank_timeout``: how long a rank waits for a host that says nothing."""
BUSY_SECONDS = 240.0
"""That start and end of Python, torch and DeepSpeed may take on a busy machine."""

pytestmark = pytest.mark.slow


class Cut(NamedTuple):
    """What became of a run whose network was cut."""

    exit_codes: list[int]
    left: list[list[str]]
    """What runs on each host once its launcher has ended."""
    metrics: list[str]


@pytest.fixture(scope="module")
def net() -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    tree = tiny.write_config(folder, epochs=12, max_steps=STEPS, checkpoint_every=4)
    (folder / "config.json").write_text(json.dumps(tree))
    (folder / "hosts").write_text("host0 slots=1\nhost1 slots=1\n")
    return folder


@pytest.fixture(scope="module")
def whole(net: Hosts, folder: Path) -> Path:
    """The run of two ranks on one host."""
    with _train(net.hosts[:1], folder, "whole", [["--num_accelerators=2"]]) as started:
        assert _exit_codes(started) == [0], _output(folder, "whole")
    return folder / "whole"


@pytest.fixture(scope="module")
def cut(net: Hosts, folder: Path) -> Cut:
    """A run whose hosts lose each other midway without being told; afterwards they are joined again."""
    with _train_on_both(net, folder, "cut", f"train.rank_timeout={SILENCE_SECONDS}") as started:
        until = time.monotonic() + BUSY_SECONDS
        while len(_metrics(folder / "cut")) < CUT_AFTER:
            assert time.monotonic() < until, _output(folder, "cut")
            assert not any(process.poll() for process in started), _output(folder, "cut")
            time.sleep(0.005)
        net.cut()
        try:
            exit_codes = _exit_codes(started, SILENCE_SECONDS + BUSY_SECONDS)
        finally:
            net.restore()
        left = [host.processes() for host in net.hosts]
    return Cut(exit_codes, left, _metrics(folder / "cut"))


def test_two_hosts_train_as_two_ranks_on_one(net: Hosts, folder: Path, whole: Path) -> None:
    with _train_on_both(net, folder, "two") as started:
        assert _exit_codes(started) == [0, 0], _output(folder, "two")
    assert [host.processes() for host in net.hosts] == [[], []]
    _assert_equal(folder / "two", whole)


def test_both_hosts_end_by_themselves_where_the_network_is_gone(cut: Cut, folder: Path) -> None:
    output = _output(folder, "cut")
    assert cut.exit_codes == [LOST, LOST], output
    assert "rank 1 on host1 sent no heartbeat for" in output
    assert "rank 0, which hosts the store of all ranks, has not answered for" in output
    assert cut.left == [[], []]
    assert CUT_AFTER <= len(cut.metrics) < STEPS


def test_the_restart_goes_on_to_the_same_weights(net: Hosts, folder: Path, whole: Path, cut: Cut) -> None:
    with _train_on_both(net, folder, "cut") as started:
        assert _exit_codes(started) == [0, 0], _output(folder, "cut")
    # Times are in it too: these steps were not done again.
    assert _metrics(folder / "cut")[:4] == cut.metrics[:4]
    _assert_equal(folder / "cut", whole)


JOIN = """
import os, torch
from dive_fast.distributed import join
join()
print(os.environ.get("GLOO_SOCKET_IFNAME"), torch.get_num_threads() == len(os.sched_getaffinity(0)))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_ranks_that_nobody_counts_divide_the_cores_of_their_own_host(net: Hosts) -> None:
    rank = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": MASTER, "MASTER_PORT": "29501"}
    found = _join(net.hosts, [rank | {"RANK": str(number)} for number in range(2)])
    assert [(code, output.split()) for code, output, _ in found] == [(0, ["eth0", "True"])] * 2, found


def test_a_master_whose_own_name_is_loopback_says_so_at_once(net: Hosts) -> None:
    names = {"MASTER_ADDR": "host0", "MASTER_PORT": "29502"}
    rank = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "WORLD_SIZE": "2"}
    ((code, _, error),) = _join(net.hosts[:1], [names | rank])
    assert code == 1
    assert "UserError: MASTER_ADDR = host0 is 127.0.1.1 on host0, which other machines cannot reach: " in error


@contextmanager
def _train(
    hosts: Sequence[Host], folder: Path, name: str, options: list[list[str]], *overrides: str, **environment: str
) -> Iterator[list["subprocess.Popen[str]"]]:
    """Starts a run, with options for each host's launcher; what is left of it ends with the block."""
    arguments = [
        "launch/train.py",
        "--config",
        str(folder / "config.json"),
        f"train.output={folder / name}",
        *overrides,
    ]
    started = []
    try:
        for host, own in zip(hosts, options, strict=True):
            with (folder / f"{name}.{host.name}.log").open("w") as log:
                started.append(
                    host.start(
                        "deepspeed",
                        *own,
                        *arguments,
                        cwd=ROOT,
                        env=_environment(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", **environment),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        yield started
    finally:
        for host in hosts:
            host.kill()
        for process in started:
            process.wait()


@contextmanager
def _train_on_both(
    net: Hosts, folder: Path, name: str, *overrides: str, **environment: str
) -> Iterator[list["subprocess.Popen[str]"]]:
    """As an administrator does who has no ssh between hosts: the launcher is started on each of them."""
    options = [
        [f"--hostfile={folder / 'hosts'}", "--no_ssh", f"--node_rank={number}", f"--master_addr={MASTER}"]
        for number in range(len(net.hosts))
    ]
    with _train(net.hosts, folder, name, options, *overrides, **environment) as started:
        yield started


def _join(hosts: Sequence[Host], environments: list[dict[str, str]]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of one rank on each host that joins and says what it chose."""
    started = []
    try:
        for host, environment in zip(hosts, environments, strict=True):
            own = _environment(DS_ACCELERATOR="cpu", **environment)
            own.pop("OMP_NUM_THREADS", None)
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            started.append(host.start(sys.executable, "-c", JOIN, cwd=ROOT, env=own, **pipes))
        outputs = [process.communicate(timeout=BUSY_SECONDS) for process in started]
        return [(process.returncode, *output) for process, output in zip(started, outputs)]
    finally:
        for host in hosts:
            host.kill()


def _environment(**own: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path} | own


def _exit_codes(started: list["subprocess.Popen[str]"], seconds: float = BUSY_SECONDS) -> list[int]:
    until = time.monotonic() + seconds
    return [process.wait(max(until - time.monotonic(), 0)) for process in started]


def _output(folder: Path, name: str) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob(f"{name}.*.log")))


def _metrics(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def _assert_equal(run: Path, whole: Path) -> None:
    """Metrics of every step and the weights at the end, bit for bit."""
    numbers = [
        [
            {name: value for name, value in json.loads(line).items() if name not in CLOCKS}
            for line in _metrics(folder)
        ]
        for folder in (run, whole)
    ]
    assert len(numbers[1]) == STEPS
    assert numbers[0] == numbers[1]
    weights = [load_file(folder / "model.safetensors") for folder in (run, whole)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
