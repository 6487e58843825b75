"""Reads a folder of images with captions in text files next to them."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dive_fast.data.sources.image_files import (
    NO_FILE,
    NOT_READABLE,
    ImageFiles,
    ImageLister,
    printable_names,
    with_progress,
)
from dive_fast.data.sources.listed_files import ListedFiles, text_name
from dive_fast.data.sources.node_index import Listing, RawSet, open_raw
from dive_fast.data.sources.sample_table import (
    SampleTable,
    Strings,
    StringsBuilder,
    clean_text,
    pack_texts,
    printable,
)
from dive_fast.data.sources.source import (
    EMPTY_CAPTION,
    Skipped,
    Source,
    locate,
    summarize_skipped,
)
from dive_fast.data.sources.watched import Watched, state_of
from dive_fast.errors import DataError
from dive_fast.identity import Identity
from dive_fast.io.safe_read import MAX_TEXT_BYTES

if TYPE_CHECKING:
    from dive_fast.distributed import Ranks  # imports torch, which takes seconds

NO_TEXT = "no .txt of the same name"
"""Reason for skipping an image without a caption file."""
THREADS, CHUNK = 16, 1024
"""Number of threads that read texts, and number of texts that one of them reads at a time."""


def open_captioned_folder(path: str, ranks: Ranks | None = None) -> Source:
    """Opens a folder of images at any depth, also behind links; ``x.txt`` next to ``x.jpg`` is its text.

    Images without a text, with an empty text or one that is not UTF-8 are skipped.

    Args:
        ranks: see :func:`open_raw`.

    Raises:
        DataError: the folder is missing, or no image has a text.
    """
    return open_raw(CaptionedFolder(path), ranks)


class CaptionedFolder(RawSet):
    """The images of a folder with a text file next to each."""

    reads_all_bytes = False

    def __init__(self, path: str) -> None:
        """Takes the argument of :func:`open_captioned_folder`."""
        self.path = path
        self._images = ImageFiles()

    def identity(self) -> Identity:
        return {"format": "folder", "text": ".txt"}

    def known_root(self) -> str:
        return str(locate(self.path))

    def list_files(self) -> Listing:
        root = locate(self.path)
        self.root = str(root)
        if not root.is_dir():
            state = "it is a file" if root.exists() else "no such folder"
            raise DataError(f"{self.path}: expected a folder of images with a .txt next to each, but {state}")
        try:
            with ImageLister(with_texts=True) as lister:
                self._images = lister.list_below(self.root)
        except OSError as error:
            raise DataError(f"{self.path}: cannot list its images: {error}") from error
        return self._images.listing()

    def watched(self, listing: Listing, table: SampleTable) -> Watched | None:
        # Texts of samples are compared when their image is read; those that make no sample are never read again.
        names, watched = listing.names, Watched()
        watched.extend(self._images.watched)
        kept = iter(table.files)
        name = next(kept, b"")
        for number, each in enumerate(names if len(table.files) < len(names) else ()):
            size, time = int(listing.sizes[len(names) + number]), int(listing.times[len(names) + number])
            if each == name:
                name = next(kept, b"")
            elif size != NO_FILE:
                text = text_name(os.fsdecode(each))
                state = state_of(os.path.join(self.root, text))
                if state[0] >= 0 if size == NOT_READABLE else state[:2] != (size, time):
                    return None  # changed while the set was read
                watched.add(text, state)
        return watched

    def read(self, listing: Listing) -> tuple[Source, Sequence[str]]:
        names, lists = listing.names, StringsBuilder()
        skipped = list(self._images.skipped)
        rows: list[NDArray[np.int64]] = []
        has_text = np.array(self._images.text_sizes, np.int64) != NO_FILE
        chunks = [range(first, min(first + CHUNK, len(names))) for first in range(0, len(names), CHUNK)]
        with ThreadPoolExecutor(THREADS, "texts") as threads:
            parts = threads.map(lambda chunk: self._read_texts(names, has_text, chunk), chunks)
            parts = with_progress(parts, len(chunks), f"reading {self.path}", f"{CHUNK} texts")
            for chunk, texts in zip(chunks, parts, strict=True):
                skipped += texts.skipped
                lists.extend(texts.lists)
                rows.append(np.array(chunk)[texts.is_kept])
        kept = np.concatenate(rows) if rows else np.empty(0, np.int64)
        if not len(kept):
            reasons = f" ({summarize_skipped(skipped)})" if skipped else ""
            has_tars = not len(names) and any(locate(self.path).glob("*.tar"))
            hint = "; it holds tars: use format webdataset" if has_tars else ""
            raise DataError(f"{self.path}: no image has a .txt of the same name next to it{reasons}{hint}")
        files = names if len(kept) == len(names) else names.select(kept)
        (sizes, text_sizes), (times, text_times) = (
            column.reshape(2, -1)[:, kept] for column in (listing.sizes, listing.times)
        )
        keys, captions = printable_names(files), Strings(*lists.columns())
        listed = ListedFiles(times, text_sizes, text_times)
        table = SampleTable.of_files(self.root, files, keys, sizes, lists=captions, listed=listed)
        return Source(table, skipped=skipped, ignored=self._images.ignored), ()

    def _read_texts(self, names: Strings, has_text: NDArray[np.bool_], rows: range) -> _Texts:
        """The texts of some images."""
        lists, skipped = StringsBuilder(), list[Skipped]()
        is_kept = np.zeros(len(rows), bool)
        for row in rows:
            name = os.fsdecode(names[row])
            text, reason = "", NO_TEXT
            if has_text[row]:
                text, reason = _text(os.path.join(self.root, text_name(name)))
            if reason:
                skipped.append(Skipped(printable(name), reason))
            else:
                lists.append(pack_texts((text,)))
                is_kept[row - rows.start] = True
        return _Texts(Strings(*lists.columns()), is_kept, skipped)


class _Texts(NamedTuple):
    """The texts of several images."""

    lists: Strings
    is_kept: NDArray[np.bool_]
    """Whether each image has a text."""
    skipped: list[Skipped]


def _text(path: str) -> tuple[str, str]:
    """The text of a file, or the reason why it has none."""
    try:
        text = _read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        return "", NO_TEXT
    except UnicodeDecodeError:
        return "", "its caption is not UTF-8"
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read it: {error}") from error
    text = clean_text(text.replace("\r\n", "\n").replace("\r", "\n"))
    return text, "" if text else EMPTY_CAPTION


def _read_bytes(path: str) -> bytes:
    """The contents of a regular file; several times faster than by a Python file object.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular file, or too large.
    """
    # Without the flag, opening a pipe would wait for a writer; for regular files it means nothing.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > MAX_TEXT_BYTES:
            raise ValueError(f"{status.st_size} bytes, more than the limit of {MAX_TEXT_BYTES}")
        data = b""
        while part := os.read(descriptor, 1 << 16):
            data += part
        return data
    finally:
        os.close(descriptor)
