"""The console command ``dive-fast``: runs one of the commands of this package by its name."""

import sys
from difflib import get_close_matches
from importlib import import_module, metadata

COMMANDS = {
    "train": "fine-tune CLIP by a config",
    "plan": "predict memory, FLOP and time of a step; same as train --dry-run",
    "evaluate": "measure a model on image sets, and write tables",
    "geometry": "compare the geometry of embeddings before and after fine-tuning",
    "ensemble": "interpolate between pre-trained and tuned weights",
    "export": "write a model for transformers or as ONNX",
    "prepare": "prepare a data set for fast reading",
    "cache": "write the teacher cache of a config",
    "demo": "fine-tune the embedded small model with FLYP and with DiVE, and compare them",
}
"""Each command and its summary for ``dive-fast --help``."""
ALIASES = {"plan": ("train", "--dry-run"), "export": ("export_model",)}
"""Modules and options of commands that are not the module of their name; `export` is one of checkpoints."""


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


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: dive-fast COMMAND [options] [section.key=value ...]\n\n"
        "Fine-tunes CLIP on your data without losing what it knows about everything else.\n\n"
        f"commands:\n{lines}\n\n"
        "dive-fast COMMAND --help describes a command."
    )
