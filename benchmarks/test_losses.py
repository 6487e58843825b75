"""Verifies every case of the losses, then measures its time and memory (README.md describes the cases)."""

from importlib.util import find_spec

import pytest
import torch
from loss_report import Report
from losses import CASES, DEVICE, INTERPRETED, Case
from measure_losses import measure, ran_out
from pytest_benchmark.fixture import BenchmarkFixture
from verify import expected


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss(case: Case, dtype: torch.dtype, report: Report, benchmark: BenchmarkFixture) -> None:
    if case.competitor.startswith("triton") and not (
        find_spec("triton") and (INTERPRETED or DEVICE.type == "cuda")
    ):
        pytest.skip("needs Triton and a GPU, or TRITON_INTERPRET=1")
    entry = report.begin(case)
    expected(case.operation, case.batch, case.width, dtype)  # cached here, so that its memory does not count
    try:
        report.measured(case, measure(case, dtype, benchmark))
    except RuntimeError as error:
        if not ran_out(error):
            raise
        entry["outcome"] = "out of memory"
    finally:
        report.write()
    if entry["outcome"] == "out of memory":
        # Outside of the handler, since the exception's frames keep the tensors alive.
        torch.cuda.empty_cache()
        pytest.skip("out of memory")
