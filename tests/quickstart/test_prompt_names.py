"""Class names for prompts from the names of folders: readable, all different, and joined to their own classes."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dive_fast.data.classes import join_names
from dive_fast.data.prompt_files import read_class_names
from dive_fast.data.sources.sample_table import Sample
from dive_fast.data.sources.source import Source
from dive_fast.quickstart.prompt_names import class_file_text, prompt_names


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["cat", "golden retriever"], ["cat", "golden retriever"]),
        (["AnnualCrop", "Sea_Lake", "merry-go-round"], ["Annual Crop", "Sea Lake", "merry go round"]),
        (["iPhone", "McDonald", "T-shirt", "x-ray"], ["iPhone", "McDonald", "T-shirt", "x-ray"]),
        (["001.Black_footed_Albatross", "002.Laysan"], ["Black footed Albatross", "Laysan"]),
        (["0_cat", "1_dog", "2_owl"], ["cat", "dog", "owl"]),
        (["10_dollar", "5_dollar"], ["10 dollar", "5 dollar"]),
        (["3_series", "5_series", "x5"], ["3 series", "5 series", "x5"]),
        (["320_airbus", "747_boeing"], ["320 airbus", "747 boeing"]),
        (["n02085620-Chihuahua", "n02085782-Japanese_spaniel"], ["Chihuahua", "Japanese spaniel"]),
        (["n01440764", "n02099601"], ["tench", "Golden Retriever"]),
        (["red car", "red_car", "sea"], ["red car", "red_car", "sea"]),
        (["a\nb", "  ", "___", "日本_猫"], ["a b", "class 1", "___", "日本 猫"]),
        (["a\nb", "a b"], ["a b", "a b 2"]),
        (["0", "1", "10"], ["0", "1", "10"]),
    ],
)
def test_prompt_names_from_folders(folders: list[str], names: list[str]) -> None:
    assert list(prompt_names(folders).names) == names


def test_prompt_names_lists_changes() -> None:
    folders = ["cat", "red_car"]
    assert prompt_names(folders).changes(folders) == [("red_car", "red car")]


@pytest.mark.parametrize(
    ("folders", "remark"),
    [
        (["Cat", "cat"], "classes 'Cat' and 'cat' have equal prompts, since CLIP ignores case: rename one"),
        (["0", "1"], "class names are numbers, which prompts do not explain"),
        (["n01440764", "n99999999"], "1 WordNet ids are not among ImageNet's 1,000 classes, e.g. n99999999"),
    ],
)
def test_prompt_names_remarks(folders: list[str], remark: str) -> None:
    (line,) = prompt_names(folders).remarks
    assert line.startswith(remark)


FOLDERS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8),
        st.from_regex(r"[0-9]{1,2}[_. -][aAbB_]{1,3}", fullmatch=True),
        st.from_regex(r"[aAbB]{1,2}[ _-]{0,2}[aAbB2]{0,2}", fullmatch=True),
        st.sampled_from(["[a]", "{b}", "# c", "- d", '"e"', "'f'", "n01440764", "1 g", "2: h"]),
    ),
    min_size=1,
    max_size=6,
    unique=True,
)


@settings(deadline=None, max_examples=150)
@given(FOLDERS)
@example(["!", "0:", "1 0"])
@example(["-a", "a"])
@example(["- a", "- b"])
@example(["# a", "b"])
@example(["1 a", "2 b"])
@example(["a b", "b", "a_b 2"])
@example(["1_b", "2_a", "a", "b"])
@example(["0_b", "1_a"])
@example(["\x1b0", "0"])
def test_file_of_prompt_names_is_read_back_for_the_same_classes(
    tmp_path_factory: pytest.TempPathFactory, folders: list[str]
) -> None:
    folders = sorted(folders)
    names = prompt_names(folders).names
    assert len(set(names)) == len(folders)
    file = tmp_path_factory.getbasetemp() / "classes.txt"
    file.write_bytes(class_file_text(names).encode())
    assert read_class_names(str(file)) == names
    source = Source.of(
        [Sample(name, Path("x"), label=label) for label, name in enumerate(folders)], tuple(folders)
    )
    if not all(name.isdecimal() for name in folders):
        assert join_names(source, names, "classes.txt") == names
