"""Reads the samples of one webdataset tar, without the contents of its images."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dive_fast.data.decode import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from dive_fast.data.sources.file_rules import HIDDEN, is_hidden, reason_to_skip
from dive_fast.data.sources.sample_table import Sample, SampleTable, TableBuilder, printable
from dive_fast.data.sources.source import EMPTY_CAPTION, Skipped
from dive_fast.data.sources.tar_index import Member, read_members
from dive_fast.errors import DataError

DUPLICATE = "duplicate name"
"""Reason for skipping a sample whose name an earlier sample of the tar has."""
DOTTED = "a dot before the suffix: webdataset ends the name of a sample at its first dot"
"""Reason for skipping a sample whose name contains a dot."""


class TarScan(NamedTuple):
    """The samples of a tar, with everything that was left out."""

    table: SampleTable
    """The complete samples in the order of the tar; its one file is the tar."""
    skipped: list[Skipped]
    """Samples that were left out."""
    ignored: list[Skipped]
    """Files that are not samples."""


def scan_tar(tar: Path, text: str, strict: bool) -> TarScan:
    """Reads the samples of a tar: keys, labels or captions, and positions of the images.

    Args:
        text: suffix of the file that a sample needs besides its image: ``.cls`` (label) or ``.txt`` (caption).
        strict: whether an incomplete tar or an invalid label is an error; otherwise it is skipped.

    Raises:
        DataError: the tar cannot be read, or is an error by ``strict``.
    """
    return scan_carefully(tar, text, strict)


def scan_carefully(tar: Path, text: str, strict: bool) -> TarScan:
    """As :func:`scan_tar`, for any tar, by Python's ``tarfile``."""
    table, skipped, ignored = TableBuilder(shares_texts=False), list[Skipped](), list[Skipped]()
    members = read_members(tar)
    if members.error is not None:
        if strict:
            raise DataError(f"{tar}: not a complete tar: {members.error}")
        reason = "a compressed tar" if "compressed" in members.error else "the tar is incomplete"
        skipped.append(Skipped(printable(tar.name), reason))
    file = table.file(os.fsencode(tar))
    try:
        for sample in _tar_samples(tar, members.files, text, strict, skipped, ignored):
            where = {"offset": sample.offset, "label": sample.label}
            table.add(sample.key, file, sample.size, sample.texts, **where)
    except OSError as error:
        raise DataError(f"{tar}: cannot read it: {error}") from error
    return TarScan(table.build(), skipped, ignored)


def _tar_samples(
    tar: Path, files: Sequence[Member], text: str, strict: bool, skipped: list[Skipped], ignored: list[Skipped]
) -> Iterator[Sample]:
    name = printable(tar.name)
    complete = _complete_samples(name, files, text, skipped, ignored)
    if not complete:
        return
    with tar.open("rb") as file:
        for key, (image, text_member) in complete.items():
            file.seek(text_member.offset)
            try:
                value = file.read(text_member.size).decode("utf-8-sig").strip()
                label, texts = (_label(value), ()) if text == ".cls" else (-1, (value,))
            except ValueError as error:
                if strict and text == ".cls":
                    raise DataError(f"{tar}: {key}{text}: {error}") from error
                is_label = text == ".cls"
                reason = "its label is not a non-negative integer" if is_label else "its caption is not UTF-8"
                skipped.append(Skipped(f"{name}/{key}", reason))
                continue
            if texts == ("",):
                skipped.append(Skipped(f"{name}/{key}", EMPTY_CAPTION))
                continue
            yield Sample(f"{name}/{key}", tar, image.offset, image.size, label, texts)


def _complete_samples(
    tar: str, files: Sequence[Member], text: str, skipped: list[Skipped], ignored: list[Skipped]
) -> dict[str, tuple[Member, Member]]:
    """Maps the name of each complete sample to its image and text; counts every other sample once."""
    samples: dict[str, dict[str, Member]] = {}
    duplicates: dict[str, Counter[str]] = {}
    for file in files:
        folder, _, name = file.name.rpartition("/")
        hidden = any(is_hidden(part) for part in folder.split("/") if part not in (".", ".."))
        if (reason := HIDDEN if hidden else reason_to_skip(name)) is not None and "suffix" not in reason:
            (ignored if reason == HIDDEN else skipped).append(Skipped(printable(f"{tar}/{file.name}"), reason))
            continue
        stem, _, suffix = name.partition(".")
        key, suffix = printable(f"{folder}/{stem}".lstrip("/")), printable(f".{suffix.lower()}")
        parts = samples.setdefault(key, {})
        if suffix not in parts:
            parts[suffix] = file
        elif suffix in IMAGE_SUFFIXES or suffix == text:
            duplicates.setdefault(key, Counter())[suffix] += 1
    for key, counts in duplicates.items():
        skipped += [Skipped(f"{tar}/{key}", DUPLICATE)] * max(counts.values())
    complete: dict[str, tuple[Member, Member]] = {}
    for key, parts in samples.items():
        images = [suffix for suffix in parts if suffix in IMAGE_SUFFIXES]
        ignored += [Skipped(f"{tar}/{key}{suffix}", "a second image of its sample") for suffix in images[1:]]
        dotted: dict[str, set[str]] = {}
        for suffix in parts:
            before, _, last = suffix.rpartition(".")
            if before:
                dotted.setdefault(key + before, set()).add(f".{last}")
        # Names up to the last dot that were meant as samples.
        dotted_samples = {name for name, ends in dotted.items() if text in ends and ends & IMAGE_SUFFIXES}
        reason = _incomplete_reason(parts, images, text)
        if reason is None:
            complete[key] = parts[images[0]], parts[text]
        elif not images and text not in parts:
            # No file has a plain suffix: all of them belong to names with dots.
            dotted_samples |= {name for name, ends in dotted.items() if text in ends or ends & IMAGE_SUFFIXES}
            other = next((suffix for suffix in parts if suffix in OTHER_IMAGE_SUFFIXES), None)
            if other is not None:
                skipped.append(Skipped(f"{tar}/{key}", f"images of suffix {other} are not read"))
            elif not dotted_samples:
                ignored.append(Skipped(f"{tar}/{key}", "not a file of a sample"))
        elif not dotted_samples:
            has_dotted_part = any(ends & IMAGE_SUFFIXES or text in ends for ends in dotted.values())
            skipped.append(Skipped(f"{tar}/{key}", f"{reason}; {DOTTED}" if has_dotted_part else reason))
        else:
            skipped.append(Skipped(f"{tar}/{key}", reason))
        skipped += [Skipped(f"{tar}/{name}", DOTTED) for name in sorted(dotted_samples)]
    return complete


def _incomplete_reason(parts: Mapping[str, Member], images: Sequence[str], text: str) -> str | None:
    """Why files of one name do not form a sample; None if they do."""
    if not images:
        other = next((suffix for suffix in parts if suffix in OTHER_IMAGE_SUFFIXES), None)
        return "no image" if other is None else f"images of suffix {other} are not read"
    if text not in parts:
        return f"no {text}"
    if min(parts[images[0]].offset, parts[text].offset) < 0:
        return "a link or a sparse file: the tar does not hold its bytes"
    return None


def _label(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):  # int() also accepts 1_000 and digits of other scripts
        raise ValueError(f"{text[:40]!r} is not an integer")
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{text[:40]} is not a label: it exceeds 64 bits")
    if int(text) < 0:
        raise ValueError(f"{text} is not a label: classes are counted from 0")
    return int(text)
