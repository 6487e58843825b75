"""``train.schedule = auto``: sequential or joint, whichever is predicted to be faster among those that fit.

Both give the same gradients. One graph of both halves needs nearly twice the activations and cuts both texts at
one length, but half the launches: it wins where a GPU has so few pairs that it waits for its host.
"""

import os
import subprocess
import sys

import torch
import torch.distributed as dist

from dive_fast.config.schema import Config
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError
from dive_fast.planner.gpu_specs import GPUS, sold_as

MIN_SPEEDUP = 0.98
"""Joint has to be predicted to take less than this share of sequential's time: it needs more memory."""


def resolve(config: Config, ranks: Ranks) -> Config:
    """The config with its schedule chosen for this machine; all ranks call it. Other schedules stay.

    Raises:
        ConfigError: the config cannot be planned.
    """
    if config.train.schedule != "auto":
        return config
    with ranks.raise_on_all(ConfigError):
        chosen = [_ask(config, ranks) if ranks.is_main else ""]
    if ranks.world_size > 1:
        dist.broadcast_object_list(chosen)
    return with_schedule(config, chosen[0])


def choose(config: Config, ranks: int, gpu: str) -> str:
    """Plans both. A process that has joined a process group cannot.

    Args:
        gpu: name in :data:`dive_fast.planner.gpu_specs.GPUS`.

    Raises:
        ConfigError: the config cannot be planned.
    """
    from dive_fast.methods import registry
    from dive_fast.planner.simulate import plan_run as plan_run

    if not registry.needs(config.objective).reference:
        return "sequential"
    sequential, joint = (plan_run(with_schedule(config, name), ranks) for name in ("sequential", "joint"))
    is_faster = joint.step_seconds(GPUS[gpu]) < MIN_SPEEDUP * sequential.step_seconds(GPUS[gpu])
    return "joint" if joint.fits(GPUS[gpu]) and is_faster else "sequential"


def with_schedule(config: Config, name: str) -> Config:
    """The config with another schedule."""
    return config.model_copy(update={"train": config.train.model_copy(update={"schedule": name})})


def _ask(config: Config, ranks: Ranks) -> str:
    """A process of its own, in which fake tensors, fake ranks and no GPU are all there is."""
    gpu = None
    if ranks.device.type == "cuda":
        about = torch.cuda.get_device_properties(ranks.device)
        gpu = sold_as(about.name, about.total_memory)
    if gpu is None:
        ranks.print("train.schedule = auto: sequential, since there are no figures of this device to predict by")
        return "sequential"
    chosen = ask(config, ranks.world_size, gpu)
    ranks.print(f"train.schedule = auto: {chosen}")
    return chosen


def ask(config: Config, ranks: int, gpu: str) -> str:
    """As :func:`choose`, for a process that has joined a group.

    Raises:
        ConfigError: the config cannot be planned.
    """
    mine = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    quiet = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "dive_fast.planner.auto_schedule", str(ranks), gpu]
    tree = config.model_dump_json()
    done = subprocess.run(command, input=tree, env=mine | quiet, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"train.schedule = auto: planning failed; name the schedule.\n{done.stderr[-2000:]}")
    return done.stdout.split()[-1]


if __name__ == "__main__":
    print(choose(Config.model_validate_json(sys.stdin.read()), int(sys.argv[1]), sys.argv[2]))
