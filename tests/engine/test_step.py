"""Every fast path of the step against the paper taken literally.

The oracle: one process, one joint graph, the frozen model run online, all 77 tokens, fp32, open_clip's own model
and nothing of the engine. Student and teacher differ and the average vector is not zero, so no term vanishes.
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
from dive_fast.methods import method as objective

aten = torch.ops.aten

STAGES = {1: (0, 2), 2: (0, 1, 2, 3)}
"""ZeRO stages tried on so many ranks."""
PATHS = list(itertools.product(["sequential", "joint"], [None, 3]))
"""(schedule, micro-batch size); 3 does not divide a rank's share, and makes more pieces than distinct prompts."""
RECOMPUTED = ("selective", "full")
"""Kinds of activation checkpointing."""


METHODS = ("vanilla_ft", "flyp", "flyp_replay", "snd", "cosine", "avl", "pvl")
"""All but DiVE itself, and LP-FT, whose loss is that of vanilla fine-tuning."""
ONE_TOWER = ("vanilla_ft", "snd")
"""Those that run one tower without the other, in a half or in both; tried at every stage."""
CLIPPED = [("fp32", 0.0), ("fp32", 0.5), ("fp16", 0.5)]
"""(precision, largest norm of the gradient)."""
STEADY: list[dict[str, Any]] = [{}, {"precision": "fp16"}, {"micro": 3}, {"schedule": "joint"}, {"clipping": 1.0}]
"""Steps that are held to read nothing of the device."""


def run_paths(folder: Path, stages: tuple[int, ...], backend: Any) -> dict[Any, Any]:
    """On one rank: gradients, metrics and average vector of every path through the step, and more cases."""
    objective.Part.backend = backend
    stage = Stage(folder)
    results: dict[Any, Any] = {}
    for zero, (schedule, micro) in itertools.product(stages, PATHS):
        engine = stage.engine(zero, schedule, micro)
        results[zero, schedule, micro] = *stage.accumulate(engine), engine.method.state()["average_vector"]
        engine.deepspeed.destroy()
    for name, (schedule, micro) in itertools.product(METHODS, PATHS[::3]):
        for zero in stages if name in ONE_TOWER else stages[-1:]:
            # Overlapped, ZeRO-1 reduces only what the last backward has a gradient for.
            found = stage.accumulate(stage.engine(zero, schedule, micro, name=name, overlap=True))
            results.setdefault((name, schedule, micro), {})[zero] = found
    for zero in stages:
        results["fp16", zero] = stage.accumulate(stage.engine(zero, precision="fp16"))
        results["bf16", zero] = stage.accumulate(stage.engine(zero, precision="bf16"))
        for mode in RECOMPUTED:
            results[mode, zero] = stage.accumulate(stage.engine(zero, micro=3, activation_checkpointing=mode))
        results["overflow", zero] = overflow(stage, zero)
        for precision, clipping in CLIPPED:
            results["clipped", zero, precision, clipping] = clipped(stage, zero, precision, clipping)
        # The interpreter computes Triton's kernels in NumPy, and so reads everything.
        if backend == "torch" and zero < 3:
            results["read", zero] = {str(how): read_by_step(stage, zero, **how) for how in STEADY}
    if stage.ranks.world_size == 1:
        results["sent alone"] = {str(how): sent_by_step(stage, **how) for how in STEADY}
    return results


def overflow(stage: Stage, zero: int) -> dict[str, Any]:
    """A step whose images are not finite on one rank alone, between two good ones."""
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
        "moved_on": stage.ranks.rank > 0 or any(not torch.equal(after[name], last[name]) for name in last),
        "finite": bool(
            torch.isfinite(vector).all() and torch.isfinite(engine.method.state()["average_vector"]).all()
        ),
        "learning_rate": engine.learning_rate,
    }


def clipped(stage: Stage, zero: int, precision: str, clipping: float) -> tuple[dict[str, Tensor], float]:
    """How far weights move in one step of AdamW whose large epsilon lets the gradient's size through; its norm."""
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
    moved = engine.towers.export({n: after[n] - before[n] for n in after}) if stage.ranks.is_main else {}
    return moved, float(metrics["gradient_norm"])


class NoReading(TorchDispatchMode):
    """Fails where a step wants to know a number, for which the host would have to wait for the device."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = op(*args, **kwargs or {})
        assert not self._asks(op, args), f"{op} reads the device"
        return found

    @staticmethod
    def _asks(op: Any, args: Any) -> bool:
        if op.overloadpacket is aten.index:
            return any(index is not None and index.dtype == torch.bool for index in args[1])
        # An output whose size depends on values is such a question too: of nonzero, unique, a mask.
        reads = op.overloadpacket in (aten._local_scalar_dense, aten.equal)
        return reads or torch.Tag.dynamic_output_shape in op.tags


@contextlib.contextmanager
def no_reading() -> Iterator[None]:
    """The CPU's stand-in for ``torch.cuda.set_sync_debug_mode("error")``."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the step reads the device")

    patches = [
        unittest.mock.patch.object(Tensor, name, refuse) for name in ("cpu", "numpy", "tolist", "__array__")
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(NoReading())
        yield


def read_by_step(stage: Stage, zero: int, **options: Any) -> str:
    """What a step in the steady state reads of the device; nothing where all is well."""
    engine = stage.engine(zero, **options)
    frozen = stage.teacher(stage.reference)
    engine.step(StepBatches(stage.target, stage.reference, frozen))
    try:
        with no_reading():
            values = engine.step(StepBatches(stage.target, stage.reference, frozen))
            line = AsyncScalars(values)
    except AssertionError as error:
        return str(error)
    assert line.numbers()["loss"] == float(values["loss"])
    return ""


class Sent(TorchDispatchMode):
    """Names of the collectives called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            self.names.append(str(op))
        return op(*args, **kwargs or {})


def sent_by_step(stage: Stage, **options: Any) -> list[str]:
    engine = stage.engine(0, **options)
    with Sent() as sent:
        engine.step(StepBatches(stage.target, stage.reference, stage.teacher(stage.reference)))
    return sent.names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.write_model(path)
    return path


PAIRWISE = [(1, "triton"), (2, "torch")]
"""Numbers of ranks and backends of the losses that the quick tests try; the others are slow."""


def both(world_size: int, backend: str) -> Any:
    """A parameter of :func:`by_rank`."""
    marks = () if (world_size, backend) in PAIRWISE else pytest.mark.slow
    return pytest.param((world_size, backend), id=f"{world_size}-{backend}", marks=marks)


@pytest.fixture(scope="module", params=[both(*case) for case in itertools.product(STAGES, ["triton", "torch"])])
def by_rank(folder: Path, request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    """Results of each rank, with one rank and with two, by the Triton kernels and by plain PyTorch."""
    world_size, backend = request.param
    return run_ranks(world_size, run_paths, folder, STAGES[world_size], backend, init=False, timeout=300)


def test_every_path_gives_the_papers_gradients(folder: Path, by_rank: list[dict[Any, Any]]) -> None:
    expected, losses = oracle(folder)
    for zero, path in itertools.product(STAGES[len(by_rank)], PATHS):
        for results in by_rank:
            gradients, metrics, average_vector = results[zero, *path]
            assert_same_gradients(gradients, expected, 1e-5)
            for name, value in losses.items():
                assert metrics[name] == pytest.approx(value, rel=1e-4), (zero, path, name)
            # Equal to the last bit, or the ranks' averages would drift apart over a run.
            assert torch.equal(average_vector, by_rank[0][zero, *path][2])


def test_recomputed_blocks_give_the_papers_gradients(folder: Path, by_rank: list[dict[Any, Any]]) -> None:
    expected, losses = oracle(folder)
    for zero, mode in itertools.product(STAGES[len(by_rank)], RECOMPUTED):
        gradients, metrics = by_rank[0][mode, zero]
        assert_same_gradients(gradients, expected, 1e-5)
        assert metrics["loss"] == pytest.approx(losses["loss"], rel=1e-4), (zero, mode)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_papers_gradients(folder: Path, by_rank: list[dict[Any, Any]], name: str) -> None:
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
    wanted = torch.cat([gradient.flatten() for gradient in expected.values()])
    for zero in STAGES[len(by_rank)]:
        gradients, _ = by_rank[0][precision, zero]
        found = torch.cat([gradients[name].flatten() for name in expected])
        error = float((found - wanted).norm() / wanted.norm())
        # Not fp32 either: then autocast would not be on.
        assert 1e-5 < error < tolerance, f"{precision}, ZeRO {zero}: {error:.1e}"


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(by_rank: list[dict[Any, Any]]) -> None:
    for zero in STAGES[len(by_rank)]:
        for results in by_rank:
            case = results["overflow", zero]
            assert case["skipped"] == 1, zero
            assert case["unchanged"]
            assert case["moved_on"]
            assert case["finite"]
            # No smaller scale would mend it.
            assert (case["nonfinite"], case["scale"]) == (1, FP16_SCALE)
            # It is a function of the step, skipped or not.
            assert case["learning_rate"] == pytest.approx(1e-3 * 4 / 5)


@pytest.mark.parametrize(("precision", "clipping"), CLIPPED)
def test_an_update_is_adamws_on_the_clipped_gradient(
    folder: Path, by_rank: list[dict[Any, Any]], precision: str, clipping: float
) -> None:
    gradients, _ = oracle(folder)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    coefficient = min(1.0, clipping / float(norm)) if clipping else 1.0
    moved = {name: -coefficient * g / (coefficient * g.abs() + 1) for name, g in gradients.items()}
    tolerance = {"fp32": 1e-4, "fp16": 0.03}[precision]
    for zero in STAGES[len(by_rank)]:
        found, found_norm = by_rank[0]["clipped", zero, precision, clipping]
        assert found_norm == pytest.approx(float(norm), rel=tolerance), zero
        whole = [torch.cat([change[name].flatten() for name in moved]) for change in (found, moved)]
        assert (whole[0] - whole[1]).norm() < tolerance * whole[1].norm(), zero


def test_a_steady_step_reads_nothing_of_the_device(by_rank: list[dict[Any, Any]]) -> None:
    for results in by_rank:
        for key, found in results.items():
            if key[0] == "read":
                assert set(found.values()) == {""}, (key, found)


def test_a_rank_that_is_alone_sends_nothing_to_itself(by_rank: list[dict[Any, Any]]) -> None:
    if len(by_rank) == 1:
        assert not any(by_rank[0]["sent alone"].values()), by_rank[0]["sent alone"]


def steady_on_a_gpu(folder: Path) -> None:
    """Steps in which CUDA itself refuses whatever the host would have to wait for."""
    stage = Stage(folder)
    target, reference = stage.target.to(stage.ranks.device), stage.reference.to(stage.ranks.device)
    frozen = stage.teacher(reference)
    for zero, how in itertools.product((0, 1, 2), STEADY):
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
def test_a_steady_step_never_waits_for_a_gpu(folder: Path) -> None:
    run_ranks(1, steady_on_a_gpu, folder, init=False, timeout=300)
