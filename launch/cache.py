"""Writes the teacher cache of a config: ``deepspeed launch/cache.py --config vitl14_dive.json [key=value ...]``.

Killed, the same command goes on where it stopped.
"""

import logging
import sys

import command


def main(arguments: list[str] | None = None) -> int:
    """Parses, calls, and turns a user's mistake into one line and exit code 2."""
    parser = command.parser(__doc__, "teacher.dtype=float16")
    parser.add_argument("--rebuild", action="store_true", help="remove the cache that is there, and write it anew")
    options = parser.parse_intermixed_args(arguments)

    # Only pydantic so far: a typo is told at once.
    from dive_fast.config import ConfigError, load

    try:
        config = load(options.config, options.overrides, command.CONFIGS)
        if config.data.reference is None:
            raise ConfigError("data.reference: a teacher cache is of a reference set; name one")
        from dive_fast.data.sets import open_reference
        from dive_fast.data.source import DataError
        from dive_fast.ranks import join
        from dive_fast.teacher import build
        from dive_fast.teacher.audit import write_audit
        from dive_fast.towers import create
    except ConfigError as error:
        return command.complain(error, options)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    ranks = join()
    path = build.cache_folder(config, command.run_folder(config.train.output, options.config))
    try:
        source = open_reference(config.data.reference)
        towers = create(config.model)
        samples = build.reference_samples(config, source, towers)
        _, found = build.open_cache(config, path, towers, samples, ranks, options.rebuild)
    except (ConfigError, DataError) as error:
        return command.complain(error, options)
    if ranks.first:
        print(f"{path}: {len(source)} pairs" + (f"; {found}" if found is not None else ""))
        if found is not None:
            write_audit(path / "audit.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
