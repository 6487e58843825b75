"""Lipsum-FT: its loss by the numbers worked out by hand, and its random texts."""

from typing import Any

import open_clip
import pytest
import tiny
import torch
from torch import Tensor

from dive_fast.config.schema import ModelConfig, ObjectiveConfig
from dive_fast.errors import ConfigError
from dive_fast.methods import registry
from dive_fast.methods.lipsum import Lipsum, RandomTexts
from dive_fast.methods.method import Start, TeacherOutputs
from dive_fast.model.features import Outputs
from dive_fast.model.towers import create, tokenizer_of

EOS_CLIP = tiny.CLIP | {
    "text_cfg": tiny.TEXT | {"vocab_size": len(tiny.VOCABULARY), "pool_type": "eos", "eos_id": 2}
}


def start(tokenizer: Any, vocabulary: int, pooled_at: Any) -> Start:
    def embed(texts: Any) -> Tensor:
        raise AssertionError("random texts are embedded by the teacher")

    return Start(embed, tokenizer, vocabulary, pooled_at, (), ())


CLIP = start(open_clip.get_tokenizer("ViT-B-16"), 49408, "argmax")


def part(seed: int = 0, **options: Any) -> Lipsum:
    lipsum = registry.create(ObjectiveConfig(name="lipsum", **options), 2, seed=seed).target_loss
    assert isinstance(lipsum, Lipsum)
    return lipsum


def test_loss_equals_worked_example() -> None:
    # r.f = (.3, .1), r.f0 = (.2, .2), s = 100: 1/(2*2) (10^2 + 10^2) = 50; unit rows with these products.
    features, frozen = torch.tensor([0.3, 0.1, 0.0]), torch.tensor([0.2, 0.2, 0.0])
    features[2], frozen[2] = (1 - features.square().sum()).sqrt(), (1 - frozen.square().sum()).sqrt()
    outputs = Outputs(7 * features[None], None, torch.tensor([3.0]), torch.zeros(1, 2))
    teacher = TeacherOutputs(frozen[None], None, torch.tensor([100.0]), part_text=torch.eye(3)[:2])
    loss = part(distillation_weight=2.0).loss(outputs, torch.tensor([0]), teacher=teacher)
    assert float(loss.metrics["random_text_loss"]) == pytest.approx(50, rel=1e-5)
    assert float(loss.loss) == pytest.approx(2 * 50 + torch.tensor(2.0).log().item(), rel=1e-5)


def test_weight_zero_is_vanilla_fine_tuning() -> None:
    outputs = Outputs(torch.randn(3, 2), None, torch.tensor([3.0]), torch.randn(3, 4))
    labels = torch.tensor([0, 3, 1])
    expected = registry.create(ObjectiveConfig(name="vanilla_ft"), 2).target(outputs, labels)
    lipsum = part(distillation_weight=0.0)
    lipsum.start(CLIP)
    assert lipsum.teacher_texts() is None
    loss = lipsum.loss(outputs, labels)
    assert torch.equal(loss.loss, expected.loss)
    assert loss.metrics == expected.metrics


def drawn(seed: int = 0, step: int = 0, **options: Any) -> Tensor:
    lipsum = part(seed, **options)
    lipsum.start(CLIP)
    lipsum.step = step
    texts = lipsum.teacher_texts()
    assert texts is not None
    assert texts.length == 2 + options.get("random_tokens", 8)
    assert torch.equal(texts.index, torch.arange(len(texts.tokens)))
    return texts.tokens


def test_random_texts_have_clips_tokens() -> None:
    tokens = drawn(random_texts=4000)
    assert tokens.shape == (4000, 77)
    assert set(tokens[:, 0].tolist()) == {49406}
    assert set(tokens[:, 9].tolist()) == {49407}
    assert not tokens[:, 10:].any()
    inner = tokens[:, 1:9]
    # Uniform in [0, 49406): 32,000 draws come close to both ends, and their mean is within 4 standard errors.
    assert int(inner.min()) < 26
    assert 49380 < int(inner.max()) < 49406
    assert abs(float(inner.double().mean()) - 49405 / 2) < 4 * 49406 / (12 * inner.numel()) ** 0.5


def test_random_texts_are_a_function_of_seed_and_step() -> None:
    assert drawn().shape == (80, 77)
    assert torch.equal(drawn(3, 5), drawn(3, 5))
    different = [drawn(seed, step) for seed in (0, 1) for step in (0, 1)]
    assert len({tokens.numpy().tobytes() for tokens in different}) == 4


@pytest.fixture(scope="module")
def eos_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("eos")
    tiny.write_tokenizer(folder)
    config = EOS_CLIP | {"text_cfg": EOS_CLIP["text_cfg"] | {"hf_tokenizer_name": str(folder)}}
    return tiny.write_model(folder, config)


def test_random_texts_of_tokenizer_without_start_token(eos_model: str) -> None:
    model = ModelConfig(name=eos_model)
    towers = create(model)
    assert (towers.pooled_at, towers.vocabulary) == (2, len(tiny.VOCABULARY))
    texts = RandomTexts(start(tokenizer_of(model), towers.vocabulary, towers.pooled_at), 8).draw(500, 0, 0)
    assert set(texts.tokens[:, 8].tolist()) == {2}
    assert set(texts.tokens[:, :8].unique().tolist()) == set(range(len(tiny.VOCABULARY))) - {2}
    # Tokens after the end do not change a feature, so the tower reads it there.
    longer = texts.tokens.clone()
    longer[:, 9:] = 5
    assert torch.equal(towers.encode_text(texts.tokens, 9), towers.encode_text(longer, 9))


def test_no_random_token_exceeds_the_end_token_of_a_larger_vocabulary() -> None:
    texts = RandomTexts(CLIP._replace(vocabulary=60000), 8).draw(4000, 0, 0)
    assert int(texts.tokens.max()) == 49407
    assert set(texts.tokens.argmax(1).tolist()) == {9}


def letters(texts: list[str]) -> Tensor:
    """A tokenizer whose end token depends on the text."""
    return torch.tensor([[1, 90 + len(text), 0, 0] for text in texts])


@pytest.mark.parametrize(
    ("changed", "count", "message"),
    [
        (
            CLIP._replace(pooled_at=None),
            8,
            "this text tower does not read its feature at an end token",
        ),
        (CLIP, 76, "objective.random_tokens = 76: .* has 78 tokens, more than the model's context of 77"),
        (start(letters, 200, "argmax"), 1, "does not begin and end all texts with the same tokens"),
        (start(lambda texts: torch.tensor([[0, 1, 0]] * len(texts)), 2, "argmax"), 1, "no tokens below its end"),
    ],
)
def test_models_without_random_texts_are_refused(changed: Start, count: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RandomTexts(changed, count)
