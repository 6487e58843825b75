"""Runs a grid of short runs and recommends a setting.

``dive-fast sweep --config mine.yaml --over objective.weight=10,100,1000 train.learning_rate=1e-5,3e-5 --steps 99``

All runs share one teacher cache, and the same command resumes an interrupted sweep. Of the settings whose ID
validation is within 1 point of the best one, that of the largest weight is recommended, or otherwise the one that
keeps most. See docs/sweep.md.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dive_fast.commands import cli
from dive_fast.commands.launcher import count_ranks, launcher_command, launcher_environment
from dive_fast.config.shipped import CONFIGS

if TYPE_CHECKING:
    from dive_fast.config.schema import Config
    from dive_fast.sweep.grid import Planned
    from dive_fast.sweep.runner import Outcome
    from dive_fast.sweep.sweep_summary import Sweep


@cli.guarded
def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 1 if a run failed, 2 for a user's mistake, 75 if the sweep was asked to stop."""
    options = _parser().parse_intermixed_args(arguments)
    # Overrides that follow the names of sets are not names.
    options.overrides += [word for word in options.kept or () if "=" in word]
    options.kept = tuple(word for word in options.kept or () if "=" not in word)

    # Heavy imports follow later, so that a typo is reported at once.
    from dive_fast.errors import UserError
    from dive_fast.locks import folder_lock

    try:
        sweep, gpus = _plan(options)
        with folder_lock(sweep.folder, "sweep folder", remedy="name another folder by --output"):
            return _run_all(sweep, gpus, options)
    except UserError as error:
        return cli.report_error(error, options)


def _plan(options: argparse.Namespace) -> "tuple[Sweep, int | None]":
    """The validated sweep, and the GPUs of each run.

    Raises:
        UserError: a mistake in the grid, or in the config of one of its runs.
    """
    from dive_fast.sweep.grid import describe_over, parse_over, plan, short_runs
    from dive_fast.sweep.sweep_summary import Selection, Sweep, id_validation, kept_text

    over = parse_over(options.over, options.seeds)
    named = {*over, *(override.partition("=")[0] for override in options.overrides)}
    first = [f"{key}={values[0].text}" for key, values in over.items()]
    length = short_runs(
        *(named, options.steps, options.epochs),
        lambda: _load(options.config, [*options.overrides, *first]).train.warmup_steps,
    )
    overrides, output = [*options.overrides, *length], options.output
    runs = plan(over, overrides, output, lambda each: _load(options.config, each))
    id_name = id_validation(_load(options.config, runs[0].overrides).evaluate, options.id, options.kept)
    print(f"sweep: {len(runs)} run{'s' * (len(runs) != 1)} in {output}: {describe_over(over)}")
    if length:
        print(f"short runs: {' '.join(length)}")
    print(f"ID validation: {id_name}; kept: the mean of {kept_text(options.kept)}", flush=True)
    gpus = None if options.gpus is None else count_ranks(options.gpus)
    # Again with the options of the methods, whose import takes seconds.
    planned = plan(over, overrides, output, lambda each: cli.load_config(options.config, each))
    full = ["dive-fast", "train", "--config", options.config]
    full += [] if gpus is None else ["--gpus", str(gpus)]
    selection = Selection(id_name, options.kept, options.within / 100)
    return Sweep(output, over, tuple(planned), selection, (*full, *options.overrides)), gpus


def _train_command(config: str, gpus: int | None, overrides: Sequence[str]) -> list[str]:
    """The command line of a run: in one process, or under DeepSpeed's launcher."""
    arguments = ["--config", config, *overrides]
    if gpus is not None and gpus > 1:
        return launcher_command("train", arguments, gpus)
    return [sys.executable, "-m", "dive_fast.launch.train", *arguments]


def _load(config: str, overrides: Sequence[str]) -> "Config":
    """A config, validated by pydantic alone, without the options of methods."""
    from dive_fast.config.load import load_config
    from dive_fast.config.schema import Config

    return load_config(config, overrides, CONFIGS, Config)


def _run_all(sweep: "Sweep", gpus: int | None, options: argparse.Namespace) -> int:
    """Runs what has not finished, and summarizes all runs; returns the exit code."""
    from dive_fast.fault_tolerance.heartbeat import STOPPED
    from dive_fast.sweep.runner import Interrupted, Runner
    from dive_fast.sweep.sweep_summary import summarize, text_of, write_summary

    outcomes: list[Outcome | None] = [None] * len(sweep.planned)
    runner = Runner(partial(_train_command, options.config, gpus), launcher_environment())
    is_stopped, seconds = False, list[float]()
    with runner.handling_signals():
        try:
            for index, run in enumerate(sweep.planned):
                print(f"[{index + 1}/{len(outcomes)}] {run.label}: ", end="", flush=True)
                started = time.monotonic()
                outcome = outcomes[index] = runner.run(run, sweep.folder / run.name, options.check)
                if not outcome.was_finished:
                    seconds.append(time.monotonic() - started)
                print(_line(sweep, run, outcome, seconds, len(outcomes) - index - 1), flush=True)
        except Interrupted:
            is_stopped = True
            print("stopped", flush=True)
    summary = summarize(sweep, outcomes)
    written = ", ".join(write_summary(summary))
    print(f"\n{text_of(summary)}\n{sweep.folder}/{written}")
    if is_stopped:
        print("the sweep was asked to stop; restart the same command to resume", file=sys.stderr)
        return STOPPED
    failed = [
        (run, outcome) for run, outcome in zip(sweep.planned, outcomes) if outcome and not outcome.is_finished
    ]
    for run, outcome in failed:
        print(f"error: {sweep.folder / run.name}: {outcome.error}", file=sys.stderr)
    return 1 if failed else 0


def _line(sweep: "Sweep", run: "Planned", outcome: "Outcome", seconds: Sequence[float], left: int) -> str:
    """The result of a run in one line, with the time that is left."""
    from dive_fast.sweep.runner import LOG
    from dive_fast.sweep.sweep_summary import run_line

    folder = sweep.folder / run.name
    if not outcome.is_finished:
        return f"failed, {outcome.error} ({folder / LOG})"
    text = run_line(folder, sweep.selection)
    if outcome.was_finished:
        return f"{text}, finished before"
    text += f", {(outcome.seconds or 0.0) / 60:.1f} min"
    if not left:
        return text
    minutes = left * sum(seconds) / len(seconds) / 60
    return f"{text}; {f'about {minutes:.0f}' if minutes >= 1 else 'less than 1'} min left"


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, "train.precision=bf16")
    grid = parser.add_argument_group("grid")
    grid.add_argument(
        "--over",
        nargs="+",
        action="extend",
        required=True,
        metavar="section.key=value,value",
        help="keys and the values to try; all combinations are run. Commas in brackets and quotes do not separate",
    )
    grid.add_argument("--seeds", metavar="0,1", help="values of train.seed to run each setting with")
    length = parser.add_argument_group("runs")
    length.add_argument(
        "--steps", type=cli.count(1), help="steps of each run (train.max_steps); a warm-up too long for it is cut"
    )
    length.add_argument("--epochs", type=cli.count(1), help="epochs of each run (train.epochs)")
    length.add_argument("--gpus", metavar="N", help="GPUs of each run, or all; runs follow one another")
    length.add_argument(
        "--output", type=Path, default=Path("runs/sweep"), help="folder of the sweep; default: %(default)s"
    )
    length.add_argument(
        "--check",
        action="store_true",
        help="start finished runs too, which validates that data and model have not changed since",
    )
    choice = parser.add_argument_group("choice")
    choice.add_argument(
        "--id", metavar="SET", help="ID validation; default: evaluate.select, or the first set of role id"
    )
    cli.add_kept(choice)
    choice.add_argument(
        "--within",
        type=_margin,
        default=1.0,
        metavar="POINTS",
        help="largest distance to the best ID validation, in points; default: %(default)g",
    )
    return parser


def _margin(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 100:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of points, from 0 to 100")
    return number
