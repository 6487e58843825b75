"""Tests of GRACE, TeCoA and PMG-AFT: the numbers of the equations, and steps against the losses written literally.

The oracle is open_clip's model in float64 with merged weights, plain PyTorch and nothing of the engine. Attacks
are replaced by a fixed change of images, since a sign turns rounding into a complete step; they have other tests.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from distributed import run_ranks
from safetensors.torch import load_file
from step_oracle import CLASSES, LABELS, TARGET, WIDTH, Stage, batches
from torch import Tensor
from torch.func import functional_call

from dive_fast.checkpoint.export import full_state
from dive_fast.checkpoint.manifest import checkpoint_path
from dive_fast.checkpoint.resume import load_checkpoint
from dive_fast.checkpoint.saver import Saver
from dive_fast.checkpoint.snapshot import RunRecord
from dive_fast.config.schema import LoraConfig, ObjectiveConfig, TrainConfig
from dive_fast.data.random_streams import Draw, stream
from dive_fast.engine.step import Engine, StepBatches
from dive_fast.errors import ConfigError
from dive_fast.methods import registry
from dive_fast.methods.adversarial import ImageAttack
from dive_fast.methods.grace import Grace, curvature_of, ranks_of, rescale
from dive_fast.methods.method import ImageInfo, Part, Start, needs_of
from dive_fast.methods.pmg_aft import PmgAft
from dive_fast.methods.tecoa import TeCoA
from dive_fast.model import adapters

SIZE, RANK, LORA_RANK = 0.05, 4, 3
OBJECTIVES: dict[str, dict[str, Any]] = {
    "grace": {"perturbation_size": SIZE},
    "two ascents": {"name": "grace", "perturbation_size": SIZE, "perturbation_steps": 2},
    "weights alone": {"name": "grace", "perturbation_size": SIZE, "gram_weight": 0},
    "volume alone": {"name": "grace", "perturbation_size": SIZE, "weight_perturbation_weight": 0},
    "lora": {"name": "grace", "weight_perturbation_weight": 0, "gram_weight": 0},
    "tecoa": {},
    "pmg_aft": {"frozen_weight": 0.5, "clean_weight": 2.0},
}
PATHS = {1: [(0, None), (2, 3)], 2: [(0, 3), (1, None), (2, None)]}
"""(ZeRO stage, micro-batch size) on so many ranks."""
TOLERANCE = 2e-4
TEACHER_FACTOR = 0.5
"""The teacher's factors A and B, relative to the student's."""


def changed(images: Tensor) -> Tensor:
    """Images in place of attacked ones: a change of each pixel that does not depend on its batch."""
    return images + 0.1 * torch.sin(37 * images)


def attack(self: ImageAttack, images: Tensor, *arguments: Any) -> Tensor:
    return changed(images)


# Numbers


def test_ranks_follow_the_quantiles_of_curvature() -> None:
    ranks = ranks_of(torch.arange(1.0, 11.0), 4, 0.2, 0.8)
    assert ranks.tolist() == [0, 0, 2, 2, 2, 2, 2, 2, 4, 4]
    assert ranks_of(torch.ones(3), 4, 0.2, 0.8).tolist() == [4, 4, 4]


def test_curvature_is_the_mean_square_times_the_images() -> None:
    estimate = curvature_of([torch.tensor([0.1]), torch.tensor([-0.2])], 256)
    assert float(estimate) == pytest.approx(6.4)
    assert float(torch.lerp(estimate, torch.tensor(1.0), 0.9)) == pytest.approx(1.54)


def test_perturbation_of_one_layer_equals_the_hand_computed_one() -> None:
    x, weight, first = torch.tensor([1.0, 0.5]), torch.eye(2), torch.tensor([[0.6, 0.8]])
    logits = weight @ x
    assert float(F.cross_entropy(logits, torch.tensor(0))) == pytest.approx(0.474077, abs=1e-6)
    error = logits.softmax(0) - torch.tensor([1.0, 0.0])
    second = torch.zeros(2, 1)
    rise = torch.zeros(1, 2), error[:, None] * (first @ x)
    rescale((first, second), rise, torch.tensor(0.1))
    change = second @ first
    expected = torch.tensor([[-0.042426, -0.056569], [0.042426, 0.056569]])
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-6)
    assert float(F.cross_entropy((weight + change) @ x, torch.tensor(0))) == pytest.approx(0.529845, abs=1e-6)


def test_rescale_without_gradient_leaves_the_weights_alone() -> None:
    factors = torch.zeros(2, 3), torch.zeros(4, 2)
    rescale(factors, (torch.zeros(2, 3), torch.zeros(4, 2)), torch.tensor(0.1))
    assert all(bool((factor == 0).all()) for factor in factors)


# Steps


def adapted(stage: Stage) -> None:
    """Gives the stage's student adapters whose factors are not zero."""
    adapters.apply(stage.student, LoraConfig(rank=LORA_RANK, alpha=6, towers=["image"]))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for layer in adapters.adapted_layers(stage.student):
            layer.lora_B.copy_(0.2 * torch.randn(layer.lora_B.shape, generator=generator))


def run_steps(folder: Path, paths: list[tuple[int, int | None]]) -> dict[Any, Any]:
    """Gradients, metrics and state of one step of every objective along every path, on one rank."""
    from deepspeed.utils import safe_get_full_grad

    Part.backend = "torch"
    stage, results = Stage(folder), {}
    adapted(stage)
    original, ImageAttack.__call__ = ImageAttack.__call__, attack  # type: ignore[method-assign]
    for name, options in OBJECTIVES.items():
        for zero, micro in paths:
            method = registry.create(ObjectiveConfig(**{"name": name} | options), WIDTH, total_steps=10)
            lora = {"rank": LORA_RANK, "alpha": 6.0, "towers": ["image"]}
            engine = stage.engine(zero, "sequential", micro, method, lora=lora)
            towers = engine.towers
            assert isinstance(method.target_loss, TeCoA)
            method.start(Start(lambda texts: torch.empty(0), None, 0, None, (), (), towers))  # type: ignore[arg-type]
            if engine.teacher is not None:
                # A teacher like the student would have no gradient.
                with torch.no_grad():
                    for factor in engine.teacher.copies.values():
                        factor.mul_(TEACHER_FACTOR)
            values = engine.accumulate(StepBatches(stage.target))
            metrics = {key: float(value) for key, value in values.items()}
            tuned = {key: p for key, p in towers.named_parameters() if p.requires_grad}
            gradients = {key: safe_get_full_grad(p).clone() for key, p in tuned.items()}
            state = {key: value.clone() for key, value in method.state().items()}
            results[name, zero, micro] = gradients, metrics, state
            engine.deepspeed.destroy()
    ImageAttack.__call__ = original  # type: ignore[method-assign]
    return results


class Literal:
    """The losses in float64 on the complete batch, by open_clip's model with merged weights."""

    def __init__(self, folder: Path) -> None:
        stage = Stage(folder)
        adapted(stage)
        self.layers = adapters.adapted_layers(stage.student)
        self.factors = {
            f"{layer.name}.lora_{kind}.default.weight": getattr(layer, f"lora_{kind}")
            .detach()
            .double()
            .requires_grad_()
            for layer in self.layers
            for kind in "AB"
        }
        self.fixed = {name: value.double() for name, value in stage.student.state_dict().items()}
        self.model = open_clip.create_model(f"local-dir:{folder}").double().eval()
        data = batches(folder)
        self.images, self.labels = data["target_images"].double(), torch.tensor(LABELS)
        self.head = data["head.weight"].double(), data["head.bias"].double()

    def weight(self, layer: str, factor: float = 1) -> Tensor:
        first, second = (factor * self.factors[f"{layer}.lora_{kind}.default.weight"] for kind in "AB")
        return self.fixed[f"{layer}.base_layer.weight"] + 6 / LORA_RANK * second @ first

    def features(self, images: Tensor, changes: dict[str, Tensor] | None = None, factor: float = 1) -> Tensor:
        weights = {each.name: self.weight(each.name, factor) for each in self.layers}
        weights = {name: weight + (changes or {}).get(name, 0) for name, weight in weights.items()}
        parameters: dict[str, Tensor] = {}
        for number in range(tiny.VISION["layers"]):
            attention = f"visual.transformer.resblocks.{number}.attn"
            parameters[f"{attention}.in_proj_weight"] = torch.cat(
                [weights[f"{attention}.{q}_proj"] for q in "qkv"]
            )
            parameters[f"{attention}.out_proj.weight"] = weights[f"{attention}.out_proj"]
            for kind in "qkv":
                assert f"{attention}.{kind}_proj" in weights
        rest = {name: self.fixed[name] for name in dict(self.model.named_parameters()) if name in self.fixed}
        # Biases of adapted layers and the student's noise.
        for number in range(tiny.VISION["layers"]):
            attention = f"visual.transformer.resblocks.{number}.attn"
            biases = [self.fixed[f"{attention}.{q}_proj.base_layer.bias"] for q in "qkv"]
            rest[f"{attention}.in_proj_bias"] = torch.cat(biases)
            rest[f"{attention}.out_proj.bias"] = self.fixed[f"{attention}.out_proj.base_layer.bias"]
        encode = functional_call(self.model, rest | parameters, (images,))
        image = encode[0] if isinstance(encode, tuple) else encode["image_features"]
        return image / image.norm(dim=1, keepdim=True)

    def logits(self, rows: Tensor) -> Tensor:
        return rows @ self.head[0].T + self.head[1]

    def cross_entropy(self, rows: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(rows), self.labels)

    def changes(self, ascents: int) -> dict[str, Tensor]:
        """The perturbation of each layer by its equations."""
        loss = self.cross_entropy(self.features(self.images))
        gradients = dict(zip(self.factors, torch.autograd.grad(loss, list(self.factors.values())), strict=True))
        curvature = [
            TARGET
            * torch.cat([gradients[f"{each.name}.lora_{kind}.default.weight"].flatten() for kind in "AB"])
            .square()
            .mean()
            for each in self.layers
        ]
        ordered = sorted(float(value) for value in curvature)
        low, high = (quantile(ordered, share) for share in (0.2, 0.8))
        self.ranks = [4 if value >= high else 2 if value >= low else 0 for value in map(float, curvature)]
        pairs: dict[str, list[Tensor]] = {}
        for number, layer in enumerate(self.layers):
            noise = torch.from_numpy(
                stream(0, Draw.PERTURBATION, 0, number).standard_normal((RANK, layer.weight.shape[1]))
            )
            noise = noise.float().double()
            noise[self.ranks[number] :] = 0
            pairs[layer.name] = [noise, torch.zeros(layer.weight.shape[0], RANK, dtype=torch.float64)]
        for ascent in range(ascents):
            for pair in pairs.values():
                for factor in pair:
                    factor.requires_grad_()
            rows = self.features(changed(self.images), {name: b @ a for name, (a, b) in pairs.items()})
            flat = [factor for pair in pairs.values() for factor in pair]
            rises = iter(torch.autograd.grad(self.cross_entropy(rows), flat))
            for name, (a, b) in list(pairs.items()):
                by_a, by_b = next(rises), next(rises)
                a, b = a.detach(), b.detach()
                if by_b.norm() > 0:
                    b = b + (1 if ascent == 0 else b.norm()) * by_b / by_b.norm()
                if ascent and by_a.norm() > 0:
                    a = a + a.norm() * by_a / by_a.norm()
                length = (b @ a).norm()
                if length > 0:
                    b = b * SIZE * self.weight(name).detach().norm() / length
                pairs[name] = [a, b]
        return {name: b @ a for name, (a, b) in pairs.items()}

    def loss(self, name: str, options: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        clean, adversarial = self.features(self.images), self.features(changed(self.images))
        if name == "tecoa":
            return self.cross_entropy(adversarial), {}
        if name == "pmg_aft":
            with torch.no_grad():
                frozen = self.features(changed(self.images), factor=TEACHER_FACTOR)
            z, z0, c = (self.logits(rows).softmax(1) for rows in (adversarial, frozen, clean))
            first, second = ((p * (p / z).log()).sum(1).mean() for p in (z0, c))
            metrics = {"frozen_kl": first.item(), "clean_kl": second.item()}
            return self.cross_entropy(adversarial) + 0.5 * first + 2 * second, metrics
        loss = self.cross_entropy(clean)
        lar, gram = options.get("weight_perturbation_weight", 1), options.get("gram_weight", 1)
        if not (lar or gram):
            return loss, {}
        perturbed = self.features(changed(self.images), self.changes(options.get("perturbation_steps", 1)))
        rows = torch.stack([clean, adversarial, perturbed], 1)
        volume = (torch.linalg.det(rows @ rows.transpose(1, 2)) + 1e-12).sqrt().mean()
        before = self.cross_entropy(adversarial)
        metrics = {"perturbation_gain": (self.cross_entropy(perturbed) - before).item()}
        metrics |= {"gram_volume": volume.item()} if gram else {}
        return loss + lar * self.cross_entropy(perturbed) + gram * volume, metrics

    def gradients(self, name: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
        loss, metrics = self.loss(name, options)
        gradients = torch.autograd.grad(loss, list(self.factors.values()))
        return dict(zip(self.factors, gradients, strict=True)), metrics | {"loss": loss.item()}


def quantile(ordered: list[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def oracles(folder: Path) -> dict[str, Any]:
    results = {}
    for name, options in OBJECTIVES.items():
        literal = Literal(folder)
        results[name] = *literal.gradients(options.get("name", name), options), getattr(literal, "ranks", None)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.write_model(path, tiny.FEW_TOKENS)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = run_ranks(1, oracles, folder)[0]
    return results


@pytest.mark.parametrize("ranks", PATHS)
def test_step_equals_the_loss_written_literally(folder: Path, expected: dict[str, Any], ranks: int) -> None:
    by_path = run_ranks(ranks, run_steps, folder, PATHS[ranks])[0]
    for (name, *path), (gradients, metrics, state) in by_path.items():
        literal, values, layer_ranks = expected[name]
        assert gradients.keys() == literal.keys(), name
        scale = max(float(gradient.norm()) for gradient in literal.values())
        for key, gradient in literal.items():
            error = float((gradients[key].double().reshape(gradient.shape) - gradient).norm())
            assert error < TOLERANCE * scale, (name, path, key)
        for key, value in values.items():
            assert metrics[key] == pytest.approx(value, rel=1e-3, abs=1e-5), (name, path, key)
        if layer_ranks is not None:
            assert state["perturbed_ranks"].tolist() == layer_ranks
            assert metrics["perturbation_gain"] > 0


def test_terms_of_grace_change_the_gradient(expected: dict[str, Any]) -> None:
    plain = expected["lora"][0]
    for name in ("grace", "two ascents", "weights alone", "volume alone"):
        changes = [float((expected[name][0][key] - plain[key]).norm() / plain[key].norm()) for key in plain]
        assert max(changes) > 0.01, name


# Runs


def start_engine(stage: Stage, zero: int, name: str, **options: Any) -> Engine:
    """An engine whose method is started, with adapters of the image tower."""
    method = registry.create(ObjectiveConfig(**{"name": name} | options), WIDTH, total_steps=10)
    lora = {"rank": LORA_RANK, "alpha": 6.0, "towers": ["image"]}
    engine = stage.engine(zero, "sequential", 3, method, lora=lora, learning_rate=1e-2)
    method.start(Start(lambda texts: torch.empty(0), None, 0, None, (), (), engine.towers))  # type: ignore[arg-type]
    return engine


def final_state(engine: Engine) -> dict[str, Tensor]:
    state = full_state(engine) | engine.method.state()
    return {name: value.clone() for name, value in state.items()}


def resume_after_two_steps(folder: Path, path: Path) -> dict[str, Any]:
    """States after a third step, at which the curvature is estimated again: uninterrupted and resumed."""
    Part.backend = "torch"
    stage = Stage(folder)
    adapted(stage)
    options = {"curvature_every": 2, "attack_steps": 2, "perturbation_size": SIZE}
    engine = start_engine(stage, 2, "grace", **options)
    for _ in range(2):
        engine.step(StepBatches(stage.target))
    saver = Saver(engine, path, TrainConfig(), RunRecord("run"))
    saver.save(2, {"best": None, "best_step": 0, "since_best": 0, "select": None}, {}, required=True)
    saver.finish(required=True)
    first = engine.method.state()["curvature"].clone()
    engine.step(StepBatches(stage.target))
    uninterrupted = final_state(engine)
    engine.deepspeed.destroy()
    engine = start_engine(stage, 2, "grace", **options)
    load_checkpoint(engine, checkpoint_path(path, 2))
    engine.step(StepBatches(stage.target))
    return {"uninterrupted": uninterrupted, "resumed": final_state(engine), "first": first}


def test_resumed_run_has_the_curvature_and_equal_weights(folder: Path, tmp_path: Path) -> None:
    by_rank = run_ranks(2, resume_after_two_steps, folder, tmp_path)
    for states in by_rank:
        assert states["uninterrupted"].keys() == states["resumed"].keys()
        for name, value in states["uninterrupted"].items():
            assert torch.equal(value, states["resumed"][name]), name
        assert not torch.equal(states["uninterrupted"]["curvature"], states["first"])
    for name in ("curvature", "perturbed_ranks"):
        assert torch.equal(by_rank[0]["resumed"][name], by_rank[1]["resumed"][name])
    stored = [load_file(file) for file in checkpoint_path(tmp_path, 2).glob("*.safetensors")]
    assert not any("perturbation" in name for tensors in stored for name in tensors)


def run_without_adversary(folder: Path) -> list[dict[str, Tensor]]:
    """Weights after two steps of GRACE with weights 0, and of cross-entropy with a frozen head."""
    Part.backend = "torch"
    stage, results = Stage(folder), []
    adapted(stage)
    for name, options in (("grace", OBJECTIVES["lora"]), ("tecoa", {"attack_steps": 0})):
        engine = start_engine(stage, 0, name, **{key: value for key, value in options.items() if key != "name"})
        for _ in range(2):
            engine.step(StepBatches(stage.target))
        results.append(full_state(engine))
        engine.deepspeed.destroy()
    return results


def test_grace_of_weights_zero_has_the_bits_of_lora_tuning(folder: Path) -> None:
    grace, lora = run_ranks(1, run_without_adversary, folder)[0]
    shared = {name for name in grace if "perturbation" not in name}
    assert shared == lora.keys()
    assert all(torch.equal(grace[name], lora[name]) for name in shared)


# Attacks on training images


def small_attack(**options: Any) -> tuple[ImageAttack, Callable[[Tensor], Tensor]]:
    attack = ImageAttack(TeCoA.Options(**options), seed=3)
    attack._mean_and_std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CLASSES, 3 * 8 * 8, generator=generator)
    return attack, lambda images: images.flatten(1) @ weight.T / 10


def normalised(count: int) -> tuple[Tensor, ImageInfo]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(count, 3, 8, 8, generator=generator)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    images = (pixels - mean) / std
    return images, ImageInfo(labels, None, torch.arange(count), images)


def test_training_attack_stays_within_eps_of_each_pixel() -> None:
    attack, logits = small_attack(attack_eps=4.0)
    images, info = normalised(6)
    attacked = attack(images, logits, info, step=2)
    std = torch.tensor([0.27, 0.26, 0.28])[:, None, None]
    change = (attacked - images) * std * 255
    assert change.abs().max() <= 4 + 1e-3
    assert change.abs().max() > 3.9
    assert info.labels is not None
    before, after = (F.cross_entropy(logits(each), info.labels) for each in (images, attacked))
    assert after > before
    assert attack.metrics(None) == {"attack_failures": 0.0}


def test_training_attack_depends_on_sample_and_step_not_on_the_batch() -> None:
    attack, logits = small_attack()
    images, info = normalised(6)
    together = attack(images, logits, info, step=2)
    one = slice(4, 5)
    assert info.labels is not None
    apart = attack(images[one], logits, ImageInfo(info.labels[one], None, info.samples[one], images[one]), step=2)
    torch.testing.assert_close(apart, together[one])
    assert not torch.equal(attack(images, logits, info, step=3), together)


def test_image_without_finite_gradient_stays_clean_and_is_counted() -> None:
    attack, logits = small_attack()
    images, info = normalised(4)
    images[1, 0, 0, 0] = math.nan
    attacked = attack(images, logits, info, step=0)
    assert torch.equal(attacked[1].nan_to_num(7), images[1].nan_to_num(7))
    assert not torch.equal(attacked[0], images[0])
    assert float(attack.metrics(None)["attack_failures"]) == 0.25
    assert attack.metrics(None) == {}


def test_attack_of_no_steps_or_size_is_none() -> None:
    images, info = normalised(2)
    for options in ({"attack_steps": 0}, {"attack_eps": 0.0}):
        attack, logits = small_attack(**options)
        assert attack(images, logits, info, step=0) is images


def test_needs_of_adversarial_methods() -> None:
    assert needs_of(Grace, None).adapters
    for loss in (Grace, TeCoA, PmgAft):
        needs = needs_of(loss, None)
        assert needs.head
        assert needs.all_weights
        assert not needs.texts
    assert needs_of(PmgAft, None).target_teacher == "frozen"


def test_grace_without_adapters_is_refused(folder: Path) -> None:
    from dive_fast.config.schema import ModelConfig
    from dive_fast.engine import trained_parameters
    from dive_fast.model.towers import create

    model = ModelConfig(name=f"local-dir:{folder}")
    method = registry.create(ObjectiveConfig(name="grace"), WIDTH)
    for lora in (None, LoraConfig(towers=["text"])):
        adapted_model = model.model_copy(update={"lora": lora})
        with pytest.raises(ConfigError, match=r"model\.lora: .*image tower"):
            trained_parameters.check(adapted_model, TrainConfig(), create(model), method)
