"""Losses of prompt learning by numbers worked out by hand, and what CoOp, KgCoOp and ContCoOp have in common."""

import math
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from dive_fast.config.schema import ModelConfig, ObjectiveConfig
from dive_fast.data.prompt_files import Template
from dive_fast.errors import ConfigError
from dive_fast.methods import registry
from dive_fast.methods.method import Method, Start
from dive_fast.model.features import Outputs
from dive_fast.model.learned_prompts import encode_classes
from dive_fast.model.towers import Towers, create, tokenizer_of

NAMES = ("dog", "white cat", "bird", "dog")
LABELS = torch.tensor([3, 1, 0])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(name=tiny.write_model(tmp_path_factory.mktemp("model"), tiny.FEW_TOKENS))


def started(model: ModelConfig, names: tuple[str, ...] = NAMES, **objective: Any) -> tuple[Method, Towers]:
    """A method after its start, with towers that have its prompts."""
    method, towers = registry.create(ObjectiveConfig.model_validate(objective), 24), create(model).eval()
    tokenizer = tokenizer_of(model)

    def embed(texts: Any) -> Tensor:
        with torch.no_grad():
            return F.normalize(towers.encode_text(tokenizer(list(texts)), 77))

    templates = (Template("a photo of a {}."),)
    method.start(Start(embed, tokenizer, towers.vocabulary, towers.pooled_at, names, templates, towers))
    towers.prompts = method.target_loss.learned_prompts(towers)
    return method, towers


def gradients(method: Method, towers: Towers) -> tuple[dict[str, Tensor], Any]:
    """Gradients by the prompts, and the loss, at random images."""
    classes = method.target_loss.classes
    features = encode_classes(towers, towers.prompts, classes, range(len(classes.tokens)))
    images = torch.randn(3, 24, generator=torch.Generator().manual_seed(5))
    loss = method.target(Outputs(images, None, torch.tensor([20.0]), classes=features), LABELS)
    loss.loss.backward()
    return {name: p.grad for name, p in towers.prompts.named_parameters() if p.grad is not None}, loss


def with_hand(name: str, hand: Tensor, **options: Any) -> Any:
    part = registry.create(ObjectiveConfig.model_validate({"name": name} | options), 2).target_loss
    part._hand = hand  # type: ignore[assignment]
    return part


def test_losses_equal_worked_example() -> None:
    # One image along the first class; the second class is at 60 degrees to it, its hand-made prompt at 90.
    classes = torch.tensor([[2.0, 0.0], [0.5, math.sqrt(0.75)]])
    outputs = Outputs(torch.tensor([[3.0, 0.0]]), None, torch.tensor([2.0]), classes=classes)
    hand, label = torch.eye(2), torch.tensor([0])
    first = 1 / (1 + math.exp(-1))  # logits 2 and 1
    cross_entropy = -math.log(first)
    coop = registry.create(ObjectiveConfig(name="coop"), 2).target(outputs, label)
    assert float(coop.loss) == pytest.approx(cross_entropy, rel=1e-6)
    kgcoop = with_hand("kgcoop", hand).loss(outputs, label)
    distance = 1 - (1 + math.sqrt(0.75)) / 2
    assert float(kgcoop.metrics["prompt_distance"]) == pytest.approx(distance, rel=1e-5)
    assert float(kgcoop.loss) == pytest.approx(cross_entropy + 8 * distance, rel=1e-5)
    contcoop = with_hand("contcoop", hand, distillation_weight=0.5).loss(outputs, label)
    old = 1 / (1 + math.exp(-2))  # logits 2 and 0
    divergence = old * math.log(old / first) + (1 - old) * math.log((1 - old) / (1 - first))
    assert float(contcoop.metrics["prompt_distance"]) == pytest.approx(divergence, rel=1e-5)
    assert float(contcoop.loss) == pytest.approx(cross_entropy + 0.5 * divergence, rel=1e-5)


@pytest.mark.parametrize("name", ["kgcoop", "contcoop"])
def test_distance_at_the_hand_made_prompt_is_zero(model: ModelConfig, name: str) -> None:
    _, loss = gradients(*started(model, name=name))
    assert abs(float(loss.metrics["prompt_distance"])) < 1e-6


def test_weight_zero_and_no_attention_have_coops_gradient(model: ModelConfig) -> None:
    expected, loss = gradients(*started(model, name="coop"))
    for name in ("kgcoop", "contcoop"):
        other, same = gradients(*started(model, name=name, distillation_weight=0.0))
        assert torch.equal(same.loss, loss.loss)
        torch.testing.assert_close(other["context"], expected["context"], rtol=1e-5, atol=1e-6)
        # The output's weight is zero at the start, so it alone of the attention has a gradient.
        moved = {key for key, gradient in other.items() if bool(gradient.any())}
        assert moved == {"context"} | ({"attention.output.weight"} if name == "contcoop" else set())


def test_permuted_classes_permute_logits(model: ModelConfig) -> None:
    order = [2, 0, 3, 1]
    method, towers = started(model, name="contcoop", residual=False, heads=4)
    permuted, same = started(model, tuple(NAMES[row] for row in order), name="contcoop", residual=False, heads=4)
    rows, others = (
        encode_classes(each, each.prompts, part.target_loss.classes, range(4))
        for part, each in ((method, towers), (permuted, same))
    )
    torch.testing.assert_close(others, rows[order], rtol=0, atol=1e-5)
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)


def test_placeholders_that_are_joined_are_refused(model: ModelConfig) -> None:
    method, towers = started(model, name="coop", context=3)
    assert towers.prompts.context.shape[0] == 3

    def tokenize(texts: list[str]) -> Tensor:
        rows = torch.zeros(len(texts), 9, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            words = text.replace("X X X", "XXX").split()
            row[: len(words)], row[len(words)] = 1, 117
        return rows

    start = Start(lambda _: Tensor(), tokenize, 118, "argmax", NAMES, (), towers)
    with pytest.raises(ConfigError, match="makes 1 tokens of 3 placeholders"):
        method.start(start)
