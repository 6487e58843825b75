"""Weight ensembles of a run with its pre-trained model: ``python launch/ensemble.py --config vitb16_dive.json``.

Alpha is chosen on ID validation, which is the config's first evaluation set unless ``--choose-on`` names another.
"""

import logging
import sys
from pathlib import Path

import cli


@cli.guarded
def main(arguments: list[str] | None = None) -> int:
    """Parses, calls, and turns a user's mistake into one line and exit code 2."""
    parser = cli.parser(__doc__, "train.output=runs/mine")
    parser.add_argument("--weights", type=Path, help="fine-tuned ones; default: the run's model.safetensors")
    parser.add_argument("--choose-on", metavar="SET", help="evaluation set that alpha is chosen on")
    parser.add_argument("--output", type=Path, help="folder; default: the run's")
    options = parser.parse_intermixed_args(arguments)

    # Only pydantic so far: a typo is told at once.
    from dive_fast.errors import UserError
    from dive_fast.methods.run_config import load_run_config

    try:
        config = load_run_config(options.config, options.overrides, cli.CONFIGS)
        from dive_fast.distributed import join
        from dive_fast.evaluate import weight_ensemble as ensemble
        from dive_fast.evaluate.early_checks import check_output, find_weights
        from dive_fast.model import towers

        run = cli.run_folder(config.train.output, options.config)
        weights = find_weights(options.weights, "--weights", run)
        folder = options.output or run
        check_output(folder)
        towers.check(config.model)

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        ranks = join()
    except UserError as error:
        return cli.report_error(error, options)
    try:
        found = ensemble.ensemble(config, weights, ranks, chosen_on=options.choose_on)
    except UserError as error:
        return cli.report_error(error, options)
    if ranks.is_main:
        ensemble.write(found, folder)
        report = found.report
        print(ensemble.table(report))
        print(f"{folder / ensemble.WEIGHTS}: alpha = {report['alpha']:g}, chosen on {report['chosen_on']}")
    ranks.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
