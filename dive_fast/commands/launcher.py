"""Starts a command on several GPUs of this machine, by DeepSpeed's launcher."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dive_fast.errors import LaunchError


def launcher_command(module: str, arguments: Sequence[str], ranks: int) -> list[str]:
    """The command line that runs a module of ``dive_fast.launch`` on ranks of this machine."""
    from dive_fast.distributed import free_port

    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    # Without a free port of its own, a second run on this machine would join the first.
    launcher += ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return [*launcher, "--module", f"dive_fast.launch.{module}", *arguments]


def launcher_environment() -> dict[str, str]:
    """This process's environment, with its Python first on ``PATH``, where the launcher looks it up."""
    folder = Path(sys.executable).parent
    return dict(os.environ) | {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}


def count_ranks(text: str) -> int:
    """The number of ranks for ``--gpus``: a number, or ``all`` visible GPUs.

    With ``DS_ACCELERATOR=cpu`` ranks run on the CPU, in any number.

    Raises:
        LaunchError: not a number, or more than there are GPUs.
    """
    import torch

    if text != "all" and not (text.isdecimal() and int(text) > 0):
        raise LaunchError(f"--gpus {text}: expected a number, or all")
    if os.environ.get("DS_ACCELERATOR") == "cpu" and text != "all":
        return int(text)
    count = torch.cuda.device_count()
    if count == 0:
        raise LaunchError(
            f"--gpus {text}: no GPU is visible; leave it out to run on the CPU, or set DS_ACCELERATOR=cpu for "
            "several ranks there"
        )
    if text != "all" and int(text) > count:
        raise LaunchError(f"--gpus {text}: only {count} GPUs are visible")
    return count if text == "all" else int(text)
