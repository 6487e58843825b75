"""CaRot: the hand-computed numbers of its loss and schedule, options, and the weights 0."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dive_fast.config.schema import ObjectiveConfig
from dive_fast.config.section import KeyedError
from dive_fast.methods import registry
from dive_fast.methods.carot import Carot
from dive_fast.methods.method import Loss, Setting, TeacherOutputs
from dive_fast.methods.self_distillation import cross_norm, orthogonality_norm
from dive_fast.model.features import Outputs

IMAGE_MAP = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
TEXT_MAP = torch.tensor([[1.0, 2], [0, 1]])
STEPS = 25030
"""Steps of ten epochs of ImageNet in batches of 512."""


def carot(total_steps: int = STEPS, **options: Any) -> Carot:
    return Carot(Carot.Options(**options), Setting(3, total_steps=total_steps))


def outputs() -> tuple[Outputs, TeacherOutputs]:
    """Features with logits [[2, 0], [0, 1]] of the student and [[1, 0], [0, 1]] of the teacher."""
    image = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    text = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.75**0.5]])
    return Outputs(image, text, torch.tensor([2.0])), TeacherOutputs(image, image, torch.tensor([1.0]))


def towers() -> Any:
    return SimpleNamespace(projections=lambda: (IMAGE_MAP, TEXT_MAP))


def loss_of(part: Carot, step: int = 1) -> Loss:
    part.step = step
    student, teacher = outputs()
    return part.loss(student, torch.arange(2), teacher=teacher)


def test_norms_have_the_hand_computed_values() -> None:
    assert orthogonality_norm(IMAGE_MAP).item() == pytest.approx(2)
    assert cross_norm(IMAGE_MAP, TEXT_MAP).item() == pytest.approx(4)


def test_loss_has_the_hand_computed_value() -> None:
    part = carot()
    loss = loss_of(part)
    assert loss.metrics["contrastive_loss"].item() == pytest.approx(0.220095, abs=1e-6)
    assert loss.metrics["self_distillation_loss"].item() == pytest.approx(1.247014, abs=1e-6)
    penalty = part.penalty(towers())
    assert penalty is not None
    assert (loss.loss + penalty).item() == pytest.approx(2.690616, abs=1e-6)
    without_penalty = carot(orthogonality_weight=0.0, projection_weight=0.0)
    assert without_penalty.penalty(towers()) is None
    assert torch.equal(loss_of(without_penalty).loss, loss.loss)


def test_first_step_and_weight_zero_have_the_contrastive_loss_alone() -> None:
    flyp = registry.create(ObjectiveConfig(name="flyp"), 3).target(outputs()[0], torch.arange(2))
    for loss in (loss_of(carot(), step=0), loss_of(carot(distillation_weight=0.0))):
        assert torch.equal(loss.loss, flyp.loss)
        assert loss.metrics == flyp.metrics


def test_decay_has_the_hand_computed_values() -> None:
    part = carot()
    decays = [part.decay(step) for step in (0, 500, 2500, 5000, 5500, STEPS - 1)]
    assert decays == pytest.approx([0.05, 0.1349, 0.4745, 0.8990, 0.9, 0.9], abs=5e-5)
    assert carot(decay_ramp=0.0).decay(0) == 0.9
    assert carot(total_steps=10, decay_ramp=1.0).decay(5) == pytest.approx(0.475)


def test_teacher_moves_every_500_steps_by_the_hand_computed_values() -> None:
    part, teacher, moved = carot(), torch.zeros(()), []
    for step in range(1001):
        part.step = step
        rate = part.teacher_rate(torch.ones(()))
        assert (rate is None) == (step % 500 > 0)
        if rate is not None:
            teacher = teacher + rate * (1 + step / 500 - teacher)
            moved.append(teacher.item())
    assert moved == pytest.approx([0.95, 1.85836, 2.74907], abs=1e-5)


def test_pretrained_weights_are_forgotten() -> None:
    """The pre-trained weights' share of the teacher, at a fifth of the run and at its end."""
    part = carot()
    shares = [math.prod(part.decay(step) for step in range(0, end, 500)) for end in (5001, STEPS)]
    assert shares == pytest.approx([1.6e-5, 2.4e-7], rel=0.05)


def test_norms_have_no_gradient_at_zero() -> None:
    maps: list[tuple[Tensor, Tensor]] = [
        (torch.eye(3, 2), torch.zeros(4, 2)),
        (torch.zeros(3, 2), torch.zeros(4, 2)),
        (torch.eye(2), torch.eye(2)),
    ]
    for pair in maps:
        image_map, text_map = (each.clone().requires_grad_() for each in pair)
        (cross_norm(image_map, text_map) + orthogonality_norm(image_map)).backward()
        for each in (image_map, text_map):
            assert each.grad is not None
            assert torch.isfinite(each.grad).all()
    orthonormal = torch.eye(3, 2).requires_grad_()
    orthogonality_norm(orthonormal).backward()
    assert orthonormal.grad is not None
    assert not orthonormal.grad.any()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("distillation_weight", -1),
        ("orthogonality_weight", -0.1),
        ("projection_weight", float("inf")),
        ("teacher_every", 0),
        ("teacher_every", 1.5),
        ("decay_start", 1.1),
        ("decay_end", -0.1),
        ("decay_ramp", 2),
    ],
)
def test_invalid_option_names_its_key(option: str, value: float) -> None:
    with pytest.raises((KeyedError, ValueError), match=option):
        registry.choose(ObjectiveConfig.model_validate({"name": "carot", option: value}))
