"""Atomic writes: a file appears under its name when it is complete, or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it when it is complete."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """As :func:`write_atomic`, for content that is written in pieces."""
    with atomic_path(path) as partial, partial.open("wb") as file:
        yield file


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """As :func:`write_atomic`, for a library that opens the temporary file by name. The umask sets the mode."""
    # A prefix, because some libraries derive the format from the suffix.
    partial = path.with_name(f".partial-{path.name}")
    new_file(partial).close()
    mode = partial.stat().st_mode
    try:
        yield partial
        # Some libraries replace the file by a private one, which other users could not read.
        partial.chmod(mode)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def new_file(path: Path) -> BinaryIO:
    """Creates a file and replaces any other at its path; a link in a folder from others is not written through."""
    path.unlink(missing_ok=True)
    return path.open("xb")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder that appears under its name when it is complete, or not at all.

    Raises:
        FileExistsError: there is something under its name.
    """
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    partial = path.with_name(f".partial-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
