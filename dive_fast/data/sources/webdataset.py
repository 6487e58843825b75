"""Reads webdataset tars of images with captions or labels."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import braceexpand

from dive_fast.data.decode import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from dive_fast.data.sources.file_rules import HIDDEN, is_hidden, reason_to_skip, refuse_duplicates
from dive_fast.data.sources.node_index import Listing, RawSet, open_raw
from dive_fast.data.sources.sample_table import Sample, TableBuilder, printable
from dive_fast.data.sources.source import (
    EMPTY_CAPTION,
    Skipped,
    Source,
    locate,
    summarize_skipped,
)
from dive_fast.data.sources.tar_index import Member, read_members
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError
from dive_fast.identity import Identity

DUPLICATE = "duplicate name"
"""Reason for skipping a sample whose name an earlier sample of the tar has."""
DOTTED = "a dot before the suffix: webdataset ends the name of a sample at its first dot"
"""Reason for skipping a sample whose name contains a dot."""
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")


def open_webdataset(path: str, text: str, *, strict: bool = True, ranks: Ranks | None = None) -> Source:
    """Opens webdataset tars, in which files whose names differ only in their suffix form a sample.

    Samples without an image or a text, with an empty text or one that is not UTF-8, or with a duplicate name are
    skipped.

    Args:
        path: a tar, a brace range, a glob, or a folder of tars.
        text: suffix of the file that a sample needs besides its image: ``.cls`` (label) or ``.txt`` (caption).
        strict: whether a broken tar or label is an error; otherwise incomplete samples are skipped.
        ranks: see :func:`open_raw`.

    Raises:
        DataError: there is no tar, a tar is broken, or no sample is complete.
    """
    return open_raw(Tars(path, text, strict), ranks)


class Tars(RawSet):
    """The tars of a set."""

    def __init__(self, path: str, text: str, strict: bool) -> None:
        """Takes the arguments of :func:`open_webdataset`."""
        self.path, self._text, self._strict = path, text, strict
        self._tars: list[Path] = []
        self._skipped: list[Skipped] = []
        self._ignored: list[Skipped] = []

    def identity(self) -> Identity:
        return {"format": "webdataset", "text": self._text, "strict": self._strict}

    def list_files(self) -> Listing:
        self._tars = list_tars(self.path, self._skipped, self._ignored)
        self.root = os.path.commonpath([tar.parent for tar in self._tars])
        return Listing.of(self.root, self._tars)

    def read(self, listing: Listing) -> tuple[Source, Sequence[str]]:
        table = TableBuilder(self.root, shares_texts=False)
        skipped, ignored = list(self._skipped), list(self._ignored)
        for tar, name in zip(self._tars, listing.names, strict=True):
            members = read_members(tar)
            if members.error is not None:
                if self._strict:
                    raise DataError(f"{tar}: not a complete tar: {members.error}")
                is_compressed = "compressed" in members.error
                reason = "a compressed tar" if is_compressed else "the tar is incomplete"
                skipped.append(Skipped(printable(tar.name), reason))
            file = table.file(name)
            try:
                for sample in _tar_samples(tar, members.files, self._text, self._strict, skipped, ignored):
                    where = {"offset": sample.offset, "label": sample.label}
                    table.add(sample.key, file, sample.size, sample.texts, **where)
            except OSError as error:
                raise DataError(f"{tar}: cannot read it: {error}") from error
        if not len(table):
            reasons = f" ({summarize_skipped(skipped)})" if skipped else ""
            raise DataError(f"{self.path}: no sample has both an image and a {self._text} file{reasons}")
        return Source(table.build(), skipped=skipped, ignored=ignored), ()


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


def list_tars(path: str, skipped: list[Skipped], ignored: list[Skipped]) -> list[Path]:
    """The tars that a path names: a tar, a brace range, a glob, or a folder of tars.

    Raises:
        DataError: there is no tar, or one of them does not exist.
    """
    root = locate(path)
    if root.is_dir():
        return _tars_in(root, path, skipped, ignored)
    try:
        names = list(braceexpand.braceexpand(path))
    except ValueError as error:
        raise DataError(f"{path}: not a brace range: {error}") from error
    tars = [Path(match) for name in names for match in (sorted(glob.glob(name, recursive=True)) or [name])]
    for tar in tars:
        if not tar.is_file():
            raise DataError(f"{path}: no such tar ({tar} does not exist)")
    refuse_duplicates(tars, path)
    return tars


def _tars_in(root: Path, path: str, skipped: list[Skipped], ignored: list[Skipped]) -> list[Path]:
    tars: list[Path] = []
    compressed: list[str] = []
    try:
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            name = entry.name.lower()
            if entry.is_dir():
                if not is_hidden(entry.name) and any(file.endswith(".tar") for file in os.listdir(entry.path)):
                    ignored.append(Skipped(printable(entry.name), "a folder of tars next to the tars"))
            elif name.endswith(".tar"):
                if is_hidden(entry.name):
                    ignored.append(Skipped(printable(entry.name), HIDDEN))
                elif not entry.is_file():  # reading a pipe could block forever
                    raise DataError(f"{entry.path}: named like a tar, but not a regular file; remove or rename it")
                else:
                    tars.append(root / entry.name)
            elif name.endswith(COMPRESSED_SUFFIXES):
                compressed.append(printable(entry.name))
    except OSError as error:
        raise DataError(f"{path}: cannot list its tars: {error}") from error
    if not tars:
        hint = f"; {compressed[0]} is compressed: unpack it to a plain .tar" if compressed else ""
        hint = hint or (f"; they may be in {ignored[0].key}" if ignored else "")
        raise DataError(f"{path}: no tar in this folder{hint}")
    refuse_duplicates(tars, path)
    skipped += [Skipped(name, "a compressed tar; unpack it to a plain .tar") for name in compressed]
    return tars
