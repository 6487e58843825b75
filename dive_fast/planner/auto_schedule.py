"""``train.schedule = auto``: the schedule, sequential or joint, that fits and is predicted to be faster.

Both give the same gradients. One graph of both halves needs nearly twice the activations and truncates both texts
to one length, but needs half the launches: it is faster if a GPU has so few pairs that it waits for its host.
"""

import os
import subprocess
import sys

import torch
import torch.distributed as dist

from dive_fast.config.schema import Config
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError
from dive_fast.planner.gpu_specs import GPUS, gpu_key

MIN_SPEEDUP = 0.98
"""Joint is chosen only below this share of sequential's predicted time, since it needs more memory."""


def resolve(config: Config, ranks: Ranks) -> Config:
    """Replaces the schedule ``auto`` by the one chosen for this machine; all ranks call it.

    Returns:
        The config with the chosen schedule; the same config if its schedule is not ``auto``.

    Raises:
        ConfigError: the config cannot be planned.
    """
    if config.train.schedule != "auto":
        return config
    with ranks.raise_on_all(ConfigError):
        chosen = [_choose_for_device(config, ranks) if ranks.is_main else ""]
    if ranks.world_size > 1:
        dist.broadcast_object_list(chosen)
    return with_schedule(config, chosen[0])


def choose(config: Config, ranks: int, gpu: str) -> str:
    """Chooses a schedule by planning both, in a process that has not joined a process group.

    Args:
        gpu: name in :data:`dive_fast.planner.gpu_specs.GPUS`.

    Raises:
        ConfigError: the config cannot be planned.
    """
    from dive_fast.methods import registry
    from dive_fast.planner.simulate import plan_run

    needs = registry.needs(config.objective)
    if not needs.reference or needs.sequential:
        return "sequential"
    sequential, joint = (plan_run(with_schedule(config, name), ranks) for name in ("sequential", "joint"))
    is_faster = joint.step_seconds(GPUS[gpu]) < MIN_SPEEDUP * sequential.step_seconds(GPUS[gpu])
    return "joint" if joint.fits(GPUS[gpu]) and is_faster else "sequential"


def with_schedule(config: Config, name: str) -> Config:
    """A copy of the config with another ``train.schedule``."""
    return config.model_copy(update={"train": config.train.model_copy(update={"schedule": name})})


def _choose_for_device(config: Config, ranks: Ranks) -> str:
    """The schedule for this rank's device: sequential unless it is a GPU that the planner has figures of."""
    gpu = None
    if ranks.device.type == "cuda":
        properties = torch.cuda.get_device_properties(ranks.device)
        gpu = gpu_key(properties.name, properties.total_memory)
    if gpu is None:
        ranks.print("train.schedule = auto: sequential, since the planner has no figures for this device")
        return "sequential"
    chosen = choose_in_subprocess(config, ranks.world_size, gpu)
    ranks.print(f"train.schedule = auto: {chosen}")
    return chosen


def choose_in_subprocess(config: Config, ranks: int, gpu: str) -> str:
    """:func:`choose`, for a process that has joined a process group: a new process sees no group and no GPU.

    Raises:
        ConfigError: the config cannot be planned.
    """
    from dive_fast.methods import registry

    if not registry.is_shipped(config.objective):
        raise ConfigError(
            "train.schedule = auto: planning runs in a new process, which does not know this objective's method, "
            "added by registry.add; name the schedule: sequential or joint"
        )
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    offline = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "dive_fast.planner.auto_schedule", str(ranks), gpu]
    tree = config.model_dump_json()
    completed = subprocess.run(
        command, input=tree, env=inherited | offline, capture_output=True, text=True, check=False
    )
    if completed.returncode:
        raise ConfigError(
            f"train.schedule = auto: planning failed; name the schedule.\n{completed.stderr[-2000:]}"
        )
    return completed.stdout.split()[-1]


if __name__ == "__main__":
    print(choose(Config.model_validate_json(sys.stdin.read()), int(sys.argv[1]), sys.argv[2]))
