"""A summary of new configs for the user: what the data is, what was chosen, and the next command."""

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from dive_fast.data.sources.source import Skipped
from dive_fast.quickstart.choose_method import SOURCES
from dive_fast.quickstart.choose_settings import ENOUGH_PAIRS
from dive_fast.quickstart.compose_config import Choices
from dive_fast.quickstart.inspect_data import FORMATS, Images, LabelledSet, imbalance, probe
from dive_fast.quickstart.inspect_reference import Reference

MAX_SHOWN, MAX_REMARKS = 5, 3
"""Changed class names, and remarks of a kind, that are shown."""
MAX_CHARACTERS = 160
"""Characters of a remark that are shown."""
LARGE_RATIO = 10
"""Images of the largest class for each of the smallest one above which classes are unbalanced."""
LARGE_SIDE = 1000
"""Shorter side in pixels above which decoding takes most of the time of a step."""


def summary(choices: Choices, path: Path) -> Iterator[str]:
    """The lines of the summary, fewer than 30.

    Args:
        path: the config that was written.
    """
    files = [path, *(choices.class_files.texts if choices.class_files is not None else ())]
    sections = {
        "target": _target(choices),
        "classes": _names(choices),
        "measure": _evaluation(choices),
        "keep": _reference(choices.reference),
        "train": _choices(choices),
        "wrote": [", ".join(map(str, files))],
        "next": [f"dive-fast train --config {shlex.quote(str(path))}"],
    }
    for title, lines in sections.items():
        for number, line in enumerate(lines):
            yield f"{'' if number else title:8} {line}"


def _target(choices: Choices) -> Iterator[str]:
    train = choices.target.train
    images = probe(train.source)
    yield f"{_count(train)}{_typical(images)}"
    if train.has_classes:
        yield from _classes(train)
    for key, reason, count in _reasons([*train.source.skipped, *train.source.ignored]):
        yield f"left out: {count:,}, {reason}; the first: {key}"
    if images.broken:
        checked = f"{len(images.broken)} of {images.checked} images that were tried"
        yield f"cannot be decoded: {checked}; {_short(images.broken[0])}"
    if images.size is not None and min(images.size) > LARGE_SIDE:
        yield f"large photos slow the training down: {_prepare(train)} makes them small once"
    for remark in choices.target.remarks[:MAX_REMARKS]:
        yield f"note: {_short(remark)}"


def _count(data: LabelledSet) -> str:
    count = f"{len(data.source):,} images"
    if data.has_classes:
        count += f" in {len(data.class_sizes()):,} classes"
    return f"{_short(data.path)}: {FORMATS[data.format]}, {count}"


def _typical(images: Images) -> str:
    return "" if images.size is None else f", typically {images.size[0]} x {images.size[1]} pixels"


def _classes(data: LabelledSet) -> Iterator[str]:
    sizes, names = data.class_sizes(), data.source.class_names
    used = [label for label, size in enumerate(sizes) if size]
    smallest, largest = min(used, key=sizes.__getitem__), max(used, key=sizes.__getitem__)

    def described(label: int) -> str:
        return f"{_short(names[label]) if names else f'label {label}'} ({sizes[label]:,})"

    if sizes[smallest] == sizes[largest]:
        yield f"{sizes[smallest]:,} images in each class"
        return
    ratio = imbalance(sizes)
    unbalanced = "; data.target.balance = class draws all alike" if ratio >= LARGE_RATIO else ""
    times = f"{ratio:.1f} times as many{unbalanced}"
    yield f"smallest class {described(smallest)}, largest {described(largest)}, {times}"


def _reasons(entries: Sequence[Skipped]) -> list[tuple[str, str, int]]:
    """The first key, reason and count of the most frequent reasons."""
    first: dict[str, str] = {}
    for key, reason in entries:
        first.setdefault(reason, key)
    counts = Counter(reason for _, reason in entries).most_common(MAX_REMARKS)
    return [(_short(first[reason]), reason, count) for reason, count in counts]


def _prepare(data: LabelledSet) -> str:
    return f"dive-fast prepare --format {data.format} --input {shlex.quote(data.path)} --output FOLDER"


def _names(choices: Choices) -> Iterator[str]:
    files = choices.class_files
    if files is None:
        yield "none: the titles of the csv are the prompts"
        return
    folders = choices.target.train.source.class_names
    changes = files.names.changes(folders) if folders else []
    state = f"{len(changes)} changed for prompts" if changes else "as they are"
    yield f"{files.path_of['train']}, {state}; prompt: {choices.template}"
    for folder, name in changes[:MAX_SHOWN]:
        yield f"{_short(folder)!r} -> {_short(name)!r}"
    for remark in files.names.remarks:
        yield f"note: {remark}"


def _evaluation(choices: Choices) -> Iterator[str]:
    target = choices.target
    total = len(target.train.source)
    if choices.holdout is not None:
        held_out = total - choices.num_train
        yield (
            f"{held_out:,} of {total:,} images ({choices.holdout:.1%} of each class, at least 1) are held out, "
            f"{choices.num_train:,} train; no file is moved"
        )
        single = sum(size == 1 for size in target.train.class_sizes())
        if single:
            yield f"{single} classes have a single image, which trains: they are not measured"
    for name, data in (("val", target.val), ("test", target.test)):
        if data is not None:
            use = "chooses the weights" if name == "val" else "is measured at the end"
            yield f"{_count(data)}; {use}"
    if choices.holdout is None and target.val is None:
        reason = "a csv has no classes" if choices.class_files is None else "no class has two images"
        yield f"nothing to choose weights by: {reason}; see evaluate in the config"


def _reference(reference: Reference | None) -> Iterator[str]:
    if reference is None:
        yield "no --reference: captioned images that keep the model from forgetting other tasks"
        yield SOURCES
        return
    about = "about " if reference.is_estimate else ""
    example = _short(reference.source.samples[0].texts[0])
    yield f"{reference.path}: {about}{reference.pairs:,} pairs, e.g. {example!r}"
    if reference.pairs < ENOUGH_PAIRS:
        yield f"few: {ENOUGH_PAIRS:,} kept as much as 25,000 in docs/study.md; broader sets keep more"


def _choices(choices: Choices) -> Iterator[str]:
    model, settings = choices.model, choices.settings
    weights = "" if model.pretrained is None else f", weights {model.pretrained}"
    yield f"model {model.name}{weights}"
    reason = "" if choices.reference is not None else " (needs no reference set; docs/methods.md has others)"
    yield f"method {choices.method}{reason}"
    batch = f"batch {settings.batch_size}"
    if settings.reference_batch_size is not None:
        batch += f" + {settings.reference_batch_size}"
    yield (
        f"{batch}, {settings.epochs} epochs = {settings.total_steps:,} steps, warm-up {settings.warmup_steps}, "
        f"learning rate {settings.learning_rate:g}, {choices.precision}"
    )


def _short(text: str) -> str:
    """One line of printable characters."""
    line = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return line if len(line) <= MAX_CHARACTERS else f"{line[: MAX_CHARACTERS - 3]}..."
