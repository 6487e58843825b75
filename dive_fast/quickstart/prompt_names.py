"""Class names for prompts from the names of class folders: ``001.Red_car`` becomes ``Red car``."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

WORDNET_ID = re.compile(r"[nN]\d{8}")
_AFTER_WORDNET_ID = re.compile(r"[nN]\d{8}[\s._-]+(?=\w)")
_AFTER_NUMBER = re.compile(r"(\d+)[\s._-]+(?=[^\W\d_])")


class PromptNames(NamedTuple):
    """The class names of a data set as they stand in prompts."""

    names: tuple[str, ...]
    """In label order, all different."""
    remarks: tuple[str, ...]
    """Lines for the user."""

    def changes(self, folders: Sequence[str]) -> list[tuple[str, str]]:
        """Each folder whose class has another name, with that name."""
        return [(folder, name) for folder, name in zip(folders, self.names, strict=True) if folder != name]


def prompt_names(folders: Sequence[str]) -> PromptNames:
    """Class names in label order, from the names of class folders.

    Names that would be equal after a change, or equal to another folder, keep the name of their folder.

    Args:
        folders: in label order, all different.
    """
    remarks: list[str] = []
    if folders and all(WORDNET_ID.fullmatch(folder) for folder in folders):
        names = _imagenet_names(folders, remarks)
    else:
        names = [_clean(rest) or folder for rest, folder in zip(_without_prefixes(folders), folders, strict=True)]
    names = _keep_apart(folders, [_one_line(name) or f"class {label}" for label, name in enumerate(names)])
    lowered = Counter(name.lower() for name in names)
    equal = [name for name in names if lowered[name.lower()] > 1]
    if equal:
        remarks.append(
            f"classes {' and '.join(map(repr, equal[:2]))} have equal prompts, since CLIP ignores case: rename one"
        )
    if names and all(name.isdecimal() for name in names):
        remarks.append("class names are numbers, which prompts do not explain: write their names into the file")
    return PromptNames(tuple(names), tuple(remarks))


def _imagenet_names(folders: Sequence[str], remarks: list[str]) -> list[str]:
    """ImageNet's names of WordNet ids; other ids stay as they are."""
    from dive_fast.data.classes import synsets  # imports torch
    from dive_fast.data.prompt_files import read_class_names

    name_of = dict(zip(synsets(), read_class_names("imagenet"), strict=True))
    names = [name_of.get(folder.lower(), folder) for folder in folders]
    unknown = [folder for folder in folders if folder.lower() not in name_of]
    if unknown:
        remarks.append(
            f"{len(unknown)} WordNet ids are not among ImageNet's 1,000 classes, e.g. {unknown[0]}: write their "
            "names into the file"
        )
    return names


def _without_prefixes(folders: Sequence[str]) -> list[str]:
    """Folder names without the numbers or WordNet ids that all of them begin with.

    Numbers are removed only where they count the folders: the names without them are all different, and they are
    consecutive or padded with zeros.
    """
    if folders and all(_AFTER_WORDNET_ID.match(folder) for folder in folders):
        return _different([_AFTER_WORDNET_ID.sub("", folder, count=1) for folder in folders], folders)
    matches = [_AFTER_NUMBER.match(folder) for folder in folders]
    numbers = [match[1] for match in matches if match]
    if not numbers or len(numbers) < len(folders):
        return list(folders)
    values = sorted(map(int, numbers))
    is_padded = len(set(map(len, numbers))) == 1 and any(number.startswith("0") for number in numbers)
    if values not in (list(range(len(values))), list(range(1, len(values) + 1))) and not is_padded:
        return list(folders)
    return _different([_AFTER_NUMBER.sub("", folder, count=1) for folder in folders], folders)


def _different(names: list[str], folders: Sequence[str]) -> list[str]:
    """The names if all are different, otherwise the folders."""
    return names if len(set(map(_word, names))) == len(names) else list(folders)


def _clean(name: str) -> str:
    """A folder name as words: separators become spaces, and camel case is split."""
    name = unicodedata.normalize("NFC", name).replace("_", " ")
    # Not in x-ray and t-shirt.
    name = re.sub(r"(?<=\w\w)-+(?=\w\w)", " ", name)
    # Not in iPhone and McDonald.
    name = re.sub(r"(?<=[a-z][a-z])(?=[A-Z][a-z])", " ", name)
    return _one_line(name).strip("-. ")


def _one_line(name: str) -> str:
    return " ".join("".join(" " if not each.isprintable() else each for each in name).split())


def _keep_apart(folders: Sequence[str], names: list[str]) -> list[str]:
    """Names of which no two are equal words, and none is the word of another class's folder."""
    folder_words = [_word(folder) for folder in folders]
    owner = {word: label for label, word in enumerate(folder_words)}
    counts = Counter(map(_word, names))
    kept: list[str] = []
    for label, (folder, name) in enumerate(zip(folders, names, strict=True)):
        is_ambiguous = counts[_word(name)] > 1 or owner.get(_word(name), label) != label
        kept.append(_one_line(folder) or name if is_ambiguous else name)
    return _numbered(folders, kept)


def _numbered(folders: Sequence[str], names: list[str]) -> list[str]:
    """The names, with a number after each one that an earlier class has, or the only folder of that word."""
    words = Counter(map(_word, folders))
    seen, kept = set(names), {folder for folder in folders if words[_word(folder)] == 1}
    result: list[str] = []
    for folder, name in zip(folders, names, strict=True):
        unique, number = name, 2
        while unique in result or (unique != name and unique in seen) or (unique in kept and unique != folder):
            unique, number = f"{name} {number}", number + 1
        result.append(unique)
    return result


def _word(name: str) -> str:
    """A name as it is compared with others: as :mod:`dive_fast.data.classes` joins names with folders."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").lower().split())


def class_file_text(names: Sequence[str]) -> str:
    """The names as a file with one a line; as a JSON list where lines could be read as more than names."""
    if names[0][0] in "[{#" or any(_look_like_code(rows) for rows in (names, names[1:]) if rows):
        return json.dumps(list(names), ensure_ascii=False, indent=0) + "\n"
    return "".join(f"{name}\n" for name in names)


def _look_like_code(rows: Sequence[str]) -> bool:
    """Whether all lines could be quoted, list items, or numbered; the first line may be a header."""
    return all(row[0] in "\"'-0123456789nN" and not row.isalnum() for row in rows)
