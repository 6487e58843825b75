"""Lists the members of a tar: names, offsets and sizes, without reading their contents."""

import posixpath
import tarfile
from pathlib import Path
from typing import Any, NamedTuple, Self

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
