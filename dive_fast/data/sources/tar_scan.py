"""Reads the samples of one webdataset tar, without the contents of its images."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dive_fast.data.decode import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from dive_fast.data.sources.file_rules import HIDDEN, is_hidden, reason_to_skip
from dive_fast.data.sources.sample_table import SampleTable, Strings, clean_text, pack_texts, printable
from dive_fast.data.sources.source import EMPTY_CAPTION, Skipped
from dive_fast.data.sources.tar_index import Member, PlainMembers, read_members, read_plain_members
from dive_fast.errors import DataError

DUPLICATE = "duplicate name"
"""Reason for skipping a sample whose name an earlier sample of the tar has."""
DOTTED = "a dot before the suffix: webdataset ends the name of a sample at its first dot"
"""Reason for skipping a sample whose name contains a dot."""
MAX_TEXT_BYTES = 2**20
"""Maximum size of a caption or label, which is read into memory."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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
    try:
        with _opened(tar) as descriptor:
            members = read_plain_members(descriptor, text, MAX_TEXT_BYTES)
            scan = None if members is None else _scan_plain(tar, members, text, strict)
    except OSError:
        scan = None  # the other function says what is wrong
    return scan or scan_carefully(tar, text, strict)


def scan_carefully(tar: Path, text: str, strict: bool) -> TarScan:
    """As :func:`scan_tar`, for any tar, by Python's ``tarfile``."""
    skipped, ignored = list[Skipped](), list[Skipped]()
    members = read_members(tar)
    if members.error is not None:
        if strict:
            raise DataError(f"{tar}: not a complete tar: {members.error}")
        reason = "a compressed tar" if "compressed" in members.error else "the tar is incomplete"
        skipped.append(Skipped(printable(tar.name), reason))
    complete = _complete_samples(printable(tar.name), members.files, text, skipped, ignored)
    columns = _Columns(tar, text, strict, skipped)
    try:
        with _opened(tar) as descriptor:
            for key, (image, value) in complete.items():
                content = os.pread(descriptor, min(value.size, MAX_TEXT_BYTES + 1), value.offset)
                columns.add(key, image.offset, image.size, content)
    except OSError as error:
        raise DataError(f"{tar}: cannot read it: {error}") from error
    return TarScan(columns.table(), skipped, ignored)


@contextmanager
def _opened(tar: Path) -> Iterator[int]:
    descriptor = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class _Columns:
    """The columns of the samples of a tar."""

    def __init__(self, tar: Path, text: str, strict: bool, skipped: list[Skipped]) -> None:
        """Begins empty columns.

        Args:
            skipped: samples of unusable texts are appended.
        """
        self._tar, self._text, self._strict, self._skipped = tar, text, strict, skipped
        self._prefix, self._is_label = f"{printable(tar.name)}/", text == ".cls"
        self._keys, self._texts = list[bytes](), list[bytes]()
        self._offsets, self._sizes, self._labels = list[int](), list[int](), list[int]()
        self._label_of: dict[bytes, int] = {}

    def add(self, key: str, offset: int, size: int, content: bytes) -> None:
        """Adds a sample unless its text is unusable.

        Args:
            offset: position of its image; ``size``: number of its bytes.
            content: its label or caption as stored.

        Raises:
            DataError: a label is invalid, and the tar is opened strictly.
        """
        if self._is_label:
            label = self._label_of.get(content)
            if label is None:
                try:
                    label = self._label_of[content] = _label(_decode(content))
                except ValueError as error:
                    if self._strict:
                        raise DataError(f"{self._tar}: {key}{self._text}: {error}") from error
                    self._skip(key, "its label is not a non-negative integer")
                    return
            self._labels.append(label)
        else:
            try:
                caption = clean_text(_decode(content))
            except UnicodeDecodeError:
                self._skip(key, "its caption is not UTF-8")
                return
            except ValueError as error:
                self._skip(key, f"its caption is {error}")
                return
            if not caption:
                self._skip(key, EMPTY_CAPTION)
                return
            self._texts.append(pack_texts((caption,)))
        self._keys.append(f"{self._prefix}{key}".encode())
        self._offsets.append(offset)
        self._sizes.append(size)

    def table(self) -> SampleTable:
        """The table of the samples so far."""
        return SampleTable(
            "",
            Strings.of([os.fsencode(self._tar)]),
            Strings.of(self._keys),
            np.zeros(len(self._keys), np.int32),
            np.array(self._offsets, np.int64),
            np.array(self._sizes, np.int64),
            np.array(self._labels, np.int64) if self._is_label else None,
            Strings.of(self._texts),
            None,
        )

    def _skip(self, key: str, reason: str) -> None:
        self._skipped.append(Skipped(f"{self._prefix}{key}", reason))


def _decode(content: bytes) -> str:
    """The text of a file.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        ValueError: it is too long; completes "the text is".
    """
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError("longer than 1 MiB")
    return content.removeprefix(_BYTE_ORDER_MARK).decode().strip()


# Plain tars


class _Group:
    """Files of one key."""

    __slots__ = ("image", "is_unusual", "text")

    def __init__(self) -> None:
        self.image = self.text = -1
        """Rows of the image and of the text; -1: none so far."""
        self.is_unusual = False
        """Whether anything but one image, one text and files of other plain suffixes belongs to it."""


def _scan_plain(tar: Path, members: PlainMembers, text: str, strict: bool) -> TarScan | None:
    """The result of :func:`scan_carefully` for the members of a plain tar; None if it may be another one."""
    skipped, ignored = list[Skipped](), list[Skipped]()
    names, offsets, sizes, contents = members
    groups, unusual = _group(names, text)
    others: Mapping[str, tuple[Member, Member]] = {}
    if unusual:
        files = [Member(names[row], offsets[row], sizes[row]) for row in unusual]
        others = _complete_samples(printable(tar.name), files, text, skipped, ignored)
    row_of = {offsets[row]: row for row in unusual}
    columns = _Columns(tar, text, strict, skipped)
    for key, group in groups.items():
        if not group.is_unusual:
            image, value = group.image, group.text
        elif key in others:
            image, value = (row_of[member.offset] for member in others[key])
        else:
            continue
        if (content := contents.get(value)) is None:
            return None
        columns.add(key, offsets[image], sizes[image], content)
    return TarScan(columns.table(), skipped, ignored)


def _group(names: Sequence[str], text: str) -> tuple[dict[str, _Group], list[int]]:
    """Groups of files by key, in order, and the rows of all files that :func:`_complete_samples` judges.

    These are hidden files, and the files of unusual groups.
    """
    groups: dict[str, _Group] = {}
    group_of: list[_Group] = []
    hidden = _Group()
    hidden.is_unusual = True
    # Suffixes that no hidden file has, unless it has nothing else.
    frequent = {suffix[1:]: suffix for suffix in (*IMAGE_SUFFIXES, ".txt", ".cls", ".json")}
    hidden_folders: dict[str, bool] = {}
    prefix, group = "", hidden
    for row, name in enumerate(names):
        suffix = frequent.get(name[len(prefix) :]) if prefix and name.startswith(prefix) else None
        if suffix is None:
            folder, slash, base = name.rpartition("/")
            stem, _, last = base.partition(".")
            if folder not in hidden_folders:
                hidden_folders[folder] = _is_in_hidden_folder(folder)
            if hidden_folders[folder] or is_hidden(base):
                group_of.append(hidden)
                continue
            suffix, prefix = f".{last.lower()}", f"{folder}{slash}{stem}."
            key = printable(f"{folder}/{stem}".lstrip("/"))
            group = groups.get(key) or groups.setdefault(key, _Group())
        if suffix in IMAGE_SUFFIXES:
            group.is_unusual |= group.image >= 0
            group.image = row
        elif suffix == text:
            group.is_unusual |= group.text >= 0
            group.text = row
        elif not suffix.isascii() or "." in suffix[1:] or suffix == "." or suffix in OTHER_IMAGE_SUFFIXES:
            group.is_unusual = True
        group_of.append(group)
    for group in groups.values():
        group.is_unusual |= group.image < 0 or group.text < 0
    return groups, [row for row, group in enumerate(group_of) if group.is_unusual]


def _is_in_hidden_folder(folder: str) -> bool:
    return any(is_hidden(part) for part in folder.split("/") if part not in (".", ".."))


# Any tar


def _complete_samples(
    tar: str, files: Sequence[Member], text: str, skipped: list[Skipped], ignored: list[Skipped]
) -> dict[str, tuple[Member, Member]]:
    """Maps the name of each complete sample to its image and text; counts every other sample once."""
    samples: dict[str, dict[str, Member]] = {}
    duplicates: dict[str, Counter[str]] = {}
    for file in files:
        folder, _, name = file.name.rpartition("/")
        in_hidden = _is_in_hidden_folder(folder)
        if (reason := HIDDEN if in_hidden else reason_to_skip(name)) is not None and "suffix" not in reason:
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
