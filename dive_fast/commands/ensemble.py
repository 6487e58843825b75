"""Interpolates between pre-trained and tuned weights: ``dive-fast ensemble --config vitb16_dive.json``.

Alpha is chosen on the config's first evaluation set (ID validation), or on that of ``--choose-on``.
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
    parser.add_argument("--weights", type=Path, help="fine-tuned weights; default: the run's model.safetensors")
    parser.add_argument(
        "--choose-on", metavar="SET", help="evaluation set on which alpha is chosen; default: the first"
    )
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
        from dive_fast.evaluation import weight_ensemble
        from dive_fast.model import towers

        towers.check(config.model)
        weights = find_weights(options.weights, "--weights", run_of(config))
        folder = options.output or run_of(config)

        ranks = join()
    except UserError as error:
        return cli.report_error(error, options)
    try:
        result = weight_ensemble.ensemble(config, weights, ranks, chosen_on=options.choose_on)
    except UserError as error:
        return cli.report_error(error, options)
    if ranks.is_main:
        weight_ensemble.write(result, folder)
        report = result.report
        print(weight_ensemble.table(report))
        print(f"{folder / weight_ensemble.WEIGHTS}: alpha = {report['alpha']:g}, chosen on {report['chosen_on']}")
    ranks.leave()
    return 0
