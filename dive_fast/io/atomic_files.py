"""Files that are whole or not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file under another name, and gives it its own when it is whole."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """The same for what is written piece by piece."""
    with atomic_path(path) as partial, partial.open("wb") as file:
        yield file


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """The same for a library that opens its file by name: gives it that other name. The mode is the umask's."""
    # In front: some libraries choose the format by the ending.
    partial = path.with_name(f".partial-{path.name}")
    new_file(partial).close()
    mode = partial.stat().st_mode
    try:
        yield partial
        # Some libraries put a private file in its place: others could not read what a run has made.
        partial.chmod(mode)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def new_file(path: Path) -> BinaryIO:
    """A file in the place of whatever had its name. A link, in a folder from elsewhere, is not written through."""
    path.unlink(missing_ok=True)
    return path.open("xb")
