"""Kept tokens are those of the tokenizer, are made once, and belong to one tokenizer and one list of texts."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tiny
import torch
from distributed import run_ranks

from dive_fast.config.schema import ModelConfig
from dive_fast.data import token_cache
from dive_fast.data.captions import with_lines
from dive_fast.data.prompt_files import Template
from dive_fast.data.prompts import PromptTable
from dive_fast.data.samples import ReferenceSamples
from dive_fast.data.sources.sample_table import Sample
from dive_fast.data.sources.source import Source
from dive_fast.data.token_cache import ListedTexts, TokenRows, kept_tokens, tokenizer_identity
from dive_fast.data.transforms import Preprocess
from dive_fast.distributed import Ranks, join
from dive_fast.model.towers import tokenizer_of

PREPROCESS = Preprocess((24, 24), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", "shortest")
ALONE = Ranks(0, 1, torch.device("cpu"))
WORDS = ("a", "photo", "of", "two", "cats", "größe", "東京", "isn't", "10 µm", "", "word " * 90)
TEXTS = [" ".join(WORDS[(row * 7 + n) % len(WORDS)] for n in range(row % 9)) for row in range(60)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIVE_FAST_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(token_cache, "MIN_TEXTS", 10)
    monkeypatch.setattr(token_cache, "CHUNK", 7)


@pytest.fixture(scope="module")
def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer()


def all_rows(tokens: TokenRows | None) -> torch.Tensor:
    assert tokens is not None
    return tokens.rows(np.arange(len(tokens)))


@pytest.mark.parametrize("padding", [0, 3, 49407])
def test_rows_are_restored_whatever_the_padding(padding: int) -> None:
    rows = torch.randint(0, 4, (50, 9))
    rows[7], rows[8] = 0, 3
    rows[9, 4] = 70_000
    parts = [TokenRows.of(part, padding) for part in rows.split(6)]
    joined = TokenRows.joined(parts)
    assert torch.equal(joined.rows(np.arange(50)), rows)
    order = np.array([8, 0, 49, 7, 7])
    assert torch.equal(joined.rows(order), rows[order])
    assert {part.columns()["values"].dtype.name for part in parts} == {"uint16", "int32"}


def test_kept_tokens_are_the_tokenizers(tokenizer: open_clip.SimpleTokenizer, tmp_path: Path) -> None:
    expected = tokenizer(TEXTS)
    tokens = kept_tokens(ListedTexts(TEXTS), tokenizer, "texts")
    assert torch.equal(all_rows(tokens), expected)
    assert isinstance(tokens and tokens.columns()["values"].base, np.memmap)
    (folder,) = [path for path in (tmp_path / "kept/tokens").iterdir() if path.is_dir()]
    assert sum(file.stat().st_size for file in folder.iterdir()) < expected.numel() * 2


def test_second_call_tokenises_nothing(
    tokenizer: open_clip.SimpleTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = all_rows(kept_tokens(ListedTexts(TEXTS), tokenizer, "texts"))
    monkeypatch.setattr(token_cache, "_tokenise", None)
    assert torch.equal(all_rows(kept_tokens(ListedTexts(TEXTS), tokenizer, "texts")), first)
    with pytest.raises(TypeError):  # other texts
        kept_tokens(ListedTexts([*TEXTS[1:], TEXTS[0]]), tokenizer, "texts")
    with pytest.raises(TypeError):  # another tokenizer
        kept_tokens(ListedTexts(TEXTS), open_clip.SimpleTokenizer(context_length=76), "texts")


def test_damaged_tokens_are_made_again(
    tokenizer: open_clip.SimpleTokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = all_rows(kept_tokens(ListedTexts(TEXTS), tokenizer, "texts"))
    (folder,) = [path for path in (tmp_path / "kept/tokens").iterdir() if path.is_dir()]
    for damage in ("flip", "cut", "remove"):
        file = folder / "values.npy"
        content = file.read_bytes()
        file.unlink()
        if damage == "flip":
            file.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
        elif damage == "cut":
            file.write_bytes(content[:-10])
        caplog.clear()
        assert torch.equal(all_rows(kept_tokens(ListedTexts(TEXTS), tokenizer, "texts")), expected)
        assert "the tokens are damaged" in caplog.text


@pytest.mark.parametrize("function", ["dive_fast.locks.Lock.acquire", "numpy.save"])
def test_full_disk_keeps_no_tokens(
    tokenizer: open_clip.SimpleTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(function, full)
    assert kept_tokens(ListedTexts(TEXTS), tokenizer, "texts") is None
    assert "not kept" in caplog.text
    assert "No space left" in caplog.text


def test_identity_has_vocabulary_options_and_context(tmp_path: Path) -> None:
    name = tiny.write_model(tmp_path / "model", tiny.FEW_TOKENS)
    first, other = open_clip.SimpleTokenizer(), open_clip.SimpleTokenizer()
    assert tokenizer_identity(first) == tokenizer_identity(other)
    other.encoder = dict(other.encoder) | {"zebra</w>": 0}  # a word that no probe has
    changed = [
        other,
        open_clip.SimpleTokenizer(context_length=76),
        open_clip.SimpleTokenizer(clean="whitespace"),
        tokenizer_of(ModelConfig(name=name)),
        tokenizer_of(ModelConfig(name=name), 20),
    ]
    identities = [tokenizer_identity(each) for each in (first, *changed)]
    assert None not in identities
    assert all(one != two for row, one in enumerate(identities) for two in identities[:row])
    assert tokenizer_identity(lambda texts: torch.zeros(len(texts), 8)) is None
    assert tokenizer_identity(open_clip.SimpleTokenizer(reduction_mask="random")) is None


def test_few_texts_and_unknown_tokenizers_keep_nothing(
    tokenizer: open_clip.SimpleTokenizer, tmp_path: Path
) -> None:
    assert kept_tokens(ListedTexts(TEXTS[:9]), tokenizer, "texts") is None
    assert kept_tokens(ListedTexts(TEXTS), lambda texts: tokenizer(texts), "texts") is None
    assert not (tmp_path / "kept").exists()


def test_disk_that_refuses_costs_one_line(
    tokenizer: open_clip.SimpleTokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache, "save_columns", fail)
    assert kept_tokens(ListedTexts(TEXTS), tokenizer, "texts") is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert "the tokens of texts are not kept" in line


def captioned(lines: bool) -> Source:
    texts = ["one", "two\nthree", "one", "a\r\nb\nc", " padded \n\n word", "größe\x0bone"]
    samples = [Sample(str(row), Path("a.jpg"), texts=(texts[row % 6],)) for row in range(30)]
    samples.append(Sample("30", Path("a.jpg"), texts=("x", "y z")))
    source = Source.of(samples)
    return with_lines(source) if lines else source


@pytest.mark.parametrize("lines", [False, True])
def test_reference_batches_are_equal_with_kept_tokens(
    tokenizer: open_clip.SimpleTokenizer, lines: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "MIN_TEXTS", 2)
    source = captioned(lines)
    plain = ReferenceSamples(source, tokenizer, PREPROCESS, "argmax", 0, draws_captions=lines)
    kept = plain.with_kept_tokens(ALONE)
    assert kept._kept_tokens is not None
    assert plain._kept_tokens is None
    keys = [(epoch, sample) for epoch in range(3) for sample in (30, *range(30))]
    for one, other in ((plain, kept), (plain.with_all_captions(), kept.with_all_captions())):
        batches = [samples.batch(keys, torch.zeros(len(keys), 3, 1, 1)) for samples in (one, other)]
        first, second = (batch.text for batch in batches)
        assert torch.equal(first.tokens[first.index], second.tokens[second.index])
        assert first.length == second.length


def test_prompt_tables_are_equal_with_kept_tokens(
    tokenizer: open_clip.SimpleTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source.of([Sample(str(row), Path("a.jpg"), label=row % 5) for row in range(20)])
    drawn = [(source.samples[row], row, epoch) for row in range(20) for epoch in range(3)]
    templates = [Template(line) for line in ("a {}", "a photo of a {}.", "{}")]
    names = ("cat", "dog", "sea lion", "東京", "x" * 100)
    tables, text = [], ""
    for least in (1000, 10):
        monkeypatch.setattr(token_cache, "MIN_TEXTS", least)
        table = PromptTable(source, names, templates, tokenizer)
        samples, rows, epochs = zip(*drawn, strict=True)
        tables.append(table.draw(samples, rows, 3, epochs))
        text = table.text(*drawn[0][:2], 3, 0)
    assert torch.equal(*tables)
    assert torch.equal(tables[0][0], tokenizer([text])[0])


def tokens_of_rank(folder: Path) -> tuple[torch.Tensor, int]:
    """The tokens on this rank, and how many times it made them."""
    made = []
    make = token_cache._tokenise
    token_cache._tokenise = lambda *arguments: made.append(1) or make(*arguments)  # type: ignore[func-returns-value]
    token_cache.MIN_TEXTS = 10
    tokens = kept_tokens(ListedTexts(TEXTS), open_clip.SimpleTokenizer(), "texts", join())
    return all_rows(tokens), len(made)


def test_one_rank_of_a_node_makes_the_tokens(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "kept", ignore_errors=True)
    outcomes = run_ranks(2, tokens_of_rank, tmp_path, init=False)
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert sorted(made for _, made in outcomes) == [0, 1]
