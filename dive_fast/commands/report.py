"""Compares any runs in one table and one trade-off chart: ``dive-fast report runs/*``.

Reads ``report.json`` of finished runs, and ``results.jsonl`` of ``dive-fast evaluate``. See docs/sweep.md.
"""

import argparse
from pathlib import Path

from dive_fast.commands import cli


@cli.guarded
def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 2 for a user's mistake, or if no folder has results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders that hold some")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/report"), help="output folder; default: %(default)s"
    )
    parser.add_argument("--html", action="store_true", help="write report.html too, a page in one file")
    parser.add_argument(
        "--id", metavar="SET", help="set of the horizontal axis; default: the ID set that most runs have"
    )
    cli.add_kept(parser)
    options = parser.parse_intermixed_args(arguments)

    from dive_fast.errors import UserError
    from dive_fast.sweep.run_results import read_runs
    from dive_fast.sweep.runs_report import write_runs_report
    from dive_fast.sweep.runs_table import compare_runs, find_axes, table_text

    try:
        table = compare_runs(read_runs(options.runs))
        axes = find_axes(table, options.id, tuple(options.kept or ()))
        print(table_text("Runs", table, axes))
        if not any(table.values):
            return 2
        written = write_runs_report(table, axes, options.output, options.html)
    except UserError as error:
        return cli.report_error(error, options)
    print(f"\n{options.output}/{', '.join(written)}")
    return 0
