"""Writes the teacher cache of a config: ``deepspeed launch/cache.py --config vitl14_dive.json [key=value ...]``.

Killed, the same command goes on where it stopped. ``--adopt`` makes the cache of embeddings that clip-retrieval
has computed, ``--export`` writes it as clip-retrieval would have.
"""

import logging
import sys
from pathlib import Path

import cli


@cli.guarded
def main(arguments: list[str] | None = None) -> int:
    """Parses, calls, and turns a user's mistake into one line and exit code 2."""
    parser = cli.parser(__doc__, "teacher.dtype=float16")
    parser.add_argument("--rebuild", action="store_true", help="remove the cache that is there, and write it anew")
    parser.add_argument(
        "--adopt",
        type=Path,
        metavar="FOLDER",
        help="of clip-retrieval inference: take its embeddings, and embed only the audit's pairs",
    )
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="write the cache that is there as clip-retrieval's files"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.export and (options.adopt or options.rebuild):
        parser.error("--export writes no cache: leave out --adopt and --rebuild")

    # Only pydantic so far: a typo is told at once.
    from dive_fast.errors import ConfigError, UserError
    from dive_fast.methods.run_config import load_run_config

    try:
        config = load_run_config(options.config, options.overrides, cli.CONFIGS)
        if config.data.reference is None:
            raise ConfigError("data.reference: a teacher cache is of a reference set; name one")
        from dive_fast.data.open_dataset import open_reference
        from dive_fast.distributed import join
        from dive_fast.model.towers import create
        from dive_fast.teacher import build
        from dive_fast.teacher import clip_retrieval as retrieval
        from dive_fast.teacher.audit import write_audit
        from dive_fast.train.preflight import check_environment

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        ranks = join(config.train.rank_timeout)
    except UserError as error:
        return cli.report_error(error, options)
    path = build.cache_folder(config, cli.run_folder(config.train.output, options.config))
    try:
        if not options.export:
            check_environment(config, path.parent, ranks)
        if options.adopt or options.export:
            retrieval.check(config, options.adopt is not None)
        embeddings = retrieval.Embeddings(options.adopt, config.teacher.dtype) if options.adopt else None
        source = open_reference(config.data.reference)
        towers = create(config.model)
        samples = build.reference_samples(config, source, towers)
        told = f"{path}: {len(source)} pairs"
        if options.export:
            if ranks.is_main:
                parts = build.export_cache(config, path, towers, samples, ranks, options.export)
                print(f"{options.export}: {len(source)} pairs, partitions: {parts}")
            ranks.leave()
            return 0
        if embeddings is None:
            _, found = build.open_cache(config, path, towers, samples, ranks, options.rebuild)
        else:
            found = build.adopt_cache(config, path, towers, samples, ranks, embeddings, options.rebuild)
            told += f" of {options.adopt}, where {len(embeddings) - len(source)} more are not needed"
    except UserError as error:
        return cli.report_error(error, options)
    if ranks.is_main:
        print(told + (f"; {found}" if found is not None else ""))
        if found is not None:
            write_audit(path / "audit.json", found)
    ranks.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
