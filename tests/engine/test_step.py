"""Tests of every fast path of the step against the equations of the paper.

The oracle uses one process, one joint graph, an online teacher, all 77 tokens, fp32 and open_clip's model, and
nothing of the engine. Student and teacher differ and the average vector is not zero, so no term vanishes.
"""

import contextlib
import dataclasses
import itertools
import math
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_ranks
from step_oracle import FP16_SCALE, Stage, assert_same_gradients, oracle
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dive_fast.checkpoint.export import full_state
from dive_fast.engine.async_scalars import AsyncScalars
from dive_fast.engine.step import StepBatches
from dive_fast.methods.method import Part
from dive_fast.model.fast_blocks import FastModule

aten = torch.ops.aten

STAGES = {1: (0, 2), 2: (0, 1, 2, 3)}
"""Number of ranks -> tested ZeRO stages."""
PATHS = list(itertools.product(["sequential", "joint"], [None, 3]))
"""(schedule, micro-batch size); 3 does not divide a rank's batch, and gives more pieces than distinct texts."""
RECOMPUTED = ("selective", "full")
"""Modes of activation checkpointing."""
METHODS = ("vanilla_ft", "flyp", "flyp_replay", "snd", "cosine", "avl", "pvl")
"""All methods except DiVE and LP-FT, whose loss is that of vanilla fine-tuning."""
ONE_TOWER = ("vanilla_ft", "snd")
"""Methods with a half that runs only one tower; tested at every stage."""
CLIPPED = [("fp32", 0.0), ("fp32", 0.5), ("fp16", 0.5)]
"""(precision, largest norm of the gradient)."""
NONBLOCKING: list[dict[str, Any]] = [
    {},
    {"precision": "fp16"},
    {"micro": 3},
    {"schedule": "joint"},
    {"clipping": 1.0},
    {"name": "tracer_dive"},
]
"""Options of steps that must not wait for the device."""


def run_paths(folder: Path, stages: tuple[int, ...], backend: Any) -> dict[Any, Any]:
    """Gradients, metrics and average vector of every path through the step on one rank, and of further cases."""
    Part.backend = backend
    stage = Stage(folder)
    results: dict[Any, Any] = {}
    for zero, (schedule, micro) in itertools.product(stages, PATHS):
        engine = stage.engine(zero, schedule, micro)
        results[zero, schedule, micro] = *stage.accumulate(engine), engine.method.state()["average_vector"]
        engine.deepspeed.destroy()
    for name, (schedule, micro) in itertools.product(METHODS, PATHS[::3]):
        for zero in stages if name in ONE_TOWER else stages[-1:]:
            # With overlapped communication, ZeRO-1 reduces only gradients that the last backward computes.
            step = stage.accumulate(stage.engine(zero, schedule, micro, name=name, overlap=True))
            results.setdefault((name, schedule, micro), {})[zero] = step
    for zero in stages:
        results["fp16", zero] = stage.accumulate(stage.engine(zero, precision="fp16"))
        results["bf16", zero] = stage.accumulate(stage.engine(zero, precision="bf16"))
        for precision in ("fp32", "fp16"):
            results["plain blocks", zero, precision] = stage.accumulate(
                stage.engine(zero, precision=precision, fast_blocks=False)
            )
        for mode in RECOMPUTED:
            results[mode, zero] = stage.accumulate(stage.engine(zero, micro=3, activation_checkpointing=mode))
        results["nonfinite", zero] = step_with_nonfinite_images(stage, zero)
        for precision, clipping in CLIPPED:
            results["clipped", zero, precision, clipping] = clipped_update(stage, zero, precision, clipping)
        # The interpreter of Triton computes in NumPy and so reads every tensor.
        if backend == "torch" and zero < 3:
            results["reads", zero] = {str(how): find_read(stage, zero, **how) for how in NONBLOCKING}
    if backend == "triton":
        with unittest.mock.patch.object(FastModule, "backend", "triton"):
            # Interpreted kernels take seconds, so in one case; recomputation runs them in the backward too.
            engine = stage.engine(stages[-1], activation_checkpointing="selective")
            results["kernels of blocks"] = stage.accumulate(engine)
    if stage.ranks.world_size == 1:
        results["collectives"] = {str(how): collectives_of_step(stage, **how) for how in NONBLOCKING}
    return results


def step_with_nonfinite_images(stage: Stage, zero: int) -> dict[str, Any]:
    """Outcome of a step whose images are not finite on one rank, between two finite ones."""
    engine = stage.engine(zero, precision="fp16")
    frozen = stage.teacher(stage.reference)

    def weights() -> dict[str, Tensor]:
        return full_state(engine)

    engine.step(StepBatches(stage.target, stage.reference, frozen))
    before, vector = weights(), engine.method.state()["average_vector"].clone()
    bad = stage.target
    if stage.ranks.rank == stage.ranks.world_size - 1:
        bad = dataclasses.replace(bad, images=bad.images * math.inf)
    metrics = engine.step(StepBatches(bad, stage.reference, frozen))
    after = weights()
    engine.step(StepBatches(stage.target, stage.reference, frozen))
    last = weights()
    return {
        "skipped": int(metrics["skipped_steps"]),
        "nonfinite": int(metrics["nonfinite_steps"]),
        "unchanged": all(torch.equal(before[name], after[name]) for name in before),
        "scale": float(metrics["loss_scale"]),
        "resumed": stage.ranks.rank > 0 or any(not torch.equal(after[name], last[name]) for name in last),
        "finite": bool(
            torch.isfinite(vector).all() and torch.isfinite(engine.method.state()["average_vector"]).all()
        ),
        "learning_rate": engine.learning_rate,
    }


def clipped_update(stage: Stage, zero: int, precision: str, clipping: float) -> tuple[dict[str, Tensor], float]:
    """Change of weights in one step, and the gradient's norm; AdamW's large epsilon keeps the gradient's scale."""
    engine = stage.engine(
        zero,
        precision=precision,
        clipping=clipping,
        epsilon=1.0,
        learning_rate=1.0,
        weight_decay=0.0,
        warmup_steps=0,
    )
    before = full_state(engine)
    metrics = engine.step(StepBatches(stage.target, stage.reference, stage.teacher(stage.reference)))
    after = full_state(engine)
    change = engine.towers.export({n: after[n] - before[n] for n in after}) if stage.ranks.is_main else {}
    return change, float(metrics["gradient_norm"])


class RefuseReads(TorchDispatchMode):
    """Fails at operations that read a value, for which the host would wait for the device."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **kwargs or {})
        assert not self._reads(op, args), f"{op} reads the device"
        return result

    @staticmethod
    def _reads(op: Any, args: Any) -> bool:
        if op.overloadpacket is aten.index:
            return any(index is not None and index.dtype == torch.bool for index in args[1])
        # An output whose size depends on values is a read too: nonzero, unique, a mask.
        is_read = op.overloadpacket in (aten._local_scalar_dense, aten.equal)
        return is_read or torch.Tag.dynamic_output_shape in op.tags


@contextlib.contextmanager
def refusing_reads() -> Iterator[None]:
    """A context that replaces ``torch.cuda.set_sync_debug_mode("error")`` on the CPU."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the step reads the device")

    patches = [
        unittest.mock.patch.object(Tensor, name, refuse) for name in ("cpu", "numpy", "tolist", "__array__")
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(RefuseReads())
        yield


def find_read(stage: Stage, zero: int, **options: Any) -> str:
    """The error of the first read of the device by a second step; empty if there is none."""
    engine = stage.engine(zero, **options)
    frozen = stage.teacher(stage.reference)
    engine.step(StepBatches(stage.target, stage.reference, frozen))
    try:
        with refusing_reads():
            values = engine.step(StepBatches(stage.target, stage.reference, frozen))
            scalars = AsyncScalars(values)
    except AssertionError as error:
        return str(error)
    assert scalars.numbers()["loss"] == float(values["loss"])
    return ""


class RecordCollectives(TorchDispatchMode):
    """Records the names of collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            self.names.append(str(op))
        return op(*args, **kwargs or {})


def collectives_of_step(stage: Stage, **options: Any) -> list[str]:
    engine = stage.engine(0, **options)
    with RecordCollectives() as collectives:
        engine.step(StepBatches(stage.target, stage.reference, stage.teacher(stage.reference)))
    return collectives.names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.write_model(path, tiny.FEW_TOKENS)
    return path


QUICK_CASES = [(1, "triton"), (2, "torch")]
"""(number of ranks, backend of the losses) of the quick tests; other pairs are slow."""


def rank_case(world_size: int, backend: str) -> Any:
    """A parameter of :func:`by_rank`."""
    marks = () if (world_size, backend) in QUICK_CASES else pytest.mark.slow
    return pytest.param((world_size, backend), id=f"{world_size}-{backend}", marks=marks)


@pytest.fixture(
    scope="module", params=[rank_case(*pair) for pair in itertools.product(STAGES, ["triton", "torch"])]
)
def by_rank(folder: Path, request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    """Results of each rank, for one rank and two, with the Triton kernels and plain PyTorch."""
    world_size, backend = request.param
    return run_ranks(world_size, run_paths, folder, STAGES[world_size], backend, init=False, timeout=300)


def test_paths_have_the_papers_gradients(folder: Path, by_rank: list[dict[Any, Any]]) -> None:
    expected, losses = oracle(folder)
    for zero, path in itertools.product(STAGES[len(by_rank)], PATHS):
        for results in by_rank:
            gradients, metrics, average_vector = results[zero, *path]
            assert_same_gradients(gradients, expected, 1e-5)
            for name, value in losses.items():
                assert metrics[name] == pytest.approx(value, rel=1e-4), (zero, path, name)
            # Bit-equal; otherwise the ranks' averages would diverge over a run.
            assert torch.equal(average_vector, by_rank[0][zero, *path][2])


def test_recomputed_blocks_have_the_papers_gradients(folder: Path, by_rank: list[dict[Any, Any]]) -> None:
    expected, losses = oracle(folder)
    for zero, mode in itertools.product(STAGES[len(by_rank)], RECOMPUTED):
        gradients, metrics = by_rank[0][mode, zero]
        assert_same_gradients(gradients, expected, 1e-5)
        assert metrics["loss"] == pytest.approx(losses["loss"], rel=1e-4), (zero, mode)


def relative_error(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Error of the complete gradient over its norm."""
    actual, reference = (torch.cat([each[n].flatten() for n in expected]) for each in (gradients, expected))
    return float((actual - reference).norm() / reference.norm())


def test_fast_blocks_are_as_exact_as_plain_ones(folder: Path, by_rank: list[dict[Any, Any]]) -> None:
    expected, _ = oracle(folder)
    for zero in STAGES[len(by_rank)]:
        for precision, key in (("fp32", (zero, "sequential", None)), ("fp16", ("fp16", zero))):
            plain = relative_error(by_rank[0]["plain blocks", zero, precision][0], expected)
            fast = relative_error(by_rank[0][key][0], expected)
            assert fast < max(2 * plain, 1e-6), (zero, precision)
    if "kernels of blocks" in by_rank[0]:
        assert relative_error(by_rank[0]["kernels of blocks"][0], expected) < 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_the_papers_gradients(folder: Path, by_rank: list[dict[Any, Any]], name: str) -> None:
    expected, losses = oracle(folder, name)
    for path, results in itertools.product(PATHS[::3], by_rank):
        for zero, (gradients, metrics) in results[name, *path].items():
            assert_same_gradients(gradients, expected, 1e-5)
            for key, value in losses.items():
                assert metrics[key] == pytest.approx(value, rel=1e-4), (zero, path, key)
            assert metrics.keys() - losses.keys() <= {"logit_scale"}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.02), ("bf16", 0.15)])
def test_autocast_stays_near_fp32(
    folder: Path, by_rank: list[dict[Any, Any]], precision: str, tolerance: float
) -> None:
    expected, _ = oracle(folder)
    expected_gradient = torch.cat([gradient.flatten() for gradient in expected.values()])
    for zero in STAGES[len(by_rank)]:
        gradients, _ = by_rank[0][precision, zero]
        gradient = torch.cat([gradients[name].flatten() for name in expected])
        error = float((gradient - expected_gradient).norm() / expected_gradient.norm())
        # An error of fp32 would mean that autocast is off.
        assert 1e-5 < error < tolerance, f"{precision}, ZeRO {zero}: {error:.1e}"


def test_step_is_skipped_on_all_ranks_for_nonfinite_loss_of_one(by_rank: list[dict[Any, Any]]) -> None:
    for zero in STAGES[len(by_rank)]:
        for results in by_rank:
            case = results["nonfinite", zero]
            assert case["skipped"] == 1, zero
            assert case["unchanged"]
            assert case["resumed"]
            assert case["finite"]
            # A smaller scale would not help, so it stays.
            assert (case["nonfinite"], case["scale"]) == (1, FP16_SCALE)
            # The learning rate is a function of the step, skipped or not.
            assert case["learning_rate"] == pytest.approx(1e-3 * 4 / 5)


@pytest.mark.parametrize(("precision", "clipping"), CLIPPED)
def test_update_is_adamw_on_the_clipped_gradient(
    folder: Path, by_rank: list[dict[Any, Any]], precision: str, clipping: float
) -> None:
    gradients, _ = oracle(folder)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    coefficient = min(1.0, clipping / float(norm)) if clipping else 1.0
    expected = {name: -coefficient * g / (coefficient * g.abs() + 1) for name, g in gradients.items()}
    tolerance = {"fp32": 1e-4, "fp16": 0.03}[precision]
    for zero in STAGES[len(by_rank)]:
        change, norm_of_engine = by_rank[0]["clipped", zero, precision, clipping]
        assert norm_of_engine == pytest.approx(float(norm), rel=tolerance), zero
        flat = [torch.cat([tensors[name].flatten() for name in expected]) for tensors in (change, expected)]
        assert (flat[0] - flat[1]).norm() < tolerance * flat[1].norm(), zero


def test_step_does_not_read_the_device(by_rank: list[dict[Any, Any]]) -> None:
    for results in by_rank:
        for key, reads in results.items():
            if key[0] == "reads":
                assert set(reads.values()) == {""}, (key, reads)


def test_step_on_one_rank_calls_no_collective(by_rank: list[dict[Any, Any]]) -> None:
    if len(by_rank) == 1:
        assert not any(by_rank[0]["collectives"].values()), by_rank[0]["collectives"]


def run_steps_on_gpu(folder: Path) -> None:
    """Makes steps in which CUDA refuses operations that synchronize the host."""
    stage = Stage(folder)
    target, reference = stage.target.to(stage.ranks.device), stage.reference.to(stage.ranks.device)
    frozen = stage.teacher(reference)
    for zero, how in itertools.product((0, 1, 2), NONBLOCKING):
        engine = stage.engine(zero, **how)
        for _ in range(2):
            engine.step(StepBatches(target, reference, frozen))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with unittest.mock.patch.object(torch.cuda, "synchronize", side_effect=AssertionError("waits")):
                AsyncScalars(engine.step(StepBatches(target, reference, frozen)))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_step_never_waits_for_the_gpu(folder: Path) -> None:
    run_ranks(1, run_steps_on_gpu, folder, init=False, timeout=300)
