"""Runs on two hosts: equal to one host, ended by a network failure, and resumed afterwards."""

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
from hosts import Host, Hosts, two_hosts, unsupported_reason
from safetensors.torch import load_file

from dive_fast.fault_tolerance.heartbeat import LOST

ROOT = Path(__file__).parents[2]
MASTER = "10.77.0.1"
STEPS, CUT_AFTER = 36, 6
CLOCKS = {"images_per_second", "data_wait"}
SILENCE_SECONDS = 20.0
"""``train.rank_timeout``: how long a rank waits for a silent host."""
BUSY_SECONDS = 240.0
"""Time for start and end of Python, torch and DeepSpeed on a busy machine."""

pytestmark = pytest.mark.slow


class Cut(NamedTuple):
    """The end of a run whose network was cut."""

    exit_codes: list[int]
    left: list[list[str]]
    """Processes that still run on each host after its launcher has ended."""
    metrics: list[str]


@pytest.fixture(scope="module")
def net() -> Iterator[Hosts]:
    if reason := unsupported_reason():
        pytest.skip(reason)
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    tree = tiny.write_config(folder, epochs=12, max_steps=STEPS, checkpoint_every=4)
    (folder / "config.json").write_text(json.dumps(tree))
    (folder / "hosts").write_text("host0 slots=1\nhost1 slots=1\n")
    return folder


@pytest.fixture(scope="module")
def single_host(net: Hosts, folder: Path) -> Path:
    """A run of two ranks on one host."""
    with _train(net.hosts[:1], folder, "single", [["--num_accelerators=2"]]) as started:
        assert _exit_codes(started) == [0], _output(folder, "single")
    return folder / "single"


@pytest.fixture(scope="module")
def cut(net: Hosts, folder: Path) -> Cut:
    """A run whose network is cut midway without an error, and restored afterwards."""
    with _train_on_both(net, folder, "cut", f"train.rank_timeout={SILENCE_SECONDS}") as started:
        deadline = time.monotonic() + BUSY_SECONDS
        while len(_metrics(folder / "cut")) < CUT_AFTER:
            assert time.monotonic() < deadline, _output(folder, "cut")
            assert not any(process.poll() for process in started), _output(folder, "cut")
            time.sleep(0.005)
        net.cut()
        try:
            exit_codes = _exit_codes(started, SILENCE_SECONDS + BUSY_SECONDS)
        finally:
            net.restore()
        left = [host.processes() for host in net.hosts]
    return Cut(exit_codes, left, _metrics(folder / "cut"))


def test_two_hosts_train_as_two_ranks_on_one(net: Hosts, folder: Path, single_host: Path) -> None:
    with _train_on_both(net, folder, "two") as started:
        assert _exit_codes(started) == [0, 0], _output(folder, "two")
    assert [host.processes() for host in net.hosts] == [[], []]
    _assert_equal(folder / "two", single_host)


def test_both_hosts_end_after_a_network_failure(cut: Cut, folder: Path) -> None:
    output = _output(folder, "cut")
    assert cut.exit_codes == [LOST, LOST], output
    assert "rank 1 on host1 sent no heartbeat for" in output
    assert "rank 0, which hosts the store of all ranks, has not answered for" in output
    assert cut.left == [[], []]
    assert CUT_AFTER <= len(cut.metrics) < STEPS


def test_restart_leads_to_the_same_weights(net: Hosts, folder: Path, single_host: Path, cut: Cut) -> None:
    with _train_on_both(net, folder, "cut") as started:
        assert _exit_codes(started) == [0, 0], _output(folder, "cut")
    # The lines contain times: these steps were not repeated.
    assert _metrics(folder / "cut")[:4] == cut.metrics[:4]
    _assert_equal(folder / "cut", single_host)


JOIN = """
import os, torch
from dive_fast.distributed import join
join()
print(os.environ.get("GLOO_SOCKET_IFNAME"), torch.get_num_threads() == len(os.sched_getaffinity(0)))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_join_divides_cores_by_the_ranks_of_the_host(net: Hosts) -> None:
    rank = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": MASTER, "MASTER_PORT": "29501"}
    results = _join(net.hosts, [rank | {"RANK": str(number)} for number in range(2)])
    assert [(code, output.split()) for code, output, _ in results] == [(0, ["eth0", "True"])] * 2, results


def test_join_refuses_a_master_on_loopback(net: Hosts) -> None:
    names = {"MASTER_ADDR": "host0", "MASTER_PORT": "29502"}
    rank = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "WORLD_SIZE": "2"}
    ((code, _, error),) = _join(net.hosts[:1], [names | rank])
    assert code == 1
    assert "UserError: MASTER_ADDR = host0 is 127.0.1.1 on host0, which other machines cannot reach: " in error


@contextmanager
def _train(
    hosts: Sequence[Host], folder: Path, name: str, options: list[list[str]], *overrides: str, **environment: str
) -> Iterator[list["subprocess.Popen[str]"]]:
    """Starts a run with options for the launcher of each host; its processes end with the block."""
    arguments = [
        "launch/train.py",
        "--config",
        str(folder / "config.json"),
        f"train.output={folder / name}",
        *overrides,
    ]
    started = []
    try:
        for host, launcher_options in zip(hosts, options, strict=True):
            with (folder / f"{name}.{host.name}.log").open("w") as log:
                started.append(
                    host.start(
                        "deepspeed",
                        *launcher_options,
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
    """Starts the launcher on each host, as without ssh between them."""
    options = [
        [f"--hostfile={folder / 'hosts'}", "--no_ssh", f"--node_rank={number}", f"--master_addr={MASTER}"]
        for number in range(len(net.hosts))
    ]
    with _train(net.hosts, folder, name, options, *overrides, **environment) as started:
        yield started


def _join(hosts: Sequence[Host], environments: list[dict[str, str]]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of one rank on each host that joins and prints its choices."""
    started = []
    try:
        for host, environment in zip(hosts, environments, strict=True):
            variables = _environment(DS_ACCELERATOR="cpu", **environment)
            variables.pop("OMP_NUM_THREADS", None)
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            started.append(host.start(sys.executable, "-c", JOIN, cwd=ROOT, env=variables, **pipes))
        outputs = [process.communicate(timeout=BUSY_SECONDS) for process in started]
        return [(process.returncode, *output) for process, output in zip(started, outputs)]
    finally:
        for host in hosts:
            host.kill()


def _environment(**variables: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "TRITON_INTERPRET": "0"} | variables


def _exit_codes(started: list["subprocess.Popen[str]"], seconds: float = BUSY_SECONDS) -> list[int]:
    deadline = time.monotonic() + seconds
    return [process.wait(max(deadline - time.monotonic(), 0)) for process in started]


def _output(folder: Path, name: str) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob(f"{name}.*.log")))


def _metrics(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def _assert_equal(run: Path, expected: Path) -> None:
    """Compares the metrics of every step and the final weights, bit for bit."""
    numbers = [
        [
            {name: value for name, value in json.loads(line).items() if name not in CLOCKS}
            for line in _metrics(folder)
        ]
        for folder in (run, expected)
    ]
    assert len(numbers[1]) == STEPS
    assert numbers[0] == numbers[1]
    weights = [load_file(folder / "model.safetensors") for folder in (run, expected)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
