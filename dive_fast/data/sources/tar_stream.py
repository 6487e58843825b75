"""Webdataset tars without an index of the set: the samples of a tar are listed when the tar is reached.

Only names and sizes of the tars are known at the start. A sample has a number that contains its tar and its
position in it, so that crops and captions are functions of the sample, whatever the order.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from dive_fast.data.sources.object_store import RemoteTar, fetch, is_url, list_remote, local_name
from dive_fast.data.sources.sample_table import Sample, SampleTable, printable
from dive_fast.data.sources.source import Images, Skipped
from dive_fast.data.sources.tar_scan import TarScan, scan_tar
from dive_fast.data.sources.webdataset import list_tars
from dive_fast.errors import DataError, TarError
from dive_fast.io.cache_folder import cache_folder, remove_unused

Result = TypeVar("Result")
FOLDER = "streams"
"""Folder of fetched tars in the cache."""
POSITION_BITS = 32
"""Low bits of a sample's number: its position among the complete samples of its tar; above them, the tar's row."""


class StreamedTar(NamedTuple):
    """A tar of a stream, as it was listed."""

    path: Path
    """Its file; for a tar in an object store, the file that it is fetched to."""
    size: int
    remote: RemoteTar | None = None


class TarStream(Images):
    """Captioned images in tars that are scanned when they are reached, by each process that reads them."""

    def __init__(
        self,
        path: str,
        tars: Sequence[StreamedTar],
        window: int,
        skipped: Sequence[Skipped] = (),
        has_lines: bool = False,
    ) -> None:
        """Takes the listed tars.

        Args:
            path: the path in the config, for messages.
            window: number of samples that are shuffled together, at least.
            skipped: files next to the tars that are left out.
            has_lines: whether each line of a caption file is a caption.
        """
        self.path, self.tars, self.window = path, tars, window
        self.skipped, self.has_lines = skipped, has_lines
        self._tables: OrderedDict[int, SampleTable] = OrderedDict()
        self._owner = os.getpid()
        self._ahead: tuple[int, threading.Thread] | None = None
        """The tar that is fetched ahead, and its thread."""

    def scan(self, tar: int) -> tuple[SampleTable, Sequence[Skipped]]:
        """The complete samples of a tar, and those that are left out. A tar that breaks off has those before that.

        Raises:
            TarError: the tar cannot be read or fetched, or its size has changed.
        """
        scan = self._with_file(tar, lambda: self._scan(tar))
        table = scan.table.split_lines() if self.has_lines else scan.table
        self._tables[tar] = table
        # A process reads the samples of two windows at most: batches ahead may begin the next one.
        while sum(map(len, self._tables.values())) - len(next(iter(self._tables.values()))) > 2 * self.window:
            self._tables.popitem(last=False)
        return table, scan.skipped

    def read(self, number: int) -> bytes:
        return self._with_file(number >> POSITION_BITS, lambda: super(TarStream, self).read(number))

    def fetch(self, tar: int) -> None:
        """Fetches a tar of an object store, unless it is here.

        Raises:
            TarError: the tar cannot be fetched.
        """
        self._with_file(tar, lambda: None)

    def fetch_ahead(self, tar: int) -> None:
        """Begins to fetch a tar of an object store, unless it is here or another one is being fetched.

        A failure is not reported: the tar is fetched again when it is needed.
        """
        path, _, remote = self.tars[tar]
        if remote is None or path.exists() or (self._ahead is not None and self._ahead[1].is_alive()):
            return
        thread = threading.Thread(target=self._fetch_ahead, args=(tar,), name="fetch ahead", daemon=True)
        self._ahead = tar, thread
        thread.start()

    def remove(self, tar: int) -> None:
        """Removes a fetched tar that the training process has left behind.

        Its folder remains until the end, for a process that fetches the tar again at this moment.
        """
        path, _, remote = self.tars[tar]
        if remote is not None:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the fetched tars and their folders, when no batch is read any more."""
        self._ahead = None
        for tar in self.tars if os.getpid() == self._owner else ():
            if tar.remote is not None:
                shutil.rmtree(tar.path.parent, ignore_errors=True)

    def _scan(self, tar: int) -> TarScan:
        path, size, _ = self.tars[tar]
        try:
            now = os.stat(path).st_size
        except OSError as error:
            raise TarError(f"{path}: cannot read it: {error.strerror or error}") from error
        if now != size:
            raise TarError(f"{path}: changed during the run: {now} bytes, {size} at its start")
        return scan_tar(path, ".txt", strict=False)

    def _with_file(self, tar: int, function: Callable[[], Result]) -> Result:
        """The result of a function that reads a tar, which is fetched before if it is in an object store.

        Workers of batches far ahead may still need a tar that the training process removes: it is fetched again.

        Raises:
            DataError: the function raised it.
            TarError: the tar cannot be fetched.
        """
        path, _, remote = self.tars[tar]
        while True:
            if remote is not None and not path.exists():
                self._await(tar)
            if remote is not None and not path.exists():
                fetch(remote, path)
            try:
                return function()
            except DataError:
                if remote is None or path.exists():
                    raise

    def _fetch_ahead(self, tar: int) -> None:
        path, _, remote = self.tars[tar]
        assert remote is not None
        with suppress(TarError):
            fetch(remote, path, attempts=1)
        if self._ahead is None:  # closed meanwhile
            shutil.rmtree(path.parent, ignore_errors=True)

    def _await(self, tar: int) -> None:
        """Waits for the end of fetching a tar ahead."""
        ahead = self._ahead
        if ahead is not None and ahead[0] == tar:
            ahead[1].join()

    def sample(self, number: int) -> Sample:
        table, position = self._table(number)
        return table[position]

    def after(self, number: int) -> int:
        """The number of the next sample of the same tar, which replaces one that cannot be used."""
        table, position = self._table(number)
        return number - position + (position + 1) % len(table)

    def digest(self) -> str:
        """A hash of names and sizes of the tars, in order. Contents of equal size are not told apart."""
        listing = [(printable(tar.path.name), tar.size) for tar in self.tars]
        return hashlib.sha256(repr(("stream", listing)).encode()).hexdigest()

    def _table(self, number: int) -> tuple[SampleTable, int]:
        tar, position = number >> POSITION_BITS, number & ((1 << POSITION_BITS) - 1)
        table = self._tables.get(tar)
        if table is None:
            table = self.scan(tar)[0]
        self._tables.move_to_end(tar)
        if position >= len(table):
            raise TarError(f"{self.tars[tar].path}: changed during the run: it has {len(table)} samples now")
        return table, position


def open_tar_stream(path: str, window: int, has_lines: bool = False) -> TarStream:
    """Lists the tars of a stream; none is opened.

    Args:
        path: a tar, a brace range, a glob, or a folder of tars, also as URLs of an object store.
        window: number of samples that are shuffled together, at least.
        has_lines: whether each line of a caption file is a caption.

    Raises:
        DataError: there is no tar, or one of them does not exist.
    """
    if is_url(path):
        try:
            folder = cache_folder(FOLDER)
        except OSError as error:
            raise DataError(f"{path}: tars cannot be fetched: {error}; set DIVE_FAST_CACHE") from error
        remove_unused(folder)
        remote = [StreamedTar(folder / local_name(tar) / tar.name, tar.size, tar) for tar in list_remote(path)]
        return TarStream(path, remote, window, has_lines=has_lines)
    skipped, ignored = list[Skipped](), list[Skipped]()
    tars = list_tars(path, skipped, ignored)
    try:
        listed = [StreamedTar(tar, os.stat(tar).st_size) for tar in tars]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot read it: {error.strerror or error}") from error
    return TarStream(path, listed, window, skipped, has_lines)
