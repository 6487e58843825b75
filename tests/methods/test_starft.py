"""StarFT: its distillation by the numbers worked out by hand, its schedule, and its backgrounds."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import tiny
import torch
from torch import Tensor

from dive_fast.config.schema import ObjectiveConfig
from dive_fast.data.prompt_files import Template
from dive_fast.data.prompts import PromptTable, SecondPrompts
from dive_fast.data.samples import TargetSamples
from dive_fast.data.sources.sample_table import Sample
from dive_fast.data.sources.source import Source
from dive_fast.data.transforms import Preprocess
from dive_fast.errors import ConfigError, DataError
from dive_fast.methods import registry
from dive_fast.methods.method import Start, TeacherOutputs
from dive_fast.methods.run_config import RunConfig
from dive_fast.methods.starft import BACKGROUNDS, StarFT
from dive_fast.model.features import Outputs

STUDENT = torch.tensor([[5.0, 0, 1], [0, 5, 1], [2, 0, 5]])
FROZEN = torch.tensor([[5.0, 1, 0], [0, 5, 1], [2, 0, 5]])


def part(epochs: int = 3, **options: Any) -> StarFT:
    objective = ObjectiveConfig(name="starft", **options)
    starft = registry.create(objective, 6, total_steps=10 * epochs, steps_per_epoch=10).target_loss
    assert isinstance(starft, StarFT)
    return starft


def with_logits(logits: Tensor, scale: float = 20.0) -> tuple[Tensor, Tensor]:
    """Unit rows of images and texts, ``(3, 6)``, whose products times the scale are these logits."""
    products = logits.double() / scale
    texts = torch.eye(6, dtype=torch.float64)[:3]
    rest = (1 - products.square().sum(1)).sqrt()
    images = torch.cat([products, rest.diag()], 1)
    return images.float(), texts.float()


def distillation(labels: list[int], frozen: Tensor = FROZEN) -> tuple[float, Tensor]:
    """The distillation without its weight, and its gradient by the image features."""
    (images, texts), (frozen_images, frozen_texts) = with_logits(STUDENT), with_logits(frozen)
    images = (3 * images).requires_grad_()
    outputs = Outputs(images, torch.eye(6)[:3], torch.tensor([7.0]), second_text=2 * texts)
    teacher = TeacherOutputs(frozen_images, None, torch.tensor([20.0]), frozen_texts)
    loss = part(distillation_weight=2.0).loss(outputs, torch.tensor(labels), teacher=teacher)
    value = loss.metrics["second_prompt_loss"]
    # The first epoch of three.
    torch.testing.assert_close(loss.loss, loss.metrics["contrastive_loss"] + 2 * (1 - 1 / 3) * value)
    base = registry.create(ObjectiveConfig(name="flyp"), 6).target(outputs, torch.tensor(labels)).loss
    (gradient,) = torch.autograd.grad(loss.loss - base, images)
    return float(value), gradient


@pytest.mark.parametrize(
    ("options", "lines"), [({"epochs": 1}, 1), ({"epochs": 2}, 0), ({"epochs": 1, "distillation_weight": 0.0}, 0)]
)
def test_run_of_one_epoch_is_reported(
    caplog: pytest.LogCaptureFixture, options: dict[str, Any], lines: int
) -> None:
    start: Any = SimpleNamespace(class_names=("cat", "dog"))
    part(**options).start(start)
    assert sum("the run ends within one epoch" in record.message for record in caplog.records) == lines


def test_distillation_equals_worked_example() -> None:
    assert distillation([0, 1, 2])[0] == pytest.approx(0.154039, abs=2e-6)


def test_pairs_of_equal_classes_are_left_out() -> None:
    # Row 0 keeps only column 2, rows 1 too: their probability is 1. Row 2 keeps (2, 0) in both.
    assert distillation([0, 0, 2])[0] == pytest.approx(0.0, abs=1e-6)
    # Rows 0 and 2 keep only column 1; row 1 keeps (0, 1), which the frozen model has as (2, 1).
    frozen = FROZEN.clone()
    frozen[1, 0] = 2
    p, q = (torch.softmax(torch.tensor(logits), 0).double() for logits in ([2.0, 1.0], [0.0, 1.0]))
    expected = float((p * (p / q).log()).sum()) / 3
    assert distillation([0, 1, 0], frozen)[0] == pytest.approx(expected, rel=1e-5)


def test_batch_of_one_class_has_no_distillation_and_no_gradient() -> None:
    value, gradient = distillation([4, 4, 4])
    assert value == 0
    assert not gradient.any()


def test_weight_falls_to_zero_in_the_last_epoch() -> None:
    starft, weights = part(distillation_weight=0.5, epochs=4), []
    for step in (0, 9, 10, 25, 30, 39, 40):
        starft.step = step
        weights.append(starft.present_weight())
    assert weights == pytest.approx([0.375, 0.375, 0.25, 0.125, 0, 0, 0])
    assert registry.needs(ObjectiveConfig(name="starft")).run_length


def test_weight_zero_is_flyp_without_second_prompts() -> None:
    outputs, labels = Outputs(torch.randn(3, 6), torch.randn(3, 6), torch.tensor([7.0])), torch.tensor([0, 1, 0])
    starft = part(distillation_weight=0.0)
    expected = registry.create(ObjectiveConfig(name="flyp"), 6).target(outputs, labels)
    assert torch.equal(starft.loss(outputs, labels).loss, expected.loss)
    assert starft.second_templates() == ()


def test_prompts_without_classes_are_refused(tmp_path: Path) -> None:
    def embed(texts: Any) -> Tensor:
        raise AssertionError("starft embeds no texts before the run")

    with pytest.raises(ConfigError, match=r"data.target: it has prompts and no classes, which starft needs"):
        part().start(Start(embed, open_clip.get_tokenizer("ViT-B-16"), 49408, "argmax", (), ()))
    tree = tiny.write_config(tmp_path)
    tree["data"]["target"]["format"] = "csv"
    with pytest.raises(ValueError, match=r"csv has prompts and no classes, which objective.name = starft needs"):
        RunConfig.model_validate_json(json.dumps(tree | {"objective": {"name": "starft"}}))


# Backgrounds and second prompts


def test_shipped_backgrounds_are_58_different_sentences() -> None:
    templates = [template("{}") for template in part().second_templates()]
    assert len(set(templates)) == len(templates) == 58
    assert all(template.count("{}") == 1 and template.startswith("{} ") for template in templates)
    assert all(template.endswith(".") and len(template) < 50 for template in templates)
    assert BACKGROUNDS.is_file()


def test_other_file_of_backgrounds_replaces_them(tmp_path: Path) -> None:
    path = tmp_path / "backgrounds.txt"
    path.write_text("{} here\n{} there\n")
    assert [each("a cat") for each in part(backgrounds=str(path)).second_templates()] == [
        "a cat here",
        "a cat there",
    ]
    path.write_text("here\n")
    with pytest.raises(DataError, match=r"objective.backgrounds: .*'here' has no \{\} for the prompt"):
        part(backgrounds=str(path)).second_templates()
    with pytest.raises(DataError, match=r"objective.backgrounds: .*no such file of templates"):
        part(backgrounds=str(tmp_path / "missing.txt")).second_templates()


class Words:
    """A tokenizer of letters that records its texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: list[str]) -> Tensor:
        self.texts += texts
        return torch.tensor([[ord(letter) for letter in text.ljust(64, "\0")[:64]] for text in texts])


def read(row: Tensor) -> str:
    return "".join(map(chr, row.tolist())).rstrip("\0")


NAMES, TEMPLATES = ("cat", "dog", "sea lion"), ("a photo of a {}.", "the {}", "{}..")
PLACES = ("{} at night.", "{} in snow", "grass under {}")
SOURCE = Source.of([Sample(f"k{i}", Path("a.tar"), label=i % 3) for i in range(300)])


def second_prompts(tokenizer: Words, source: Source = SOURCE) -> tuple[PromptTable, SecondPrompts]:
    table = PromptTable(source, NAMES, tuple(map(Template, TEMPLATES)), tokenizer)
    return table, SecondPrompts(table, tuple(map(Template, PLACES)), tokenizer)


def draw(table: PromptTable, sample: Sample, index: int, seed: int, epoch: int) -> torch.Tensor:
    """The tokens of one prompt."""
    return table.draw([sample], [index], seed, [epoch])[0]


def test_second_prompt_puts_the_prompt_without_full_stop_into_a_background() -> None:
    table, second = second_prompts(Words())
    seen = set()
    for row, sample in enumerate(SOURCE.samples):
        prompt, text = table.text(sample, row, 5, 2), second.text(sample, row, 5, 2)
        assert prompt == read(draw(table, sample, row, 5, 2))
        assert NAMES[sample.label] in prompt
        bare = prompt.removesuffix(".")
        assert text in [place.replace("{}", bare) for place in PLACES]
        seen.add(
            (TEMPLATES.index(prompt.replace(NAMES[sample.label], "{}")), PLACES.index(text.replace(bare, "{}")))
        )
    # Backgrounds are drawn independently of templates.
    assert len(seen) == 9


def test_second_prompts_are_a_function_of_seed_sample_and_epoch() -> None:
    _, second = second_prompts(Words())
    _, again = second_prompts(Words())
    drawn = {
        key: [second.text(sample, row, *key) for row, sample in enumerate(SOURCE.samples)]
        for key in ((0, 0), (0, 1), (1, 0))
    }
    assert len({tuple(texts) for texts in drawn.values()}) == 3
    backwards = [again.text(sample, row, 0, 1) for row, sample in reversed(list(enumerate(SOURCE.samples)))]
    assert backwards[::-1] == drawn[0, 1]


def test_tokens_of_second_prompts_are_cached_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dive_fast.data.prompts.CACHED_PROMPTS", 4)
    tokenizer = Words()
    _, second = second_prompts(tokenizer)
    tokenizer.texts.clear()
    keys = [(sample, row, 0) for row, sample in enumerate(SOURCE.samples[:6])]
    expected = [second.text(sample, row, 7, epoch) for sample, row, epoch in keys]
    for _ in range(2):
        tokens = second.draw(keys, 7)
        assert tokens.dtype == torch.int32
        assert [read(row) for row in tokens] == expected
        assert len(second._tokens) == min(4, len(set(expected)))
    assert len(set(expected)) == 6
    assert tokenizer.texts[:6] == expected
    # The second call tokenised only what the bound removed.
    assert tokenizer.texts[6:] == expected[:2]


def test_truncated_second_prompts_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    source = Source.of([Sample("k", Path("a.tar"), texts=("x" * 60,)), Sample("l", Path("a.tar"), texts=("y",))])
    table = PromptTable(source, (), (), Words())
    SecondPrompts(table, (Template("{} at night."),), Words()).warn_about_truncated(source, 0)
    assert "second prompts: 1 of 2 sampled captions fill the model's context of 64 tokens" in caplog.text


def test_batches_have_second_prompts_of_their_samples() -> None:
    table, second = second_prompts(Words())
    preprocess = Preprocess((32, 32), (0.0,) * 3, (1.0,) * 3, "bicubic", "shortest")
    samples = TargetSamples(SOURCE, table, preprocess, None, 3, second)
    keys = [(1, 17), (0, 4), (1, 17), (2, 299)]
    batch = samples.batch(keys, torch.empty(0))
    assert batch.second_text is not None
    texts = [read(batch.second_text.tokens[row]) for row in batch.second_text.index]
    assert texts == [second.text(SOURCE.samples[sample], sample, 3, epoch) for epoch, sample in keys]
    assert len(batch.second_text.tokens) == 3
    without = TargetSamples(SOURCE, table, preprocess, None, 3).batch(keys, torch.empty(0))
    assert without.second_text is None
    assert torch.equal(without.text.tokens, batch.text.tokens)
