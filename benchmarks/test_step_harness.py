"""The step benchmarks: every case has an outcome within the time limit, and ratios are within one run."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import measure_steps
import profile_steps
import pytest
import step_turns
import steps
import test_steps
import torch
from loss_report import REPOSITORY
from peers.levers import Levers
from step_report import NAMES, StepReport, draw
from steps import COMPETITORS, NEEDS_GPU, Case, Running

from dive_fast.model import fast_blocks
from dive_fast.model.towers import Towers

CASES = [Case("ViT-tiny", 8, competitor) for competitor in COMPETITORS]
FIGURES = {"mfu": None, "flop": 2e9, "images_per_second": 8.0, "minutes_per_epoch": 30.0}
OPTIMIZER: Any = None  # not used to settle
NO_BENCHMARK: Any = None  # for cases that end before they are timed


def measured(seconds: float, mebibytes: int) -> dict[str, Any]:
    return {
        "outcome": "measured",
        "seconds": seconds,
        "mean_over_median": 1.1,
        "peak_bytes": mebibytes * 2**20,
        **FIGURES,
    }


def report(folder: Path, minutes: float = 9) -> StepReport:
    return StepReport(CASES, {"zero": 0}, minutes, folder)


def outcomes(path: Path) -> dict[str, str]:
    return {entry["competitor"]: entry["outcome"] for entry in json.loads(path.read_text())["cases"]}


def test_report_has_outcome_of_every_case_after_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(case: Case, *_: Any) -> dict[str, Any]:
        if case.competitor == "sequential":
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        assert case.competitor != "cached_teacher", "a wrong loss"
        return measured(1.0, 10)

    monkeypatch.setattr(test_steps, "measure", measure)
    reported, by_name = report(tmp_path), {case.competitor: case for case in CASES}
    expected = dict.fromkeys(COMPETITORS, "not reached")
    for name, ends, outcome in [
        ("flyp_published", None, "measured"),
        ("sequential", pytest.skip.Exception, "out of memory"),
        ("cached_teacher", AssertionError, "failed"),
    ]:
        if ends is None:
            test_steps.test_step(by_name[name], 0, reported, NO_BENCHMARK)
        else:
            with pytest.raises(ends):
                test_steps.test_step(by_name[name], 0, reported, NO_BENCHMARK)
        expected[name] = outcome
        assert outcomes(reported.path) == expected
        assert f"{NAMES[name].strip()} | {outcome if ends else '1.00 s | 1.00x | 1.10'} |" in reported.table()


def test_case_that_may_exceed_time_limit_is_skipped(tmp_path: Path) -> None:
    reported = report(tmp_path, minutes=1)
    reported.record(CASES[0], measured(1.0, 10), seconds=50)
    assert reported.has_time()
    reported.record(CASES[1], measured(1.0, 10), seconds=70)
    assert not reported.has_time()
    with pytest.raises(pytest.skip.Exception, match="not reached"):
        test_steps.test_step(CASES[2], 0, reported, NO_BENCHMARK)


def test_report_ratios_are_to_published_flyp_of_same_size(tmp_path: Path) -> None:
    larger = Case("ViT-tiny", 16, "dive_fast")
    reported = StepReport([*CASES, larger], {}, 9, tmp_path)
    reported.record(CASES[0], measured(2.0, 40))
    reported.record(CASES[1], measured(3.0, 100))
    reported.record(larger, measured(8.0, 80))
    peer, dive, *_, alone = json.loads(reported.path.read_text())["cases"]
    assert (peer["time_ratio"], peer["memory_ratio"]) == (1, 1)
    assert (dive["time_ratio"], dive["memory_ratio"]) == (1.5, 2.5)
    assert "time_ratio" not in alone
    assert "| DiVE as published | 3.00 s | 1.50x | 1.10 | 100 MiB | 2.50x | 0.002 |" in reported.table()


def test_draw_with_unmeasured_cases(tmp_path: Path) -> None:
    reported = report(tmp_path)
    reported.record(CASES[0], {"outcome": "out of memory"})
    reported.record(CASES[1], measured(3.0, 100))
    assert draw(reported.path).read_bytes().startswith(b"\x89PNG")


def test_settle_runs_until_step_is_not_skipped() -> None:
    scales, steps = iter([8.0, 4.0, 4.0, 2.0, 2.0, 2.0]), []
    measure_steps.settle(Running(steps.append, lambda: next(scales), OPTIMIZER), itertools.count())
    assert steps == [0, 1, 2]
    falling = iter(range(100, 0, -1))
    with pytest.raises(AssertionError, match="overflow"):
        measure_steps.settle(Running(lambda _: {}, lambda: next(falling), OPTIMIZER), itertools.count())


def test_each_turn_has_other_texts_and_the_same_images() -> None:
    inputs = [steps.make_inputs("ViT-tiny", 64, 64, turn) for turn in range(steps.NUM_TURNS)]
    prepare = Levers(trimmed_text=True, distinct_texts=True).prepare
    texts = [(each.target_text, each.reference_text) for each in map(prepare, inputs)]
    shapes = {tuple((len(text.tokens), text.length) for text in both) for both in texts}
    assert len(shapes) > 0.75 * steps.NUM_TURNS  # some repeat by chance
    assert all(each.target_images is inputs[0].target_images for each in inputs)


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm>", "products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("fmha_cutlassB_f16_aligned_64x64_k64_sm80", "attention"),
        ("activation_gradient_kernel", "fused layers"),
        ("statistics_kernel", "losses"),
        ("triton_poi_fused_add_mul_sigmoid_3", "compiled"),
        ("void at::native::vectorized_layer_norm_kernel<float, float>", "layer norm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::sigmoid_kernel_cuda>", "element-wise"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdam>", "optimizer"),
        ("void at::native::reduce_kernel<512, 1>", "reductions"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
    ],
)
def test_profile_classifies_kernels_by_name(kernel: str, group: str) -> None:
    assert profile_steps.class_of(kernel, profile_steps.our_kernels()) == group


def test_steps_in_turns_share_weights_and_moments_but_no_modules() -> None:
    model = steps.random_model("ViT-tiny")
    first, second = map(step_turns.share_parameters, (model, model))
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    fast_blocks.install(Towers(first))
    assert type(first.visual.transformer) is not type(second.visual.transformer)
    optimizers = [torch.optim.AdamW(each.parameters()) for each in (first, second)]
    for parameter in first.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizers[0].step()
    step_turns.share_moments(*optimizers)
    optimizers[1].step()
    assert {float(state["step"]) for state in optimizers[0].state.values()} == {2.0}
    with torch.no_grad():  # other tests use the model
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.grad = None
            parameter.copy_(value)


def test_steps_in_turns_report_medians_of_ratios_within_rounds() -> None:
    flop = {step_turns.FLYP: 100, step_turns.DIVE: 200, "dive_fast": 50}
    rounds = [
        {step_turns.FLYP: 1.0, step_turns.DIVE: 2.0, "dive_fast": 0.5},
        {step_turns.FLYP: 10.0, step_turns.DIVE: 40.0, "dive_fast": 1.0},
        {step_turns.FLYP: 1.0, step_turns.DIVE: 3.0, "dive_fast": 0.9},
    ]
    row = step_turns.summarize(flop, rounds)["dive_fast"]
    assert row["seconds"] == 0.9
    assert row["time_over_flyp_published"] == 0.5
    assert row["time_over_dive_published"] == 0.25
    assert (row["flop_over_flyp_published"], row["flop_over_dive_published"]) == (0.5, 0.25)
    assert "| DiVE, dive_fast | 0.90 | 0.25 | 0.25 | 0.50 | 0.50 |" in step_turns.table({"dive_fast": row})


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the results of a tiny run."""
    folder = tmp_path_factory.mktemp("tiny")
    call("benchmarks/steps.py", "--results", str(folder))
    return folder


def call(*command: str) -> str:
    """Output of a script."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    # pytest-benchmark measures nothing in a worker of xdist; the new process is not a worker.
    environment.pop("PYTEST_XDIST_WORKER", None)
    run = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
def test_tiny_run_writes_figures_and_picture(tiny_run: Path) -> None:
    assert outcomes(tiny_run / "cpu-steps.json") == {
        name: "needs a GPU" if name in NEEDS_GPU else "measured" for name in COMPETITORS
    }
    entries = {e["competitor"]: e for e in json.loads((tiny_run / "cpu-steps.json").read_text())["cases"]}
    # Arithmetic and memory are reproducible, wall time is not.
    assert entries["trimmed_text"]["flop"] < entries["dive_published"]["flop"]
    assert entries["cached_teacher"]["flop"] < entries["dive_published"]["flop"]
    assert entries["sequential"]["flop"] == entries["dive_published"]["flop"]
    assert entries["sequential"]["peak_bytes"] < entries["dive_published"]["peak_bytes"]
    assert entries["dive_fast"]["flop"] < entries["dive_published"]["flop"]
    assert (tiny_run / "cpu-steps.png").is_file()


@pytest.mark.slow  # tests/planner/test_plan.py also compares plans with steps
def test_plans_match_measured_steps(tiny_run: Path) -> None:
    picture = tiny_run / "planned.png"
    printed = call("benchmarks/planned.py", "--against", str(tiny_run / "cpu-steps.json"), "--draw", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ViT-tiny")]
    assert [row[1].strip("`") for row in rows] == [
        "flyp_fast",
        "dive_fast",
        "dive_fast_plain",
        "dive_fast_joint",
        "dive_fast, B' = 4",
    ]
    for *_, memory, flop, time in rows:
        assert float(memory) == pytest.approx(1, abs=0.02)
        assert float(flop) == pytest.approx(1, abs=0.02)
        assert not time.strip(" |"), "a CPU has no published rates"
    assert re.search(r"^measured: memory (0.9|1.0)\d to 1.0\d$", printed, re.MULTILINE)
