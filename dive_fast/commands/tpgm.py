"""Projects tuned weights towards the pre-trained ones by TPGM: ``dive-fast tpgm --config runs/mine``.

One projection radius per tensor is learned on images that are neither trained on nor reported: those that
data.target.holdout leaves out of training, or a labelled evaluation set (``--learn-on``).
"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from dive_fast.commands import cli

if TYPE_CHECKING:
    from dive_fast.config.schema import Config


@cli.guarded
def main(arguments: list[str] | None = None) -> int:
    """Runs the command; a user's mistake becomes one line and exit code 2."""
    parser = cli.parser(__doc__, "train.output=runs/mine")
    parser.add_argument("--weights", type=Path, help="fine-tuned weights; default: the run's model.safetensors")
    parser.add_argument(
        "--learn-on",
        metavar="SET",
        help="labelled set of evaluate.sets on which the radii are learned, and which is not reported; default: "
        "the held-out part of data.target",
    )
    parser.add_argument("--iterations", type=cli.count(1), default=200, help="default: %(default)s")
    parser.add_argument(
        "--batch-size", type=cli.count(1), default=64, help="images over all ranks; default: %(default)s"
    )
    parser.add_argument(
        "--learning-rate", type=_positive, default=1e-2, help="of Adam on the radii; default: %(default)s"
    )
    parser.add_argument(
        "--norm",
        choices=("l2", "mars"),
        default="l2",
        help="l2: of each tensor; mars: the L1 norm of each row; default: %(default)s",
    )
    parser.add_argument("--seed", type=cli.count(0), default=0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="output folder; default: the run folder")
    options = parser.parse_intermixed_args(arguments)

    # Only pydantic is imported so far, so that a typo is reported at once.
    from dive_fast.errors import UserError
    from dive_fast.evaluation.early_checks import check_tuned, find_weights

    def run_of(config: "Config") -> Path:
        return cli.run_folder(config.train.output, options.config)

    def check(config: "Config") -> None:
        check_tuned(config, run_of(config), options.weights, options.output)

    try:
        config = cli.load_config(options.config, options.overrides, check=check)
        from dive_fast.distributed import join
        from dive_fast.evaluation import learned_radii
        from dive_fast.model import towers

        towers.check(config.model)
        weights = find_weights(options.weights, "--weights", run_of(config))
        folder = options.output or run_of(config)
        settings = learned_radii.Settings(
            options.norm, options.iterations, options.batch_size, options.learning_rate, options.seed
        )

        ranks = join()
    except UserError as error:
        return cli.report_error(error, options)
    try:
        result = learned_radii.tpgm(config, weights, ranks, settings, learn_on=options.learn_on)
    except UserError as error:
        return cli.report_error(error, options)
    if ranks.is_main:
        learned_radii.write(result, folder)
        print(learned_radii.table(result.report))
        print(f"{folder / learned_radii.WEIGHTS}: {learned_radii.summarize(result.report)}")
    ranks.leave()
    return 0


def _positive(text: str) -> float:
    """Argument type for a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return value
