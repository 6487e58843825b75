"""Reading what somebody else may have made: nothing in it is executed, no name in it leads out of its folder."""

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn
from unittest import mock

import numpy as np

LARGEST_TEXT = 2**30
"""Bytes of a text file, COCO's captions included. What is larger is something else."""


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file (a pipe would never end), too large, or no text.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is no regular file")
    if about.st_size > LARGEST_TEXT:
        raise ValueError(f"it has {about.st_size} bytes, at most {LARGEST_TEXT} are read")
    return path.read_text(encoding=encoding)


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError, ValueError: as :func:`read_text` and :func:`parse_json`.
    """
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """The value of JSON, as the standard has it: finite numbers, Unicode strings.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
        # Only an escape can make a string that no file can hold.
        if "\\u" in text and not _is_unicode(value):
            raise ValueError("a string of it holds half a surrogate pair, which is no character")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def inside(folder: Path, name: str) -> Path:
    """The file that a manifest in ``folder`` calls ``name``.

    Raises:
        ValueError: it is absolute, leads out of the folder by ``..`` or a link, or is no name.
    """
    path = below(folder, name)
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # a circle of links
        raise ValueError(f"{path} leads nowhere: {error}") from error
    if not is_inside:
        raise ValueError(f"{path} is a link out of its folder; put the file itself there")
    return path


def below(folder: Path, name: str) -> Path:
    """The same by the name alone, for thousands of files, or folders in which people link images on purpose.

    Raises:
        ValueError: it is absolute, has ``..`` in it, or is no name.
    """
    parts = PurePosixPath(name).parts
    if not parts or "\0" in name or ".." in parts or PurePosixPath(name).is_absolute():
        raise ValueError(f"{name!r} is no name of a file below {folder}")
    return folder / name


def map_array(path: Path) -> "np.memmap[Any, Any]":
    """A ``.npy`` file, memory-mapped: what its header says it has, the file has.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no array of plain numbers, one row behind the other, or is cut off.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing, or no regular file")
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # the header is Python's syntax, and its parser has errors of many kinds
        raise ValueError(f"{path.name} is no whole .npy file: {error}") from error
    if not rows.flags.c_contiguous or rows.dtype.fields is not None or not rows.dtype.isnative:
        raise ValueError(f"{path.name} holds {rows.dtype} in another order than row by row")
    return rows


@contextmanager
def forbid_code_execution() -> Iterator[None]:
    """Inside, ``torch.load`` admits tensors and plain values alone, and transformers loads no code of a model.

    Whatever the library in between asks for: open_clip falls back to torch's default, DeepSpeed unpickles freely,
    and a model's own JSON may say ``trust_remote_code``.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with _no_remote_code():
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _no_remote_code() -> Iterator[None]:
    from transformers import dynamic_module_utils

    with (
        # Fetches a module of the model, and runs it; without its time out it asks at the terminal first.
        mock.patch.object(dynamic_module_utils, "get_cached_module_file", _no_code),
        mock.patch.object(dynamic_module_utils, "get_class_in_module", _no_code),
        mock.patch.object(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0),
    ):
        yield


def _no_code(*_: Any, **__: Any) -> NoReturn:
    raise ValueError("it brings code of its own, which is not executed; take a model that needs none")


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is larger than any number")
    return value


def _is_unicode(value: Any) -> bool:
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        return all(_is_unicode(key) and _is_unicode(held) for key, held in value.items())
    return not isinstance(value, list) or all(map(_is_unicode, value))
