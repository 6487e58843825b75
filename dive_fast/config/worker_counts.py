"""Numbers of loader workers for ``workers: "auto"``, from the cores of this rank and the work of each loader."""

import copy
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

AUTO = "auto"
MOST = 16
"""Most workers of a loader: more only wait for the GPU (docs/data.md)."""
_CGROUP = Path("/sys/fs/cgroup")


def with_worker_counts(tree: dict[str, Any]) -> dict[str, Any]:
    """A config that is not validated yet, with numbers of workers instead of ``auto``.

    One core is left for the training process. Target and reference get shares of the others by their images per
    step, at least one each; evaluations, during which training waits, get all.
    """
    tree = copy.deepcopy(tree)
    data, evaluate = tree.get("data"), tree.setdefault("evaluate", {})
    free = max(1, cores_of_rank() - 1)
    target = data.get("target") if isinstance(data, Mapping) else None
    if isinstance(evaluate, MutableMapping):
        # By default evaluations have the workers of the target; all of them are free for an evaluation.
        default = target.get("workers") if isinstance(target, Mapping) else None
        if evaluate.get("workers", default) == AUTO:
            evaluate["workers"] = min(free, MOST)
    if not isinstance(data, Mapping):
        return tree
    halves = {name: data[name] for name in ("target", "reference") if isinstance(data.get(name), MutableMapping)}
    images = {name: _number(half.get("batch_size"), 512.0) for name, half in halves.items()}
    if "reference" in images and isinstance(objective := tree.get("objective"), Mapping):
        images["reference"] /= _number(objective.get("reference_every"), 1.0)
    automatic = [name for name, half in halves.items() if half.get("workers") == AUTO]
    # A number leaves the other cores to the other half.
    free -= sum(int(_number(half.get("workers"), 4.0)) for name, half in halves.items() if name not in automatic)
    total = sum(images[name] for name in automatic)
    for name in automatic:
        halves[name]["workers"] = max(1, min(MOST, round(free * images[name] / total)))
    return tree


def cores_of_rank() -> int:
    """The share of this rank in the cores of its node, within the limits of its container."""
    own, ranks = len(os.sched_getaffinity(0)), _local_ranks()
    # A launcher that binds ranks to cores has divided them already.
    is_bound = own * ranks <= _cores_of_container()
    return max(1, int(min(own if is_bound else own / ranks, _quota() / ranks)))


def _cores_of_container() -> int:
    """Cores of the machine, or those that its container is bound to."""
    try:
        ranges = (_CGROUP / "cpuset.cpus.effective").read_text(encoding="ascii").strip().split(",")
        bounds = [[int(core) for core in each.split("-")] for each in ranges]
        return sum(each[-1] - each[0] + 1 for each in bounds)
    except (OSError, ValueError):
        return os.cpu_count() or 1


def _quota() -> float:
    """Cores that the container's limit of CPU time equals; infinite without one."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no such limit: "max"
        return float("inf")


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def _number(value: object, default: float) -> float:
    """A positive number of the config; the default instead of an invalid value, which validation refuses."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**53:
        return float(value)
    return default
