"""Features of many texts: batches by length, their division among ranks, and kept tokens."""

from collections import Counter
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from distributed import run_ranks
from open_clip import IMAGENET_CLASSNAMES
from torch import Tensor

from dive_fast.config.schema import ModelConfig
from dive_fast.data.prompt_files import read_templates
from dive_fast.distributed import Ranks
from dive_fast.evaluation import text_features
from dive_fast.evaluation.classifier import classifier
from dive_fast.evaluation.text_features import KeptTokens, batches_by_length, embed_texts, share_of_batches
from dive_fast.model.towers import Towers, create, tokenizer_of, unit

ALONE = Ranks(0, 1, torch.device("cpu"))
TEXTS = [f"{'a long ' * (i % 9)}photo of {i % 13}" for i in range(60)] + ["a cat", "A CAT", "a cat", ""]


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_model(tmp_path_factory.mktemp("model"))


def built(name: str) -> tuple[Towers, Any]:
    config = ModelConfig(name=name)
    return create(config).eval(), tokenizer_of(config)


def lengths_of_imagenet() -> list[list[int]]:
    """Words of each prompt of each ImageNet class, as if each word were a token."""
    templates = read_templates("imagenet")
    return [[2 + len(template(name).split()) for template in templates] for name in IMAGENET_CLASSNAMES]


def test_prompts_of_imagenet_take_few_calls_and_little_padding() -> None:
    lengths = lengths_of_imagenet()
    calls, padded = len(lengths), sum(len(each) * max(each) for each in lengths)  # one call for each class
    flat = [length for each in lengths for length in each]
    at_once = text_features.TOKENS_AT_ONCE["cuda"]
    batches = batches_by_length(flat, at_once)
    assert sorted(row for batch in batches for row in batch) == list(range(len(flat)))
    sizes = [len(batch) * flat[batch[0]] for batch in batches]
    assert all(flat[batch[0]] == max(flat[row] for row in batch) for batch in batches)
    assert max(sizes) <= at_once
    assert (calls, len(batches)) == (1000, 40)
    # Of the tokens with padding; 24 % of those before were padding.
    assert (padded, sum(sizes), sum(flat)) == (851_200, 642_820, 632_200)
    shares = [share_of_batches(batches, flat, Ranks(rank, 8, ALONE.device)) for rank in range(8)]
    assert sorted(batch for share in shares for batch in share) == sorted(batches)
    tokens = [sum(len(batch) * flat[batch[0]] for batch in share) for share in shares]
    assert max(tokens) - min(tokens) <= at_once


@pytest.mark.parametrize("at_once", [1, 40, 1 << 14])
def test_embed_texts_equals_one_text_at_a_time(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(text_features.TOKENS_AT_ONCE, "cpu", at_once)
    towers, tokenizer = built(name)
    towers = towers.double()
    with torch.no_grad():
        expected = torch.cat([unit(towers.encode_text(tokenizer([text]))) for text in TEXTS])
    encoded: list[Tensor] = []
    encode = towers.encode_text
    monkeypatch.setattr(
        towers, "encode_text", lambda tokens, length=None: encoded.append(tokens) or encode(tokens, length)
    )
    rows = embed_texts(towers, tokenizer, TEXTS, ALONE)
    assert rows.shape == (64, 24)
    assert torch.allclose(rows, expected, rtol=0, atol=1e-12)
    # Equal tokens, also of texts that differ, are encoded once and tie exactly.
    assert torch.equal(rows[60], rows[61])
    counts = Counter(tuple(row) for batch in encoded for row in batch.tolist())
    assert set(counts.values()) == {1}
    assert embed_texts(towers, tokenizer, [], ALONE).shape == (0, 24)


def on_each_rank(name: str) -> list[Tensor]:
    text_features.TOKENS_AT_ONCE["cpu"], text_features.TEXTS_TOKENIZED_AT_ONCE = 40, 7
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    towers, tokenizer = built(name)
    calls = []
    encode = towers.encode_text
    towers.encode_text = lambda tokens, length=None: calls.append(len(tokens)) or encode(tokens, length)  # type: ignore[method-assign,assignment,func-returns-value]
    rows = embed_texts(towers, tokenizer, TEXTS, ranks)
    return [rows, embed_texts(towers, tokenizer, TEXTS[:1], ranks), torch.tensor(calls)]


def test_embed_texts_has_equal_bits_on_any_number_of_ranks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(text_features.TOKENS_AT_ONCE, "cpu", 40)
    towers, tokenizer = built(name)
    expected = embed_texts(towers, tokenizer, TEXTS, ALONE)
    calls = []
    for rows, single, encoded in run_ranks(2, on_each_rank, name):
        assert torch.equal(rows, expected)
        assert torch.equal(single, embed_texts(towers, tokenizer, TEXTS[:1], ALONE))
        calls.append(int(encoded.sum()))
    assert min(calls) > 20


def test_classifier_in_parts_equals_classifier_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    towers, tokenizer = built(name)
    names, templates = ["cat", "dog", "yurt", "sea lion"], read_templates("simple")
    complete = classifier(towers.double(), tokenizer, names, templates)
    monkeypatch.setattr("dive_fast.evaluation.classifier.PROMPTS_AT_ONCE", 3 * len(templates))
    assert torch.allclose(classifier(towers, tokenizer, names, templates), complete, rtol=0, atol=1e-13)


def test_kept_tokens_are_made_once() -> None:
    calls: list[list[str]] = []

    def tokenizer(texts: list[str]) -> Tensor:
        calls.append(texts)
        return torch.tensor([[len(text), 0] for text in texts])

    kept = KeptTokens(tokenizer)
    for _ in range(2):
        assert torch.equal(kept(["a", "bc"]), torch.tensor([[1, 0], [2, 0]]))
        assert torch.equal(kept(["ab", "c"]), torch.tensor([[2, 0], [1, 0]]))
    kept(["\ud800"])
    assert calls == [["a", "bc"], ["ab", "c"], ["\ud800"]]
