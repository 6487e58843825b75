"""Fine-tunes CLIP: ``deepspeed launch/train.py --config vitl14_dive.json [section.key=value ...]``."""

import logging
import sys

import command


def main(arguments: list[str] | None = None) -> int:
    """Parses, calls, and turns a user's mistake into one line and exit code 2."""
    parser = command.parser(__doc__, "train.epochs=1")
    options = parser.parse_intermixed_args(arguments)

    # Only pydantic so far: a typo is told at once.
    from dive_fast.config import ConfigError, load

    try:
        config = load(options.config, options.overrides, command.CONFIGS)
        from dive_fast.data.source import DataError
        from dive_fast.ranks import join
        from dive_fast.train import train
    except ConfigError as error:
        return command.complain(error, options)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    ranks = join()
    folder = command.run_folder(config.train.output, options.config)
    try:
        results = train(config, folder, ranks)
    except (ConfigError, DataError) as error:
        return command.complain(error, options)
    if ranks.first:
        print(
            f"{folder}/model.safetensors", *(f"{name}={value:.4g}" for name, value in results.items()), sep="\n  "
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
