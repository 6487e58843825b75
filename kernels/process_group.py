"""Process groups by name, as a custom op takes them; the empty name stands for this process alone."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d


def name_of(group: dist.ProcessGroup | None) -> str:
    """The group's name, or "" for None."""
    return "" if group is None else group.group_name


def world_size(name: str) -> int:
    """Number of ranks in the group."""
    return dist.get_world_size(_resolve(name)) if name else 1


def rank(name: str) -> int:
    """This rank's number within the group."""
    return dist.get_rank(_resolve(name)) if name else 0


def gather(tensor: Tensor, name: str) -> Tensor:
    """Tensors of all ranks, stacked in rank order: ``(...) -> (W, ...)``."""
    if world_size(name) == 1:
        return tensor.unsqueeze(0)
    gathered = tensor.new_empty(world_size(name) * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=_resolve(name))
    return gathered.unflatten(0, (-1, len(tensor)))


def _resolve(name: str) -> dist.ProcessGroup:
    # Private, but PyTorch's own functional collectives resolve their groups with it.
    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined]
