"""Fine-tunes CLIP: ``dive-fast train --config vitl14_dive.json [section.key=value ...]``.

``--dry-run`` prints FLOP, memory and time of a step instead, without a GPU, data, weights or network.
"""

import argparse
import gc
import json
import os
import sys
import warnings
from typing import TYPE_CHECKING

from dive_fast.commands import cli
from dive_fast.commands.lean_imports import lean_imports
from dive_fast.planner.gpu_specs import GPUS

if TYPE_CHECKING:
    from dive_fast.config.schema import Config


@cli.guarded
def main(arguments: list[str] | None = None) -> int:
    """Runs the command; a user's mistake becomes one line and exit code 2."""
    parser = cli.parser(__doc__, "train.epochs=1")
    planning = parser.add_argument_group("planning")
    planning.add_argument("--dry-run", action="store_true", help="print FLOP, memory and time of a step, and exit")
    planning.add_argument("--json", action="store_true", help="print the plan as a JSON object on the last line")
    planning.add_argument(
        "--ranks", type=cli.count(1), help="number of GPUs to plan for; default: WORLD_SIZE, or 1"
    )
    planning.add_argument("--device", choices=GPUS, help="plan only for this GPU")
    options = parser.parse_intermixed_args(arguments)
    if not options.dry_run and (options.json or options.ranks or options.device):
        parser.error("--json, --ranks and --device require --dry-run")

    # Heavy imports follow later, so that a typo is reported at once.
    from dive_fast.errors import UserError
    from dive_fast.evaluation.early_checks import MODEL, PROMPTS, check_training

    try:
        announcement = "" if options.json else f"{options.config}: the config is valid; loading libraries"
        check = None if options.dry_run else check_training
        config = cli.load_config(options.config, options.overrides, announcement, check)
        if options.dry_run:
            return dry_run(config, options)
        with lean_imports():
            from dive_fast.checkpoint.saver import SaveError
            from dive_fast.distributed import join
            from dive_fast.fault_tolerance.heartbeat import STOPPED, LostError
            from dive_fast.fault_tolerance.nonfinite import NonFiniteError
            from dive_fast.training.loop import Stopped, train
            from dive_fast.training.metrics import MetricsError

        ranks = join(config.train.rank_timeout)
    except UserError as error:
        return cli.report_error(error, options)
    folder = cli.run_folder(config.train.output, options.config)
    try:
        train(config, folder, ranks)
    except UserError as error:
        return cli.report_error(error, options)
    except Stopped as stopped:
        if ranks.is_main:
            print(f"{stopped}; restart the same command to resume", file=sys.stderr)
        return STOPPED
    except (SaveError, NonFiniteError, MetricsError) as error:
        cli.report_error(error, options)
        return 1
    except LostError as error:
        print(
            f"rank {ranks.rank}: error: {error}; restart the same command to resume from the newest checkpoint",
            file=sys.stderr,
        )
        return error.code
    if ranks.is_main:
        name, file = ("prompts", PROMPTS) if (folder / PROMPTS).is_file() else ("model", MODEL)
        print(f"\n{name}: {folder}/{file}, described in README.md")
        print(f"report: {folder}/report.md, .json and .png; metrics of each step: metrics.jsonl")
    ranks.leave()
    return 0


def dry_run(config: "Config", options: argparse.Namespace) -> int:
    """Prints the plan of a config on rank 0.

    Raises:
        ConfigError: as :func:`dive_fast.planner.simulate.plan_run`.
        UserError: ``WORLD_SIZE`` is not a number.
    """
    from dive_fast.errors import UserError

    if (rank := os.environ.get("RANK", "0")) != "0":
        print(f"--dry-run: RANK = {rank} is set, and only rank 0 prints the plan; unset RANK", file=sys.stderr)
        return 0
    try:
        ranks = options.ranks or cli.count(1)(os.environ.get("WORLD_SIZE", "1"))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"WORLD_SIZE = {error}; unset it, or set --ranks") from error
    # Set before torch and Hugging Face are imported, so that neither uses a GPU or the network.
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    with lean_imports():
        from dive_fast.planner.advice import advise
        from dive_fast.planner.auto_schedule import choose, with_schedule
        from dive_fast.planner.simulate import plan_run
        from dive_fast.planner.table import as_json, as_table
    gc.freeze()  # collections during the simulation visit what it creates alone

    gpus = [options.device] if options.device else list(GPUS)
    if config.train.schedule == "auto":
        config = with_schedule(config, choose(config, ranks, gpus[0]))
        print(f"schedule         {config.train.schedule}, chosen for {gpus[0]}")
    plan = plan_run(config, ranks)
    advice = advise(config, plan, gpus)
    print(as_table(plan, gpus, advice))
    if options.json:
        print(json.dumps(as_json(plan, gpus, advice)))
    return 0
