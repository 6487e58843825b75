"""The loss benchmarks: wrong results are rejected, memory is exact, and reports are atomic."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ceiling
import loss_report as report_module
import losses
import pytest
import test_losses
import torch
import verify
from ceiling import Ceiling
from loss_report import REPOSITORY, Report, write_json
from losses import CASES, COMPETITORS, DEVICE, LEAVES, Case, Inputs
from measure_losses import peak_extra_bytes

from dive_fast.kernels import naive

BATCH, WIDTH = 33, 48
NO_BENCHMARK: Any = None  # for cases that must end before they are timed


@pytest.mark.parametrize("operation", LEAVES)
def test_evaluate_in_chunks_equals_naive(operation: str) -> None:
    inputs = verify.in_float64(losses.make_inputs(BATCH, WIDTH, torch.float16))
    scale = torch.tensor(3.0, device=DEVICE, dtype=torch.float64)

    def in_one(inputs: Inputs, operation: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        if operation == "contrastive":
            return naive.contrastive_loss(*inputs[:3]), None
        part = naive.difference_loss(*inputs[3:]) if operation == "difference" else naive.dive_loss(*inputs)
        return part.loss, part.average_vector

    expected = losses.step(in_one, inputs, operation, scale)
    actual = verify.evaluate(inputs, operation, scale, rows=7)
    assert max(verify.relative_errors(actual, expected).values()) < 1e-12


def with_factor_on_gradient(loss: losses.Loss, name: str, factor: float) -> losses.Loss:
    def wrong(inputs: Inputs, operation: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        passed = getattr(inputs, name) * 1
        passed.register_hook(lambda gradient: gradient * factor)
        return loss(inputs._replace(**{name: passed}), operation)

    return wrong


def test_competitor_without_gradient_of_the_scale_is_verified() -> None:
    def fixed_scale(inputs: Inputs, operation: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return naive.contrastive_loss(*inputs[:2], inputs.logit_scale.detach()), None

    case, scale = Case("contrastive", BATCH, WIDTH, "memeff"), losses.loss_scale(BATCH, torch.float16)
    truth, naive_errors = verify.expected(case.operation, BATCH, WIDTH, torch.float16)
    outputs = losses.step(fixed_scale, losses.make_inputs(BATCH, WIDTH, torch.float16), case.operation, scale)
    assert "gradient of logit_scale" not in outputs
    assert verify.check(outputs, truth, naive_errors, case).keys() == outputs.keys()
    with pytest.raises(AssertionError, match="logit_scale"):
        verify.check(outputs, truth, naive_errors, case._replace(competitor="naive"))
    del outputs["gradient of text_features"]
    with pytest.raises(AssertionError, match="text_features"):
        verify.check(outputs, truth, naive_errors, case)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
@pytest.mark.parametrize("name", ["text_features", "reference_image_features", "logit_scale"])
@pytest.mark.parametrize(("competitor", "dtype"), [("naive", "float16"), ("eager", "float32")])
def test_wrong_gradient_is_rejected_by_name(
    competitor: str, dtype: str, name: str, factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMPETITORS, competitor, with_factor_on_gradient(COMPETITORS[competitor], name, factor))
    case, report = Case("joint", BATCH, WIDTH, competitor), Report(dtype, tmp_path)
    with pytest.raises(AssertionError, match=f"{competitor}: gradient of {name} "):
        test_losses.test_loss(case, getattr(torch, dtype), report, NO_BENCHMARK)
    (entry,) = json.loads(report.path.read_text())["cases"]
    assert entry == {**case._asdict(), "outcome": "failed"}
    assert "| failed |" in report.table()


def test_out_of_memory_is_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(inputs: Inputs, operation: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise torch.OutOfMemoryError

    monkeypatch.setitem(COMPETITORS, "eager", too_large)
    report = Report("float16", tmp_path)
    with pytest.raises(pytest.skip.Exception, match="out of memory"):
        test_losses.test_loss(Case("joint", BATCH, WIDTH, "eager"), torch.float16, report, NO_BENCHMARK)
    assert [entry["outcome"] for entry in report.entries] == ["out of memory"]


def test_ceiling_counts_minimal_work() -> None:
    half, full = torch.float16, torch.float32
    slow_products, slow_memory = Ceiling(1.0, 1e12), Ceiling(1e12, 1.0)
    contrastive, difference, joint = (
        Case(operation, 4, 8, "triton") for operation in ("contrastive", "difference", "joint")
    )
    matrix = 4 * 8
    assert slow_products.seconds(contrastive, half) == slow_products.seconds(joint, half) == 6 * 4 * matrix
    # Two matrices read, two gradients written; teachers are fp32.
    assert slow_memory.seconds(contrastive, half) == 4 * 2 * matrix
    assert slow_memory.seconds(difference, half) == (4 * 2 + 2 * 4) * matrix
    assert slow_memory.seconds(joint, full) == (8 * 4 + 2 * 4) * matrix
    assert slow_products.seconds(difference, half) < 1e-8
    measured = ceiling.measure(full)
    assert 1e8 < measured.flop_per_second < 1e16
    assert 1e8 < measured.bytes_per_second < 1e14


def test_peak_extra_bytes_is_exact() -> None:
    matrix = torch.ones(256, 256, device=DEVICE)
    assert peak_extra_bytes(lambda: matrix + matrix) == matrix.nbytes
    assert peak_extra_bytes(lambda: ((matrix + matrix) + matrix) + matrix) == 2 * matrix.nbytes
    assert peak_extra_bytes(lambda: matrix.T) == 0


def test_write_json_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    write_json(path, {"cases": [1]})
    with pytest.raises(TypeError):
        write_json(path, {"cases": [2], "not for JSON": object()})
    assert json.loads(path.read_text()) == {"cases": [1]}
    assert list(path.parent.iterdir()) == [path]


def test_report_path_is_results_only_for_complete_gpu_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, entries, folder in [
        ("cuda", CASES, "benchmarks/results"),
        ("cuda", CASES[1:], "build/benchmarks"),
        ("cpu", CASES, "build/benchmarks"),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
        monkeypatch.setattr(report_module, "DEVICE", torch.device(device))
        report = Report("float16")
        for case in entries:
            report.begin(case)
        name = "nvidia-h200-losses" if device == "cuda" else "cpu-losses"
        name += "-part" if device == "cuda" and len(entries) < len(CASES) else ""
        assert report.path == REPOSITORY / folder / f"{name}.json"


def test_complete_run_replaces_partial_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(report_module, "DEVICE", torch.device("cuda"))
    report = Report("float16", tmp_path)
    report.begin(CASES[0])
    report.write()
    assert [path.name for path in tmp_path.iterdir()] == ["nvidia-h200-losses-part.json"]
    for case in CASES[1:]:
        report.begin(case)
    report.write()
    assert [path.name for path in tmp_path.iterdir()] == ["nvidia-h200-losses.json"]


def test_tiny_run_prints_table(tmp_path: Path) -> None:
    # -P keeps the repository's root with its folder `kernels` off the path.
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "benchmarks/test_losses.py",
        "-k",
        "not difference and not compiled and not joint-33x48-triton or apart",
        "-p",
        "interpreted",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY / "tests")}
    # pytest-benchmark measures nothing in a worker of xdist; the new process is not a worker.
    environment.pop("PYTEST_XDIST_WORKER", None)
    command += ["--results", str(tmp_path), "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"| joint {BATCH} x {WIDTH} | " in run.stdout
    content = json.loads((tmp_path / "cpu-losses.json").read_text())
    assert content["interpreted"]
    assert {entry["outcome"] for entry in content["cases"]} == {"measured"}
    assert all(0 < entry["share_of_ceiling"] < 1 for entry in content["cases"])
    assert {entry["competitor"] for entry in content["cases"]} == COMPETITORS.keys() - {"compiled"}
