"""Tests of samples as columns: what is stored is what is read."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dive_fast.data.sources.sample_table import (
    Sample,
    SampleTable,
    Strings,
    StringsBuilder,
    TableBuilder,
    split_lines,
)
from dive_fast.errors import DataError

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
SAMPLES = st.lists(
    st.builds(
        Sample,
        key=st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        path=st.sampled_from([Path("/a/b.tar"), Path("/a/é"), Path(os.fsdecode(b"/x\xff"))]),
        offset=st.integers(0, 2**40),
        size=st.integers(-1, 2**40),
        label=st.integers(-1, 5),
        texts=st.lists(TEXTS, max_size=3).map(tuple),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(SAMPLES, SAMPLES, st.booleans(), st.randoms())
def test_table_returns_the_samples_that_were_added(
    first: list[Sample], second: list[Sample], shares: bool, random: Any
) -> None:
    samples = first + second
    table = SampleTable.of(samples)
    assert list(table) == samples == [table[row] for row in range(len(samples))]
    assert table[1:] == samples[1:]
    parts = TableBuilder(shares_texts=shares)
    for part in (first, second):
        parts.extend(SampleTable.of(part))
    joined = parts.build()
    assert list(joined) == samples
    loaded = SampleTable.from_columns(table.columns(), table.root, table.digest_of_columns())
    assert list(loaded) == samples
    assert loaded.digest() == table.digest()
    assert table.text_counts.tolist() == [len(sample.texts) for sample in samples]
    assert table.labels.tolist() == [sample.label for sample in samples]
    assert table.offsets.tolist() == [sample.offset for sample in samples]
    assert table.sizes.tolist() == [sample.size for sample in samples]
    assert set(table.used_files()) == {sample.path for sample in samples}
    assert list(table.iter_keys()) == [sample.key.encode() for sample in samples]
    order = random.sample(range(len(samples)), len(samples) // 2)
    some = table.select(np.array(order, np.int64)).select(np.arange(len(order))[::-1])
    assert list(some) == [samples[row] for row in reversed(order)]
    assert list(some.iter_keys()) == [sample.key.encode() for sample in some]
    lines = some.split_lines()
    assert [sample.texts for sample in lines] == [split_lines(sample.texts) for sample in some]
    assert lines.text_counts.tolist() == [len(sample.texts) for sample in lines]
    labelled = some.with_labels(np.arange(len(some)))
    assert list(labelled) == [replace(sample, label=row) for row, sample in enumerate(some)]


def test_rows_count_from_both_ends() -> None:
    table = SampleTable.of([Sample(key, Path("a")) for key in "xyz"])
    assert [table[-1].key, table[-3].key] == ["z", "x"]
    for row in (3, -4):
        with pytest.raises(IndexError):
            table[row]


def test_texts_keep_no_separator_and_no_blank_text() -> None:
    table = SampleTable.of([Sample("a", Path("a"), texts=("one\0two", " ", "three")), Sample("b", Path("a"))])
    assert [sample.texts for sample in table] == [("one two", "three"), ()]
    assert table.has_texts


def test_equal_lists_of_texts_are_stored_once() -> None:
    table = SampleTable.of([Sample(str(row), Path("a"), texts=("x", str(row % 2))) for row in range(9)])
    assert (len(table.lists), list(table.text_lists())) == (2, [("x", "0"), ("x", "1")])
    assert table.list_rows.tolist() == [row % 2 for row in range(9)]


DIGESTED: dict[str, Callable[[Sample], Sample]] = {
    "key": lambda sample: replace(sample, key="other"),
    "label": lambda sample: replace(sample, label=7),
    "size": lambda sample: replace(sample, size=7),
    "texts": lambda sample: replace(sample, texts=("x", "y")),
    "split texts": lambda sample: replace(sample, texts=("x y",)),
}


@pytest.mark.parametrize("change", DIGESTED)
def test_digest_depends_on_samples_and_order_only(change: str) -> None:
    samples = [Sample(f"{row}", Path("a"), row, 3, row, ("x", "z")) for row in range(3)]
    digest = SampleTable.of(samples).digest()
    assert SampleTable.of([replace(sample, path=Path("b"), offset=9) for sample in samples]).digest() == digest
    assert SampleTable.of([DIGESTED[change](samples[0]), *samples[1:]]).digest() != digest
    assert SampleTable.of(samples[::-1]).digest() != digest
    table = SampleTable.of(samples)
    assert table.select(np.array([0, 2, 1])).digest() != digest
    assert table.with_labels(table.labels + 1).digest() != digest
    assert table.split_lines().digest() == digest


BROKEN: dict[str, tuple[str, Any, str]] = {
    "no sizes": ("size", None, "file: int32 .*, expected int32"),
    "other type": ("size", np.zeros(3, np.int32), "size: int32"),
    "other length": ("offset", np.zeros(2, np.int64), "offset: int64"),
    "two dimensions": ("label", np.zeros((3, 1), np.int64), "label: int64"),
    "file out of range": ("file", np.array([0, 1, 9], np.int32), "file: a value is out of range"),
    "negative text": ("list_of", np.array([0, -1, 0], np.int32), "list_of: a value is out of range"),
    "no file rows": ("file", None, "file is missing"),
    "ends decrease": ("keys_ends", np.array([2, 1, 3]), "keys_ends: not increasing"),
    "ends beyond": ("lists_ends", np.array([1, 900]), "lists_ends: not increasing"),
    "no ends": ("files_ends", None, "files_ends is missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_from_columns_refuses_inconsistent_columns(case: str) -> None:
    name, column, message = BROKEN[case]
    samples = [Sample(f"{row}", Path("ab"[row % 2]), row, 3, row, ("xy"[row % 2],)) for row in range(3)]
    columns = SampleTable.of(samples).columns()
    columns = {key: value for key, value in columns.items() if key != name or column is not None}
    if column is not None:
        columns[name] = column
    with pytest.raises(ValueError, match=message):
        SampleTable.from_columns(columns, "", "")


def test_invalid_utf8_in_columns_is_a_data_error() -> None:
    table = replace(SampleTable.of([Sample("a", Path("a"))]), root="/set", keys=Strings.of([b"\xff"]))
    with pytest.raises(DataError, match=r"^/set: invalid text in row 0 of the index: "):
        table.key(0)


def test_strings_of_any_bytes() -> None:
    strings = [b"", b"\0\xff", b"a" * 5000, b""] * 2000
    columns = Strings.of(strings)
    assert list(columns) == strings
    assert columns[3:0:-1] == strings[3:0:-1]
    builder = StringsBuilder()
    for _ in range(2):
        builder.extend(columns)
    builder.append(b"x")
    joined = Strings(*builder.columns())
    assert list(joined) == [*strings, *strings, b"x"]
    assert joined.lengths.tolist() == [len(string) for string in joined]
