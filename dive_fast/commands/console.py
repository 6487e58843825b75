"""The console command ``dive-fast``: runs one of the commands of this package by its name."""

import os
import sys
from difflib import get_close_matches
from importlib import import_module, metadata

COMMANDS = {
    "init": "look at your data, and write a config that fits it",
    "train": "fine-tune CLIP by a config",
    "plan": "predict memory, FLOP and time of a step; same as train --dry-run",
    "evaluate": "measure a model on image sets, and write tables",
    "sweep": "run a grid of short runs, and recommend one of its settings",
    "report": "compare any runs in one table and one chart",
    "geometry": "compare the geometry of embeddings before and after fine-tuning",
    "shift": "measure how far test sets are from a training set",
    "ensemble": "interpolate between pre-trained and tuned weights",
    "tpgm": "project tuned weights towards the pre-trained ones, tensor by tensor",
    "export": "write a model for transformers or as ONNX",
    "answers": "write the candidate answers of visual questions to a file",
    "prepare": "prepare a data set for fast reading",
    "cache": "write the teacher cache of a config",
    "keys": "list the keys of a config with their types, defaults and meanings",
    "demo": "fine-tune the embedded small model with FLYP and with DiVE, and compare them",
}
"""Each command and its summary for ``dive-fast --help``."""
ALIASES = {"plan": ("train", "--dry-run"), "export": ("export_model",)}
"""Modules and options of commands that are not the module of their name; `export` is one of checkpoints."""
ON_SEVERAL_GPUS = ("train", "cache", "evaluate", "geometry", "shift", "ensemble", "tpgm")
"""Commands that take ``--gpus``."""


def main(arguments: list[str] | None = None) -> int:
    """Runs ``dive-fast COMMAND ...``; returns the command's exit code, 2 for an unknown command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"dive_fast {metadata.version('dive_fast')}")
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: dive-fast has no command {name!r}{hint} (commands: {', '.join(COMMANDS)})", file=sys.stderr)
        return 2
    if name in ON_SEVERAL_GPUS and (index := _index_of_gpus(arguments)) is not None:
        return _launch(name, arguments[1:index], arguments[index:])
    module, *inserted = ALIASES.get(name, (name,))
    # argparse shows this name in usage lines.
    sys.argv = [f"dive-fast {name}", *inserted, *arguments[1:]]
    try:
        code: int = import_module(f"dive_fast.commands.{module}").main()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "dive_fast"):
            raise
        print(
            f"error: dive-fast {name} needs the package {package}, which is not installed: "
            "pip install 'dive_fast[train]'",
            file=sys.stderr,
        )
        return 2
    return code


def _index_of_gpus(arguments: list[str]) -> int | None:
    """The position of ``--gpus`` among the arguments; None without it."""
    return next((at for at, word in enumerate(arguments) if word.partition("=")[0] == "--gpus"), None)


def _launch(name: str, before: list[str], option: list[str]) -> int:
    """Replaces this process by DeepSpeed's launcher; returns only after a mistake.

    Args:
        before: the command's arguments before ``--gpus``.
        option: ``--gpus``, its value and the arguments after it.
    """
    from dive_fast.commands.launcher import count_ranks, launcher_command, launcher_environment
    from dive_fast.errors import LaunchError

    _, separator, value = option[0].partition("=")
    after = option[1:] if separator else option[2:]
    print(f"dive-fast {name}: starting ranks", flush=True)
    try:
        if not separator:
            value = option[1] if len(option) > 1 else ""
        command = launcher_command(name, [*before, *after], count_ranks(value))
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.execve(command[0], command, launcher_environment())


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: dive-fast COMMAND [options] [section.key=value ...]\n\n"
        "Fine-tunes CLIP on your data without losing what it knows about everything else.\n\n"
        f"commands:\n{lines}\n\n"
        f"--gpus N, or --gpus all: runs {', '.join(ON_SEVERAL_GPUS)} on several GPUs.\n"
        "dive-fast COMMAND --help describes a command."
    )
