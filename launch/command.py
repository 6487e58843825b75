"""What the commands share that take a config: their arguments, the run folder, how a user's mistake is told."""

import argparse
import os
import sys
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"


def parser(description: str | None, example: str) -> argparse.ArgumentParser:
    """Takes a config and overrides of it.

    Args:
        example: of an override.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--config", required=True, help="a path, or a name in launch/configs")
    made.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"e.g. {example}")
    return made


def run_folder(output: str | None, config: str) -> Path:
    """``train.output``, or else the config's own name below ``runs``."""
    return Path(output or f"runs/{Path(config).stem}")


def complain(error: Exception) -> int:
    """Tells a user's mistake in one line, on the first rank; returns the exit code."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    return 2
