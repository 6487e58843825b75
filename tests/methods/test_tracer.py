"""TRACER: the hand-computed numbers of its loss and teacher, its clocks and kernels, options, and weights 0."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dive_fast.config.schema import ObjectiveConfig
from dive_fast.config.section import KeyedError
from dive_fast.kernels.naive import unit
from dive_fast.methods import registry
from dive_fast.methods.method import Loss, Method, Setting, TeacherOutputs
from dive_fast.methods.self_distillation import SelfDistillation
from dive_fast.methods.tracer import Tracer
from dive_fast.model.features import Outputs

STEPS = 25030
"""Steps of ten epochs of ImageNet in batches of 512."""
ZERO = {"feature_weight": 0.0, "relational_weight": 0.0, "interactive_weight": 0.0, "cross_weight": 0.0}
LABELS = torch.arange(2)


def tracer(total_steps: int = STEPS, **options: Any) -> Tracer:
    return Tracer(Tracer.Options(**options), Setting(2, total_steps=total_steps))


def outputs() -> tuple[Outputs, TeacherOutputs]:
    image, text = torch.tensor([[1.0, 0], [0.6, 0.8]]), torch.tensor([[0.8, 0.6], [0, 1.0]])
    scale = torch.tensor([2.0])
    return Outputs(image, text, scale), TeacherOutputs(torch.eye(2), torch.eye(2), scale)


def loss_of(part: SelfDistillation, step: int = 1) -> Loss:
    part.step = step
    student, teacher = outputs()
    return part.loss(student, LABELS, teacher=teacher)


def move(part: Tracer, theta: Any, steps: int, applied: Any = lambda step: 1.0) -> list[float]:
    """The teacher's weight after each of its updates, from the student's weights ``theta(k)``."""
    teacher, moved = torch.tensor(theta(0), dtype=torch.float64), []
    for step in range(steps):
        part.step = step
        rate = part.teacher_rate(torch.tensor(applied(step)))
        if rate is not None:
            teacher = teacher + rate.double() * applied(step) * (theta(step + 1) - teacher)
            moved.append(teacher.item())
    return moved


# Loss


def test_terms_have_the_hand_computed_values() -> None:
    loss = loss_of(tracer())
    terms = {"feature": 0.2, "relational": 0.235853, "interactive": 0.319972, "cross": 0.097681}
    for term, value in terms.items():
        assert loss.metrics[f"{term}_loss"].item() == pytest.approx(value, abs=1e-6)
    distillation = (loss.loss - loss.metrics["contrastive_loss"]) / 0.9
    assert distillation.item() == pytest.approx(400.653506, rel=1e-6)


def test_term_of_weight_zero_is_left_out() -> None:
    full = loss_of(tracer()).metrics
    for term in ("feature", "relational", "interactive", "cross"):
        loss = loss_of(tracer(distillation_weight=1.0, **(ZERO | {f"{term}_weight": 3.0})))
        assert loss.metrics.keys() == {"contrastive_loss", "logit_scale", f"{term}_loss"}
        distillation = loss.loss - loss.metrics["contrastive_loss"]
        assert distillation.item() == pytest.approx(3 * full[f"{term}_loss"].item(), rel=1e-5)


def test_first_step_and_weights_zero_have_the_contrastive_loss_alone() -> None:
    flyp = registry.create(ObjectiveConfig(name="flyp"), 2).target(outputs()[0], LABELS)
    parts = [(tracer(), 0), (tracer(distillation_weight=0.0), 1), (tracer(**ZERO), 1)]
    for loss in (loss_of(part, step) for part, step in parts):
        assert torch.equal(loss.loss, flyp.loss)
        assert loss.metrics == flyp.metrics
    towers: Any = SimpleNamespace()
    assert tracer(projection_weight=0.0).penalty(towers) is None


def test_equal_teacher_has_no_feature_and_relational_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor([20.0], dtype=torch.float64)
    leaves = [rows.clone().requires_grad_() for rows in (image, text, scale)]
    part = tracer(interactive_weight=0.0, cross_weight=0.0)
    result = part.distillation(Outputs(*leaves), TeacherOutputs(unit(image), unit(text), scale), None)
    for leaf, gradient in zip(leaves, torch.autograd.grad(result.loss, leaves), strict=True):
        assert gradient.abs().max() < 1e-12, leaf.shape
    assert all(value.abs() < 1e-12 for value in result.metrics.values())


# Teacher


def test_kernel_and_teacher_have_the_hand_computed_values() -> None:
    part = tracer(total_steps=4)
    kernel = [part._kernel(k) for k in range(5)]
    assert kernel == pytest.approx([1.061033, 0.694609, 0.63662, 0.694609, 1.061033], abs=1e-6)
    # Algorithm 1's sum, which starts at 0, would end at 2.687.
    assert move(part, float, 4) == pytest.approx([0.39564, 0.82259, 1.31255, 2.0], abs=1e-5)
    assert part.kernel_sum.dtype == torch.float64
    assert part.kernel_sum.item() == pytest.approx(sum(kernel), rel=1e-15)


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.8, 1.0, 1.5, 10.0])
def test_kernel_is_the_beta_density(beta: float) -> None:
    total_steps = 50
    part = tracer(total_steps, kernel_beta=beta)
    for k in (0, 1, 17, 50):
        tau = torch.tensor((k + 0.5) / 51, dtype=torch.float64)
        density = torch.distributions.Beta(*(torch.tensor(beta, dtype=torch.float64),) * 2).log_prob(tau).exp()
        assert part._kernel(k) == pytest.approx(density.item(), rel=1e-9)


def test_largest_beta_is_finite_in_long_runs() -> None:
    part = tracer(10**7, kernel_beta=10.0)
    assert part.kernel_sum.item() > 0
    assert all(0 < value <= 1 for value in move(part, lambda k: float(k > 0), 3))


def test_beta_one_is_a_plain_running_mean() -> None:
    expected = [sum(k**2 for k in range(n + 1)) / (n + 1) for n in range(1, 21)]
    assert move(tracer(20, kernel_beta=1.0), lambda k: float(k**2), 20) == pytest.approx(expected, rel=1e-6)


def test_rates_have_the_hand_computed_values_over_a_run() -> None:
    """Rates at a tenth, in the middle and at the end of a run, and the share of its first tenth in the teacher."""
    part, rates, sums = tracer(), [], []
    for step in range(STEPS):
        part.step = step
        rate = part.teacher_rate(torch.ones(()))
        assert rate is not None
        assert rate.dtype == torch.float32
        rates.append(rate.item())
        sums.append(part.kernel_sum.item())
    picked = [rates[STEPS // 10], rates[STEPS // 2], rates[-1]]
    assert picked == pytest.approx([2.1e-4, 5.1e-5, 2.9e-3], rel=0.03)
    assert sums[STEPS // 10] / sums[-1] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(("every", "share"), [(1, 0.0029), (100, 0.045), (500, 0.103), (2500, 0.224)])
def test_clock_by_updates_leaves_more_of_the_pretrained_weights(every: int, share: float) -> None:
    part = tracer(teacher_every=every, kernel_clock="updates")
    left = move(part, lambda k: float(k == 0), STEPS)
    assert len(left) == -(-STEPS // every)
    assert left[-1] == pytest.approx(share, rel=0.02)


def test_clock_by_steps_weights_updates_by_their_step() -> None:
    total_steps, every = 12, 5
    part = tracer(total_steps, teacher_every=every)
    kernel = [part._kernel(k) for k in (0, 1, 6, 11)]  # updates follow steps 0, 5 and 10
    thetas = [0.0, 1.0, 6.0, 11.0]
    mean = sum(k * theta for k, theta in zip(kernel, thetas, strict=True)) / sum(kernel)
    assert move(part, float, total_steps)[-1] == pytest.approx(mean, rel=1e-6)
    # Without a distance between updates both clocks agree.
    clocks = [move(tracer(9, kernel_clock=clock), float, 9) for clock in ("steps", "updates")]
    assert clocks[0] == clocks[1]


def test_skipped_step_adds_nothing_to_the_average() -> None:
    part = tracer(4)
    moved = move(part, float, 4, lambda step: float(step != 1))
    kernel = [part._kernel(k) for k in (0, 1, 3, 4)]
    assert part.kernel_sum.item() == pytest.approx(sum(kernel), rel=1e-15)
    assert moved[1] == moved[0]
    mean = sum(k * theta for k, theta in zip(kernel, (0, 1, 3, 4), strict=True)) / sum(kernel)
    assert moved[-1] == pytest.approx(mean, rel=1e-6)


def test_step_beyond_the_run_is_an_error() -> None:
    part = tracer(4)
    part.step = 4
    with pytest.raises(ValueError, match="step 5 of a run of 4: create the method with the run's total_steps"):
        part.teacher_rate(torch.ones(()))


# Methods


def test_sum_is_state_next_to_that_of_the_reference_loss() -> None:
    method: Method = registry.create(ObjectiveConfig(name="tracer_dive"), 4, total_steps=9)
    state: dict[str, Tensor] = method.state()
    assert state.keys() == {"kernel_sum", "average_vector"}
    assert method.needs.run_length
    assert method.needs.target_teacher == "moving"
    assert method.needs.reference_teacher


def test_tracer_fd_has_the_feature_term_alone() -> None:
    method = registry.create(ObjectiveConfig(name="tracer_fd"), 2, total_steps=9)
    method.begin_step(1)
    student, teacher = outputs()
    metrics = method.target(student, LABELS, teacher=teacher).metrics
    assert metrics.keys() == {"contrastive_loss", "logit_scale", "feature_loss"}
    with pytest.raises(KeyedError, match="fixes it at 0"):
        registry.choose(ObjectiveConfig.model_validate({"name": "tracer_fd", "cross_weight": 1.0}))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("distillation_weight", -1),
        ("feature_weight", float("nan")),
        ("projection_weight", -0.1),
        ("kernel_beta", 0),
        ("kernel_beta", 11),
        ("kernel_clock", "epochs"),
        ("teacher_every", 0),
    ],
)
def test_invalid_option_names_its_key(option: str, value: Any) -> None:
    with pytest.raises((KeyedError, ValueError), match=option):
        registry.choose(ObjectiveConfig.model_validate({"name": "tracer", option: value}))
