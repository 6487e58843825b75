"""Tests of the methods' losses, which combine those of the kernels, and of DiVE's average vector."""

import pytest
import torch
from torch import Tensor, nn

from dive_fast.config.schema import ObjectiveConfig
from dive_fast.config.section import Section
from dive_fast.kernels import contrastive_loss, difference_loss, naive
from dive_fast.methods import registry
from dive_fast.methods.flyp import Contrastive
from dive_fast.methods.flyp_replay import Replay
from dive_fast.methods.method import Group, Loss, Method, Setting
from dive_fast.model.features import Outputs, Pairs

WIDTH = 6


def pairs(seed: int, count: int = 5) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    return Pairs(*torch.randn(2, count, WIDTH, generator=generator))


def teacher(seed: int, count: int = 5) -> Pairs:
    return Pairs(*(naive.unit(rows) for rows in pairs(seed, count)))


SCALE = torch.tensor([20.0])
LABELS = torch.zeros(5, dtype=torch.long)


def outputs(seed: int, count: int = 5) -> Outputs:
    return Outputs(*pairs(seed, count), SCALE)


def test_flyp_is_contrastive_loss_without_reference() -> None:
    method = registry.create(ObjectiveConfig(name="flyp"), WIDTH)
    assert not method.needs.reference
    assert torch.equal(method.target(outputs(0), LABELS).loss, contrastive_loss(*pairs(0), SCALE))
    assert not method.state()


def test_dive_weights_difference_loss_and_moves_average_vector() -> None:
    config = ObjectiveConfig(weight=30.0, decay=0.5, average_weight=2.0, pairwise_weight=3.0, mean_gradient=False)
    method = registry.create(config, WIDTH)
    vector: Tensor = torch.zeros(WIDTH)
    for step in range(3):
        expected = difference_loss(
            *pairs(step),
            *teacher(9),
            vector,
            decay=0.5,
            average_weight=2.0,
            pairwise_weight=3.0,
            mean_gradient=False,
        )
        result = method.reference(outputs(step), teacher(9))
        assert torch.equal(result.loss, 30 * expected.loss)
        assert torch.equal(result.metrics["pairwise_loss"], expected.pairwise_loss)
        vector = expected.average_vector
        assert torch.equal(method.state()["average_vector"], vector)
    assert torch.equal(method.state()["average_vector"], vector)


def test_joint_loss_is_sum_of_both_halves() -> None:
    separate, joint_method = (registry.create(ObjectiveConfig(), WIDTH) for _ in range(2))
    first, second = separate.target(outputs(0), LABELS), separate.reference(outputs(1, 7), teacher(2, 7))
    joint = joint_method.joint(outputs(0), LABELS, outputs(1, 7), teacher(2, 7))
    assert torch.equal(joint.loss, first.loss + second.loss)
    assert joint.metrics == first.metrics | second.metrics
    assert torch.equal(separate.state()["average_vector"], joint_method.state()["average_vector"])


def test_average_vector_ignores_batch_with_nan() -> None:
    method = registry.create(ObjectiveConfig(), WIDTH)
    method.reference(outputs(0), teacher(1))
    before = method.state()["average_vector"].clone()
    bad = outputs(2)
    bad.image[0, 0] = torch.nan
    assert method.reference(bad, teacher(1)).loss.isnan()
    assert torch.equal(method.state()["average_vector"], before)


def test_metrics_have_no_gradient() -> None:
    method = registry.create(ObjectiveConfig(), WIDTH)
    features = Outputs(*(rows.requires_grad_() for rows in pairs(0)), SCALE.clone().requires_grad_())
    result = method.joint(features, LABELS, features, teacher(1))
    assert result.loss.requires_grad
    assert not any(value.requires_grad for value in result.metrics.values())
    assert not method.state()["average_vector"].requires_grad


def test_part_with_parameters_is_refused() -> None:
    part = Contrastive(Section(), Setting(WIDTH))
    part.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match=r"a part has parameters, .*: target_loss\.scale"):
        Method(part)


def test_metric_that_both_parts_log_is_refused() -> None:
    class Same(Replay):
        def loss(self, outputs: Outputs, teacher: Pairs | None, group: Group = None) -> Loss:
            loss: Loss = super().loss(outputs, teacher, group)
            return Loss(loss.loss, {"contrastive_loss": loss.loss.detach()})

    method = Method(Contrastive(Section(), Setting(WIDTH)), Same(Section(), Setting(WIDTH)))
    with pytest.raises(ValueError, match="two losses log a metric of the same name: contrastive_loss"):
        method.joint(outputs(0), LABELS, outputs(1), None)
