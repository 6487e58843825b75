"""The process group of a run: joining it, collectives between ranks, and the device of this rank."""

import io
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dive_fast import numerics
from dive_fast.errors import LaunchError
from dive_fast.waiting import report, waiting

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Timeout of a collective. A run detects a lost rank far sooner (:mod:`dive_fast.fault_tolerance.heartbeat`);
phases without such supervision, the last shards of a cache or a long evaluation, may let ranks wait for longer
than the usual ten minutes."""
START_TIMEOUT = 1800.0
"""Seconds that ranks wait for one another at the start: nodes of a cluster may start minutes apart."""
PROGRESS_DELAY = 3.0
"""Seconds of work before :func:`progress` shows it."""
RESOLVE_TIMEOUT = 30.0
"""Seconds until a host name that cannot be resolved is an error."""


T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, from the view of one of them."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group of all ranks, as an argument of losses; None if there is only one."""
        return dist.group.WORLD if self.world_size > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this is the first rank, which prints and writes for all."""
        return self.rank == 0

    def progress(self, total: int, description: str, unit: str, done: int = 0) -> "tqdm[Any]":
        """A progress bar on the first rank; without a terminal, lines."""
        return _progress_type()(total=total, initial=done, desc=description, unit=unit, disable=not self.is_main)

    def barrier(self) -> None:
        """Waits until every rank has reached this call."""
        if self.world_size > 1:
            with self._waiting():
                dist.barrier()

    def leave(self) -> None:
        """Leaves the process group at the end of a command; after an error other ranks may never call it."""
        self.barrier()
        dist.destroy_process_group()

    def _waiting(self) -> AbstractContextManager[None]:
        return waiting(lambda waited: f"rank {self.rank} has waited {waited:.0f} s for the other ranks")

    @contextmanager
    def raise_on_all(self, *errors: type[Exception]) -> Iterator[None]:
        """Raises an error of any rank on all ranks after the block, which must not contain collectives."""
        failure: Exception | None = None
        try:
            yield
        except errors as error:
            failure = error
        failures: list[Exception | None] = [failure] * self.world_size
        if self.world_size > 1:
            with self._waiting():
                dist.all_gather_object(failures, failure)
        if (first_failure := next(filter(None, failures), None)) is not None:
            raise first_failure

    def broadcast(self, value: Any) -> Any:
        """The value of the first rank, on all ranks: a shared file system may look different on other machines."""
        values = [value]
        if self.world_size > 1:
            with self._waiting():
                dist.broadcast_object_list(values, src=0)
        return values[0]

    def collect(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order, on each of them; all ranks call it."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def once_per_node(self, key: Any, function: Callable[[], T], *errors: type[Exception]) -> T:
        """The result of a function that the first rank of each node calls, on all ranks of that node.

        Args:
            key: ranks of a node with another value call the function apart.
            function: must not contain collectives; its result is pickled.
            errors: exceptions of any rank that all ranks raise.
        """
        if self.world_size == 1:
            return function()
        with self._waiting():
            nodes = self.collect((*_node(), key))
        first = nodes.index(nodes[self.rank])
        result: T | None = None
        with self.raise_on_all(*errors):
            if first == self.rank:
                result = function()
        with self._waiting():
            results: list[T] = self.collect(result)
        return results[first]

    def print(self, line: str) -> None:
        """Prints a line on the first rank, above its progress bar."""
        if self.is_main:
            tqdm.write(line)

    def local_range(self, count: int) -> range:
        """This rank's contiguous part of ``range(count)``; the sizes of parts differ by at most one."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks in rank order, on each of them; their numbers may differ."""
        if self.group is None:
            return rows
        counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device), group=self.group)
        sizes = [int(count) for count in counts]
        # Collectives need equal shapes.
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _node() -> tuple[str, str]:
    """The name of this machine, with what tells machines of one name apart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = ""
    return socket.gethostname(), boot


def progress(total: int, description: str, unit: str) -> "tqdm[Any]":
    """A progress bar of this process, unless it is one of several ranks and not the first.

    Nothing is printed for work of less than :data:`PROGRESS_DELAY` seconds.
    """
    disable = os.environ.get("RANK", "0") != "0"
    return _progress_type()(total=total, desc=description, unit=unit, disable=disable, delay=PROGRESS_DELAY)


def _progress_type() -> "type[tqdm[Any]]":
    return tqdm if sys.stderr.isatty() else ProgressLines


class ProgressLines(tqdm):  # type: ignore[misc, type-arg]
    """Progress as plain lines on stderr, for log files: no carriage returns, and at most one line in ten seconds.

    Lines become rarer with time, down to one for each twentieth of the time so far or a minute, whichever is
    shorter. The last line is written at the end.
    """

    SECONDS = 10.0, 60.0
    """Shortest and longest time between lines."""
    FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"

    def __init__(self, **options: Any) -> None:
        # gui: tqdm leaves the output to this class. miniters: each update looks at the clock.
        # file: tqdm.write repeats the bars of its own file after each line.
        options |= {"gui": True, "file": io.StringIO(), "miniters": 1, "mininterval": self.SECONDS[0]}
        super().__init__(**options)

    def display(self, *args: Any, **kwargs: Any) -> None:
        """Writes a line."""
        state = self.format_dict
        shortest, longest = self.SECONDS
        self.mininterval = max(shortest, min(longest, state["elapsed"] / 20))
        sys.stderr.write(tqdm.format_meter(**state | {"bar_format": self.FORMAT}) + "\n")
        sys.stderr.flush()

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: lines stay."""

    def close(self) -> None:
        """Writes the last line."""
        is_shown = not self.disable and time.time() >= self.start_t + self.delay
        if is_shown and self.n > max(self.initial, self.last_print_n):
            self.display()
        super().close()


class Launch(NamedTuple):
    """The variables that a launcher (deepspeed, torchrun, a Slurm script) sets for this process."""

    rank: int
    world_size: int
    local_rank: int
    local_ranks: int
    """Number of ranks on this machine; 0: not set by the launcher."""
    address: str
    port: int


def launched() -> Launch | None:
    """The launch of this process by a launcher; None if it runs alone.

    Raises:
        LaunchError: variables of a launcher are incomplete or not numbers; the message says what to do.
    """
    read = os.environ.get
    if "RANK" not in os.environ:
        for tasks, number in (
            (read("SLURM_STEP_NUM_TASKS") or read("SLURM_NTASKS"), "SLURM_PROCID"),
            (read("OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_RANK"),
            (read("PMI_SIZE"), "PMI_RANK"),
        ):
            if number in os.environ and (tasks or "").isdecimal() and int(tasks or 0) > 1:
                raise LaunchError(
                    f"{tasks} tasks were started ({number} = {read(number)}), but RANK is not set, so each would "
                    "be a separate run: set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as in "
                    f"docs/reliability.md, or unset {number} to run alone"
                )
        return None
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if not read(name)]:
        raise LaunchError(
            f"RANK is set, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not: start by "
            "deepspeed or torchrun, or unset RANK and WORLD_SIZE to run alone"
        )
    rank, world_size, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    local_rank = _number("LOCAL_RANK") if read("LOCAL_RANK") else 0
    local_ranks = _number(local) if (local := next(filter(read, ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")), None)) else 0
    if rank >= world_size:
        raise LaunchError(f"RANK = {rank} is not below WORLD_SIZE = {world_size}: ranks count from 0")
    if not 0 < port < 2**16:
        raise LaunchError(f"MASTER_PORT = {port}: expected a port from 1 to 65535")
    return Launch(rank, world_size, local_rank, local_ranks, os.environ["MASTER_ADDR"], port)


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise LaunchError(f"{name} = {text!r}: expected a number; a launcher sets it, or unset RANK to run alone")
    return int(text)


def join(timeout: float = START_TIMEOUT) -> Ranks:
    """Joins the process group of the launcher (deepspeed, torchrun, Slurm), or makes a group of one rank.

    CUDA uses NCCL. The CPU uses gloo and divides the machine's cores among its ranks. While ranks wait for others
    to start, each reports it every half minute.

    Args:
        timeout: seconds until the process exits with code 76 because other ranks have not started.

    Raises:
        LaunchError: the launcher's variables are incomplete, ``MASTER_ADDR`` or ``MASTER_PORT`` cannot be used, or
            there are fewer GPUs than ranks.
    """
    launch = launched()
    _refuse_uuids()
    import deepspeed

    numerics.configure()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    alone: dict[str, Any] = {}
    if launch is None:
        # Not by environment variables: a process started from this one would take them for a launcher's.
        alone = {"init_method": f"tcp://127.0.0.1:{free_port()}", "rank": 0, "world_size": 1}
    device = torch.device("cpu")
    if _uses_cuda():
        device = torch.device("cuda", _device_index(0 if launch is None else launch.local_rank))
        torch.cuda.set_device(device)
    # DeepSpeed reads it; an interactive job may have left another value.
    os.environ["LOCAL_RANK"] = str(launch.local_rank if device.index is None and launch else device.index or 0)
    if device.type == "cpu":
        # Otherwise DeepSpeed compiles a shared-memory collective at start, for up to 90 s; gloo replaces it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _check_interface()
    if launch is not None:
        _resolve(launch.address, timeout)
        # With GPUs too: decisions between steps go over gloo.
        if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := _interface(launch.local_ranks)):
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    backend = "nccl" if device.type == "cuda" else "gloo"
    with _rendezvous(launch, timeout):
        deepspeed.init_distributed(
            dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=COLLECTIVE_TIMEOUT, **alone
        )
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        local_ranks = 1 if launch is None else launch.local_ranks or _count_local_ranks()
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def use_cpu_without_gpu() -> None:
    """Sets DeepSpeed's accelerator to the CPU if there is no GPU; its import would warn otherwise.

    To be called before anything imports DeepSpeed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _uses_cuda() -> bool:
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def _device_index(local_rank: int) -> int:
    """Index of this rank's GPU among the visible ones."""
    count = torch.cuda.device_count()
    if local_rank < count:
        return local_rank
    if count == 1:
        return 0  # with Slurm's --gpus-per-task each task sees only its own GPU
    raise LaunchError(
        f"LOCAL_RANK = {local_rank}, but {count} GPUs are visible here: start at most {count} ranks on a machine "
        "(deepspeed --num_gpus, torchrun --nproc_per_node), or show each rank all GPUs of its machine"
    )


def _refuse_uuids() -> None:
    """Refuses UUIDs in ``CUDA_VISIBLE_DEVICES`` where DeepSpeed reads numbers: with NVIDIA's package installed."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    named = [name for name in visible.split(",") if name.strip() and not name.strip().lstrip("-").isdecimal()]
    if named and _uses_cuda() and find_spec("pynvml") is not None:
        raise LaunchError(
            f"CUDA_VISIBLE_DEVICES = {visible}: DeepSpeed reads numbers only, not {named[0]}; set the numbers "
            "that nvidia-smi -L shows, or uninstall nvidia-ml-py and start by torchrun"
        )


def _check_interface() -> None:
    """Checks ``GLOO_SOCKET_IFNAME``: gloo's own error is a traceback that does not name the variable."""
    named, interfaces = os.environ.get("GLOO_SOCKET_IFNAME"), psutil.net_if_addrs()
    if named and (unknown := [name for name in named.split(",") if name not in interfaces]):
        raise LaunchError(
            f"GLOO_SOCKET_IFNAME = {named}: there is no network interface {unknown[0]} on {socket.gethostname()}, "
            f"only {', '.join(interfaces)}: set one of them, or unset it"
        )


def _resolve(address: str, timeout: float) -> None:
    """Waits until the host name of the first rank is resolved: a cluster may publish it after the start."""
    patience, is_reported = min(RESOLVE_TIMEOUT, timeout), False
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as error:
            if not is_reported:
                report(f"MASTER_ADDR = {address} cannot be resolved ({error}): trying for {patience:.0f} s")
            is_reported = True
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"MASTER_ADDR = {address} cannot be resolved: {error}; name the first rank's machine or its "
                    "address, or unset RANK and WORLD_SIZE to run alone"
                ) from error
        time.sleep(1)


@contextmanager
def _rendezvous(launch: Launch | None, timeout: float) -> Iterator[None]:
    """Supervises the rendezvous inside: reports the wait every half minute, and exits at the timeout.

    SIGTERM and Ctrl-C end the process at once: the store would wait for hours.
    """
    if launch is None:
        yield
        return
    endpoint = f"{launch.address}:{launch.port}"
    is_main_thread = threading.current_thread() is threading.main_thread()
    previous_handler = signal.signal(signal.SIGINT, signal.SIG_DFL) if is_main_thread else None
    reason = f"for {launch.world_size} ranks to meet at {endpoint}; to run alone: unset RANK WORLD_SIZE"
    try:
        with waiting(lambda waited: f"rank {launch.rank} has waited {waited:.0f} s {reason}", timeout, code=76):
            yield
    except (RuntimeError, ValueError) as error:
        text = str(error)
        if "EADDRINUSE" in text or "address already in use" in text.lower():
            raise LaunchError(
                f"port {launch.port} is in use on {socket.gethostname()}, perhaps by another run: choose another "
                "(deepspeed --master_port, torchrun --master_port, MASTER_PORT)"
            ) from error
        if "Duplicate GPU" in text:
            raise LaunchError(
                "two ranks have the same GPU: start one rank for each GPU (deepspeed --num_gpus, torchrun "
                "--nproc_per_node)"
            ) from error
        if isinstance(error, dist.DistNetworkError):
            raise LaunchError(f"the first rank does not answer at {endpoint}: {text.splitlines()[0]}") from error
        raise
    finally:
        if previous_handler is not None:
            signal.signal(signal.SIGINT, previous_handler)


def _interface(local_ranks: int) -> str | None:
    """The network interface on the route to ``MASTER_ADDR``; None to leave the choice to gloo.

    Gloo chooses the interface of the machine's host name: on many systems loopback, where ranks on other machines
    reach nothing, or a rank of their own machine.
    """
    master = os.environ["MASTER_ADDR"]
    try:
        family, kind, _, _, address = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing, but binds to the source address of packets
            source = probe.getsockname()[0]
    except OSError:
        return None  # the process group reports it better
    if not ipaddress.ip_address(source).is_loopback:
        addresses = psutil.net_if_addrs()
        return next(
            (name for name in addresses if any(source == entry.address for entry in addresses[name])), None
        )
    if 0 < local_ranks < int(os.environ["WORLD_SIZE"]):
        raise LaunchError(
            f"MASTER_ADDR = {master} is {address[0]} on {socket.gethostname()}, which other machines cannot "
            "reach: name an address of the network between them (deepspeed --master_addr), or set "
            "GLOO_SOCKET_IFNAME"
        )
    return None


def _count_local_ranks() -> int:
    """Number of ranks on this machine, for launchers that do not set it."""
    names = [""] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names.count(socket.gethostname())


def free_port() -> int:
    """A TCP port that nothing on this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
