"""Readers of untrusted files: nothing in them is executed, and no name in them leads out of their folder."""

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

MAX_TEXT_BYTES = 2**30
"""Maximum bytes of a text file, larger than COCO's captions."""


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: not a regular file (a pipe would never end), too large, or not text.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > MAX_TEXT_BYTES:
        raise ValueError(f"{status.st_size} bytes, more than the limit of {MAX_TEXT_BYTES}")
    return path.read_text(encoding=encoding)


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError, ValueError: as :func:`read_text` and :func:`parse_json`.
    """
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """The value of standard JSON: finite numbers, Unicode strings.

    Raises:
        ValueError: the text is not JSON, or nested too deeply.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        # Only an escape can produce a string that cannot be encoded.
        if "\\u" in text and not _is_unicode(value):
            raise ValueError("a string contains half a surrogate pair, which is not a character")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def inside(folder: Path, name: str) -> Path:
    """The file that a manifest in ``folder`` calls ``name``.

    Raises:
        ValueError: the name is absolute, leads out of the folder by ``..`` or a link, or is not a file name.
    """
    path = below(folder, name)
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # a circle of links
        raise ValueError(f"{path} cannot be resolved: {error}") from error
    if not is_inside:
        raise ValueError(f"{path} is a link out of its folder; put the file itself there")
    return path


def below(folder: Path, name: str) -> Path:
    """As :func:`inside`, by the name alone: for thousands of files, or folders in which images are links on
    purpose.

    Raises:
        ValueError: the name is absolute, contains ``..``, or is not a file name.
    """
    parts = PurePosixPath(name).parts
    if not parts or "\0" in name or ".." in parts or PurePosixPath(name).is_absolute():
        raise ValueError(f"{name!r} is not the name of a file below {folder}")
    return folder / name


def map_array(path: Path) -> "np.memmap[Any, Any]":
    """A memory-mapped ``.npy`` file, as large as its header says.

    Raises:
        OSError: the file cannot be read.
        ValueError: not an array of plain numbers in row-major order, or truncated.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing or not a regular file")
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # the header is Python syntax, whose parser raises errors of many types
        raise ValueError(f"{path.name} is not a complete .npy file: {error}") from error
    if not rows.flags.c_contiguous or rows.dtype.fields is not None or not rows.dtype.isnative:
        raise ValueError(f"{path.name} holds {rows.dtype}, not plain numbers in row-major order")
    return rows


@contextmanager
def forbid_code_execution() -> Iterator[None]:
    """Restricts ``torch.load`` to tensors and plain values, and keeps transformers from loading code of a model.

    This overrides the libraries in between: open_clip falls back to torch's default, DeepSpeed unpickles freely,
    and the JSON of a model may say ``trust_remote_code``.
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
        # These fetch and run a module of the model; without a timeout the terminal is asked first.
        mock.patch.object(dynamic_module_utils, "get_cached_module_file", _refuse_code),
        mock.patch.object(dynamic_module_utils, "get_class_in_module", _refuse_code),
        mock.patch.object(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0),
    ):
        yield


def _refuse_code(*_: Any, **__: Any) -> NoReturn:
    raise ValueError("the model needs its own code, which is not executed; use a model that needs none")


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _is_unicode(value: Any) -> bool:
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        return all(_is_unicode(key) and _is_unicode(item) for key, item in value.items())
    return not isinstance(value, list) or all(map(_is_unicode, value))
