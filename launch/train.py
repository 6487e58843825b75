"""Fine-tunes CLIP: ``deepspeed launch/train.py --config vitl14_dive.json [section.key=value ...]``."""

import argparse
import logging
import os
import sys
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"


def main(arguments: list[str] | None = None) -> int:
    """Parses, calls, and turns a user's mistake into one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a path, or a name in launch/configs")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. train.epochs=1")
    options = parser.parse_intermixed_args(arguments)

    # Only pydantic so far: a typo is told at once.
    from dive_fast.config import ConfigError, load

    try:
        config = load(options.config, options.overrides, CONFIGS)
        from dive_fast.data.source import DataError
        from dive_fast.ranks import join
        from dive_fast.train import train
    except ConfigError as error:
        return _complain(error)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    ranks = join()
    folder = Path(config.train.output or f"runs/{Path(options.config).stem}")
    try:
        results = train(config, folder, ranks)
    except (ConfigError, DataError) as error:
        return _complain(error)
    if ranks.first:
        print(
            f"{folder}/model.safetensors", *(f"{name}={value:.4g}" for name, value in results.items()), sep="\n  "
        )
    return 0


def _complain(error: Exception) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
