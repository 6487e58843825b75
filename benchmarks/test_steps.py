"""Measures time, memory and arithmetic of every case of the steps (README.md describes the cases)."""

import gc
import time

import pytest
import torch
from losses import DEVICE
from measure_losses import ran_out
from measure_steps import measure
from pytest_benchmark.fixture import BenchmarkFixture
from step_report import StepReport
from steps import CASES, NEEDS_GPU, Case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(case: Case, zero: int, step_report: StepReport, benchmark: BenchmarkFixture) -> None:
    if not step_report.has_time():
        pytest.skip("not reached within the time limit")
    if case.competitor in NEEDS_GPU and DEVICE.type != "cuda":
        step_report.record(case, {"outcome": "needs a GPU"})
        pytest.skip("needs a GPU")
    start, figures = time.monotonic(), {"outcome": "failed"}
    step_report.record(case, figures)  # replaced below, unless the process dies
    try:
        figures = measure(case, zero, benchmark)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        figures = {"outcome": "out of memory"}
    finally:
        step_report.record(case, figures, time.monotonic() - start)
    # Outside of the handler, since the exception's frames keep the tensors alive.
    gc.collect()
    torch.cuda.empty_cache()
    if figures["outcome"] == "out of memory":
        pytest.skip("out of memory")
