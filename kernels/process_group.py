"""Process groups by name, which is how a custom op takes them; the empty name is this rank alone."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d


def name_of(group: dist.ProcessGroup | None) -> str:
    """The name that the other functions take."""
    return "" if group is None else group.group_name


def world_size(name: str) -> int:
    """Number of ranks."""
    return dist.get_world_size(_group(name)) if name else 1


def rank(name: str) -> int:
    """This rank's number within the group."""
    return dist.get_rank(_group(name)) if name else 0


def gather(tensor: Tensor, name: str) -> Tensor:
    """Tensors of all ranks, stacked in rank order: ``(...) -> (W, ...)``."""
    if world_size(name) == 1:
        return tensor.unsqueeze(0)
    gathered = tensor.new_empty(world_size(name) * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=_group(name))
    return gathered.unflatten(0, (-1, len(tensor)))


def _group(name: str) -> dist.ProcessGroup:
    # Private, and what PyTorch's own functional collectives resolve their groups with.
    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined]
