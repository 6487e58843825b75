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
from typing import Any, Literal, NamedTuple

from dive_fast.data.sources.csv_table import NO_FILE, examine_files
from dive_fast.data.sources.sample_table import Strings, TableBuilder, clean_text, printable
from dive_fast.data.sources.source import Skipped, Source, locate
from dive_fast.errors import DataError
from dive_fast.io.safe_read import below, parse_json, read_json, read_text

VqaText = Literal["question", "question_answer", "answer", "prompt"]
NO_ANSWER = "no answer"
"""Reason for skipping a question without an answer, where the text has one."""
EMPTY_QUESTION = "its question is empty"
"""Reason for skipping a question of white space alone."""
SUFFIXES = (".jpg", ".png", ".jpeg")
ENOUGH = 3
"""Number of people whose equal answer counts completely: soft accuracy is min(#agreeing / 3, 1)."""
MAX_WORDS = 4
"""Words of the longest opening of a question that decides its candidate answers."""
MIN_QUESTIONS = 20
"""Training questions that an opening needs to decide this."""
Entry = Mapping[str, Any]


class Question(NamedTuple):
    """A question about an image."""

    key: str
    file: str
    """Name of the image below the folder of images."""
    question: str
    answer: str
    """The most frequent answer; empty if there is none."""
    counts: Mapping[str, int]
    """The number of people who gave each answer, as :func:`plain_answer` writes it."""


class Questions(NamedTuple):
    """The questions of a file."""

    root: Path
    """Folder of the images."""
    usable: list[Question]
    skipped: list[Skipped]
    sizes: Mapping[str, int]
    """Number of bytes of each image file; empty if images are not read."""


def vqa_prompt(question: str, answer: str) -> str:
    """The text of a question with an answer, which models are trained on and by which answers are ranked."""
    return f"question: {question} answer: {answer}"


def plain_answer(answer: str) -> str:
    """An answer as it is compared with others: in lower case, without outer white space and full stop."""
    return clean_text(answer).lower().rstrip(".").strip()


def open_vqa(path: str, annotations: str | None, image_root: str | None, text: VqaText, *, images: bool) -> Source:
    """Opens the questions of a file as image-text samples, one for each question.

    Args:
        annotations: file of the answers; None: the file next to the questions that VQAv2 would name so, if any.
        image_root: folder of the images; None: the folder of the questions.
        text: the text of a sample: its question, its ``question : answer`` with the most frequent answer, that
            answer, or both as :func:`vqa_prompt`.
        images: whether images are read: a question whose image does not exist is skipped.

    Raises:
        DataError: a file is missing or does not have this form, or the first image does not exist.
    """
    questions = read_questions(path, annotations, image_root, text, images=images)
    words = {
        "question": lambda each: each.question,
        "answer": lambda each: each.answer,
        "question_answer": lambda each: f"{each.question} : {each.answer}",
        "prompt": lambda each: vqa_prompt(each.question, each.answer),
    }[text]
    return source_of(questions, [words(each) for each in questions.usable], shares_texts=text == "answer")


def source_of(questions: Questions, texts: Sequence[str], *, shares_texts: bool = True) -> Source:
    """The samples of questions with a text each."""
    builder = TableBuilder(str(questions.root), shares_texts=shares_texts)
    for question, text in zip(questions.usable, texts, strict=True):
        file = builder.file(os.fsencode(question.file))
        builder.add(question.key, file, questions.sizes.get(question.file, -1), (text,))
    return Source(builder.build(), skipped=questions.skipped)


def read_questions(
    path: str, annotations: str | None, image_root: str | None, text: VqaText = "prompt", *, images: bool
) -> Questions:
    """Reads the questions of a file, and their answers.

    Args:
        annotations, image_root, images: as for :func:`open_vqa`.
        text: a question without what this text needs, question or answer, is skipped.

    Raises:
        DataError: as :func:`open_vqa`.
    """
    file, answers = locate(path), text != "question"
    entries, split = _entries(_read(file), file, ("questions", "data"))
    entry_of = _answers(file, annotations) if answers else {}
    root = Path(image_root) if image_root is not None else file.parent
    name_of = _image_namer(entries[0], split, root, file, must_exist=images)
    usable, skipped, seen = list[Question](), list[Skipped](), set[str]()
    for number, entry in enumerate(entries):
        key = str(entry.get("question_id", number))
        if key in seen:
            raise DataError(f"{file}: duplicate question_id {key}")
        seen.add(key)
        if entry_of and "question_id" not in entry:
            raise DataError(f"{file}: entry {number} has no question_id, by which its answers are joined")
        question = clean_text(_field(entry, "question", str, file, number))
        answered = entry_of.get(key, entry)
        answer = _answer(answered, file, key) if answers else ""
        reason = "" if question or text == "answer" else EMPTY_QUESTION
        reason = NO_ANSWER if answers and not answer else reason
        if reason:
            skipped.append(Skipped(printable(key), reason))
            continue
        counts = _counts(answered, file, key) if answers else {}
        usable.append(Question(printable(key), name_of(entry, number), question, answer, counts))
    sizes: dict[str, int] = {}
    if images:
        names = list(dict.fromkeys(each.file for each in usable))
        examined, _ = examine_files(str(root), Strings.of(map(os.fsencode, names)))
        sizes = dict(zip(names, examined.tolist(), strict=True))
        skipped += [Skipped(each.key, NO_FILE) for each in usable if sizes[each.file] < 0]
        usable = [each for each in usable if sizes[each.file] >= 0]
    if not usable:
        is_unanswered = skipped[0].reason == NO_ANSWER and annotations is None and not entry_of
        hint = f"; there is no {annotations_of(file).name}: name the file of the answers as annotations"
        raise DataError(f"{file}: no question can be used: {skipped[0].reason}{hint if is_unanswered else ''}")
    return Questions(root, usable, skipped, sizes)


class Candidates(NamedTuple):
    """Candidate answers, and for the openings of questions those that are possible."""

    answers: tuple[str, ...]
    """As :func:`plain_answer` writes them."""
    openings: Mapping[str, tuple[int, ...]] = {}
    """The possible ``answers`` of questions that begin with these words, see :func:`openings_of`."""

    def possible(self, question: str) -> tuple[int, ...]:
        """The answers of a question's longest known opening; all if none is known."""
        known = (self.openings[each] for each in openings_of(question) if each in self.openings)
        return next(known, tuple(range(len(self.answers))))


def openings_of(question: str) -> list[str]:
    """The first words of a question in lower case, at most :data:`MAX_WORDS`, the longest first."""
    words = question.lower().rstrip("?").split()[:MAX_WORDS]
    return [" ".join(words[:count]) for count in range(len(words), 0, -1)]


class FrequentAnswers(NamedTuple):
    """The answers that are most often the most frequent one of a question."""

    candidates: Candidates
    """The most frequent first; equally frequent ones are in alphabetical order."""
    num_distinct: int
    """Number of all answers."""
    num_covered: int
    """Number of questions whose most frequent answer is a candidate."""


def frequent_answers(questions: Sequence[Question], count: int) -> FrequentAnswers:
    """The ``count`` most frequent answers of some questions, and those of each of their openings.

    An opening is known if at least :data:`MIN_QUESTIONS` questions with such an answer have it.
    """
    pairs = [(question.question, plain_answer(question.answer)) for question in questions]
    frequencies = Counter(answer for _, answer in pairs if answer)
    ordered = sorted(frequencies, key=lambda answer: (-frequencies[answer], answer))
    row_of = {answer: row for row, answer in enumerate(ordered[:count])}
    rows: dict[str, set[int]] = {}
    num_questions: Counter[str] = Counter()
    for question, answer in pairs:
        if answer in row_of:
            for opening in openings_of(question):
                num_questions[opening] += 1
                rows.setdefault(opening, set()).add(row_of[answer])
    openings = {
        opening: tuple(sorted(rows[opening]))
        for opening in sorted(rows)
        if num_questions[opening] >= MIN_QUESTIONS and len(rows[opening]) > 1
    }
    covered = sum(frequencies[answer] for answer in row_of)
    return FrequentAnswers(Candidates(tuple(row_of), openings), len(ordered), covered)


def read_answers(path: str) -> Candidates:
    """Candidate answers from a JSON file of ``dive-fast answers``, or from a text file with one a line.

    Raises:
        DataError: the file does not exist or is invalid, an answer is empty or listed twice, or there are fewer
            than two.
    """
    try:
        text = read_text(Path(path))
        is_list = text.lstrip()[:1] != "{"
        tree: Any = {"answers": text.splitlines(), "openings": {}} if is_list else parse_json(text)
        listed, openings = tree["answers"], dict(tree["openings"])
        if not all(isinstance(answer, str) for answer in listed):
            raise ValueError("its answers are not text")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; dive-fast answers writes it") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot read answers: {error}") from error
    answers: dict[str, int] = {}
    for number, line in enumerate(listed, 1):
        answer = plain_answer(line)
        if not answer:
            raise DataError(f"{path}: answer {number} is empty")
        if answer in answers:
            raise DataError(f"{path}: answer {number} repeats {answer!r}, answer {answers[answer]}")
        answers[answer] = number
    if len(answers) < 2:
        raise DataError(f"{path}: {len(answers)} answers; ranking needs at least 2")
    for opening, rows in openings.items():
        if (
            not isinstance(rows, list)
            or not rows
            or not all(type(row) is int and 0 <= row < len(answers) for row in rows)
        ):
            raise DataError(f"{path}: the opening {opening!r} has no list of numbers of answers")
    return Candidates(tuple(answers), {opening: tuple(rows) for opening, rows in openings.items()})


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


def _answers(file: Path, annotations: str | None) -> dict[str, Entry]:
    answers_file = locate(annotations) if annotations is not None else annotations_of(file)
    if annotations is None and (answers_file == file or not answers_file.is_file()):
        return {}  # in the entries of the questions, or an error that names this
    entries, _ = _entries(_read(answers_file), answers_file, ("annotations",))
    entry_of: dict[str, Entry] = {}
    for number, entry in enumerate(entries):
        key = str(_field(entry, "question_id", (int, str), answers_file, number))
        if key in entry_of:
            raise DataError(f"{answers_file}: duplicate question_id {key}")
        entry_of[key] = entry
    return entry_of


def _answer(entry: Entry, file: Path, key: str) -> str:
    """The most frequent answer; of equally frequent ones the first."""
    chosen = entry.get("multiple_choice_answer", entry.get("answer"))
    if isinstance(chosen, str):
        return clean_text(chosen)
    counts = Counter(clean_text(each) for each in _listed(entry, file, key))
    return counts.most_common(1)[0][0] if counts else ""


def _counts(entry: Entry, file: Path, key: str) -> Mapping[str, int]:
    """The number of people who gave each answer; an answer that no list confirms counts completely."""
    counts = Counter(plain_answer(each) for each in _listed(entry, file, key))
    return counts or {plain_answer(_answer(entry, file, key)): ENOUGH}


def _listed(entry: Entry, file: Path, key: str) -> list[str]:
    answers = entry.get("answers", [])
    if not isinstance(answers, list):
        raise DataError(f"{file}: question {key}: its answers are not a list")
    texts = [each.get("answer") if isinstance(each, dict) else each for each in answers]
    return [each for each in texts if isinstance(each, str) and clean_text(each)]


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
            "of the images"
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
