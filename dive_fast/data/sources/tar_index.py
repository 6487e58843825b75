"""Where the files of a tar lie: names, offsets and sizes, and what of it is no plain file."""

import posixpath
import tarfile
from pathlib import Path
from typing import Any, NamedTuple, Self

LONGEST_NAME = 2**20
"""Bytes of a header that holds nothing but a member's name and the like, and is read into memory."""
_NAMES = (
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
    """As the header has it; bytes that are not UTF-8 are surrogates."""
    offset: int
    """-1: the tar does not hold the bytes in one piece: a link out of it, a sparse file, a device."""
    size: int


class Members(NamedTuple):
    """What a tar holds."""

    files: list[Member]
    """In the tar's order; a hard or symbolic link to a file of the same tar is that file by another name."""
    broken: str | None
    """Why the tar is not whole, if it is not; what comes before is in ``files``."""


def read_members(tar: Path) -> Members:
    """Reads the headers of a tar, and none of its contents."""
    found = Members([], None)
    place: dict[str, Member] = {}
    try:
        with tarfile.open(tar, "r:", tarinfo=_Header) as members:
            file_size, end = tar.stat().st_size, 0
            for member in members:
                if member.size < 0 or members.offset <= end:
                    # By extended headers too: what goes back would be read again, for ever.
                    return found._replace(broken=f"the size of {member.name} is {member.size}")
                end = members.offset
                if member.islnk() or member.issym():
                    target = member.linkname
                    if member.issym():
                        target = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), target))
                    found.files.append(place.get(target, Member("", -1, 0))._replace(name=member.name))
                    continue
                if member.isdir():
                    continue
                if member.issparse() or not member.isfile():
                    found.files.append(Member(member.name, -1, 0))
                    continue
                if member.offset_data + member.size > file_size:
                    return found._replace(broken=f"it breaks off inside {member.name}")
                place[member.name] = Member(member.name, member.offset_data, member.size)
                found.files.append(place[member.name])
            end = members.offset
        # tarfile takes a header that it cannot read for the end, which is a block of zeros.
        with tar.open("rb") as content:
            content.seek(end)
            if content.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                return found._replace(broken=f"it breaks off at byte {end}")
    except (OSError, tarfile.TarError) as error:
        return found._replace(broken=_compression(tar) or str(error))
    except (ValueError, ArithmeticError, LookupError, MemoryError, RecursionError) as error:
        return found._replace(broken=f"a header cannot be read: {error or type(error).__name__}")
    return found


def _compression(tar: Path) -> str:
    try:
        with tar.open("rb") as content:
            beginning = content.read(8)
    except OSError:
        return ""
    name = next((name for magic, name in _COMPRESSED.items() if beginning.startswith(magic)), None)
    return f"it is compressed by {name}; unpack it to a plain .tar" if name is not None else ""


class _Header(tarfile.TarInfo):
    """Of a member. tarfile believes any size, and goes where it leads."""

    @classmethod
    def frombuf(cls, *arguments: Any, **options: Any) -> Self:
        """Parses one.

        Raises:
            tarfile.HeaderError: it is none, or has a size that nothing has.
        """
        header = super().frombuf(*arguments, **options)
        if not 0 <= header.size <= (LONGEST_NAME if header.type in _NAMES else 2**62):
            raise tarfile.HeaderError(f"{header.size} bytes in a member of type {header.type!r}")
        return header
