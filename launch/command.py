"""What the commands share that take a config: their arguments, the run folder, how a user's mistake is told."""

import argparse
import os
import shlex
import sys
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"


def parser(description: str | None, example: str, required: bool = True) -> argparse.ArgumentParser:
    """Takes a config and overrides of it.

    Args:
        example: of an override.
        required: whether the command needs a config.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--config", required=required, help="a path, or a name in launch/configs")
    made.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"e.g. {example}")
    return made


def run_folder(output: str | None, config: str) -> Path:
    """``train.output``, or else the config's own name below ``runs``."""
    return Path(output or f"runs/{Path(config).stem}")


def complain(error: Exception, options: argparse.Namespace) -> int:
    """Tells a user's mistake in one line, on the first rank; returns the exit code.

    Args:
        options: what the user gave: a command that mends it repeats them.
    """
    from dive_fast.teacher.store import StaleCacheError

    mend = f": {_rebuild(options)}" if isinstance(error, StaleCacheError) else ""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}{mend}", file=sys.stderr)
    return 2


def _rebuild(options: argparse.Namespace) -> str:
    """The command that writes the teacher cache of a config anew."""
    adopt = getattr(options, "adopt", None)
    words = ["--config", options.config, "--rebuild", *(["--adopt", str(adopt)] if adopt else [])]
    return f"deepspeed launch/cache.py {shlex.join(words + options.overrides)}"
