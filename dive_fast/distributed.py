"""The ranks of a run: their process group and this one's device."""

import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dive_fast import numerics as precision
from dive_fast.errors import LaunchError
from dive_fast.waiting import report, waiting

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Until a process group gives a collective up. A run finds out far sooner whom it has lost (``guard/watch.py``);
what is not timed there, the last shards of a cache or a long evaluation, may keep ranks waiting for longer than
ten minutes, the usual limit."""
START_TIMEOUT = 1800.0
"""Seconds that ranks wait for one another to start: nodes of a cluster may come minutes apart."""
RESOLVE = 30.0
"""Seconds until a name that cannot be resolved is an error."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks, as losses want it; None where there is only this one."""
        return dist.group.WORLD if self.world_size > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this rank talks and writes for all."""
        return self.rank == 0

    def progress(self, total: int, description: str, unit: str, done: int = 0) -> "tqdm[Any]":
        """A progress bar on the first rank; a line every half minute where no one is watching."""
        quiet = 0.1 if sys.stderr.isatty() else 30
        return tqdm(
            total=total, initial=done, desc=description, unit=unit, mininterval=quiet, disable=not self.is_main
        )

    def barrier(self) -> None:
        """Waits until every rank has come here."""
        if self.world_size > 1:
            with self._waiting():
                dist.barrier()

    def leave(self) -> None:
        """Leaves the process group at the end of a command; after an error the others may never come to it."""
        self.barrier()
        dist.destroy_process_group()

    def _waiting(self) -> AbstractContextManager[None]:
        return waiting(
            lambda waited: f"rank {self.rank} has waited {waited:.0f} s for the other ranks to come here"
        )

    @contextmanager
    def raise_on_all(self, *errors: type[Exception]) -> Iterator[None]:
        """Where one rank fails by one of these errors, all raise it behind the block, which has no collective."""
        failure: Exception | None = None
        try:
            yield
        except errors as error:
            failure = error
        failures: list[Exception | None] = [failure] * self.world_size
        if self.world_size > 1:
            with self._waiting():
                dist.all_gather_object(failures, failure)
        if (first := next(filter(None, failures), None)) is not None:
            raise first

    def broadcast(self, found: Any) -> Any:
        """What the first rank has found, on all: file systems do not show the same to all machines at once."""
        values = [found]
        if self.world_size > 1:
            with self._waiting():
                dist.broadcast_object_list(values, src=0)
        return values[0]

    def collect(self, value: Any) -> list[Any]:
        """A value of every rank, in rank order, on all of them; all ranks call it."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def print(self, line: str) -> None:
        """Prints a line, once, that breaks no progress bar."""
        if self.is_main:
            tqdm.write(line)

    def local_range(self, count: int) -> range:
        """This rank's contiguous part of ``count`` things; parts differ by at most one."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks in rank order, on each of them; each may bring its own number."""
        if self.group is None:
            return rows
        counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device), group=self.group)
        sizes = [int(count) for count in counts]
        # Collectives want equal shapes.
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class Launch(NamedTuple):
    """What a launcher (deepspeed, torchrun, a Slurm script) announces of this process."""

    rank: int
    world_size: int
    local_rank: int
    local_ranks: int
    """Processes of this run on this machine; 0: the launcher does not say."""
    address: str
    port: int


def launched() -> Launch | None:
    """How this process was launched; None: alone.

    Raises:
        LaunchError: variables of a launcher are incomplete, or no numbers; the message says what to do.
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
                    "be a run of its own: set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as in "
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
    """Joins the process group that the launcher (deepspeed, torchrun, Slurm) announces; alone without one.

    CUDA runs on NCCL, the CPU on gloo with the machine's cores divided among its ranks. While ranks wait for
    others to start, each says so every half minute.

    Args:
        timeout: seconds until the process ends, with exit code 76, because other ranks have not come.

    Raises:
        LaunchError: the launcher's variables are incomplete, ``MASTER_ADDR`` or ``MASTER_PORT`` cannot be used, or
            there are fewer GPUs than ranks.
    """
    launch = launched()
    _refuse_uuids()
    import deepspeed

    precision.configure()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    alone: dict[str, Any] = {}
    if launch is None:
        # Not by the environment: a process that is started from this one would take it for a launcher's.
        alone = {"init_method": f"tcp://127.0.0.1:{free_port()}", "rank": 0, "world_size": 1}
    device = torch.device("cpu")
    if _uses_cuda():
        device = torch.device("cuda", _device_index(0 if launch is None else launch.local_rank))
        torch.cuda.set_device(device)
    # DeepSpeed asks for it, whatever an interactive job has left there.
    os.environ["LOCAL_RANK"] = str(launch.local_rank if device.index is None and launch else device.index or 0)
    if device.type == "cpu":
        # Else DeepSpeed compiles a shared-memory collective at start, for up to 90 s; gloo does its work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _check_interface()
    if launch is not None:
        _resolve(launch.address, timeout)
        # With GPUs too: what ranks agree on beside their steps goes over gloo.
        if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := _interface(launch.local_ranks)):
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    backend = "nccl" if device.type == "cuda" else "gloo"
    with _rendezvous(launch, timeout):
        deepspeed.init_distributed(
            dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=COLLECTIVE_TIMEOUT, **alone
        )
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        here = 1 if launch is None else launch.local_ranks or _ranks_here()
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _uses_cuda() -> bool:
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def _device_index(local_rank: int) -> int:
    """This rank's GPU among those that it sees."""
    count = torch.cuda.device_count()
    if local_rank < count:
        return local_rank
    if count == 1:
        return 0  # Slurm's --gpus-per-task shows each task its own
    raise LaunchError(
        f"LOCAL_RANK = {local_rank}, but {count} GPUs are visible here: start at most {count} ranks on a machine "
        "(deepspeed --num_gpus, torchrun --nproc_per_node), or show each rank all GPUs of its machine"
    )


def _refuse_uuids() -> None:
    """DeepSpeed's engine reads ``CUDA_VISIBLE_DEVICES`` as numbers where NVIDIA's package is installed."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    named = [name for name in visible.split(",") if name.strip() and not name.strip().lstrip("-").isdecimal()]
    if named and _uses_cuda() and find_spec("pynvml") is not None:
        raise LaunchError(
            f"CUDA_VISIBLE_DEVICES = {visible}: DeepSpeed reads numbers only, not {named[0]}; set the numbers "
            "that nvidia-smi -L shows, or uninstall nvidia-ml-py and start by torchrun"
        )


def _check_interface() -> None:
    """Gloo's own error is a traceback that names no variable."""
    named, interfaces = os.environ.get("GLOO_SOCKET_IFNAME"), psutil.net_if_addrs()
    if named and (unknown := [name for name in named.split(",") if name not in interfaces]):
        raise LaunchError(
            f"GLOO_SOCKET_IFNAME = {named}: there is no network interface {unknown[0]} on {socket.gethostname()}, "
            f"only {', '.join(interfaces)}: set one of them, or unset it"
        )


def _resolve(address: str, timeout: float) -> None:
    """Waits until the name of the first rank's machine is known: a cluster may publish it after the start."""
    patience, told = min(RESOLVE, timeout), False
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as error:
            if not told:
                report(f"MASTER_ADDR = {address} cannot be resolved ({error}): trying for {patience:.0f} s")
            told = True
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"MASTER_ADDR = {address} cannot be resolved: {error}; name the first rank's machine or its "
                    "address, or unset RANK and WORLD_SIZE to run alone"
                ) from error
        time.sleep(1)


@contextmanager
def _rendezvous(launch: Launch | None, timeout: float) -> Iterator[None]:
    """Inside, ranks meet: says every half minute that they wait, ends the process at the end of its patience.

    A request to stop, Ctrl-C included, ends the process at once: the store would wait for hours.
    """
    if launch is None:
        yield
        return
    place = f"{launch.address}:{launch.port}"
    is_main = threading.current_thread() is threading.main_thread()
    former = signal.signal(signal.SIGINT, signal.SIG_DFL) if is_main else None
    what = f"for {launch.world_size} ranks to meet at {place}; to run alone: unset RANK WORLD_SIZE"
    try:
        with waiting(lambda waited: f"rank {launch.rank} has waited {waited:.0f} s {what}", timeout, code=76):
            yield
    except (RuntimeError, ValueError) as error:
        text = str(error)
        if "EADDRINUSE" in text or "address already in use" in text.lower():
            raise LaunchError(
                f"port {launch.port} is taken on {socket.gethostname()}, perhaps by another run: name another one "
                "(deepspeed --master_port, torchrun --master_port, MASTER_PORT)"
            ) from error
        if "Duplicate GPU" in text:
            raise LaunchError(
                "two ranks have the same GPU: start one rank for each GPU (deepspeed --num_gpus, torchrun "
                "--nproc_per_node)"
            ) from error
        if isinstance(error, dist.DistNetworkError):
            raise LaunchError(f"the first rank does not answer at {place}: {text.splitlines()[0]}") from error
        raise
    finally:
        if former is not None:
            signal.signal(signal.SIGINT, former)


def _interface(local_ranks: int) -> str | None:
    """The network interface on the way to ``MASTER_ADDR``; None to leave the choice to gloo.

    Gloo's own choice is the one that the machine's name stands for: on many systems loopback, at which ranks on
    other machines find nobody, or a rank of their own.
    """
    master = os.environ["MASTER_ADDR"]
    try:
        family, kind, _, _, address = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing, but binds to the address that packets would come from
            own = probe.getsockname()[0]
    except OSError:
        return None  # the process group will say it better
    if not ipaddress.ip_address(own).is_loopback:
        addresses = psutil.net_if_addrs()
        return next((name for name in addresses if any(own == entry.address for entry in addresses[name])), None)
    if 0 < local_ranks < int(os.environ["WORLD_SIZE"]):
        raise LaunchError(
            f"MASTER_ADDR = {master} is {address[0]} on {socket.gethostname()}, which other machines cannot "
            "reach: name an address of the network between them (deepspeed --master_addr), or set "
            "GLOO_SOCKET_IFNAME"
        )
    return None


def _ranks_here() -> int:
    """How many ranks run on this machine, for launchers that do not say so."""
    names = [""] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names.count(socket.gethostname())


def free_port() -> int:
    """A TCP port that nothing on this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
