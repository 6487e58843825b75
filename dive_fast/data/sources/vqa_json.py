"""Reads questions about images from JSON files: VQAv2's, and those of data sets in its form.

The questions are the list itself, or the list under ``questions`` (VQAv2, OK-VQA, AdVQA) or ``data`` (TextVQA).
Answers stand in a second file, under ``annotations`` or as a list, and are joined by ``question_id``, or in the
entries of the first (VizWiz, TextVQA). An entry names its image by ``image``, or by ``image_id``, of which the
file is that of COCO or the number itself.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dive_fast.data.sources.sample_table import TableBuilder, clean_text, printable
from dive_fast.data.sources.source import Skipped, Source, locate
from dive_fast.errors import DataError
from dive_fast.io.safe_read import below, read_json

VqaText = Literal["question", "question_answer", "answer"]
NO_ANSWER = "no answer"
"""Reason for skipping a question without an answer, where the text has one."""
EMPTY_QUESTION = "its question is empty"
"""Reason for skipping a question of white space alone."""
SUFFIXES = (".jpg", ".png", ".jpeg")
Entry = Mapping[str, Any]


def open_vqa(path: str, annotations: str | None, image_root: str | None, text: VqaText, *, images: bool) -> Source:
    """Opens the questions of a file as image-text samples, one for each question.

    Args:
        annotations: file of the answers; None: the file next to the questions that VQAv2 would name so, if any.
        image_root: folder of the images; None: the folder of the questions.
        text: the text of a sample: its question, its ``question : answer`` with the most frequent answer, or that.
        images: whether images are read, so that the first one must exist.

    Raises:
        DataError: a file is missing or does not have this form, or the first image does not exist.
    """
    file = locate(path)
    entries, split = _entries(_read(file), file, ("questions", "data"))
    answers = _answers(file, annotations, text)
    root = Path(image_root) if image_root is not None else file.parent
    name_of = _image_namer(entries[0], split, root, file, must_exist=images)
    builder, skipped = TableBuilder(str(root), shares_texts=text == "answer"), list[Skipped]()
    seen: set[str] = set()
    for number, entry in enumerate(entries):
        key = str(entry.get("question_id", number))
        if key in seen:
            raise DataError(f"{file}: duplicate question_id {key}")
        seen.add(key)
        question = clean_text(_field(entry, "question", str, file, number))
        answer = "" if text == "question" else _answer(answers.get(key, entry), file, key)
        reason = EMPTY_QUESTION if text != "answer" and not question else ""
        reason = NO_ANSWER if text != "question" and not answer else reason
        if reason:
            skipped.append(Skipped(printable(key), reason))
            continue
        words = {"question": question, "answer": answer, "question_answer": f"{question} : {answer}"}[text]
        builder.add(printable(key), builder.file(os.fsencode(name_of(entry, number))), -1, (words,))
    if not len(builder):
        raise DataError(f"{file}: no question can be used: {skipped[0].reason}")
    return Source(builder.build(), skipped=skipped)


def annotations_of(questions: Path) -> Path:
    """VQAv2's name of the answers to a file of questions."""
    return questions.with_name(questions.name.replace("OpenEnded_", "").replace("questions", "annotations"))


def _read(file: Path) -> Any:
    try:
        return read_json(file)
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such file") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot read it: {error}") from error


def _entries(tree: Any, file: Path, names: Sequence[str]) -> tuple[list[Entry], str]:
    """The entries of a file, and the part of COCO that their images are of, where the file names one."""
    split = ""
    if isinstance(tree, dict):
        split = str(tree.get("data_subtype") or "")
        tree = next((tree[name] for name in names if name in tree), None)
    if not isinstance(tree, list) or not tree or not all(isinstance(entry, dict) for entry in tree):
        listed = " or ".join(f'"{name}"' for name in names)
        raise DataError(f"{file}: no list of entries, at the top or as {listed}")
    return tree, split


def _answers(file: Path, annotations: str | None, text: VqaText) -> dict[str, Entry]:
    if text == "question":
        return {}
    answers_file = locate(annotations) if annotations is not None else annotations_of(file)
    if annotations is None and (answers_file == file or not answers_file.is_file()):
        return {}  # in the entries of the questions, or an error that names this
    entries, _ = _entries(_read(answers_file), answers_file, ("annotations",))
    return {str(entry.get("question_id")): entry for entry in entries}


def _answer(entry: Entry, file: Path, key: str) -> str:
    """The most frequent answer; of equally frequent ones the first."""
    chosen = entry.get("multiple_choice_answer", entry.get("answer"))
    if isinstance(chosen, str):
        return clean_text(chosen)
    answers = entry.get("answers", [])
    if not isinstance(answers, list):
        raise DataError(f"{file}: question {key}: its answers are not a list")
    texts = [each.get("answer") if isinstance(each, dict) else each for each in answers]
    counts = Counter(clean_text(each) for each in texts if isinstance(each, str))
    return counts.most_common(1)[0][0] if counts else ""


def _image_namer(
    first: Entry, split: str, root: Path, file: Path, must_exist: bool
) -> Callable[[Entry, int], str]:
    """Returns a function from an entry and its number to the name of its image below ``root``.

    The pattern of the names is the one by which the first image exists.
    """

    def coco(entry: Entry, number: int) -> str:
        part = str(entry.get("coco_split") or split)
        return f"COCO_{part}_{_image_number(entry, file, number):012d}.jpg"

    def in_folder(entry: Entry, number: int) -> str:
        return f"{entry.get('coco_split') or split}/{coco(entry, number)}"

    def padded(entry: Entry, number: int) -> str:
        return f"{_image_number(entry, file, number):012d}.jpg"

    def named(entry: Entry, number: int) -> str:
        return str(_field(entry, "image", str, file, number))

    patterns: list[Callable[[Entry, int], str]]
    if "image" in first:
        patterns = [named]
    else:
        numbered = [coco, in_folder] if split or first.get("coco_split") else []
        try:
            _image_number(first, file, 0)
            numbered.append(padded)
        except DataError:
            numbered = []
        patterns = [*numbered, *(_with_suffix(suffix, file) for suffix in SUFFIXES)]

    def checked(pattern: Callable[[Entry, int], str]) -> Callable[[Entry, int], str]:
        def name(entry: Entry, number: int) -> str:
            try:
                return str(below(root, pattern(entry, number)).relative_to(root))
            except ValueError as error:
                raise DataError(f"{file}: entry {number}: {error}") from error

        return name

    names = [checked(pattern) for pattern in patterns]
    for name in names:
        if (root / name(first, 0)).is_file():
            return name
    if must_exist:
        raise DataError(
            f"{file}: the image of its first question is not in {root} (no {names[0](first, 0)}): name the folder "
            "of the images, or measure texts only"
        )
    return names[0]


def _with_suffix(suffix: str, file: Path) -> Callable[[Entry, int], str]:
    def name(entry: Entry, number: int) -> str:
        return f"{_field(entry, 'image_id', (str, int), file, number)}{suffix}"

    return name


def _image_number(entry: Entry, file: Path, number: int) -> int:
    value = _field(entry, "image_id", (str, int), file, number)
    if not str(value).isdecimal():
        raise DataError(f"{file}: entry {number}: its image_id is {value!r}, not a number")
    return int(value)


def _field(entry: Entry, name: str, kind: Any, file: Path, number: int) -> Any:
    if not isinstance(entry.get(name), kind):
        raise DataError(f"{file}: entry {number}: its {name} is missing or of a wrong type")
    return entry[name]
