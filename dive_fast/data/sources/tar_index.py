"""Lists the members of a tar: names, offsets and sizes, without reading the contents of large ones.

:func:`read_members` reads any tar by Python's ``tarfile``. :func:`read_plain_members` is several times faster, and
leaves every tar to it whose headers are not of the plain form that tools write for files with short names.
"""

import os
import posixpath
import re
import tarfile
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

MAX_NAME_BYTES = 2**20
"""Maximum size of an extended header (a long name, link target or PAX record), which is read into memory."""
_EXTENDED_HEADERS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\3\4": "zip",
}


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    """Name in the header; bytes that are not UTF-8 are surrogates."""
    offset: int
    """Position of the contents; -1: not one range of the tar (a link out of it, a sparse file, a device)."""
    size: int
    """Number of bytes of the contents."""


class Members(NamedTuple):
    """The files of a tar, and whether it is complete."""

    files: list[Member]
    """Files in the order of the tar; a link to a file of the same tar has that file's offset and size."""
    error: str | None
    """Why the tar is incomplete, or None if it is complete; ``files`` lists the members before the error."""


def read_members(tar: Path) -> Members:
    """Reads the headers of a tar, but not its contents."""
    members = Members([], None)
    member_of: dict[str, Member] = {}
    try:
        with tarfile.open(tar, "r:", tarinfo=_CheckedHeader) as archive:
            file_size, end = tar.stat().st_size, 0
            for header in archive:
                if header.size < 0 or archive.offset <= end:
                    # Extended headers can set the size too; going backwards would loop forever.
                    return members._replace(error=f"the size of {header.name} is {header.size}")
                end = archive.offset
                if header.islnk() or header.issym():
                    target = header.linkname
                    if header.issym():
                        target = posixpath.normpath(posixpath.join(posixpath.dirname(header.name), target))
                    members.files.append(member_of.get(target, Member("", -1, 0))._replace(name=header.name))
                    continue
                if header.isdir():
                    continue
                if header.issparse() or not header.isfile():
                    members.files.append(Member(header.name, -1, 0))
                    continue
                if header.offset_data + header.size > file_size:
                    return members._replace(error=f"it breaks off inside {header.name}")
                member_of[header.name] = Member(header.name, header.offset_data, header.size)
                members.files.append(member_of[header.name])
            end = archive.offset
        # tarfile treats an unreadable header as the end of the tar, which must be a block of zeros.
        with tar.open("rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                return members._replace(error=f"it breaks off at byte {end}")
    except (OSError, tarfile.TarError) as error:
        return members._replace(error=_compression_error(tar) or str(error))
    except (ValueError, ArithmeticError, LookupError, MemoryError, RecursionError) as error:
        return members._replace(error=f"a header cannot be read: {error or type(error).__name__}")
    return members


def _compression_error(tar: Path) -> str:
    """The message for a compressed tar; empty if it is not compressed."""
    try:
        with tar.open("rb") as file:
            beginning = file.read(8)
    except OSError:
        return ""
    name = next((name for magic, name in _COMPRESSED.items() if beginning.startswith(magic)), None)
    return f"it is compressed by {name}; unpack it to a plain .tar" if name is not None else ""


class _CheckedHeader(tarfile.TarInfo):
    """Header of a member with a plausible size; tarfile itself seeks to wherever a size leads."""

    @classmethod
    def frombuf(cls, *arguments: Any, **options: Any) -> Self:
        """Parses a header.

        Raises:
            tarfile.HeaderError: it is not a header, or its size is implausible.
        """
        header = super().frombuf(*arguments, **options)
        if not 0 <= header.size <= (MAX_NAME_BYTES if header.type in _EXTENDED_HEADERS else 2**62):
            raise tarfile.HeaderError(f"{header.size} bytes in a member of type {header.type!r}")
        return header


# Plain tars

_BLOCK = tarfile.BLOCKSIZE
_WINDOW = 16 * _BLOCK
"""Bytes of one read: a header with the small files and headers that follow it."""
_CHECKED_HEADERS = 4096
"""Number of headers that are validated together."""
_FILE_TYPES = tarfile.REGTYPE[0], tarfile.AREGTYPE[0]
_POSIX, _GNU = b"ustar\x0000", b"ustar  \0"
"""Magic and version of a header."""
_MAGIC, _CHECKSUM, _PREFIX = slice(257, 265), slice(148, 156), 345
"""Positions of fields in a header."""
_NUMBERS = [(100, 8), (108, 8), (116, 8), (124, 12), (136, 12), (148, 8), (329, 8), (337, 8)]
"""Position and length of each field that is an octal number."""
_IN_NUMBERS = np.concatenate([np.arange(first, first + length) for first, length in _NUMBERS])
_CONTINUES = np.concatenate([np.arange(length) > 0 for _, length in _NUMBERS])[:, None]
"""Positions of the bytes of these fields, and whether each of them follows another byte of its field."""
_DIGIT, _BLANK, _OTHER = 0, 1, 2
_KINDS_OF_BYTES = np.full(256, _OTHER, np.uint8)
_KINDS_OF_BYTES[list(b"01234567")], _KINDS_OF_BYTES[list(b" \0")] = _DIGIT, _BLANK
_TIME_RECORD = re.compile(rb"([1-9][0-9]{0,3}) (?:mtime|atime|ctime)=[0-9]+(?:\.[0-9]+)?\n")
"""A record of a PAX header that changes neither name nor size: webdataset's writer adds one to each file."""


class PlainMembers(NamedTuple):
    """The files of a complete tar that has plain headers only, in order."""

    names: list[str]
    """Names; bytes that are not UTF-8 are surrogates."""
    offsets: list[int]
    """Positions of the contents."""
    sizes: list[int]
    """Numbers of bytes of the contents."""
    contents: dict[int, bytes]
    """The contents of the files of the requested suffix, by their rows."""


def read_plain_members(descriptor: int, suffix: str, max_bytes: int) -> PlainMembers | None:
    """The files of an open tar, or None unless :func:`read_members` would certainly return the same ones.

    Args:
        suffix: suffix of the files whose contents are read too, in upper or lower case.
        max_bytes: of longer contents, one byte more than these is read.

    Raises:
        OSError: the file cannot be read.
    """
    members = PlainMembers([], [], [], {})
    names, offsets, sizes, contents = members
    encoding, ending = tarfile.ENCODING, suffix.encode()
    headers = bytearray()
    window, start, position, after_pax = b"", 0, 0, False
    while True:
        at = position - start
        if at + _BLOCK > len(window):
            window, start, at = os.pread(descriptor, _WINDOW, position), position, 0
            if len(window) < _BLOCK:
                return None
        name_end = window.find(0, at, at + 100)
        name = window[at : at + 100 if name_end < 0 else name_end]
        kind = window[at + 156]
        if not name:
            is_end = not after_pax and window.count(0, at, at + _BLOCK) == _BLOCK
            return members if is_end and names and _are_plain(headers) else None
        try:
            size = int(window[at + 124 : at + 135], 8)
        except ValueError:
            return None
        following = position + _BLOCK + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        if size < 0:
            return None
        headers += window[at : at + _BLOCK]
        if len(headers) == _CHECKED_HEADERS * _BLOCK:
            if not _are_plain(headers):
                return None
            headers.clear()
        if kind in _FILE_TYPES:
            if window[at + _PREFIX]:
                name = window[at + _PREFIX : at + 500].partition(b"\0")[0] + b"/" + name
            if name.endswith(b"/"):
                return None
            if name.endswith(ending) or name[-len(ending) :].lower() == ending:
                if at + _BLOCK + size > len(window):  # with the header that follows
                    length = 2 * _BLOCK + min(size, max_bytes + 1)
                    window, start, at = os.pread(descriptor, max(_WINDOW, length), position), position, 0
                content = contents[len(names)] = window[at + _BLOCK : at + _BLOCK + size]
                if len(content) < min(size, max_bytes + 1):
                    return None
            names.append(name.decode(encoding, "surrogateescape"))
            offsets.append(position + _BLOCK)
            sizes.append(size)
            after_pax = False
        elif kind == tarfile.XHDTYPE[0]:
            if at + following - position > len(window):
                window, start, at = os.pread(descriptor, _WINDOW, position), position, 0
            end = at + following - position
            if after_pax or end > len(window) or not _has_only_times(window, at + _BLOCK, end):
                return None
            after_pax = True
        elif kind != tarfile.DIRTYPE[0] or size or after_pax:
            return None
        position = following


def _are_plain(headers: bytearray) -> bool:
    """Whether all headers are valid, and of a form that is read as it is written here."""
    rows = np.frombuffer(headers, np.uint8).reshape(-1, _BLOCK)
    plain = np.zeros(len(rows), np.bool_)
    for magic in (_POSIX, _GNU):
        plain |= (rows[:, _MAGIC] == np.frombuffer(magic, np.uint8)).all(1)
    # A number is digits, then blanks.
    kinds = _KINDS_OF_BYTES[rows[:, _IN_NUMBERS].T]
    plain &= (kinds < _OTHER).all(0) & ~((kinds[1:] < kinds[:-1]) & _CONTINUES[1:]).any(0)
    checksums = np.zeros(len(rows), np.int64)
    for column in rows[:, _CHECKSUM].T:
        checksums = np.where(column >= ord("0"), checksums * 8 + (column & 7), checksums)
    sums = rows.sum(1, dtype=np.uint32) - rows[:, _CHECKSUM].sum(1, dtype=np.uint32) + 8 * ord(" ")
    # The walk reads eleven digits of a size.
    return bool((plain & (checksums == sums) & (rows[:, 135] < ord("0"))).all())


def _has_only_times(window: bytes, first: int, end: int) -> bool:
    """Whether the contents of a PAX header, a range of the window, are nothing but times."""
    at = first
    while (record := _TIME_RECORD.match(window, at, end)) is not None:
        if int(record[1]) != record.end() - at:
            return False
        at = record.end()
    return at > first and window.count(0, at, end) == end - at
