"""Writes a config as commented YAML or JSON: complete, or not at all."""

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dive_fast.config.load import load_config
from dive_fast.config.schema import Config
from dive_fast.errors import ConfigError
from dive_fast.io.atomic_files import atomic_path, write_atomic

Tree = Mapping[str, Any]
"""The sections of a config, by key."""
WIDTH = 100
"""Columns of a comment."""
FORMATS = {".yaml": "yaml", ".yml": "yaml", ".json": "json"}
"""The format of each suffix."""


def config_text(tree: Tree, comments: Mapping[str, str], header: Sequence[str], file_format: str) -> str:
    """A config as text, with comments above their keys.

    Args:
        comments: by dotted key.
        header: the lines of the comment at the top.
        file_format: ``yaml`` or ``json``.
    """
    mark = "#" if file_format == "yaml" else "//"
    lines = [*(f"{mark} {_printable(line)}" for line in header), ""]
    if file_format == "yaml":
        lines += _yaml(tree, comments, "", "")
    else:
        lines += ["{", *_json(tree, comments, "", "  "), "}"]
    return "\n".join(lines) + "\n"


def write_files(path: Path, text: str, class_texts: Mapping[Path, str], force: bool) -> None:
    """Writes a config, and the files of class names that it refers to.

    The config is loaded from its temporary file before it appears under its name.

    Args:
        class_texts: the content of each file of class names.
        force: whether existing files are replaced.

    Raises:
        ConfigError: a file exists, and is not a file of the same class names; or the folder cannot be written to.
    """
    changed = [file for file, content in class_texts.items() if not _has_content(file, content)]
    existing = next((file for file in (path, *changed) if file.exists() or file.is_symlink()), None)
    if existing is not None and not force:
        raise ConfigError(f"{existing} exists: name another file by --output, or replace it with --force")
    try:
        with atomic_path(path) as partial:
            partial.write_text(text, encoding="utf-8")
            load_config(str(partial), (), None, Config)
            for file in changed:
                write_atomic(file, class_texts[file].encode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot write it: {error.strerror or error}") from error


def _has_content(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def _comment(text: str, mark: str, indent: str) -> list[str]:
    width = WIDTH - len(indent) - len(mark) - 1
    return [f"{indent}{mark} {line}" for line in textwrap.wrap(_printable(text), width)]


def _printable(text: str) -> str:
    """A comment as one line, without characters that YAML does not allow."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _yaml(tree: Tree, comments: Mapping[str, str], prefix: str, indent: str) -> Iterator[str]:
    for key, value in tree.items():
        place = f"{prefix}{key}"
        if not indent and prefix == "" and key != next(iter(tree)):
            yield ""
        if place in comments:
            yield from _comment(comments[place], "#", indent)
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from _yaml(value, comments, f"{place}.", f"{indent}  ")
        else:
            yield f"{indent}{key}: {_scalar(value)}"


def _json(tree: Tree, comments: Mapping[str, str], prefix: str, indent: str) -> Iterator[str]:
    for number, (key, value) in enumerate(tree.items(), start=1):
        place = f"{prefix}{key}"
        end = "" if number == len(tree) else ","
        if place in comments:
            yield from _comment(comments[place], "//", indent)
        if isinstance(value, Mapping):
            yield f"{indent}{json.dumps(key)}: {{"
            yield from _json(value, comments, f"{place}.", f"{indent}  ")
            yield f"{indent}}}{end}"
        else:
            yield f"{indent}{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}{end}"


def _scalar(value: Any) -> str:
    """A value in YAML's flow style, which differs from JSON in a few letters."""
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value, re.ASCII):
        words = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
        return json.dumps(value) if value.lower() in words else value
    if isinstance(value, float):
        # YAML reads 1e-05 as text.
        mantissa, e, exponent = repr(value).partition("e")
        return f"{mantissa}{'' if '.' in mantissa else '.0'}{e}{exponent}" if e else mantissa
    text = json.dumps(value, ensure_ascii=False)
    return "".join(each if each.isprintable() else _escape(each) for each in text)


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
