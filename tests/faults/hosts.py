"""Two hosts on one machine: Linux namespaces with their own names, addresses and processes, on one switch."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("host0", "host1")


@dataclass(frozen=True)
class Host:
    """A host with its own network, name, mounts and processes, which shares the files of the machine."""

    name: str
    address: str
    pid: int
    """Pid of its first process on the machine; when that ends, the kernel ends all others of the host."""

    def start(self, *command: str, **options: Any) -> "subprocess.Popen[str]":
        """Starts a command on the host.

        Args:
            options: arguments of :class:`subprocess.Popen`.
        """
        return subprocess.Popen([*_enter(self.pid), *command], text=True, stdin=subprocess.DEVNULL, **options)

    def processes(self) -> list[str]:
        """The command lines of all processes on the host except the first one."""
        lines = (_command_line(entry) for entry in Path(f"/proc/{self.pid}/root/proc").glob("[0-9]*"))
        return [line for line in lines if line is not None]

    def kill(self) -> None:
        """Kills all processes on the host except the first one."""
        # Fails if there are none.
        subprocess.run([*_enter(self.pid), "sh", "-c", "kill -KILL -1"], capture_output=True, check=False)


@dataclass(frozen=True)
class Hosts:
    """The hosts and the switch between them."""

    hosts: tuple[Host, ...]
    switch: int

    def cut(self) -> None:
        """Drops packets between hosts from now on, without an error on the hosts, like a dead switch."""
        _run(*_enter(self.switch, "--net"), "ip", "link", "set", "switch", "down")

    def restore(self) -> None:
        """Delivers packets again."""
        _run(*_enter(self.switch, "--net"), "ip", "link", "set", "switch", "up")


def unsupported_reason() -> str | None:
    """Why hosts cannot be created here; None if they can."""
    probe = "ip link add switch type bridge && ip link add here type veth peer name there"
    try:
        result = subprocess.run([*_UNSHARE, "sh", "-c", probe], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return f"hosts cannot be created: {error}"
    return f"hosts cannot be created: {result.stderr.strip()}" if result.returncode else None


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts that reach each other by name and by address; they end with the block."""
    with ExitStack() as stack:
        switch = stack.enter_context(_first_process())
        _run(*_enter(switch, "--net"), "ip", "link", "add", "switch", "up", "type", "bridge")
        pids = [stack.enter_context(_first_process()) for _ in NAMES]
        hosts = tuple(
            Host(name, f"10.77.0.{number}", pid) for number, (name, pid) in enumerate(zip(NAMES, pids), start=1)
        )
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for host in hosts:
            # As on Debian: the name of the host itself means loopback, which others cannot reach.
            addresses = {other.name: "127.0.1.1" if other is host else other.address for other in hosts}
            lines = [f"{address} {name}\n" for name, address in ({"localhost": "127.0.0.1"} | addresses).items()]
            (folder / host.name).write_text("".join(lines))
            for command in (
                f"hostname {host.name}",
                # Mounts of a host are visible only there.
                f"mount --bind {folder / host.name} /etc/hosts",
                f"ip link add eth0 type veth peer name {host.name} netns {switch}",
                "ip link set lo up",
                "ip link set eth0 up",
                f"ip address add {host.address}/24 dev eth0",
            ):
                # In the machine's process namespace, where the switch has a pid.
                _run(*_enter(host.pid, "--net", "--uts", "--mount"), *command.split())
            _run(*_enter(switch, "--net"), "ip", "link", "set", host.name, "up", "master", "switch")
        yield Hosts(hosts, switch)


_UNSHARE = ("unshare", "--fork", "--pid", "--mount-proc", "--net", "--uts")


@contextmanager
def _first_process() -> Iterator[int]:
    """The first process of new namespaces, which waits until its input ends, at the latest with this process."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*_UNSHARE, "sh", "-c", "echo; exec cat"], **pipes) as unshare:
        assert unshare.stdout is not None
        assert unshare.stdout.readline() == b"\n", "no namespaces"
        pid = int(Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text())
        try:
            yield pid
        finally:
            # The kernel ends all processes of its namespace before `unshare`, for which the block waits, returns.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _enter(pid: int, *namespaces: str) -> list[str]:
    namespaces = namespaces or ("--net", "--uts", "--mount", "--pid")
    return ["nsenter", f"--target={pid}", *namespaces, f"--wd={Path.cwd()}", "--"]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=60)


def _command_line(entry: Path) -> str | None:
    """The command line of a process by its folder in ``/proc``; None if it has ended or is the first one."""
    try:
        # The name, in brackets, may contain anything.
        state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return None
    return None if entry.name == "1" or state in "ZX" else line
