"""Class names joined to the classes of a data set: by WordNet id, by number, by name, or by checked position."""

import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from importlib import resources

import open_clip

from dive_fast.data.prompts import check_labels, read_class_names
from dive_fast.data.sources.source import Source
from dive_fast.errors import DataError

logger = logging.getLogger(__name__)

SHOWN = 3
"""Examples in a message."""
_WORDNET_ID = re.compile(r"[nN]\d{8}")


@cache
def synsets(subset: str = "") -> tuple[str, ...]:
    """WordNet ids in the order of the labels: all 1000 of ImageNet, or the 200 of ``r`` or ``a``; timm's lists."""
    file = f"imagenet_{subset}_synsets.txt" if subset else "imagenet_synsets.txt"
    text = resources.files("timm.data").joinpath("_info", file).read_text(encoding="utf-8")
    return tuple(sorted(text.split()))


def are_wordnet_ids(names: Sequence[str]) -> bool:
    """Whether each of the names, of which there is at least one, is a WordNet id such as ``n02099601``."""
    return bool(names) and all(_WORDNET_ID.fullmatch(name) for name in names)


def are_numbers(names: Sequence[str]) -> bool:
    """Whether each of the names, of which there is at least one, is a whole number."""
    return bool(names) and all(name.isdecimal() and name.isascii() for name in names)


def imagenet_rows(folders: Sequence[str]) -> tuple[int, ...] | None:
    """The numbers (0 to 999) of the ImageNet classes with these WordNet ids; None if one is of no class."""
    row_of = {wnid: row for row, wnid in enumerate(synsets())}
    rows = tuple(row_of.get(folder.lower(), -1) for folder in folders)
    return rows if rows and min(rows) >= 0 else None


def join_names(source: Source, names: Sequence[str] | None, given: str) -> tuple[str, ...]:
    """The class name of each label of a data set.

    A data set whose classes have names of their own (folders, mostly) is joined by key where there is one: WordNet
    ids with ImageNet's names by id, equal words by word, whole numbers by their order as numbers. Otherwise name i
    belongs to class i, and there must be as many names as classes. Where classes have no names of their own, names
    are joined by label.

    Args:
        names: in the order of the user's list; None: the data set's own, as they are.
        given: what the user calls the list, for messages: ``imagenet`` or a file.

    Raises:
        DataError: the names do not fit the classes, or a label has no name.
    """
    folders = source.class_names
    if names is None:
        check_labels(source, folders)
        return folders
    names = tuple(names)
    if folders:
        joined = _by_wordnet_id(folders, names, given)
        if joined is None:
            joined = _by_word(folders, names, given)
        if joined is None:
            joined = _by_position(folders, names, given)
        names = joined
    check_labels(source, names)
    if not folders and len(source) and min(sample.label for sample in source.samples) == 1:
        logger.warning(
            "%s: no sample has label 0, which is %r; where labels are counted from 1, every image gets the name "
            "after its own",
            *(given, names[0]),
        )
    return names


def target_names(source: Source, given: str | None) -> tuple[str, ...]:
    """The class names of a data set that is trained on; where it has prompts of its own, as they are listed.

    Args:
        given: the config's ``class_names``.

    Raises:
        DataError: as :func:`join_names`, or the list cannot be read.
    """
    if given is None:
        return source.class_names
    names = read_class_names(given)
    return names if any(sample.texts for sample in source.samples) else join_names(source, names, given)


def pairing(folders: Sequence[str], names: Sequence[str]) -> str:
    """The first and the last class with the name it was given, for people to check."""
    pairs = [f"{folder} = {name}" for folder, name in zip(folders, names, strict=True)]
    shown = pairs if len(pairs) <= SHOWN else [*pairs[: SHOWN - 1], "...", pairs[-1]]
    return ", ".join(shown)


def repeated(names: Sequence[str]) -> dict[str, list[int]]:
    """The names that several classes have, with these classes."""
    classes = defaultdict(list)
    for label, name in enumerate(names):
        classes[name].append(label)
    return {name: labels for name, labels in classes.items() if len(labels) > 1}


def remark_on_repeated(names: Sequence[str]) -> list[str]:
    """One line where several classes share a name; none otherwise."""
    twice = repeated(names)
    if not twice:
        return []
    name, labels = next(iter(twice.items()))
    return [
        f"{len(twice)} class names belong to several classes, e.g. {name!r} to classes "
        f"{' and '.join(map(str, labels))}: prompts cannot tell them apart, and only the first is predicted"
    ]


def remarks(names: Sequence[str], folders: Sequence[str] = (), given: str | None = None) -> list[str]:
    """What a user should know of class names that prompts are made from, a line each.

    Args:
        names: one a class.
        folders: the classes' names in the data set, where it has any.
        given: what the user calls the list of names; None: the folders' names are used.
    """
    found = remark_on_repeated(names)
    if len(names) == 1:
        found.append(f"there is one class alone, {names[0]!r}: whatever the model, every image is predicted as it")
    if are_wordnet_ids(names):
        found.append(
            f"the classes are called by WordNet id, and prompts say {names[0]!r}: class_names=imagenet names them"
        )
    elif are_numbers(names):
        found.append(f"the classes are called by number, and prompts say {names[0]!r}: class_names names them")
    elif given is None and (name := next((name for name in names if "_" in name), None)) is not None:
        found.append(f"prompts keep the underscores of class names such as {name!r}: class_names gives others")
    if given is not None and folders and tuple(folders) != tuple(names):
        found.append(f"class names of {given}: {pairing(folders, names)}")
    return found


def _by_wordnet_id(folders: Sequence[str], names: tuple[str, ...], given: str) -> tuple[str, ...] | None:
    if names != tuple(open_clip.IMAGENET_CLASSNAMES) or not are_wordnet_ids(folders):
        return None
    rows = imagenet_rows(folders)
    if rows is None:
        stranger = next(folder for folder in folders if folder.lower() not in synsets())
        raise DataError(f"{given}: {stranger} is not a class of ImageNet's 1000; list the names in a file")
    return tuple(names[row] for row in rows)


def _by_word(folders: Sequence[str], names: tuple[str, ...], given: str) -> tuple[str, ...] | None:
    """Joined where each class's own name is one of the names, in whichever order they are listed."""
    words, listed = [_word(folder) for folder in folders], [_word(name) for name in names]
    if are_numbers(folders) or len(set(words)) < len(words):
        return None
    place = {word: at for at, word in enumerate(listed) if listed.count(word) == 1}
    if all(word in place for word in words):
        if len(names) != len(folders) and names != tuple(open_clip.IMAGENET_CLASSNAMES):
            raise DataError(_unequal(folders, names, given))
        return tuple(names[place[word]] for word in words)
    return None


def _by_position(folders: Sequence[str], names: tuple[str, ...], given: str) -> tuple[str, ...]:
    if len(names) != len(folders):
        raise DataError(_unequal(folders, names, given))
    if are_numbers(folders):
        order = sorted(range(len(folders)), key=lambda at: int(folders[at]))
        if len({int(folder) for folder in folders}) < len(folders):
            raise DataError(f"{given}: two classes are called by one number, e.g. 1 and 01; rename one")
        name_of = dict(zip(order, names, strict=True))
        return tuple(name_of[at] for at in range(len(folders)))
    if names == tuple(open_clip.IMAGENET_CLASSNAMES) and tuple(folders) != synsets():
        raise DataError(
            f"{given}: the 1000 classes are not called by WordNet id, number or name, e.g. {folders[0]}: "
            "which name is whose cannot be known; list the names in a file, in the order of the sorted folders"
        )
    listed = {_word(name): at for at, name in enumerate(names)}
    for at, folder in enumerate(folders):
        if (other := listed.get(_word(folder), at)) != at:
            raise DataError(
                f"{given}: class {folder!r} is number {at}, whose name there is {names[at]!r}, but "
                f"{names[other]!r} is number {other}: list the names in the order of the sorted folders"
            )
    return names


def _unequal(folders: Sequence[str], names: Sequence[str], given: str) -> str:
    some = ", ".join(folders[:SHOWN]) + (", ..." if len(folders) > SHOWN else "")
    return (
        f"{given}: {len(names)} class names, but the data set has {len(folders)} classes ({some}); "
        "list one name for each class, in the order of the sorted folders"
    )


def _word(name: str) -> str:
    return " ".join(composed(name).replace("_", " ").lower().split())


def composed(name: str) -> str:
    """A name with each accented letter as one character: macOS writes folders' names with two."""
    return unicodedata.normalize("NFC", name)
