"""Command-line options of the benchmarks, and their tables at the end of a run.

This folder is not a package, so that pytest does not put the repository's root on the path, where its ``kernels``
would hide Hugging Face's package of that name.
"""

from pathlib import Path

import pytest
import torch
from loss_report import Report
from step_report import StepReport

REPORT = pytest.StashKey[Report]()
STEP_REPORT = pytest.StashKey[StepReport]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dive_fast benchmarks")
    group.addoption(
        "--dtype", choices=["float16", "bfloat16", "float32"], default="float16", help="dtype of features"
    )
    group.addoption("--results", type=Path, help="folder for the JSON file (benchmarks/README.md has the default)")
    group.addoption(
        "--minutes", type=float, default=9, help="for steps: time limit; cases that may exceed it are skipped"
    )
    group.addoption("--zero", type=int, help="for steps: DeepSpeed's ZeRO stage")


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Report:
    options = request.config.option
    created = Report(getattr(options, "dtype", "float16"), getattr(options, "results", None))
    return request.config.stash.setdefault(REPORT, created)


@pytest.fixture(scope="session")
def dtype(report: Report) -> torch.dtype:
    return getattr(torch, report.dtype)


@pytest.fixture(scope="session")
def zero(request: pytest.FixtureRequest) -> int:
    from steps import ZERO  # imported here, since the losses do not need DeepSpeed

    stage = request.config.option.zero
    return ZERO if stage is None else stage


@pytest.fixture(scope="session")
def step_report(request: pytest.FixtureRequest, zero: int) -> StepReport:
    from steps import CASES, PRECISION

    options = request.config.option
    created = StepReport(CASES, {"zero": zero, "precision": PRECISION}, options.minutes, options.results)
    return request.config.stash.setdefault(STEP_REPORT, created)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if (report := config.stash.get(REPORT, None)) and report.entries:
        terminalreporter.write_line(f"\n{report.table()}\n\n{report.times()}\n\n{report.path}")
        if summary := report.summary():
            terminalreporter.write_line(f"measured: {summary}")
    if step_report := config.stash.get(STEP_REPORT, None):
        terminalreporter.write_line(f"\n{step_report.table()}\n\n{step_report.path}")
