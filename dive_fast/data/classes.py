"""Class names joined to the classes of a data set: by WordNet id, by number, by name, or by checked position."""

import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from importlib import resources

import numpy as np

from dive_fast.data.prompt_files import imagenet_names, read_class_names
from dive_fast.data.sources.source import Source
from dive_fast.errors import DataError

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 3
"""Classes that a message lists."""
_WORDNET_ID = re.compile(r"[nN]\d{8}")


@cache
def synsets(subset: str = "") -> tuple[str, ...]:
    """WordNet ids in label order from timm's lists: all 1000 of ImageNet, or the 200 of subset ``r`` or ``a``."""
    file = f"imagenet_{subset}_synsets.txt" if subset else "imagenet_synsets.txt"
    text = resources.files("timm.data").joinpath("_info", file).read_text(encoding="utf-8")
    return tuple(sorted(text.split()))


def are_wordnet_ids(names: Sequence[str]) -> bool:
    """Whether there are names and all of them are WordNet ids such as ``n02099601``."""
    return bool(names) and all(_WORDNET_ID.fullmatch(name) for name in names)


def are_numbers(names: Sequence[str]) -> bool:
    """Whether there are names and all of them are integers."""
    return bool(names) and all(name.isdecimal() and name.isascii() for name in names)


def imagenet_rows(folders: Sequence[str]) -> tuple[int, ...] | None:
    """ImageNet class numbers (0 to 999) of WordNet ids; None if an id is not an ImageNet class."""
    row_of = {wnid: row for row, wnid in enumerate(synsets())}
    rows = tuple(row_of.get(folder.lower(), -1) for folder in folders)
    return rows if rows and min(rows) >= 0 else None


def check_labels(source: Source, class_names: Sequence[str]) -> None:
    """Checks that every label has a class name.

    Raises:
        DataError: a label has no class name.
    """
    labels = source.samples.labels
    invalid = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if invalid.size:
        sample = source.samples[int(invalid[0])]
        raise DataError(
            f"{sample.path}: sample {sample.key} has label {sample.label}, "
            f"but there are {len(class_names)} class names"
        )


def join_names(source: Source, names: Sequence[str] | None, origin: str) -> tuple[str, ...]:
    """The class name of each label of a data set.

    If the classes of the data set have names (usually folders), names are joined by key where possible: WordNet
    ids with ImageNet's names by id, equal words by word, integers in numeric order. Otherwise name i belongs to
    class i, and there must be as many names as classes. If the classes have no names, names are joined by label.

    Args:
        names: in the order of the user's list; None: the names of the data set, unchanged.
        origin: the user's name for the list, for messages: ``imagenet`` or a file.

    Raises:
        DataError: the names do not fit the classes, or a label has no name.
    """
    folders = source.class_names
    if names is None:
        check_labels(source, folders)
        return folders
    names = tuple(names)
    if folders:
        joined = _by_wordnet_id(folders, names, origin)
        if joined is None:
            joined = _by_word(folders, names, origin)
        if joined is None:
            joined = _by_position(folders, names, origin)
        names = joined
    check_labels(source, names)
    if not folders and len(source) and int(source.samples.labels.min()) == 1:
        logger.warning(
            "%s: no sample has label 0, which is %r; if labels are counted from 1, every image gets the name of "
            "the next class",
            *(origin, names[0]),
        )
    return names


def target_names(source: Source, class_names: str | None, part: str = "all") -> tuple[str, ...]:
    """The class names of a training set, in the listed order if its samples have texts.

    Args:
        class_names: the config's ``class_names``.
        part: the config's ``classes``; the names of a part are those that ``source`` was opened with.

    Raises:
        DataError: as :func:`join_names`, or the list cannot be read.
    """
    if class_names is None or part != "all":
        return source.class_names
    names = read_class_names(class_names)
    return names if source.samples.has_texts else join_names(source, names, class_names)


def format_pairs(folders: Sequence[str], names: Sequence[str]) -> str:
    """The first and last folders with their class names in one line, for users to check."""
    pairs = [f"{folder} = {name}" for folder, name in zip(folders, names, strict=True)]
    shown = pairs if len(pairs) <= NUM_EXAMPLES else [*pairs[: NUM_EXAMPLES - 1], "...", pairs[-1]]
    return ", ".join(shown)


def repeated(names: Sequence[str]) -> dict[str, list[int]]:
    """Names of more than one class, with the labels of these classes."""
    classes = defaultdict(list)
    for label, name in enumerate(names):
        classes[name].append(label)
    return {name: labels for name, labels in classes.items() if len(labels) > 1}


def remark_on_repeated(names: Sequence[str]) -> list[str]:
    """One line if several classes share a name, otherwise none."""
    duplicates = repeated(names)
    if not duplicates:
        return []
    name, labels = next(iter(duplicates.items()))
    return [
        f"{len(duplicates)} class names belong to several classes, e.g. {name!r} to classes "
        f"{' and '.join(map(str, labels))}: prompts cannot distinguish them, and only the first is predicted"
    ]


def remarks(names: Sequence[str], folders: Sequence[str] = (), origin: str | None = None) -> list[str]:
    """Lines about class names that give unusual prompts, for the user.

    Args:
        names: one name per class.
        folders: names of the classes in the data set, if it has any.
        origin: the user's name for the list of names; None: the names are those of the folders.
    """
    lines = remark_on_repeated(names)
    if len(names) == 1:
        lines.append(f"there is only one class, {names[0]!r}: every model predicts it for every image")
    if are_wordnet_ids(names):
        lines.append(
            f"class names are WordNet ids, so prompts contain {names[0]!r}: class_names=imagenet gives their names"
        )
    elif are_numbers(names):
        lines.append(f"class names are numbers, so prompts contain {names[0]!r}: set class_names to their names")
    elif origin is None and (name := next((name for name in names if "_" in name), None)) is not None:
        lines.append(f"prompts keep the underscores of class names such as {name!r}: class_names replaces them")
    if origin is not None and folders and tuple(folders) != tuple(names):
        lines.append(f"class names from {origin}: {format_pairs(folders, names)}")
    return lines


def _by_wordnet_id(folders: Sequence[str], names: tuple[str, ...], origin: str) -> tuple[str, ...] | None:
    if names != imagenet_names() or not are_wordnet_ids(folders):
        return None
    rows = imagenet_rows(folders)
    if rows is None:
        unknown = next(folder for folder in folders if folder.lower() not in synsets())
        raise DataError(f"{origin}: {unknown} is not a class of ImageNet's 1000; list the names in a file")
    return tuple(names[row] for row in rows)


def _by_word(folders: Sequence[str], names: tuple[str, ...], origin: str) -> tuple[str, ...] | None:
    """Joins the names in any order if each folder's name is one of them; otherwise None."""
    words, listed = [_word(folder) for folder in folders], [_word(name) for name in names]
    if are_numbers(folders) or len(set(words)) < len(words):
        return None
    index = {word: i for i, word in enumerate(listed) if listed.count(word) == 1}
    if all(word in index for word in words):
        if len(names) != len(folders) and names != imagenet_names():
            raise DataError(_unequal(folders, names, origin))
        return tuple(names[index[word]] for word in words)
    return None


def _by_position(folders: Sequence[str], names: tuple[str, ...], origin: str) -> tuple[str, ...]:
    if len(names) != len(folders):
        raise DataError(_unequal(folders, names, origin))
    if are_numbers(folders):
        order = sorted(range(len(folders)), key=lambda label: int(folders[label]))
        if len({int(folder) for folder in folders}) < len(folders):
            raise DataError(f"{origin}: two class folders are the same number, e.g. 1 and 01; rename one")
        name_of = dict(zip(order, names, strict=True))
        return tuple(name_of[label] for label in range(len(folders)))
    if names == imagenet_names() and tuple(folders) != synsets():
        raise DataError(
            f"{origin}: the 1000 class folders are not WordNet ids, numbers or names, e.g. {folders[0]}, so the "
            "names cannot be assigned to them; list the names in a file, in the order of the sorted folders"
        )
    index, labels = _rows_of_words(names), _rows_of_words(folders)
    for word, label in labels.items():
        folder = folders[label]
        if (other := index.get(word, label)) != label:
            raise DataError(
                f"{origin}: class {folder!r} is number {label}, for which the list has {names[label]!r}, but "
                f"{names[other]!r} is number {other}: list the names in the order of the sorted folders"
            )
    return names


def _unequal(folders: Sequence[str], names: Sequence[str], origin: str) -> str:
    examples = ", ".join(folders[:NUM_EXAMPLES]) + (", ..." if len(folders) > NUM_EXAMPLES else "")
    return (
        f"{origin}: {len(names)} class names, but the data set has {len(folders)} classes ({examples}); "
        "list one name for each class, in the order of the sorted folders"
    )


def _rows_of_words(names: Sequence[str]) -> dict[str, int]:
    """The row of each name that no other one equals as a word."""
    words = [_word(name) for name in names]
    counts = Counter(words)
    return {word: row for row, word in enumerate(words) if counts[word] == 1}


def _word(name: str) -> str:
    return " ".join(composed(name).replace("_", " ").lower().split())


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC); macOS writes folder names in the decomposed form."""
    return unicodedata.normalize("NFC", name)
