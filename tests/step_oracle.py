"""Gradients and losses of a step by the equations of the paper, and engines on the same batches."""

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from dive_fast.config.schema import Config, ModelConfig
from dive_fast.data.batch import ReferenceBatch, TargetBatch
from dive_fast.data.prompts import pack
from dive_fast.distributed import join
from dive_fast.engine.async_scalars import AsyncScalars as AsyncScalars
from dive_fast.engine.step import Engine, StepBatches
from dive_fast.methods import registry
from dive_fast.methods.method import Method
from dive_fast.methods.run_config import RunConfig
from dive_fast.model.towers import create, tokenizer_of
from dive_fast.teacher.teacher import OnlineTeacher

TARGET, REFERENCE, WIDTH = 8, 12, 24
WEIGHT, DECAY = 1000.0, 0.9
AVERAGE_COSINE = 0.8
FP16_SCALE = 4.0
PROMPTS = [
    "a photo of a dog",
    "a cat",
    "a dog",
    "a cat",
    "a photo of a dog",
    "two birds in a tree",
    "a cat",
    "a cat",
]
CAPTIONS = [f"picture number {i} of {'many many ' * (i % 3)}things" for i in range(REFERENCE - 1)] + ["a cat"]
TARGET_ONLY = ("vanilla_ft", "flyp")
"""Methods without a reference half."""
TOTAL_STEPS = 10
"""Steps of the run that an engine is created for."""
CLASSES = 5
LABELS = [3, 1, 3, 1, 3, 0, 1, 4]


def batches(folder: Path) -> dict[str, Tensor]:
    """Images and tokens of a target and a reference batch over all ranks, the average vector and the head."""
    tokenizer = tokenizer_of(ModelConfig(name=f"local-dir:{folder}"))
    generator = torch.Generator().manual_seed(7)
    return {
        "target_images": torch.randn(TARGET, 3, 32, 32, generator=generator),
        "target_tokens": tokenizer(PROMPTS),
        "reference_images": torch.randn(REFERENCE, 3, 32, 32, generator=generator),
        "reference_tokens": tokenizer(CAPTIONS),
        "average_vector": 0.05 * torch.randn(WIDTH, generator=generator),
        "head.weight": torch.randn(CLASSES, WIDTH, generator=generator),
        "head.bias": torch.randn(CLASSES, generator=generator),
    }


def add_noise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The student's weights: the teacher's plus noise."""
    generator = torch.Generator().manual_seed(3)
    return {name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in state.items()}


def oracle(folder: Path, name: str = "dive") -> tuple[dict[str, Tensor], dict[str, float]]:
    """Parameter gradients and losses as the paper writes them."""
    frozen = open_clip.create_model(f"local-dir:{folder}").eval()
    student = copy.deepcopy(frozen)
    student.load_state_dict(add_noise(frozen.state_dict()))
    data = batches(folder)

    def embed(model: Any, half: str) -> tuple[Tensor, Tensor]:
        return (
            F.normalize(model.encode_image(data[f"{half}_images"]), dim=-1),
            F.normalize(model.encode_text(data[f"{half}_tokens"]), dim=-1),
        )

    if name == "vanilla_ft":
        head = {part: data[part].requires_grad_() for part in ("head.weight", "head.bias")}
        logits = embed(student, "target")[0] @ head["head.weight"].T + head["head.bias"]
        loss = F.cross_entropy(logits, torch.tensor(LABELS))
        loss.backward()
        parameters = {part: p for part, p in student.named_parameters() if part.startswith("visual.")} | head
        return {part: p.grad for part, p in parameters.items()}, dict.fromkeys(
            ("loss", "cross_entropy"), loss.item()
        )
    f, g = embed(student, "target")
    loss = contrastive = contrastive_as_written(f, g, student.logit_scale.exp())
    values = {"contrastive_loss": contrastive}
    if name not in TARGET_ONLY:
        with torch.no_grad():
            frozen_pairs = embed(frozen, "reference")
        pairs = embed(student, "reference")
        average_vector = data["average_vector"]
        term, metrics = reference_as_written(name, pairs, frozen_pairs, student.logit_scale.exp(), average_vector)
        loss, values = contrastive + WEIGHT * term, values | metrics
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    return gradients, {name: value.item() for name, value in (values | {"loss": loss}).items()}


def contrastive_as_written(f: Tensor, g: Tensor, scale: Tensor) -> Tensor:
    logits, labels = scale * f @ g.T, torch.arange(len(f))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def self_distillation_oracle(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Parameter gradients and losses in float64 of a step of TRACER or CaRot with distillation.

    The teacher has the pre-trained weights and the student other ones, as in :class:`Stage`.
    """
    teacher = open_clip.create_model(f"local-dir:{folder}").eval()
    student = copy.deepcopy(teacher)
    student.load_state_dict(add_noise(teacher.state_dict()))
    teacher, student = teacher.double(), student.double()
    data = in_float64(batches(folder))
    loss, values = self_distillation_as_written(name.removesuffix("_dive"), student, teacher, data)
    if name.endswith("_dive"):
        with torch.no_grad():
            frozen = embedded(teacher, data, "reference")
        pairs = embedded(student, data, "reference")
        scale, average_vector = student.logit_scale.exp(), data["average_vector"]
        term, metrics = reference_as_written("dive", pairs, frozen, scale, average_vector)
        loss, values = loss + WEIGHT * term, values | metrics
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    return gradients, {name: value.item() for name, value in (values | {"loss": loss}).items()}


def in_float64(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Batches for models in float64."""
    return {key: value.double() if value.is_floating_point() else value for key, value in data.items()}


def embedded(model: Any, data: dict[str, Tensor], half: str) -> tuple[Tensor, Tensor]:
    """Unit embeddings of a half's images and texts."""
    image, text = model.encode_image(data[f"{half}_images"]), model.encode_text(data[f"{half}_tokens"])
    return image / image.square().sum(1, keepdim=True).sqrt(), text / text.square().sum(1, keepdim=True).sqrt()


def self_distillation_as_written(
    name: str,
    student: Any,
    teacher: Any,
    data: dict[str, Tensor],
    first: bool = False,
    feature_weight: float = 2000,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of TRACER or CaRot with the weights of their code, and its terms.

    Args:
        student, teacher: models of open_clip.
        first: whether it is the first step, which has no distillation.
        feature_weight: weight of FD inside TRACER's sum.
    """
    f, g = embedded(student, data, "target")
    s, image_map, text_map = student.logit_scale.exp(), student.visual.proj, student.text_projection
    contrastive = contrastive_as_written(f, g, s)
    cross_norm = (image_map @ text_map.T).square().sum().sqrt()
    values = {"contrastive_loss": contrastive, "penalty": 0.05 * cross_norm}
    if name == "carot":
        gram = image_map.T @ image_map - torch.eye(WIDTH, dtype=f.dtype)
        values["penalty"] = values["penalty"] + 0.2 * gram.square().sum().sqrt()
    loss = contrastive + values["penalty"]
    if first:
        return loss, values
    with torch.no_grad():
        f_teacher, g_teacher = embedded(teacher, data, "target")
        teacher_logits = teacher.logit_scale.exp() * f_teacher @ g_teacher.T
    logits, count = s * f @ g.T, len(f)

    def cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
        probabilities = targets.exp() / targets.exp().sum(1, keepdim=True)
        return -(probabilities * (logits - logits.exp().sum(1, keepdim=True).log())).sum() / count

    def divergence(targets: Tensor, logits: Tensor) -> Tensor:
        return cross_entropy(targets, logits) - cross_entropy(targets, targets)

    if name == "carot":
        distillation = cross_entropy(teacher_logits, logits) + cross_entropy(teacher_logits.T, logits.T)
        return loss + 1.5 * distillation, values | {"self_distillation_loss": distillation}
    a, b = s * f @ g_teacher.T, s * g @ f_teacher.T
    squares = [(x[i] - y[i]) @ (x[i] - y[i]) for x, y in ((f, f_teacher), (g, g_teacher)) for i in range(count)]
    terms = {
        "feature_loss": torch.stack(squares).sum() / (count * WIDTH),
        "relational_loss": (divergence(teacher_logits, logits) + divergence(teacher_logits.T, logits.T)) / 2,
        "interactive_loss": sum(F.cross_entropy(each, torch.arange(count)) for each in (a, b)) / 2,
        "cross_loss": (divergence(teacher_logits, a) + divergence(teacher_logits.T, b)) / 2,
    }
    weights = (feature_weight, 1, 1, 1)
    distillation = torch.stack([weight * term for weight, term in zip(weights, terms.values(), strict=True)]).sum()
    return loss + 0.9 * distillation, values | terms


def reference_as_written(
    name: str, pairs: tuple[Tensor, Tensor], frozen: tuple[Tensor, Tensor], scale: Tensor, average_vector: Tensor
) -> tuple[Any, dict[str, Any]]:
    """The loss of the reference batch, and its metrics."""
    (f_ft, g_ft), (f_pre, g_pre) = pairs, frozen
    if name == "flyp_replay":
        replay = contrastive_as_written(f_ft, g_ft, scale)
        return replay, {"replay_loss": replay}
    if name == "cosine":
        u, v = F.cosine_similarity(f_ft, f_pre), F.cosine_similarity(g_ft, g_pre)
        m = DECAY * AVERAGE_COSINE + (1 - DECAY) * (u + v).mean() / 2
        avl, pvl = ((u - m) ** 2 + (v - m) ** 2).mean(), ((u - v) ** 2).mean()
        values = {"average_loss": avl, "pairwise_loss": pvl, "average_cosine": m}
        return avl + pvl, values | {"image_cosine": u.mean(), "text_cosine": v.mean()}
    u, v = f_ft - f_pre, g_ft - g_pre
    if name == "snd":
        distillation = sum(u[j] @ u[j] for j in range(REFERENCE)) / REFERENCE
        return distillation, {"distillation_loss": distillation, "image_norm": u.norm(dim=1).mean()}
    m = DECAY * average_vector + (1 - DECAY) * (u + v).mean(0) / 2
    avl = sum((u[j] - m) @ (u[j] - m) + (v[j] - m) @ (v[j] - m) for j in range(REFERENCE)) / REFERENCE
    pvl = sum((u[j] - v[j]) @ (u[j] - v[j]) for j in range(REFERENCE)) / REFERENCE
    values = {"average_loss": avl, "pairwise_loss": pvl, "average_norm": m.norm()}
    values |= {"image_norm": u.norm(dim=1).mean(), "text_norm": v.norm(dim=1).mean()}
    return (name != "pvl") * avl + (name != "avl") * pvl, values


def objective(name: str) -> dict[str, Any]:
    """The ``objective`` section of a method, with the oracle's weight and decay if it has them."""
    preset = registry.table().presets[name]
    values = {"decay": DECAY} if "decay" in registry.options_of(preset) else {}
    return {"name": name} | values | ({} if preset.reference is None else {"weight": WEIGHT})


def config(
    folder: Path,
    stage: int,
    schedule: str,
    micro: int | None,
    precision: str = "fp32",
    name: str = "dive",
    clipping: float = 0.0,
    overlap: bool = False,
    zero_options: dict[str, Any] | None = None,
    projection: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    **train_options: Any,
) -> Config:
    data = {"format": "webdataset", "path": "-", "workers": 0}
    tree = {
        "model": {"name": f"local-dir:{folder}", "lora": lora},
        "data": {
            "target": data | {"batch_size": TARGET, "class_names": "-"},
            "reference": data | {"batch_size": REFERENCE},
        },
        "objective": objective(name),
        "projection": projection or {"name": "none"},
        "train": {
            "schedule": schedule,
            "micro_batch_size": micro,
            "precision": precision,
            "learning_rate": 1e-3,
            "warmup_steps": 5,
            **train_options,
        },
        "deepspeed": {
            "zero_optimization": {"stage": stage, "overlap_comm": overlap} | (zero_options or {}),
            "gradient_clipping": clipping,
        },
    }
    return RunConfig.model_validate_json(json.dumps(tree))


class Stage:
    """Common start of all cases on one rank: student, teacher and this rank's share of the oracle's batches."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ranks = folder, join()
        model = ModelConfig(name=f"local-dir:{folder}")
        self.student = create(model)
        self.teacher = OnlineTeacher(copy.deepcopy(self.student), self.ranks)
        # The oracle draws its noise in the order of open_clip's names.
        state = self.student.state_dict()
        noisy = add_noise(open_clip.create_model(model.name).state_dict())
        self.student.load_state_dict(
            {n: noisy[self.student.exported_name(n)].reshape(state[n].shape) for n in state}
        )
        data = batches(folder)
        self.average_vector = data["average_vector"]
        self.head = {part: data[f"head.{part}"] for part in ("weight", "bias")}
        first, second = (list(self.ranks.local_range(count)) for count in (TARGET, REFERENCE))
        self.target = TargetBatch(
            images=data["target_images"][first],
            text=pack(data["target_tokens"][first], "argmax"),
            labels=torch.tensor(LABELS)[first],
            sample=torch.tensor(first),
            keys=(),
        )
        self.reference = ReferenceBatch(
            images=data["reference_images"][second],
            text=pack(data["reference_tokens"][second], "argmax"),
            sample=torch.tensor(second),
            view=torch.zeros(len(second), dtype=torch.long),
            keys=(),
        )

    def engine(
        self,
        zero: int,
        schedule: str = "sequential",
        micro: int | None = None,
        method: Method | None = None,
        **options: Any,
    ) -> Engine:
        settings = config(self.folder, zero, schedule, micro, **options)
        method = method or registry.create(settings.objective, WIDTH, total_steps=TOTAL_STEPS)
        state = method.state()
        if "average_vector" in state:
            state["average_vector"].copy_(self.average_vector)
        if "average_cosine" in state:
            state["average_cosine"].fill_(AVERAGE_COSINE)
        student = copy.deepcopy(self.student)
        if method.needs.head:
            student.head = torch.nn.Linear(WIDTH, CLASSES)
            student.head.load_state_dict(self.head)
        engine = Engine(settings, student, method, self.ranks, TOTAL_STEPS)
        if engine.scale.dynamic:
            # A student this far from its teacher overflows at the initial scale.
            engine.scale.value.fill_(FP16_SCALE)
        return engine

    def accumulate(self, engine: Engine) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Gradients (full, unscaled, with open_clip's names) and metrics of one step."""
        batches = StepBatches(self.target)
        if engine.method.needs.reference:
            batches = StepBatches(self.target, self.reference, self.teacher(self.reference))
        return self.gradients(engine, batches)

    @staticmethod
    def gradients(engine: Engine, batches: StepBatches) -> tuple[dict[str, Tensor], dict[str, float]]:
        """As :meth:`accumulate`, on other batches."""
        from deepspeed.utils import safe_get_full_grad

        metrics = engine.accumulate(batches)
        scale, towers = engine.scale.value.item(), engine.towers
        tuned = {name: p for name, p in towers.named_parameters() if p.requires_grad}
        gradients = {towers.exported_name(n): safe_get_full_grad(p).clone() / scale for n, p in tuned.items()}
        return gradients, {name: float(value) for name, value in metrics.items()}


def assert_same_gradients(gradients: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (gradients[name].reshape(gradient.shape) - gradient).norm() / gradient.norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"
