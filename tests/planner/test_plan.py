"""Plans against real steps, measured by an independent tracker; FLOP against torch and formulas."""

import contextlib
import dataclasses
import json
import subprocess
import unittest.mock
import weakref
from pathlib import Path
from typing import Any, get_args

import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from distributed import run_ranks, run_script
from small_configs import CONTEXT, REFERENCE, SMALL, TARGET, WIDTH, small_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dive_fast.config.schema import Config, ModelConfig
from dive_fast.data.batch import ReferenceBatch, TargetBatch, Text
from dive_fast.data.prompt_files import read_templates
from dive_fast.distributed import join
from dive_fast.engine.step import Engine, StepBatches
from dive_fast.engine.trained_parameters import adapt
from dive_fast.kernels import contrastive_loss, primitives
from dive_fast.methods import method as objective
from dive_fast.methods import registry
from dive_fast.methods.run_config import load_run_config
from dive_fast.model.features import Pairs
from dive_fast.model.towers import create
from dive_fast.planner.advice import _free_changes, advise
from dive_fast.planner.gpu_specs import GPUS
from dive_fast.planner.memory_tracker import Tracker
from dive_fast.planner.operations import MISSED_FLOP, Stage
from dive_fast.planner.plan import LAUNCH_SECONDS, Estimate, Plan
from dive_fast.planner.simulate import _SampledMicroBatches, plan_run, simulate_fast_blocks
from dive_fast.planner.table import as_json, as_table

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "launch/configs"

Case = dict[str, Any]
QUICK: dict[str, Case] = {
    "sequential": {},
    "flyp, fp16": {"objective.name": "flyp", "train.precision": "fp16", "data.target.text_length": 10},
    "micro-batches": {"train.micro_batch_size": 3, "zero": 0},
    "adapters": {"model.lora": {"rank": 4, "targets": ["q", "v", "mlp"]}, "model.freeze": ["logit_scale"]},
}
SLOW: dict[str, Case] = {
    "selective": {"train.activation_checkpointing": "selective"},
    "random texts of a teacher": {"objective.name": "lipsum"},
    "teacher, micro-batches": {"objective.name": "tracer_fd", "train.micro_batch_size": 5},
    "flyp": {"objective.name": "flyp"},
    "joint": {"train.schedule": "joint", "zero": 1},
    "micro-batches, ZeRO-2": {"train.micro_batch_size": 5},
    "fp16": {"train.precision": "fp16", "zero": 1},
    "bf16, joint": {"train.precision": "bf16", "train.schedule": "joint"},
    "bf16, micro-batches": {"train.precision": "bf16", "train.micro_batch_size": 7, "zero": 1},
    "short texts": {"data.target.text_length": 10, "data.reference.text_length": 20},
    "ZeRO-3": {"zero": 3},
    "bf16, selective": {"train.precision": "bf16", "train.activation_checkpointing": "selective", "zero": 1},
    "full": {"train.activation_checkpointing": "full"},
    "vanilla fine-tuning": {"objective.name": "vanilla_ft"},
    "SnD": {"objective.name": "snd"},
    "teacher, second prompts, micro-batches": {"objective.name": "starft", "train.micro_batch_size": 5},
    "contexts of a teacher": {"objective.name": "car_ft"},
    "teacher, fp16": {"objective.name": "tracer_fd", "train.precision": "fp16", "zero": 1},
    "SnD, joint, micro-batches": {"objective.name": "snd", "train.schedule": "joint", "train.micro_batch_size": 5},
}


TOWERS: tuple[Stage, ...] = ("target", "reference", "target_teacher")


class LiveBytes(TorchDispatchMode):
    """Peak of live bytes, summed again at each possible peak; independent of dive_fast.planner.memory_tracker."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
        self.peak = self.upper_bound = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if self.storages.get(storage.data_ptr()) is not storage:
                    self.storages[storage.data_ptr()] = storage
                    self.upper_bound += storage.nbytes()
        if self.upper_bound > self.peak:
            self.upper_bound = sum(storage.nbytes() for storage in self.storages.values())
            self.peak = max(self.peak, self.upper_bound)
        return result


def layer_norm_as_on_cuda(layer_norm: Any) -> Any:
    def in_fp32(x: torch.Tensor, *args: Any) -> torch.Tensor:
        return layer_norm(x.float() if torch.is_autocast_enabled("cpu") else x, *args)

    return in_fp32


def _launch_nothing(*_: Any, **__: Any) -> None:
    """In place of ``primitives.launch``; a mock would keep the tensors alive."""


def start_method(method: objective.Method) -> None:
    """Starts a method with a tokenizer that fits the small model's vocabulary."""

    def tokenize(texts: list[str]) -> torch.Tensor:
        rows = torch.zeros(len(texts), CONTEXT, dtype=torch.long)
        rows[range(len(texts)), [len(text.split()) for text in texts]] = 499
        return rows

    def embed(texts: Any) -> torch.Tensor:
        return torch.randn(len(texts), WIDTH)

    names = tuple(open_clip.IMAGENET_CLASSNAMES)
    method.start(objective.Start(embed, tokenize, 500, "argmax", names, read_templates("imagenet")))


def real_step(config: Config) -> tuple[int, int, int]:
    """Peak bytes, FLOP and parameters of a step on real tensors, after one that allocates optimizer state."""
    ranks = join()
    data, method = config.data, registry.create(config.objective, WIDTH, total_steps=9)
    dtype = torch.float16 if config.train.precision == "fp16" else torch.float32

    def pairs(section: Any) -> tuple[torch.Tensor, Text]:
        count, length = section.batch_size, section.text_length or CONTEXT
        tokens = torch.randint(1, 499, (count, length))
        return torch.randn(count, 3, 64, 64).to(dtype), Text(tokens, torch.arange(count), length)

    def batches() -> Any:
        labels = torch.zeros(TARGET, dtype=torch.long)
        second = pairs(data.target)[1] if method.needs.second_prompts else None
        target = TargetBatch(*pairs(data.target), labels, torch.empty(0), (), second)
        if not method.needs.reference:
            return StepBatches(target)
        reference = ReferenceBatch(*pairs(data.reference), torch.empty(0), torch.empty(0), ())
        unit = [F.normalize(torch.randn(REFERENCE, WIDTH), dim=-1) for _ in range(2)]
        return StepBatches(target, reference, Pairs(*unit))

    live = LiveBytes()
    casts = layer_norm_as_on_cuda(F.layer_norm)
    with contextlib.ExitStack() as patches:
        patches.enter_context(unittest.mock.patch.object(F, "layer_norm", casts))
        patches.enter_context(unittest.mock.patch.object(F, "linear", F.linear))
        # The kernels of fast blocks only allocate: they would be slow, and write zeros as well as any numbers.
        patches.enter_context(unittest.mock.patch.object(primitives, "launch", _launch_nothing))
        patches.enter_context(unittest.mock.patch.object(primitives, "empty", torch.zeros))
        with live:
            towers = create(config.model)
            if method.needs.head:
                towers.head = torch.nn.Linear(WIDTH, len(open_clip.IMAGENET_CLASSNAMES))
            start_method(method)
            adapt(config.model, towers, method, seed=0)
            engine = Engine(config, towers, method, ranks, total_steps=9)
            simulate_fast_blocks(towers)
            if engine.teacher is not None:
                simulate_fast_blocks(engine.teacher.towers)
            # The initial scale overflows, and a skipped step allocates no moments.
            engine.scale.value.fill_(1.0)
            parameters = sum(getattr(p, "ds_numel", p.numel()) for p in towers.parameters())
            engine.step(batches())
            waiting = [batches(), batches()]
            live.peak = 0
            engine.step(waiting[0])
        with FlopCounterMode(display=False, custom_mapping=MISSED_FLOP) as counter:
            engine.step(waiting[1])
    engine.deepspeed.destroy()
    return live.peak, counter.get_total_flops(), parameters


def real_steps(folder: Path, cases: dict[str, Case]) -> dict[str, tuple[int, int, int]]:
    objective.Part.backend = "torch"  # Triton's interpreter allocates in NumPy
    return {name: real_step(small_config(folder, **case)) for name, case in cases.items()}


def small_plans(folder: Path, cases: dict[str, Case], ranks: int = 1) -> dict[str, Plan]:
    return {name: plan_run(small_config(folder, **case), ranks) for name, case in cases.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.write_model(path, SMALL, preprocess={"size": 64})
    return path


@pytest.mark.parametrize("cases", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["quick", "slow"])
def test_plan_run_matches_memory_and_flop_of_real_step(folder: Path, cases: dict[str, Case]) -> None:
    real = run_ranks(1, real_steps, folder, cases, init=False, timeout=500)[0]
    plans = run_ranks(1, small_plans, folder, cases, init=False, timeout=300)[0]
    for name in cases:
        peak, flop, parameters = real[name]
        assert plans[name].parameters == parameters
        # Attention's backward sums 16-bit gradients of queries in fp32: 65 tokens padded to 128, 2 heads of 64.
        is_half = cases[name].get("train.precision") in ("fp16", "bf16")
        batch = cases[name].get("train.micro_batch_size", TARGET)
        assert plans[name].estimates["scratch"] == (4 * batch * 2 * 128 * 64 if is_half else 0)
        assert plans[name].peak_memory_bytes == pytest.approx(peak, rel=0.01), name
        # The CPU computes one matrix of logits and differentiates it: three products of B x B x D.
        has_head = registry.needs(small_config(folder, **cases[name]).objective).head
        plain_loss = 0 if has_head else 6 * TARGET**2 * WIDTH
        towers = sum(plans[name].flop_of(stage) for stage in TOWERS)
        assert towers == flop - plain_loss
        has_teacher, tower = "teacher" in name, create(small_config(folder).model).visual
        assert (plans[name].flop_of("target_teacher") > 0) == has_teacher
        # With a head, the teacher shares the text tower, which is frozen.
        copied = sum(map(torch.numel, tower.parameters())) if has_head else parameters
        assert plans[name].parts.get("target_teacher", 0) == pytest.approx(4 * copied * has_teacher, rel=0.05)


@pytest.mark.slow
def test_reference_every_averages_steps_with_and_without_reference(folder: Path) -> None:
    cases: dict[str, Case] = {
        "always": {},
        "never": {"objective.name": "flyp"},
        "every fourth": {"objective.reference_every": 4},
    }
    plans = run_ranks(1, small_plans, folder, cases, init=False, timeout=300)[0]
    flop = {name: plan.flop_per_step for name, plan in plans.items()}
    assert flop["every fourth"] == pytest.approx((flop["always"] + 3 * flop["never"]) / 4, rel=1e-6)
    assert plans["every fourth"].peak_memory_bytes == plans["always"].peak_memory_bytes


ZERO: dict[str, Case] = {str(stage): {"zero": stage} for stage in (1, 2, 3)}
MICRO_BATCHES: Case = {"train.micro_batch_size": 2}


def plans_over_ranks(folder: Path) -> dict[str, Plan]:
    """Plans of ZeRO over four ranks, one rank before and after, and micro-batches, sampled and all executed."""
    plans = {
        "one rank": plan_run(small_config(folder)),
        **small_plans(folder, ZERO, ranks=4),
        "one rank again": plan_run(small_config(folder)),
        "sampled": plan_run(small_config(folder, **MICRO_BATCHES)),
    }
    with unittest.mock.patch.object(_SampledMicroBatches, "MAX_FORWARDS", 99):
        return plans | {"all": plan_run(small_config(folder, **MICRO_BATCHES))}


@pytest.mark.slow
def test_plan_run_divides_zero_state_and_samples_micro_batches(folder: Path) -> None:
    plans = run_ranks(1, plans_over_ranks, folder, init=False, timeout=300)[0]
    single, state = plans["one rank"], 4 * plans["one rank"].parameters
    assert single.parts["optimizer"] == pytest.approx(3 * state, rel=0.03)
    # Reduction buckets and the gradients in them.
    buckets = 10**6
    for zero in ZERO:
        many = plans[zero]
        assert (single.estimates["nccl"], many.estimates["nccl"]) == (0, 2 * 2**30)
        assert many.parts["optimizer"] == pytest.approx(3 * state / 4, rel=0.03)
        assert many.parts["weights"] == pytest.approx(state / 4 if zero == "3" else state, rel=0.03)
        assert many.parts["gradients"] <= (state if zero == "1" else state / 4) + buckets, zero
        assert many.flop_per_step == pytest.approx(single.flop_per_step, rel=1e-3)
    assert plans["one rank again"] == single
    for stage in get_args(Stage):
        assert plans["sampled"].flop_of(stage) == plans["all"].flop_of(stage)
        # A skipped micro-batch differentiates its part of the loss alone, in scalars.
        assert plans["sampled"].bytes_of(stage) == pytest.approx(plans["all"].bytes_of(stage), rel=1e-3)
    assert plans["sampled"].parts == pytest.approx(plans["all"].parts, rel=0.02)


def shipped_plans(cases: dict[str, tuple[str, list[str]]]) -> dict[str, Plan]:
    return {
        name: plan_run(load_run_config(config, overrides, CONFIGS)) for name, (config, overrides) in cases.items()
    }


def texts(target: int, reference: int | None = None) -> list[str]:
    lengths = [f"data.target.text_length={target}"]
    return lengths if reference is None else [*lengths, f"data.reference.text_length={reference}"]


def transformer_flop(tokens: int, width: int, layers: int) -> int:
    """FLOP of one sequence, forward and backward; attention's backward recomputes scores, as its kernels do.

    The last layer computes keys and values of all tokens, and the rest of one.
    """
    layer = 3 * 2 * 12 * tokens * width**2 + (2 + 5) * 2 * tokens**2 * width
    last = 3 * 2 * (2 * tokens + 10) * width**2 + (2 + 5) * 2 * tokens * width
    return (layers - 1) * layer + last


def forward_flop(tokens: int, width: int, layers: int) -> int:
    """FLOP of one sequence without gradient, as :func:`transformer_flop` counts them."""
    layer = 2 * 12 * tokens * width**2 + 2 * 2 * tokens**2 * width
    last = 2 * (2 * tokens + 10) * width**2 + 2 * 2 * tokens * width
    return (layers - 1) * layer + last


def test_vit_b16_flop_match_formula_and_dive_memory_flyp() -> None:
    flyp, dive, wilds, tracer = "vitb16_flyp", "vitb16_dive", "iwildcam_flyp", "vitb16_tracer"
    cases = {flyp: (flyp, texts(32)), dive: (dive, texts(32, 32)), wilds: (wilds, texts(32))}
    # FLYP's precision: the batches of bf16 are fp32.
    cases[tracer] = (tracer, [*texts(32), "train.precision=fp16"])
    cases["ema"] = (flyp, [*texts(32), "train.ema=0.999"])
    cases |= {rule: (flyp, [*texts(32), f"projection.name={rule}"]) for rule in ("l2sp", "digrap")}
    plans = run_ranks(1, shipped_plans, cases, init=False, timeout=300)[0]
    patches = 2 * 2 * 196 * 768 * 3 * 16**2
    expected = 512 * (transformer_flop(197, 768, 12) + transformer_flop(32, 512, 12) + patches)
    assert plans[flyp].flop_of("target") == pytest.approx(expected, rel=0.02)
    assert plans[flyp].flop_of("reference") == 0
    assert plans[dive].flop_of("reference") == plans[dive].flop_of("target") == plans[flyp].flop_of("target")
    assert plans[flyp].parameters == 149_620_737
    # Gradients of the target half and images of the reference half, next to activations that fast blocks reduce.
    assert plans[dive].peak_memory_bytes <= 1.025 * plans[flyp].peak_memory_bytes
    assert plans[wilds].flop_of("target") == plans[flyp].flop_of("target") / 2
    # A teacher that runs without gradient, and one fp32 copy of the weights.
    forward = 512 * (forward_flop(197, 768, 12) + forward_flop(32, 512, 12) + patches / 2)
    weights = 4 * plans[flyp].parameters
    assert plans[tracer].flop_of("target_teacher") == pytest.approx(forward, rel=0.02)
    assert plans[tracer].flop_per_step <= 1.36 * plans[flyp].flop_per_step
    assert plans[tracer].parts["target_teacher"] == pytest.approx(weights, rel=1e-3)
    assert plans[tracer].peak_memory_bytes <= 1.03 * plans[flyp].peak_memory_bytes + weights
    # The move reads both copies and writes one, next to FLYP's update.
    moved = plans[tracer].bytes_of("update") - plans[flyp].bytes_of("update")
    assert moved == pytest.approx(3 * weights, rel=1e-3)
    # The same for averaged weights.
    assert plans["ema"].parts == plans[flyp].parts | {"average": pytest.approx(weights, rel=1e-3)}
    averaged = plans["ema"].bytes_of("update") - plans[flyp].bytes_of("update")
    assert averaged == pytest.approx(3 * weights, rel=1e-3)
    # A projection keeps the anchors, and DiGraP the previous deviations too.
    anchored = {rule: plans[rule].parts["projection"] for rule in ("l2sp", "digrap")}
    assert anchored == {"l2sp": pytest.approx(weights, rel=1e-3), "digrap": pytest.approx(2 * weights, rel=1e-3)}
    extra = {rule: plans[rule].bytes_of("update") - plans[flyp].bytes_of("update") for rule in anchored}
    # L2-SP reads W, W0 and g, and writes g. DiGraP reads g, W, W0 and d_prev for its sums, then W, W0 and g, and
    # writes g and d_prev.
    assert extra == {"l2sp": pytest.approx(4 * weights, rel=1e-2), "digrap": pytest.approx(9 * weights, rel=1e-2)}
    assert "  anchors              1.11 GiB" in as_table(plans["digrap"], ["h200"], {"h200": None})
    table = as_table(plans[tracer], ["h200"], {"h200": None})
    assert "  target's teacher    17." in table
    assert "  target's teacher     0.56 GiB" in table
    assert "online" not in table


@pytest.mark.slow
def test_plan_run_of_every_shipped_config() -> None:
    cases: dict[str, tuple[str, list[str]]] = {path.stem: (path.stem, []) for path in CONFIGS.glob("*.json")}
    plans = run_ranks(1, shipped_plans, cases, init=False, timeout=600)[0]
    assert all(plan.flop_of("target") > 0 for plan in plans.values())


@pytest.mark.slow
def test_vit_l14_memory_and_published_step_flop() -> None:
    large = ["data.target.batch_size=256"]
    published = ["train.precision=fp32", "train.schedule=joint", "teacher.mode=online", "train.fast_blocks=false"]
    cases = {
        "flyp": ("vitl14_dive", [*large, *texts(32), "objective.name=flyp"]),
        "dive": ("vitl14_dive", [*large, *texts(32, 32)]),
        "short": ("vitb16_dive", texts(16, 32)),
        "published": ("vitb16_dive", published),
    }
    plans = run_ranks(1, shipped_plans, cases, init=False, timeout=600)[0]
    assert plans["dive"].peak_memory_bytes <= 1.03 * plans["flyp"].peak_memory_bytes
    assert plans["published"].flop_per_step == pytest.approx(147.8e12, rel=1e-3)
    assert plans["published"].flop_of("teacher") == pytest.approx(plans["published"].flop_per_step / 7, rel=0.01)
    assert plans["published"].parts["teacher"] == pytest.approx(plans["published"].parts["weights"], rel=0.01)
    assert plans["short"].flop_per_step <= 0.80 * plans["published"].flop_per_step
    assert plans["published"].step_seconds(GPUS["h200"]) > 14 * plans["short"].step_seconds(GPUS["h200"])


JOINT: Case = {"train.schedule": "joint"}
RESNET = SMALL | {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}}
"""A model without transformer blocks to recompute."""


def advice_for(folder: Path, case: Case, ranks: int, memories: list[int]) -> list[Any]:
    """A config's plan and its advice for GPUs of these sizes, without estimates: they exceed the small model."""
    with unittest.mock.patch("dive_fast.planner.simulate._estimates", return_value={}):
        return _advice_for(folder, case, ranks, memories)


def _advice_for(folder: Path, case: Case, ranks: int, memories: list[int]) -> list[Any]:
    config = small_config(folder, **case)
    plan = plan_run(config, ranks)
    results: list[Any] = [plan]
    for memory in memories:
        with unittest.mock.patch.dict(GPUS, {"small": GPUS["h100"]._replace(memory=memory)}):
            advice = advise(config, plan, ["small"])
            results.append(advice["small"] if advice else "fits")
    return results


def advice_for_all(cases: list[tuple[Path, Case, int, list[int]]]) -> list[list[Any]]:
    return [advice_for(*arguments) for arguments in cases]


@pytest.mark.slow
def test_advise_returns_cheapest_change_that_fits(folder: Path, tmp_path: Path) -> None:
    tiny.write_model(tmp_path, RESNET, preprocess={"size": 64})
    selective, full = (f"train.activation_checkpointing={kind}" for kind in ("selective", "full"))
    sequential = "train.schedule=sequential"
    memories = [size * 10**6 for size in (1000, 60, 50, 40, 28, 1)]
    cases = [
        (folder, JOINT, 1, memories),
        (folder, {}, 1, [50 * 10**6]),
        (folder, {"train.activation_checkpointing": "full"}, 1, [33 * 10**6]),
        (folder, {"zero": 0}, 4, [16 * 10**6]),
        (tmp_path, {}, 1, [55 * 10**6]),
    ]
    joint, plain, recomputed, ranks, resnet = run_ranks(1, advice_for_all, cases, init=False, timeout=500)[0]
    base, enough, *changed, none = joint
    assert memories[0] > base.peak_memory_bytes > memories[1]
    assert enough == "fits"
    assert [advice.overrides for advice in changed] == [
        (sequential,),
        (sequential, selective),
        (sequential, full),
        (sequential, "train.micro_batch_size=1"),
    ]
    for advice, memory in zip(changed, memories[1:], strict=False):
        assert advice.plan.peak_memory_bytes <= memory
    # Recomputation of more matrix products costs more FLOP.
    flop = [advice.plan.flop_per_step for advice in changed]
    assert base.flop_per_step == flop[0] == flop[1] < flop[2] < flop[3]
    assert none is None
    assert plain[1].overrides == (selective,)
    assert ranks[1].overrides == ("deepspeed.zero_optimization.stage=3", full)
    # Settings already on and those that the towers do not support are not tried.
    for _, advice in (recomputed, resnet):
        (override,) = advice.overrides
        assert override.startswith("train.micro_batch_size=")


@pytest.mark.parametrize(
    ("name", "stages"),
    [("flyp", "123"), ("flyp ema", "12"), ("flyp spd", "12"), ("tracer", "12"), ("lipsum", "12")],
)
def test_zero_3_is_no_advice_for_methods_that_it_refuses(folder: Path, name: str, stages: str) -> None:
    name, _, further = name.partition(" ")
    options = {"": {}, "ema": {"train.ema": 0.9}, "spd": {"projection.name": "spd"}}[further] | {
        "objective.name": name
    }
    config = small_config(folder, **options, zero=0)
    overrides = [override for override, _ in _free_changes(config, Plan(1, 4, {}, {"weights": 1}))]
    assert overrides == [f"deepspeed.zero_optimization.stage={stage}" for stage in stages]


def test_estimates_count_in_fits_and_are_listed() -> None:
    gpu = GPUS["h100"]
    estimates: dict[Estimate, int] = {"context": 2**29, "nccl": 2**30, "scratch": 0, "allocator": 2**31}
    full = Plan(1, 2, {}, {"activations": gpu.memory}, estimates)
    room = Plan(1, 2, {}, {"activations": gpu.memory - 7 * 2**29}, estimates)
    assert (full.fits(gpu), room.fits(gpu)) == (False, True)
    assert not dataclasses.replace(room, parts={"activations": gpu.memory - 7 * 2**29 + 1}).fits(gpu)
    table = as_table(room, ["h100"], {})
    assert f"with estimates   {gpu.memory / 2**30:8.2f} GiB" in table
    assert "NCCL buffers         1.00 GiB" in table
    assert "scratch" not in table
    tree = as_json(room, ["h100"], {})
    assert tree["estimates"] == estimates
    assert tree["needed_memory_bytes"] == tree["peak_memory_bytes"] + sum(estimates.values()) == gpu.memory


def test_workspace_of_chunked_gradient() -> None:
    tracker, rows = Tracker(), 2176
    with FakeTensorMode(), tracker:
        features = [torch.empty(rows, 512, dtype=torch.float16, requires_grad=True) for _ in range(2)]
        contrastive_loss(*features, torch.ones(()), backend="triton").backward()
    # The weights of all rows in fp16, and their sums in fp32.
    assert tracker.workspace == rows * rows * 2 + rows * 512 * 4


def dry_run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # No proxy listens at this address: any use of the network fails.
    environment = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    command = [str(ROOT / "launch/train.py"), "--dry-run", "--config", *arguments]
    return run_script(*command, cwd=cwd, environment=environment)


def plan_json(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    tree: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert all(isinstance(tree[key], int) for key in ("parameters", "flop_per_step", "peak_memory_bytes"))
    assert sum(tree["parts"].values()) == tree["peak_memory_bytes"]
    assert tree["peak_memory_bytes"] + sum(tree["estimates"].values()) == tree["needed_memory_bytes"]
    assert sum(tree["flop"].values()) == tree["flop_per_step"]
    return tree


def test_dry_run_plans_demo_on_two_ranks_and_writes_nothing(tmp_path: Path) -> None:
    result = dry_run("demo", "--ranks", "2", "--json", "train.epochs=1", cwd=tmp_path)
    tree = plan_json(result)
    assert tree["ranks"] == 2
    assert tree["flop_per_step"] == 2 * tree["flop_per_step_per_gpu"]
    assert tree["fits"] == dict.fromkeys(GPUS, True)
    # Such a small step waits for its host on every GPU.
    host = tree["seconds"]["a100"]["host"]
    assert (
        tree["step_seconds"]["a100"]
        == tree["step_seconds"]["h100"]
        == host
        > tree["launches"] * LAUNCH_SECONDS
        > 0
    )
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "train.epoch=3"], "unknown key train.epoch; did you mean train.epochs?"),
        (["demo", "--ranks", "3"], "data.target.batch_size = 128 is not divisible by 3 ranks"),
        pytest.param(
            ["demo", "model.name=hf-hub:nobody/nothing"],
            "model: cannot load hf-hub:nobody/nothing",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["demo", "data.target.text_length=99"],
            "data.target.text_length = 99 exceeds the model's context of",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_dry_run_reports_mistake_in_one_line_with_exit_code_2(arguments: list[str], message: str) -> None:
    result = dry_run(*arguments)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_dry_run_plans_shipped_configs_without_data(tmp_path: Path) -> None:
    small = plan_json(dry_run("vitb16_flyp", "--device", "h200", "--json", cwd=tmp_path))
    assert small["fits"] == {"h200": True}
    assert small["advice"] == {}
    large = plan_json(dry_run("vitl14_dive", "--device", "a100", "--json", cwd=tmp_path))
    assert large["parameters"] == 427_616_513
    assert large["fits"] == {"a100": False}
    advice = large["advice"]["a100"]
    assert advice["overrides"] == ["train.activation_checkpointing=full"]
    followed = plan_json(dry_run("vitl14_dive", "--device", "a100", "--json", *advice["overrides"], cwd=tmp_path))
    assert followed["fits"] == {"a100": True}
    assert followed["peak_memory_bytes"] == advice["peak_memory_bytes"]


def plans_of_frozen(folder: Path) -> dict[str, Plan]:
    cases: dict[str, Case] = {
        "all": {},
        "lora": {"model.lora": {"rank": 4}},
        "image": {"model.freeze": ["image"]},
    }
    return small_plans(folder, {name: case | {"zero": 1} for name, case in cases.items()})


def test_plan_of_adapters_and_frozen_weights_is_smaller(folder: Path) -> None:
    plans = run_ranks(1, plans_of_frozen, folder, init=False, timeout=300)[0]
    full, lora, image = plans["all"], plans["lora"], plans["image"]
    # 2 blocks of 2 towers with 4 projections of 128 x 128, and the logit scale.
    assert lora.trained == 2 * 2 * 4 * 2 * 4 * 128 + 1
    assert lora.parameters == full.parameters + lora.trained - 1
    assert full.trained == full.parameters
    visual = sum(p.numel() for p in create(ModelConfig(name=f"local-dir:{folder}")).visual.parameters())
    assert image.trained == full.trained - visual
    # AdamW's moments, and the fp32 copy of ZeRO.
    assert lora.parts["optimizer"] < 0.05 * full.parts["optimizer"]
    assert lora.peak_memory_bytes < full.peak_memory_bytes
    # No product computes the gradient of a frozen weight.
    assert lora.flop_per_step < 0.85 * full.flop_per_step
    assert image.flop_per_step < 0.7 * full.flop_per_step
    assert as_json(lora, (), {})["trained_parameters"] == lora.trained
    assert f"{lora.parameters:,}, {lora.trained:,} of them trained" in as_table(lora, (), {})
