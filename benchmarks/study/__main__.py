"""The study: ``python -m study run``, then ``python -m study report``, in ``benchmarks``.

``run`` works off the plan, one line of results for each run; the same command resumes after a kill.
With ``--settings small`` the plan has the settings that the grid of that size has chosen, and no grid; with
``--part weights`` it has the methods in weight space, and FLYP and DiVE next to them; with ``--part attacks`` the
methods that are compared under attack; with ``--part prompts`` learned prompts after an update of the model.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from loss_report import REPOSITORY

from dive_fast.distributed import join
from dive_fast.errors import ConfigError
from study import prompt_runs, prompt_tables, results, robustness_tables
from study import summary as report
from study.experiments import SEEDS, Rows, complete, in_weight_space, plan, settled, under_attack
from study.methods import UNDECAYED
from study.robustness import is_measured
from study.runs import PRETRAINED, SIZES, Run, Study

FOLDER = REPOSITORY / "build/study"


def main() -> None:
    """Parses and does one of the three."""
    begun = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of data, models and runs")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks/results")
    parser.add_argument("--settings", choices=SIZES, help="use the settings that the grid of this size has chosen")
    parser.add_argument("--worlds", nargs="+", choices=report.WORLDS, default=list(report.WORLDS))
    parser.add_argument("--part", choices=["all", "weights", "attacks", "prompts"], default="all")
    parser.add_argument("--minutes", type=float, help="time limit after which no run starts")
    parser.add_argument("what", choices=["run", "plan", "report"])
    options = parser.parse_args()
    path = options.results / f"study-{options.size}.jsonl"
    prompts = options.results / f"study-{options.size}-prompts.jsonl"
    grid = None
    if options.settings is not None:
        grid = results.latest(results.read(REPOSITORY / f"benchmarks/results/study-{options.settings}.jsonl"))
    if options.what == "report":
        rows = results.latest(results.read(path))
        further = robustness_tables.lines(rows, options.size, options.results)
        further += prompt_tables.lines(prompt_runs.latest(results.read(prompts)), options.size, options.results)
        print(report.write(rows, options.size, options.results, grid, further).read_text())
        return
    study = Study(options.folder, options.size, join())
    if options.part == "prompts":
        update = prompt_runs.PromptStudy(options.folder, options.size, study.size.shape, study.ranks)
        update.work(prompts, options.minutes, begun, dry=options.what == "plan")
        return
    study.prepare(tuple(options.worlds))

    def planned(rows: Rows) -> list[Run]:
        if grid is not None:
            return settled(grid, options.worlds)
        if options.part == "weights":
            return in_weight_space(rows, study.digests)
        if options.part == "attacks":
            return under_attack(rows, study.digests)
        return [run for run in plan(rows, study.size, study.digests) if run.world in options.worlds]

    work(
        study, path, planned, options.minutes, begun, dry=options.what == "plan", attacks=options.part == "attacks"
    )


def work(
    study: Study,
    path: Path,
    planned: Callable[[Rows], list[Run]],
    minutes: float | None = None,
    begun: float = 0.0,
    *,
    dry: bool = False,
    attacks: bool = False,
) -> None:
    """Works off a plan.

    Args:
        path: of the results.
        planned: which runs, from the results so far.
        begun: when the minutes began, by ``time.perf_counter``.
        dry: only say what is left.
        attacks: measure robustness too; results without it are measured again.
    """
    impossible = set[Run]()
    while minutes is None or time.perf_counter() - begun < 60 * minutes:
        rows = [row for row in results.latest(results.read(path)) if row["world"] in study.digests]
        measured = [row for row in complete(rows) if is_measured(row) or not attacks]
        left = [
            run for run in planned(rows) if run not in impossible and not results.has(measured, study.key(run))
        ]
        if dry:
            print("\n".join(map(str, left)), f"{len(left)} runs left", sep="\n")
            return
        if not left:
            return
        run = left[0]
        try:
            study.config(run)
        except ConfigError as error:
            impossible.add(run)
            print(f"left out: {run}: {error}", flush=True)
            continue
        first = {"method": PRETRAINED, "world": run.world, "model": study.digests[run.world]}
        if not results.has(measured, first):
            results.append(path, study.pretrained_row(run, attacks=attacks))
        # What is run again with other seeds, and is no sweep, is what was chosen. Ensembles need UNDECAYED's.
        is_kept = attacks or (run.is_plain() and (run.seed == SEEDS[1] or run.method == UNDECAYED))
        keep = study.folder / "weights" if is_kept else None
        row = study.measure(run, keep, attacks=attacks)
        results.append(path, row)
        print(f"{row['seconds']:.0f} s, {len(left) - 1} left: {row}", flush=True)


if __name__ == "__main__":
    main()
