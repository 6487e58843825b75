"""Folders of columns in the cache: one file per array, memory-mapped, with a stamp of what decides them."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dive_fast.io.atomic_files import atomic_folder
from dive_fast.io.cache_folder import mark_used
from dive_fast.io.safe_read import read_json

Columns = Mapping[str, NDArray[Any]]
"""Arrays by name."""
ABOUT = "index.json"
"""Description of the columns in their folder."""


def save_columns(folder: Path, columns: Columns, about: Mapping[str, Any], stamp: str) -> None:
    """Writes columns into a new folder, which replaces anything damaged of its name.

    Args:
        about: JSON values that :func:`load_columns` returns.
        stamp: digest of everything that decides the contents.

    Raises:
        OSError: the disk refuses it.
    """
    description = {
        **about,
        "stamp": stamp,
        "checksum": _checksum(columns, about),
        "lengths": {name: len(column) for name, column in columns.items()},
    }
    if folder.is_symlink() or folder.is_file():
        folder.unlink()  # otherwise nothing could ever be kept under this name
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_folder(folder) as partial:
        for name, column in columns.items():
            np.save(partial / f"{name}.npy", column, allow_pickle=False)
        (partial / ABOUT).write_text(json.dumps(description))


def load_columns(folder: Path, stamp: str | None) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
    """The memory-mapped columns of a folder and their description; None if there is no such folder.

    Args:
        stamp: the expected stamp; it and the checksum are validated. None: another process of the node has just
            done so.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: the folder is damaged.
    """
    try:
        about = read_json(folder / ABOUT)
    except FileNotFoundError:
        return None
    columns = {name: _load(folder / f"{name}.npy", length) for name, length in about["lengths"].items()}
    stored = {name: about.pop(name) for name in ("stamp", "checksum", "lengths")}
    if stamp is not None and (stored["stamp"] != stamp or stored["checksum"] != _checksum(columns, about)):
        raise ValueError("its contents do not match its name or checksum")
    mark_used(folder)
    return columns, about


def _load(file: Path, length: int) -> NDArray[Any]:
    try:
        return np.asarray(np.load(file, mmap_mode="r" if length else None))
    except (SyntaxError, TokenError, MemoryError) as error:  # NumPy evaluates the header
        raise ValueError(f"{file.name}: {error}") from error


def _checksum(columns: Columns, about: Mapping[str, Any]) -> str:
    return hashlib.sha256(f"{columns_hash(columns)} {json.dumps(about, sort_keys=True)}".encode()).hexdigest()


def columns_hash(columns: Columns) -> str:
    """A hash of columns and their names."""
    result = hashlib.sha256()
    for name in sorted(columns):
        column = np.ascontiguousarray(columns[name])
        result.update(f"{name} {column.dtype} {column.shape}".encode())
        result.update(column.view(np.uint8).data if column.size else b"")
    return result.hexdigest()
