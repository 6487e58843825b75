"""The ranks of a run: their process group and this one's device."""

import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dive_fast import precision
from dive_fast.errors import UserError

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Until a process group gives a collective up. A run finds out far sooner whom it has lost (``guard/watch.py``);
what is not timed there, the last shards of a cache or a long evaluation, may keep ranks waiting for longer than
ten minutes, the usual limit."""


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
    def first(self) -> bool:
        """Whether this rank talks and writes for all."""
        return self.rank == 0

    def progress(self, total: int, description: str, unit: str, done: int = 0) -> "tqdm[Any]":
        """A progress bar on the first rank; a line every half minute where no one is watching."""
        quiet = 0.1 if sys.stderr.isatty() else 30
        return tqdm(
            total=total, initial=done, desc=description, unit=unit, mininterval=quiet, disable=not self.first
        )

    def barrier(self) -> None:
        """Waits until every rank has come here."""
        if self.world_size > 1:
            dist.barrier()

    @contextmanager
    def together(self, *errors: type[Exception]) -> Iterator[None]:
        """Where one rank fails by one of these errors, all raise it behind the block, which has no collective."""
        failure: Exception | None = None
        try:
            yield
        except errors as error:
            failure = error
        failures: list[Exception | None] = [failure] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(failures, failure)
        if (first := next(filter(None, failures), None)) is not None:
            raise first

    def as_first(self, found: Any) -> Any:
        """What the first rank has found, on all: file systems do not show the same to all machines at once."""
        values = [found]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def collect(self, value: Any) -> list[Any]:
        """A value of every rank, in rank order, on all of them; all ranks call it."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def say(self, line: str) -> None:
        """Prints a line, once, that breaks no progress bar."""
        if self.first:
            tqdm.write(line)

    def share(self, count: int) -> range:
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


def join() -> Ranks:
    """Joins the process group that the launcher (deepspeed, torchrun, Slurm) announces; alone without one.

    CUDA runs on NCCL, the CPU on gloo with the machine's cores divided among its ranks.

    Raises:
        UserError: other machines cannot reach this one by ``MASTER_ADDR``.
    """
    import deepspeed

    precision.configure()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    alone: dict[str, Any] = {}
    if "RANK" not in os.environ:
        # Not by the environment: a process that is started from this one would take it for a launcher's.
        alone = {"init_method": f"tcp://127.0.0.1:{free_port()}", "rank": 0, "world_size": 1}
        os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed asks for
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # Else DeepSpeed compiles a shared-memory collective at start, for up to 90 s; gloo does its work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_ranks = 1 if alone else int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 0)
    # With GPUs too: what ranks agree on beside their steps goes over gloo.
    if not alone and "GLOO_SOCKET_IFNAME" not in os.environ and (interface := _interface(local_ranks)):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=COLLECTIVE_TIMEOUT, **alone
    )
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (local_ranks or _ranks_here())))
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


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
        raise UserError(
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
