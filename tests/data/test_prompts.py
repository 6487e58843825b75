"""Prompts from class names and templates, and the distinct texts of a batch."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from dive_fast.data.prompt_files import Template, read_class_names, read_templates
from dive_fast.data.prompts import PromptTable, pack, warn_about_prompts, warn_about_truncated_captions
from dive_fast.data.sources.sample_table import Sample
from dive_fast.data.sources.source import Source
from dive_fast.data.text_tokenizer import quick_bpe
from dive_fast.errors import DataError

NAMES = ("cat", "dog", "sea lion")
TEMPLATES = ("a photo of a {}.", "the {}", "{}", "{} and {}, again", "no {} {{}} 5")


class Letters:
    """A reversible tokenizer: one token per letter."""

    def __init__(self) -> None:
        self.longest_call = 0

    def __call__(self, texts: list[str]) -> Tensor:
        self.longest_call = max(self.longest_call, len(texts))
        return torch.tensor([[ord(letter) for letter in text.ljust(64, "\0")[:64]] for text in texts])


def read(tokens: Tensor) -> str:
    return "".join(chr(int(token)) for token in tokens).rstrip("\0")


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def labelled(*labels: int) -> Source:
    return Source.of([Sample(f"k{i}", Path("a.tar"), label=label) for i, label in enumerate(labels)])


@pytest.fixture
def table(tmp_path: Path) -> PromptTable:
    templates = read_templates(write(tmp_path / "templates.txt", "\n".join(TEMPLATES)))
    return PromptTable(labelled(0, 1, 2), NAMES, templates, Letters())


# Names and templates


def test_imagenet_names_and_templates_equal_open_clip() -> None:
    names, templates = read_class_names("imagenet"), read_templates("imagenet")
    assert (len(names), len(set(names)), len(templates)) == (1000, 998, 80)
    assert names == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert [template("cat") for template in templates] == [
        original("cat") for original in open_clip.OPENAI_IMAGENET_TEMPLATES
    ]
    assert [template("cat") for template in read_templates("simple")] == [
        original("cat") for original in open_clip.SIMPLE_IMAGENET_TEMPLATES
    ]


def test_read_class_names_and_templates_one_per_line(tmp_path: Path) -> None:
    names = write(tmp_path / "names.txt", "\ufeffcat\r\n  sea lion \r\ngröße\r\n\r\n\n")
    assert read_class_names(names) == ("cat", "sea lion", "größe")
    templates = read_templates(write(tmp_path / "templates.txt", "the {}\n{}: a {}\n"))
    assert [template("dog {}") for template in templates] == ["the dog {}", "dog {}: a dog {}"]


def test_read_templates_accepts_a_template_itself() -> None:
    (template,) = read_templates("a {} in {{}}")
    assert template("dog") == "a dog in {dog}"


def test_read_class_names_rejects_empty_lines(tmp_path: Path) -> None:
    for text, line in {"cat\n\ndog\n": 2, "\ncat\n": 1, "cat\ndog\n \t\nhen": 3}.items():
        path = write(tmp_path / "names.txt", text)
        with pytest.raises(
            DataError, match=rf"^{path}: expected class names, one per line; line {line} is empty$"
        ):
            read_class_names(path)


def test_read_class_names_and_templates_name_unusable_files(tmp_path: Path) -> None:
    missing, empty = str(tmp_path / "missing.txt"), write(tmp_path / "empty.txt", " \n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe")
    plain = write(tmp_path / "plain.txt", "a {}\na photo\n")
    for path in (missing, str(binary), str(tmp_path)):
        with pytest.raises(DataError, match=rf"^{path}: cannot read class names: [^\n]+$"):
            read_class_names(path)
        error = "no such file of templates; a template itself" if path == missing else "cannot read templates:"
        with pytest.raises(DataError, match=rf"^{path}: {error} [^\n]+$"):
            read_templates(path)
    with pytest.raises(DataError, match=rf"^{empty}: expected class names, one per line; the file is empty$"):
        read_class_names(empty)
    with pytest.raises(DataError, match=rf"^{plain}: template 'a photo' has no {{}} for the class name$"):
        read_templates(plain)


# Drawing


def draw(table: PromptTable, sample: Sample, index: int, seed: int, epoch: int) -> torch.Tensor:
    """The tokens of one prompt."""
    return table.draw([sample], [index], seed, [epoch])[0]


def test_draw_is_a_pure_function_of_seed_sample_and_epoch(table: PromptTable) -> None:
    samples = labelled(0, 1, 2).samples
    arguments = [
        (sample, index, seed, epoch)
        for sample in samples
        for index in (0, 9)
        for seed in (0, 1)
        for epoch in range(9)
    ]
    prompts = {key: read(draw(table, *key)) for key in arguments}
    for key in random.Random(0).sample(arguments, len(arguments)):
        torch.rand(3)
        assert read(draw(table, *key)) == prompts[key]
    for index, seed in [(0, 0), (9, 0), (0, 1)]:
        assert len({prompts[samples[0], index, seed, epoch] for epoch in range(9)}) > 1  # changes with the epoch
    drawn = {
        (index, seed): tuple(prompts[samples[0], index, seed, epoch] for epoch in range(9))
        for index in (0, 9)
        for seed in (0, 1)
    }
    assert len(set(drawn.values())) == 4  # and with sample and seed


def test_draw_is_uniform_over_the_templates_of_the_class(table: PromptTable) -> None:
    for label, name in enumerate(NAMES):
        sample = Sample("k", Path("a"), label=label)
        drawn = Counter(read(draw(table, sample, index, 0, epoch)) for index in range(100) for epoch in range(10))
        assert drawn.keys() == {template.replace("{}", name) for template in TEMPLATES}
        expected = 1000 / len(TEMPLATES)
        chi_square = sum((count - expected) ** 2 / expected for count in drawn.values())
        assert chi_square < 18.5  # 0.1 % quantile for 4 degrees of freedom


def test_draw_uses_the_texts_of_a_sample_as_prompts(tmp_path: Path) -> None:
    cat = Sample("a.jpg", Path("a.jpg"), texts=("a cat", "the cat", "a cat"))
    dog = Sample("b.jpg", Path("b.jpg"), texts=("a dog",))
    tokenizer = Letters()
    table = PromptTable(Source.of([cat, dog]), (), (), tokenizer)
    drawn = Counter(read(draw(table, cat, 0, 0, epoch)) for epoch in range(900))
    assert drawn.keys() == {"a cat", "the cat"}
    assert 540 < drawn["a cat"] < 660  # a duplicate title is drawn twice as often
    assert {read(draw(table, dog, 1, 0, epoch)) for epoch in range(20)} == {"a dog"}
    assert tokenizer.longest_call == 3  # each distinct title is tokenised once


def test_prompt_table_tokenises_in_pieces() -> None:
    tokenizer = Letters()
    table = PromptTable(labelled(999), read_class_names("imagenet"), read_templates("simple"), tokenizer)
    assert tokenizer.longest_call <= 1024
    tokens = draw(table, Sample("k", Path("a"), label=999), 0, 0, 0)
    assert tokens.dtype == torch.int64
    assert "toilet paper" in read(tokens)


@pytest.mark.parametrize("label", [-1, 3])
def test_prompt_table_rejects_labels_without_class_name(label: int) -> None:
    with pytest.raises(DataError, match=rf"^a\.tar: sample k1 has label {label}, but there are 3 class names$"):
        PromptTable(labelled(0, label), NAMES, read_templates("simple"), Letters())


# Packing

ROWS = torch.tensor(
    [
        [7, 3, 9, 0, 0, 0],
        [7, 9, 0, 0, 0, 0],
        [7, 3, 9, 0, 0, 0],
        [7, 4, 5, 9, 0, 0],
        [7, 9, 0, 0, 0, 0],
    ],
    dtype=torch.int32,
)


def test_pack_keeps_distinct_rows_and_an_index_to_restore_all() -> None:
    text = pack(ROWS, "argmax")
    assert text.tokens.shape == (3, 6)
    assert text.tokens.dtype == text.index.dtype == torch.int64
    assert torch.equal(text.tokens[text.index], ROWS.long())
    assert len(pack(ROWS[:1], "argmax").tokens) == 1


def test_pack_length_ends_at_the_last_token_that_is_read() -> None:
    assert pack(ROWS, "argmax").length == 4
    assert pack(ROWS, 9).length == 4
    # The end token is not the largest and others follow; the first one counts, as in open_clip.
    assert pack(torch.tensor([[7, 2, 5, 2], [2, 7, 7, 7]]), 2).length == 2
    # A text without an end is read at its first token, whatever its length.
    assert pack(torch.tensor([[7, 3, 3], [7, 4, 4]]), 9).length == 1
    # A text truncated to the context cannot be trimmed further.
    assert pack(torch.tensor([[7, 3, 9], [7, 9, 0]]), "argmax").length == 3
    # A tower that needs the complete context.
    assert pack(ROWS, None).length == 6


# Files of names


def test_read_class_names_reads_a_json_list(tmp_path: Path) -> None:
    path = write(tmp_path / "names.json", '[\n "cat",\n "sea lion",\n\n "größe"\n]\n')
    assert read_class_names(path) == ("cat", "sea lion", "größe")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["cat", "dog"', "begins like JSON but is not valid: .*; expected one class name per line"),
        ("[cat]\n[dog]\n", "begins like JSON but is not valid"),
        ('{"0": "cat"}', "expected a JSON list of class names, in label order, or one name per line"),
        ('[["n01440764", "tench"]]', "expected a JSON list of class names"),
        ('["cat", ""]', "expected a JSON list of class names"),
        ("[]", "expected a JSON list of class names"),
        (
            "0: cat\n1: dog\n",
            r"each line begins with its number, which would be part of the class name \('0: cat'\)",
        ),
        ("1 cat\n2 dog\n", "each line begins with its number"),
        ("n01440764 tench, Tinca tinca\nn01443537 goldfish\n", "each line begins with a WordNet id"),
    ],
)
def test_read_class_names_rejects_lines_that_are_not_names(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "names.txt", text)
    with pytest.raises(DataError, match=f"^{path}: {message}"):
        read_class_names(path)


def test_read_class_names_accepts_names_starting_with_numbers(tmp_path: Path) -> None:
    for names in (("7 up", "4 runner"), ("0 - zero", "one"), ("n01440764", "n01443537")):
        assert read_class_names(write(tmp_path / "names.txt", "\n".join(names))) == names


def test_read_templates_explains_a_template_without_braces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^a photo: no such file of templates; a template itself must have \{\}"):
        read_templates("a photo")


# Texts without spaces


def test_quick_bpe_gives_the_tokens_of_open_clip() -> None:
    original, quick = open_clip.SimpleTokenizer(), quick_bpe(open_clip.SimpleTokenizer())
    assert quick_bpe(quick).bpe is quick.bpe
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["a" * count for count in (63, 64, 65, 200, 401)]
    words += ["".join(draw.choices(letters, k=draw.randrange(60, 400))) for _ in range(40)]
    words += ["".join(draw.choices("aehnt", k=draw.randrange(60, 300))) for _ in range(40)]
    words += ["the" * 50, "ab" * 99, "größe" * 40, "猫" * 60, "日本語の文章" * 20, "!" * 300, "?!" * 90, "7" * 99]
    words += ["https://example.com/" + "x" * 100, "Donaudampfschifffahrt" * 9, "👩\u200d🚀" * 30, "&amp;" * 40]
    texts = [*words, " ".join(words[:9]), "a photo of a cat", "", " \n"]
    for text in texts:
        assert quick.encode(text) == original.encode(text), text
    assert torch.equal(quick(texts), original(texts))


def test_quick_bpe_needs_few_lookups_for_a_long_word() -> None:
    tokenizer = quick_bpe(open_clip.SimpleTokenizer())
    lookups = 0

    class Counted(dict[Any, Any]):
        def get(self, *arguments: Any) -> Any:
            nonlocal lookups
            lookups += 1
            return super().get(*arguments)

    tokenizer.bpe._ranks = Counted(tokenizer.bpe_ranks)
    assert tokenizer(["".join(random.Random(0).choices("etaoin", k=100_000))]).shape == (1, 77)
    assert lookups < 3 * 100_000


# Lists written by other tools


@pytest.mark.parametrize("separator", ["\u2028", "\x0c", "\x85", "\x1c"])
def test_read_class_names_splits_only_at_line_ends(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(f"sea{separator}lion\r\ndog\r\n".encode())
    assert read_class_names(str(path)) == ("sea lion", "dog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,name\n0,cat\n1,dog\n", r"each line begins with its number, .* \('0,cat'\)"),
        ("00 cat\n01 dog\n", "each line begins with its number"),
        ("1. cat\n2. dog\n", "each line begins with its number"),
        ("\"cat\"\n'dog'\n", "all lines are quoted"),
        ("'cat',\n'dog',\n", "all lines are quoted"),
        ("- cat\n- dog\n", "each line begins with '- '"),
        ("# my classes\ncat\n", "its first line is a comment"),
    ],
)
def test_read_class_names_rejects_syntax_of_other_formats(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_class_names(write(tmp_path / "names.txt", text))


def test_read_class_names_accepts_years_as_first_words(tmp_path: Path) -> None:
    assert read_class_names(write(tmp_path / "names.txt", "2012 BMW M3\n1994 Audi 100\n")) == (
        "2012 BMW M3",
        "1994 Audi 100",
    )


def test_read_templates_reads_json_and_rejects_placeholders(tmp_path: Path) -> None:
    listed = read_templates(write(tmp_path / "list.txt", '["a {}.",\n "the {}."]\n'))
    assert [template("cat") for template in listed] == ["a cat.", "the cat."]
    with pytest.raises(DataError, match=r"has an unknown placeholder \{domain\}"):
        read_templates("a {domain} of {}")
    with pytest.raises(DataError, match="all lines are quoted"):
        read_templates(write(tmp_path / "code.txt", "'a bad photo of a {}.',\n'a {}.',\n"))


def test_warn_about_prompts_reports_truncated_and_equal_ones(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    long = "a photo " * 60
    warn_about_prompts(["cat", "dog"], [Template(f"{long}{{}}"), Template("{}")], tokenizer)
    assert "2 of 2 classes have a prompt that fills the model's context of 77 tokens" in caplog.text
    assert "'cat' and 'dog' have prompts with the same tokens" in caplog.text
    caplog.clear()
    warn_about_prompts(["Jaguar", "jaguar", "dog"], [Template("{}")], tokenizer)
    assert "'Jaguar' and 'jaguar' have prompts with the same tokens" in caplog.text
    caplog.clear()
    warn_about_prompts(["cat", "dog"], [Template("a {}")], tokenizer)
    assert not caplog.text


def test_warn_about_truncated_captions_counts_them(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    warn_about_truncated_captions(["a dog", "word " * 300, "a cat"], tokenizer, "flickr")
    assert "flickr: 1 of 3 sampled captions fill the model's context of 77 tokens" in caplog.text
