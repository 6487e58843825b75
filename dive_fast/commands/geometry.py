"""Measures how a run changed the geometry of embeddings: ``dive-fast geometry --config vitb16_dive.json``.

Embeds image-caption pairs with the pre-trained and the fine-tuned model and compares them: RSA, CKA, alignment,
uniformity, modality gap, difference vectors. Writes geometry.json and figures.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from dive_fast.commands import cli

if TYPE_CHECKING:
    from dive_fast.config.schema import Config


@cli.guarded
def main(arguments: list[str] | None = None) -> int:
    """Runs the command; a user's mistake becomes one line and exit code 2."""
    parser = cli.parser(__doc__, "train.output=runs/mine")
    parser.add_argument(
        "--before", type=Path, metavar="WEIGHTS", help="exported weights; default: the config's pre-trained model"
    )
    parser.add_argument(
        "--after", type=Path, metavar="WEIGHTS", help="exported weights; default: the run's model.safetensors"
    )
    parser.add_argument(
        "--pairs", metavar="SET", help="captioned tars, CSV or prepared set; default: data.reference"
    )
    parser.add_argument(
        "--format",
        choices=("folder", "webdataset", "csv", "huggingface", "prepared"),
        help="format of --pairs; default: guessed",
    )
    parser.add_argument("--image-root", help="csv: folder that relative file paths start from")
    # Time grows with the square of the pairs: a reference set of millions would take forever.
    parser.add_argument(
        "--limit",
        type=cli.count(3),
        metavar="N",
        default=10_000,
        help="number of pairs, spread evenly over the set; default: %(default)s",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="output folder; default: the run folder")
    options = parser.parse_intermixed_args(arguments)

    # Only pydantic is imported so far, so that a typo is reported at once.
    from dive_fast.data.data_paths import check_path
    from dive_fast.errors import UserError
    from dive_fast.evaluation.early_checks import check_output, find_weights
    from dive_fast.model.model_names import check_name

    def run_of(config: "Config") -> Path:
        return cli.run_folder(config.train.output, options.config)

    def check(config: "Config") -> None:
        run = run_of(config)
        find_weights(options.after, "--after", run)
        if options.before is not None:
            find_weights(options.before, "--before", run)
        check_output(options.output or run)
        check_name(config.model, weights=options.before is None)
        if options.pairs is None and config.data.reference is not None:
            check_path(config.data.reference, "data.reference")

    try:
        config = cli.load_config(options.config, options.overrides, check=check)
        from dive_fast.distributed import join
        from dive_fast.evaluation.geometry import compare
        from dive_fast.evaluation.geometry.embed import describe_pairs
        from dive_fast.model import towers

        data = describe_pairs(config.data.reference, options.pairs, options.format, options.image_root)
        run = run_of(config)
        after = find_weights(options.after, "--after", run)
        towers.check(config.model, weights=options.before is None)

        ranks = join()
    except UserError as error:
        return cli.report_error(error, options)
    if options.pairs is None:
        ranks.print(
            "pairs: data.reference, whose embeddings training keeps in place; unseen pairs are more informative: "
            "name some by --pairs (docs/geometry.md)"
        )
    try:
        place = "" if options.pairs is None else "--pairs"
        embedded = compare.embed_both(
            config.model, config.evaluate, options.before, after, data, ranks, options.limit, place
        )
        if not ranks.is_main:
            return 0
        labels = {
            "model": config.model.name,
            "before": str(options.before or compare.PRETRAINED),
            "after": str(after),
            "pairs": data.path,
        }
        report = compare.measure(embedded, labels)
    except UserError as error:
        return cli.report_error(error, options)
    # Curves over training belong to the run's own weights only.
    training = run / "metrics.jsonl" if options.after is None else None
    print(compare.table(report) + "\n")
    for file in compare.write(report, embedded, options.output or run, training):
        print(file)
    ranks.leave()
    return 0
