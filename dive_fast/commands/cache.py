"""Writes the teacher cache of a config: ``dive-fast cache --config vitl14_dive.json [key=value ...]``.

An interrupted command resumes when it is restarted. ``--adopt`` makes the cache from embeddings computed by
clip-retrieval; ``--export`` writes an existing cache to clip-retrieval's files.
"""

from pathlib import Path

from dive_fast.commands import cli


@cli.guarded
def main(arguments: list[str] | None = None) -> int:
    """Runs the command; a user's mistake becomes one line and exit code 2."""
    parser = cli.parser(__doc__, "teacher.dtype=float16")
    parser.add_argument("--rebuild", action="store_true", help="remove an existing cache and write it again")
    parser.add_argument(
        "--adopt",
        type=Path,
        metavar="FOLDER",
        help="output folder of clip-retrieval inference: use its embeddings, and embed only the audit's pairs",
    )
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="write an existing cache to clip-retrieval's files"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.export and (options.adopt or options.rebuild):
        parser.error("--export writes no cache: remove --adopt and --rebuild")

    # Heavy imports follow later, so that a typo is reported at once.
    from dive_fast.errors import ConfigError, UserError
    from dive_fast.evaluation.early_checks import check_reference

    try:
        config = cli.load_config(options.config, options.overrides, check=check_reference)
        if config.data.reference is None:
            raise ConfigError("data.reference: a teacher cache needs a reference set; configure one")
        from dive_fast.data.open_dataset import open_reference
        from dive_fast.distributed import join
        from dive_fast.model.towers import check_text_length, create
        from dive_fast.teacher import build
        from dive_fast.teacher import clip_retrieval as retrieval
        from dive_fast.teacher.audit import write_audit
        from dive_fast.training.preflight import check_environment

        ranks = join(config.train.rank_timeout)
    except UserError as error:
        return cli.report_error(error, options)
    path = build.cache_folder(config.teacher, cli.run_folder(config.train.output, options.config))
    try:
        if not options.export:
            check_environment(config, path.parent, ranks)
        if options.adopt or options.export:
            retrieval.check(config.data.reference, config.teacher, options.adopt is not None)
        embeddings = retrieval.Embeddings(options.adopt, config.teacher.dtype) if options.adopt else None
        towers = create(config.model)
        check_text_length(config.data, towers)
        source = open_reference(config.data.reference, ranks=ranks)
        samples = build.reference_samples(config, source, towers).with_kept_tokens(ranks)
        summary = f"{path}: {len(source)} pairs"
        if options.export:
            if ranks.is_main:
                parts = build.export_cache(config, path, towers, samples, ranks, options.export)
                print(f"{options.export}: {len(source)} pairs, partitions: {parts}")
            ranks.leave()
            return 0
        if embeddings is None:
            _, audit = build.open_cache(config, path, towers, samples, ranks, options.rebuild)
        else:
            audit = build.adopt_cache(config, path, towers, samples, ranks, embeddings, options.rebuild)
            summary += f" of {options.adopt}, where {len(embeddings) - len(source)} more are not needed"
    except UserError as error:
        return cli.report_error(error, options)
    if ranks.is_main:
        print(summary + (f"; {audit}" if audit is not None else ""))
        if audit is not None:
            write_audit(path / "audit.json", audit)
    ranks.leave()
    return 0
