"""Class names are joined to classes by id, number, word or checked position; anything else is an error."""

import unicodedata
from pathlib import Path

import open_clip
import pytest
import tiny

from dive_fast.config.schema import EvaluationSet
from dive_fast.data.classes import join_names, remarks, synsets
from dive_fast.data.prepared.convert import Options
from dive_fast.data.prepared.raw import RawSource
from dive_fast.data.prepared.write import prepare
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.sample_table import Sample
from dive_fast.data.sources.source import Source
from dive_fast.errors import DataError
from dive_fast.evaluation.datasets.resolve import open_evaluation

IMAGENET = tuple(open_clip.IMAGENET_CLASSNAMES)
WNIDS = ("n02099601", "n02123045", "n04086273")
NUMBERS = tuple(str(number) for number in range(12))


def folders(*names: str) -> Source:
    """A set with one sample in each class."""
    samples = [Sample(f"{name}/0.jpg", Path(name), label=label) for label, name in enumerate(names)]
    return Source.of(samples, tuple(names))


def test_join_names_joins_wordnet_ids_by_id() -> None:
    assert join_names(folders(*WNIDS), IMAGENET, "imagenet") == ("Golden Retriever", "tabby cat", "revolver")
    assert join_names(folders(*synsets()), IMAGENET, "imagenet") == IMAGENET
    assert join_names(folders(*WNIDS), ("a", "b", "c"), "names.txt") == ("a", "b", "c")
    with pytest.raises(DataError, match="imagenet: n99999999 is not a class of ImageNet's 1000"):
        join_names(folders(*WNIDS, "n99999999"), IMAGENET, "imagenet")


@pytest.mark.parametrize("order", [NUMBERS, tuple(sorted(NUMBERS))], ids=["as numbers", "as text"])
@pytest.mark.parametrize("start", [0, 1])
def test_join_names_joins_integers_in_numeric_order(order: tuple[str, ...], start: int) -> None:
    numbers = tuple(str(int(number) + start) for number in order)
    names = [f"name {number}" for number in range(12)]
    assert join_names(folders(*numbers), names, "f") == tuple(f"name {int(number) - start}" for number in numbers)


def test_join_names_joins_equal_words_in_any_order() -> None:
    source = folders("Polar_bear", "cat", "dog")
    assert join_names(source, ("dog", "polar bear", "cat"), "f") == ("polar bear", "cat", "dog")
    # A folder named like an ImageNet class is that class.
    assert join_names(folders("goldfish", "tench"), IMAGENET, "imagenet") == ("goldfish", "tench")


@pytest.mark.parametrize(
    ("classes", "names", "message"),
    [
        (
            WNIDS,
            ("a", "b"),
            r"f: 2 class names, but the data set has 3 classes \(n02099601, n02123045, n04086273\)",
        ),
        (WNIDS, ("a", "b", "c", "d"), "f: 4 class names, but the data set has 3 classes"),
        (("cat", "dog"), IMAGENET, "f: 1000 class names, but the data set has 2 classes"),
        (("cat", "dog"), ("dog", "cat", "owl"), "f: 3 class names, but the data set has 2 classes"),
        (("bird", "cat", "dog"), ("dog", "cat", "owl"), "class 'dog' is number 2, for which the list has 'owl'"),
        (("0", "1", "2"), ("a", "b"), r"f: 2 class names, but the data set has 3 classes"),
        (("1", "01"), ("a", "b"), "two class folders are the same number"),
        (tuple(f"thing {i:03d}" for i in range(1000)), IMAGENET, "the names cannot be assigned to them"),
    ],
)
def test_join_names_rejects_names_that_do_not_fit(
    classes: tuple[str, ...], names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        join_names(folders(*classes), names, "f")


def test_remarks_report_names_that_give_unusual_prompts() -> None:
    assert remarks(("cat", "dog"), ("cat", "dog")) == []
    assert remarks(("a", "b", "c", "d"), ("w", "x", "y", "z"), "f") == [
        "class names from f: w = a, x = b, ..., z = d"
    ]
    for names, origin, expected in (
        (("cat", "dog", "cat"), None, "1 class names belong to several classes, e.g. 'cat' to classes 0 and 2"),
        (IMAGENET, "imagenet", "2 class names belong to several classes, e.g. 'missile' to classes 657 and 744"),
        (WNIDS, None, "WordNet ids, so prompts contain 'n02099601': class_names=imagenet gives their names"),
        (NUMBERS, None, "class names are numbers, so prompts contain '0'"),
        (("cat",), None, "there is only one class, 'cat'"),
        (("cat", "polar_bear"), None, "underscores of class names such as 'polar_bear'"),
    ):
        (line,) = remarks(names, names, origin)
        assert expected in line


def test_join_names_works_for_folder_and_prepared_sets(tmp_path: Path) -> None:
    for number in (0, 1, 2, 10):
        path = tmp_path / f"set/{number}/a.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(tiny.jpeg(number))
    prepare(RawSource(open_folder(str(tmp_path / "set"))), tmp_path / "ready", Options(), 1)
    (tmp_path / "names.txt").write_text("none\none\ntwo\nten\n")
    (tmp_path / "short.txt").write_text("none\none\ntwo\n")
    for kind, path in (("folder", "set"), ("prepared", "ready")):
        config = EvaluationSet(
            format=kind,  # type: ignore[arg-type]
            path=str(tmp_path / path),
            class_names=str(tmp_path / "names.txt"),
        )
        labelled = open_evaluation(config)
        pairs = {
            sample.key.split("/")[0]: labelled.class_names[sample.label] for sample in labelled.source.samples
        }  # type: ignore[union-attr]
        assert pairs == {"0": "none", "1": "one", "2": "two", "10": "ten"}
        short = config.model_copy(update={"class_names": str(tmp_path / "short.txt")})
        with pytest.raises(DataError, match="3 class names, but the data set has 4 classes"):
            open_evaluation(short)


def test_join_names_ignores_unicode_normal_form() -> None:
    names = ["\u00e9cole", "\u00eatre"]
    folders = tuple(sorted((unicodedata.normalize("NFD", name) for name in names), reverse=True))
    source = Source.of([Sample("0", Path("0"), label=0), Sample("1", Path("1"), label=1)], folders)
    assert join_names(source, names, "a file") == tuple(reversed(names))


def test_join_names_accepts_upper_case_wordnet_ids() -> None:
    source = Source.of([Sample("0", Path("0"), label=0)], ("N02099601",))
    assert join_names(source, open_clip.IMAGENET_CLASSNAMES, "imagenet") == (IMAGENET[207],)


def test_join_names_warns_about_labels_from_one(caplog: pytest.LogCaptureFixture) -> None:
    join_names(Source.of([Sample("0", Path("0"), label=1)]), ["a", "b"], "a file")
    assert "no sample has label 0, which is 'a'" in caplog.text


def test_join_names_accepts_names_of_folders_that_differ_in_case() -> None:
    source = Source.of([Sample(name, Path("x"), label=label) for label, name in enumerate("Bb")], ("B", "b"))
    assert join_names(source, ("B", "b"), "classes.txt") == ("B", "b")
