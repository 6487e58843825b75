"""Reads a config: one JSON file and overrides from the command line."""

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dive_fast.config.explain import explain as explain
from dive_fast.config.explain import first_mistake as first_mistake
from dive_fast.config.explain import key_path as key_path
from dive_fast.config.explain import shorten as shorten
from dive_fast.config.schema import Config
from dive_fast.errors import ConfigError, nearest
from dive_fast.io.safe_read import read_text


def load_config(name: str, overrides: Sequence[str] = (), folder: Path | None = None) -> Config:
    """Reads a config by path or by its name in ``folder``, with or without ``.json``, and applies overrides.

    Args:
        overrides: ``section.key=value``; the value is JSON, or else taken as a string.

    Raises:
        ConfigError: no such file, no JSON, an unknown or ill-typed key, or keys that do not go together.
    """
    path = find_config(name, folder)
    try:
        tree = _parsed(read_text(path))
        _check_values(tree)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}{_what_else(path)}") from error
    if not isinstance(tree, _Object):
        raise ConfigError(f"{path}: expected a JSON object with sections {', '.join(Config.model_fields)}")
    if (place := _twice(tree)) is not None:
        raise ConfigError(f"{path}: key {place} stands twice in one object; keep one")
    for override in overrides:
        _override(tree, override)
    try:
        return Config.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ConfigError(f"{_origin(error, path, overrides)}: {explain(error)}") from None


def find_config(name: str, folder: Path | None = None) -> Path:
    """The file that a config's name stands for: a path, else a file in ``folder``.

    Raises:
        ConfigError: none exists; names the nearest one that does.
    """
    candidates = [Path(name)]
    if folder is not None:
        candidates += [folder / name, folder / f"{name}.json"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in folder.glob("*.json")) if folder is not None else []
    hint = f"; shipped configs: {', '.join(known)}{nearest(Path(name).stem, known)}" if known else ""
    raise ConfigError(f"--config {name}: no such file{hint}")


class _Object(dict[str, Any]):
    """A JSON object that remembers a key which stood in it twice."""

    twice: str | None = None

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        if len(self) < len(pairs):
            self.twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)


def _parsed(text: str) -> Any:
    """Of JSON; what is not finite is left for the key that it stands at to refuse."""
    try:
        return json.loads(text, object_pairs_hook=_Object)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def _twice(tree: Any) -> str | None:
    """The place of a key that stands twice in one object."""
    if isinstance(tree, _Object) and tree.twice is not None:
        return tree.twice
    held = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    below = ((key, _twice(value)) for key, value in held)
    return next((f"{key}.{place}" for key, place in below if place is not None), None)


DEEPEST = 64
"""Objects and lists in one another; a config needs five, DeepSpeed's section a few more."""

_TOO_DEEP = f"nested more than {DEEPEST} deep; no section goes that far"


def _check_values(value: Any, depth: int = 0) -> None:
    """Holds a tree to what a config can mean, wherever its values go.

    Raises:
        ValueError: a text is no Unicode or has a zero byte, which no path can hold; or it is nested too deeply.
    """
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{shorten(value)} holds a zero byte, or bytes that are no UTF-8")
    elif isinstance(value, dict | list):
        if depth >= DEEPEST:
            raise ValueError(_TOO_DEEP)
        for held in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_values(held, depth + 1)


def _override(tree: dict[str, Any], override: str) -> None:
    place, separator, text = override.partition("=")
    keys = place.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"override {shorten(override)}: expected section.key=value, e.g. train.epochs=1")
    try:
        value = _parsed(text)
    except ValueError:
        value = text
    try:
        if len(keys) > DEEPEST:
            raise ValueError(_TOO_DEEP)
        _check_values([*keys, value])
    except ValueError as error:
        raise ConfigError(f"override {shorten(override)}: {error}") from error
    if (twice := _twice(value)) is not None:
        raise ConfigError(f"override {shorten(override)}: key {twice} stands twice in one object; keep one")
    for depth, key in enumerate(keys[:-1], start=1):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {shorten(override)}: {'.'.join(keys[:depth])} is a value, not a section")
    tree[keys[-1]] = value


def _what_else(path: Path) -> str:
    """What a file that is not JSON may be, for the end of a message."""
    if path.suffix.lower() in (".yaml", ".yml"):
        return "; a config is JSON, not YAML"
    with contextlib.suppress(OSError, ValueError):
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            if line.lstrip().startswith(("//", "#", "/*")):
                return f"; line {number} is a comment, which JSON does not have: remove it"
    return ""


def _origin(error: ValidationError, path: Path, overrides: Sequence[str]) -> str:
    """Where the first mistake comes from: the last override of its key or section, or the file."""
    place = f"{key_path(first_mistake(error))}."
    for override in reversed(overrides):
        key = f"{override.partition('=')[0]}."
        if place != "." and (place.startswith(key) or key.startswith(place)):
            return f"command line ({shorten(override)})"
    return str(path)
