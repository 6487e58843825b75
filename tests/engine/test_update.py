"""Tests of the loss scale and the learning-rate schedule."""

import math

import pytest
import torch

from dive_fast.config.schema import TrainConfig
from dive_fast.engine.optimizer import learning_rate_schedule, schedule_of
from dive_fast.engine.update import INITIAL_SCALE, LossScale


def test_loss_scale_counts_nonfinite_losses_apart_from_overflow() -> None:
    skipped, applied = torch.tensor(1.0), torch.tensor(0.0)
    finite, nonfinite = torch.tensor(True), torch.tensor(False)
    scale = LossScale("fp16", torch.device("cpu"))
    first = scale.value.item()
    cases = ((nonfinite, (1, 1)), (nonfinite, (2, 2)), (finite, (2, 0)), (nonfinite, (3, 1)))
    for loss_is_finite, counts in cases:
        before = scale.value.item()
        scale.update(skipped, loss_is_finite)
        assert (scale.nonfinite_steps, scale.nonfinite_in_row) == counts
        # Only where the loss is finite does a smaller scale help.
        assert scale.value == (before / 2 if loss_is_finite is finite else before)
    scale.update(applied, finite)
    assert (scale.nonfinite_steps, scale.nonfinite_in_row, scale.skipped_steps) == (3, 0, 4)
    scale.value.fill_(1.0)
    scale.update(skipped, finite)
    assert (scale.nonfinite_in_row, scale.value) == (1, 1.0)
    assert first == 2.0**16
    plain = LossScale("fp32", torch.device("cpu"))
    plain.update(skipped, finite)
    assert (plain.nonfinite_in_row, plain.skipped_steps) == (1, 1)


def test_loss_scale_halves_on_overflow_and_doubles_after_2000_steps() -> None:
    scale, good, bad = LossScale("fp16", torch.device("cpu")), torch.tensor(0.0), torch.tensor(1.0)
    finite = torch.tensor(True)
    first = scale.value.item()
    scale.update(bad, finite)
    assert scale.value == first / 2
    for _ in range(1999):
        scale.update(good, finite)
    assert scale.value == first / 2
    resumed = LossScale("fp16", torch.device("cpu"))
    resumed.load_state_dict(scale.state_dict())
    for each in (scale, resumed):
        each.update(good, finite)
        assert each.value == first
        for _ in range(40):
            each.update(bad, finite)
        assert each.value == 1.0
        assert each.skipped_steps == 41
    fixed = LossScale("fp32", torch.device("cpu"))
    fixed.update(bad, finite)
    assert fixed.value == 1.0
    assert "loss_scale" not in fixed.metrics()


def test_learning_rate_has_linear_warm_up_and_cosine_decay() -> None:
    factor = learning_rate_schedule(warmup_steps=4, total_steps=12)
    assert [factor(step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factor(8) == pytest.approx(0.5)
    assert factor(12) == pytest.approx(0)
    assert factor(6) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    # A run shorter than its warm-up, and one without.
    assert learning_rate_schedule(500, 10)(9) == pytest.approx(10 / 500)
    assert learning_rate_schedule(0, 10)(0) == 1


def test_learning_rate_of_prompt_learning_falls_once_an_epoch() -> None:
    # CoOp's code at 3 steps an epoch and 4 epochs: the first at a constant rate, then cos(pi k / 4), k = 0, 1, 2.
    train = TrainConfig(learning_rate=0.002, warmup_steps=3, warmup_rate=1e-5, cosine_every="epoch")
    factor = schedule_of(train, 12, 3)
    epochs = [1e-5, *(0.002 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(3))]
    rates = [train.learning_rate * factor(step) for step in range(12)]
    assert rates == pytest.approx([rate for rate in epochs for _ in range(3)], rel=1e-12)
    # The peak follows the constant warm-up in a run of which the cosine falls in every step, too.
    every_step = schedule_of(train.model_copy(update={"cosine_every": "step"}), 12, 3)
    assert [every_step(step) for step in (2, 3)] == pytest.approx([0.005, 1])
    assert every_step(12) == 0


def test_loss_scale_is_not_restored_for_another_precision() -> None:
    cpu = torch.device("cpu")
    scale = LossScale("bf16", cpu)
    scale.skipped_steps += 3
    other = LossScale("fp16", cpu)
    other.load_state_dict(scale.state_dict())
    assert other.value == INITIAL_SCALE
    assert other.skipped_steps == 3
    other.value.fill_(1024.0)
    again, plain = LossScale("fp16", cpu), LossScale("fp32", cpu)
    again.load_state_dict(other.state_dict())
    plain.load_state_dict(other.state_dict())
    assert again.value == 1024
    assert plain.value == 1
