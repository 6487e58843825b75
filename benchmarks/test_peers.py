"""The competitors: their gradients are those of the project's plain formulas."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import steps
import torch
from losses import DEVICE, INTERPRETED
from peers.dive_published import DivePublished
from peers.flyp import Flyp, Inputs, cosine_with_warmup
from peers.levers import DiveWithLevers, Levers
from torch import Tensor

from dive_fast.engine.optimizer import learning_rate_schedule
from dive_fast.kernels import naive
from dive_fast.model import transformer_blocks as blocks
from dive_fast.model.fast_blocks import FastModule
from dive_fast.model.towers import Towers, unit

BATCH = 6
WEIGHT, DECAY = 1000.0, 0.9
# Only the average vector changes: AdamW's first update is the gradient's sign, which depends on rounding.
STILL: dict[str, Any] = {"total_steps": 10, "learning_rate": 0.0}
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def teacher() -> Any:
    return copy.deepcopy(steps.random_model("ViT-tiny")).to(DEVICE)


@pytest.fixture(scope="module")
def student(teacher: Any) -> Any:
    """The teacher with small changes."""
    changed = copy.deepcopy(teacher)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return changed


@pytest.fixture(scope="module")
def batches() -> list[Inputs]:
    """Batches of two steps; the first has equal texts."""
    both = steps.make_inputs("ViT-tiny", 2 * BATCH, 2 * BATCH)
    first, second = (Inputs(*parts) for parts in zip(*(tensor.split(BATCH) for tensor in both)))
    first.target_tokens[1] = first.target_tokens[0]
    first.reference_tokens[3] = first.reference_tokens[2]
    return [first, second]


def gradients(model: Any) -> Gradients:
    return {name: parameter.grad.reshape(-1).clone() for name, parameter in model.named_parameters()}


def error(actual: Gradients, expected: Gradients) -> float:
    """Largest relative error of a parameter's gradient, by norms."""
    assert actual.keys() == expected.keys()
    return max(float((actual[name] - value).norm() / value.norm()) for name, value in expected.items())


def by_steps(step: Callable[..., Any], model: Any, batches: list[Any]) -> list[Gradients]:
    collected = []
    for batch in batches:
        step(batch)
        collected.append(gradients(model))
    return collected


def features(towers: Towers, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return towers.encode_image(images), towers.encode_text(tokens)


def published(student: Any, teacher: Any, batches: list[Inputs]) -> list[Gradients]:
    model = copy.deepcopy(student)
    peer = DivePublished(model, copy.deepcopy(teacher), weight=WEIGHT, decay=DECAY, **STILL)
    return by_steps(peer.step, model, batches)


def test_flyp_gradient_is_that_of_contrastive_loss(student: Any, batches: list[Inputs]) -> None:
    model, towers = copy.deepcopy(student), Towers(copy.deepcopy(student))
    collected = by_steps(Flyp(model, **STILL).step, model, batches)
    for batch, gradient in zip(batches, collected, strict=True):
        towers.zero_grad()
        loss = naive.contrastive_loss(*features(towers, *batch[:2]), towers.scale())
        loss.backward()
        assert error(gradient, gradients(towers)) < 1e-5


def test_dive_gradient_and_average_vector_match_paper(student: Any, teacher: Any, batches: list[Inputs]) -> None:
    towers, frozen = Towers(copy.deepcopy(student)), Towers(copy.deepcopy(teacher)).eval()
    average_vector = torch.zeros(towers.width, device=DEVICE)
    for batch, gradient in zip(batches, published(student, teacher, batches), strict=True):
        with torch.no_grad():
            rows = map(unit, features(frozen, *batch[2:]))
        towers.zero_grad()
        target, reference = features(towers, *batch[:2]), features(towers, *batch[2:])
        result = naive.dive_loss(
            *target, towers.scale(), *reference, *rows, average_vector, weight=WEIGHT, decay=DECAY
        )
        result.loss.backward()
        average_vector = result.average_vector
        assert error(gradient, gradients(towers)) < 1e-5


@pytest.mark.parametrize("lever", [*Levers._fields, "all but half precision"])
def test_levers_keep_gradient(
    lever: str, student: Any, teacher: Any, batches: list[Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traces the same graph without inductor, which takes minutes on a small machine.
    monkeypatch.setattr(blocks, "BACKEND", "aot_eager")
    if INTERPRETED:
        # The interpreter takes minutes for these layers; the tests of the step and of the model have it.
        monkeypatch.setattr(FastModule, "backend", "torch")
    every = Levers(*[True] * len(Levers._fields))._replace(half_precision=False)
    levers = Levers(**{lever: True}) if lever in Levers._fields else every
    if levers.fused_losses and not INTERPRETED and DEVICE.type != "cuda":
        pytest.skip("needs Triton and a GPU, or TRITON_INTERPRET=1")
    frozen = Towers(copy.deepcopy(teacher))
    with torch.no_grad():
        rows = [tuple(map(unit, features(frozen, *batch[2:]))) for batch in batches]
    towers = Towers(copy.deepcopy(student))
    peer = DiveWithLevers(
        towers, None if levers.cached_teacher else frozen, levers, weight=WEIGHT, decay=DECAY, **STILL
    )
    if levers.half_precision:
        # A model this far from its teacher overflows at the initial scale.
        peer.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    collected = by_steps(peer.step, towers, [*map(levers.prepare, batches, rows)])
    for ours, expected in zip(collected, published(student, teacher, batches), strict=True):
        if levers.half_precision:
            actual, exact = (torch.cat(list(part.values())) for part in (ours, expected))
            # The lower bound shows that autocast is enabled.
            assert 1e-5 < (actual - exact).norm() / exact.norm() < 0.02
        else:
            assert error(ours, expected) < 1e-5


def test_levers_text_is_trimmed_and_distinct(batches: list[Inputs]) -> None:
    tokens = batches[0].target_tokens
    longest = int(tokens.argmax(1).max()) + 1
    for trimmed, distinct in [(False, False), (True, False), (False, True), (True, True)]:
        text = Levers(trimmed_text=trimmed, distinct_texts=distinct).text(tokens)
        assert text.length == (longest if trimmed else 77)
        assert len(text.tokens) == (BATCH - 1 if distinct else BATCH)
        assert torch.equal(text.tokens[text.index], tokens)


def test_flyp_update_is_adamw_with_the_engines_schedule(student: Any, batches: list[Inputs]) -> None:
    model = copy.deepcopy(student)
    peer = Flyp(model, total_steps=10, learning_rate=1e-3, weight_decay=0.1, warmup_steps=4)
    peer.step(batches[0])
    rate, decay = 1e-3 / 4, 0.1
    for before, after in zip(student.parameters(), model.parameters(), strict=True):
        # Adam's first update divides each gradient by its absolute value.
        update = after.grad / (after.grad.abs() + 1e-8)
        torch.testing.assert_close(after, before * (1 - rate * decay) - rate * update, rtol=1e-5, atol=1e-6)
    ours, engines = cosine_with_warmup(4, 10), learning_rate_schedule(4, 10)
    assert [ours(step) for step in range(12)] == [engines(step) for step in range(12)]


def test_flyp_does_not_bound_the_logit_scale(student: Any, batches: list[Inputs]) -> None:
    model = copy.deepcopy(student)
    peer = Flyp(model, **STILL)
    with torch.no_grad():
        model.logit_scale.fill_(5.0)  # 148
    peer.step(batches[0])
    assert model.logit_scale.item() == 5.0
