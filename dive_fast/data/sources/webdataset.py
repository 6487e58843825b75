"""Opens webdataset tars: images with captions or labels."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import braceexpand

from dive_fast.data.decode import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from dive_fast.data.sources.source import EMPTY_CAPTION, HIDDEN, Sample, Skipped, Source, locate, readable, some
from dive_fast.data.sources.source import is_hidden as is_hidden
from dive_fast.data.sources.source import reason_to_skip as reason_to_skip
from dive_fast.data.sources.source import refuse_duplicates as refuse_duplicates
from dive_fast.data.sources.tar_index import Member, read_members
from dive_fast.errors import DataError

TAKEN = "its name is taken"

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")

DOTTED = "a dot before the suffix: webdataset ends the name of a sample at its first dot"


def open_webdataset(path: str, text: str, *, strict: bool = True) -> Source:
    """Webdataset tars: files of one name but for the suffix are one sample.

    Samples without an image or a text, whose text is empty or not UTF-8, or whose name is taken, are skipped.

    Args:
        path: a tar, a brace range, a glob, or a folder of tars.
        text: the suffix that a sample needs beside its image, ``.cls`` (its label) or ``.txt`` (its caption).
        strict: whether a broken tar or label is an error; else what is whole is taken and the rest skipped.

    Raises:
        DataError: no tar there, one that is broken, or none with a whole sample.
    """
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    ignored: list[Skipped] = []
    for tar in _tars(path, skipped, ignored):
        members = read_members(tar)
        if members.broken is not None:
            if strict:
                raise DataError(f"{tar}: not a whole tar: {members.broken}")
            is_compressed = "compressed" in members.broken
            reason = "a compressed tar" if is_compressed else "the tar is not whole"
            skipped.append(Skipped(readable(tar.name), reason))
        try:
            samples += _tar_samples(tar, members.files, text, strict, skipped, ignored)
        except OSError as error:
            raise DataError(f"{tar}: cannot read it: {error}") from error
    if not samples:
        lost = f" ({some(skipped)})" if skipped else ""
        raise DataError(f"{path}: no sample has both an image and a {text} file{lost}")
    return Source(samples, skipped=skipped, ignored=ignored)


def _tar_samples(
    tar: Path, files: Sequence[Member], text: str, strict: bool, skipped: list[Skipped], ignored: list[Skipped]
) -> Iterator[Sample]:
    found = _grouped(readable(tar.name), files, text, skipped, ignored)
    if not found:
        return
    with tar.open("rb") as file:
        for key, (image, about) in found.items():
            file.seek(about.offset)
            try:
                words = file.read(about.size).decode("utf-8-sig").strip()
                label, texts = (_label(words), ()) if text == ".cls" else (-1, (words,))
            except ValueError as error:
                if strict and text == ".cls":
                    raise DataError(f"{tar}: {key}{text}: {error}") from error
                reason = (
                    "its label is not a whole number from 0 on" if text == ".cls" else "its caption is not UTF-8"
                )
                skipped.append(Skipped(f"{readable(tar.name)}/{key}", reason))
                continue
            if texts == ("",):
                skipped.append(Skipped(f"{readable(tar.name)}/{key}", EMPTY_CAPTION))
                continue
            yield Sample(f"{readable(tar.name)}/{key}", tar, image.offset, image.size, label, texts)


def _grouped(
    tar: str, files: Sequence[Member], text: str, skipped: list[Skipped], ignored: list[Skipped]
) -> dict[str, tuple[Member, Member]]:
    """Image and text of each whole sample by its name; of the others, each is counted once."""
    samples: dict[str, dict[str, Member]] = {}
    taken: dict[str, Counter[str]] = {}
    for file in files:
        folder, _, name = file.name.rpartition("/")
        hidden = any(is_hidden(part) for part in folder.split("/") if part not in (".", ".."))
        if (reason := HIDDEN if hidden else reason_to_skip(name)) is not None and "suffix" not in reason:
            (ignored if reason == HIDDEN else skipped).append(Skipped(readable(f"{tar}/{file.name}"), reason))
            continue
        stem, _, suffix = name.partition(".")
        key, suffix = readable(f"{folder}/{stem}".lstrip("/")), readable(f".{suffix.lower()}")
        parts = samples.setdefault(key, {})
        if suffix not in parts:
            parts[suffix] = file
        elif suffix in IMAGE_SUFFIXES or suffix == text:
            taken.setdefault(key, Counter())[suffix] += 1
    for key, counts in taken.items():
        skipped += [Skipped(f"{tar}/{key}", TAKEN)] * max(counts.values())
    whole: dict[str, tuple[Member, Member]] = {}
    for key, parts in samples.items():
        images = [suffix for suffix in parts if suffix in IMAGE_SUFFIXES]
        ignored += [Skipped(f"{tar}/{key}{suffix}", "a second image of its sample") for suffix in images[1:]]
        dotted: dict[str, set[str]] = {}
        for suffix in parts:
            before, _, last = suffix.rpartition(".")
            if before:
                dotted.setdefault(key + before, set()).add(f".{last}")
        of_samples = {name for name, own in dotted.items() if text in own and own & IMAGE_SUFFIXES}
        reason = _why_not_whole(parts, images, text)
        if reason is None:
            whole[key] = parts[images[0]], parts[text]
        elif not images and text not in parts:
            # Nothing of the sample has a plain suffix: the dots have made it of other ones.
            of_samples |= {name for name, own in dotted.items() if text in own or own & IMAGE_SUFFIXES}
            other = next((suffix for suffix in parts if suffix in OTHER_IMAGE_SUFFIXES), None)
            if other is not None:
                skipped.append(Skipped(f"{tar}/{key}", f"images of suffix {other} are not read"))
            elif not of_samples:
                ignored.append(Skipped(f"{tar}/{key}", "no file of a sample"))
        elif not of_samples:
            loose = any(own & IMAGE_SUFFIXES or text in own for own in dotted.values())
            skipped.append(Skipped(f"{tar}/{key}", f"{reason}; {DOTTED}" if loose else reason))
        else:
            skipped.append(Skipped(f"{tar}/{key}", reason))
        skipped += [Skipped(f"{tar}/{name}", DOTTED) for name in sorted(of_samples)]
    return whole


def _why_not_whole(parts: Mapping[str, Member], images: Sequence[str], text: str) -> str | None:
    if not images:
        other = next((suffix for suffix in parts if suffix in OTHER_IMAGE_SUFFIXES), None)
        return "no image" if other is None else f"images of suffix {other} are not read"
    if text not in parts:
        return f"no {text}"
    if min(parts[images[0]].offset, parts[text].offset) < 0:
        return "a link, or in pieces: the tar does not hold its bytes"
    return None


def _label(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):  # int() takes 1_000, and digits of any script
        raise ValueError(f"{text[:40]!r} is no integer")
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{text[:40]} is no label: it has more than 64 bits")
    if int(text) < 0:
        raise ValueError(f"{text} is no label: classes are counted from 0")
    return int(text)


def _tars(path: str, skipped: list[Skipped], ignored: list[Skipped]) -> list[Path]:
    root = locate(path)
    if root.is_dir():
        return _tars_in(root, path, skipped, ignored)
    try:
        names = list(braceexpand.braceexpand(path))
    except ValueError as error:
        raise DataError(f"{path}: not a brace range: {error}") from error
    tars = [Path(found) for name in names for found in (sorted(glob.glob(name, recursive=True)) or [name])]
    for tar in tars:
        if not tar.is_file():
            raise DataError(f"{path}: no tar there ({tar} does not exist)")
    refuse_duplicates(tars, path)
    return tars


def _tars_in(root: Path, path: str, skipped: list[Skipped], ignored: list[Skipped]) -> list[Path]:
    tars: list[Path] = []
    compressed: list[str] = []
    try:
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            name = entry.name.lower()
            if entry.is_dir():
                if not is_hidden(entry.name) and any(below.endswith(".tar") for below in os.listdir(entry.path)):
                    ignored.append(Skipped(readable(entry.name), "a folder of tars beside the tars"))
            elif name.endswith(".tar"):
                if is_hidden(entry.name):
                    ignored.append(Skipped(readable(entry.name), HIDDEN))
                elif not entry.is_file():  # a pipe would be waited for, for ever
                    raise DataError(f"{entry.path}: called like a tar, but no regular file; remove or rename it")
                else:
                    tars.append(root / entry.name)
            elif name.endswith(COMPRESSED):
                compressed.append(readable(entry.name))
    except OSError as error:
        raise DataError(f"{path}: cannot list its tars: {error}") from error
    if not tars:
        hint = f"; {compressed[0]} is compressed: unpack it to a plain .tar" if compressed else ""
        hint = hint or (f"; they may lie in {ignored[0].key}" if ignored else "")
        raise DataError(f"{path}: no tar there{hint}")
    refuse_duplicates(tars, path)
    skipped += [Skipped(name, "a compressed tar; unpack it to a plain .tar") for name in compressed]
    return tars
