"""How far a run has moved the geometry of its model: ``python launch/geometry.py --config vitb16_dive.json``.

Embeds image-caption pairs by the pre-trained model and by the fine-tuned one, and compares them: RSA, CKA,
alignment, uniformity, modality gap, difference vectors. Leaves geometry.json and pictures.
"""

import logging
import sys
from pathlib import Path

import cli


@cli.guarded
def main(arguments: list[str] | None = None) -> int:
    """Parses, calls, and turns a user's mistake into one line and exit code 2."""
    parser = cli.parser(__doc__, "train.output=runs/mine")
    parser.add_argument("--before", type=Path, metavar="WEIGHTS", help="default: the config's pre-trained model")
    parser.add_argument("--after", type=Path, metavar="WEIGHTS", help="default: the run's model.safetensors")
    parser.add_argument(
        "--pairs", metavar="SET", help="captioned tars, CSV or prepared set; default: data.reference"
    )
    parser.add_argument("--format", choices=("webdataset", "csv", "prepared"), help="of --pairs; default: guessed")
    parser.add_argument("--image-root", help="of --pairs, csv only: where relative file paths start")
    # Time grows with the square: a reference set of millions would never end.
    parser.add_argument(
        "--limit",
        type=cli.count(3),
        metavar="N",
        default=10_000,
        help="pairs, spread over the set; default: %(default)s",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: the run's")
    options = parser.parse_intermixed_args(arguments)

    # Only pydantic so far: a typo is told at once.
    from dive_fast.errors import UserError
    from dive_fast.methods.run_config import load_run_config

    try:
        config = load_run_config(options.config, options.overrides, cli.CONFIGS)
        from dive_fast.distributed import join
        from dive_fast.evaluate.early_checks import check_output, find_weights
        from dive_fast.evaluate.geometry import compare as movement
        from dive_fast.evaluate.geometry.embed import describe_pairs
        from dive_fast.model import towers

        data = describe_pairs(config, options.pairs, options.format, options.image_root)
        run = cli.run_folder(config.train.output, options.config)
        after = find_weights(options.after, "--after", run)
        if options.before is not None:
            find_weights(options.before, "--before", run)
        check_output(options.output or run)
        towers.check(config.model, weights=options.before is None)

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        ranks = join()
    except UserError as error:
        return cli.report_error(error, options)
    if options.pairs is None:
        ranks.print(
            "pairs: data.reference, on which training holds embeddings in place; pairs that it has not seen tell "
            "more: name some by --pairs (docs/geometry.md)"
        )
    try:
        embedded = movement.embed_both(config, options.before, after, data, ranks, options.limit)
        if not ranks.is_main:
            return 0
        about = {
            "model": config.model.name,
            "before": str(options.before or movement.PRETRAINED),
            "after": str(after),
            "pairs": data.path,
        }
        report = movement.measure(embedded, about)
    except UserError as error:
        return cli.report_error(error, options)
    # The run's course is that of its own weights.
    training = run / "metrics.jsonl" if options.after is None else None
    print(movement.table(report) + "\n")
    for file in movement.write(report, embedded, options.output or run, training):
        print(file)
    ranks.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
