"""Reads a config: one JSON file and overrides from the command line."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from dive_fast.config.explain import explain, first_mistake, key_path, shorten
from dive_fast.config.schema import Config, ObjectiveConfig
from dive_fast.errors import ConfigError, nearest
from dive_fast.io.safe_read import read_text

C = TypeVar("C", bound=Config)


def load_config(
    name: str, overrides: Sequence[str] = (), folder: Path | None = None, schema: type[C] = Config
) -> C:
    """Reads a config by path or by its name in ``folder``, with or without ``.json``, and applies overrides.

    A file may name a ``base``, relative to it: its own sections are merged into the base's, key by key. Where a
    file or an override names another method, options of the former method that the new one lacks are left out.

    Args:
        overrides: ``section.key=value``; the value is JSON, or else taken as a string.
        schema: the config's type.

    Raises:
        ConfigError: no such file, no JSON, an unknown or ill-typed key, or keys that do not go together.
    """
    path = find_config(name, folder)
    tree, origins, inherited = _Object([]), dict[str, str](), set[str]()
    for source, layer in _layers(path):
        before, set_here = dict(_objective_of(tree)), set(_objective_of(layer))
        _merge(tree, layer)
        inherited = (inherited | _foreign(before, _objective_of(tree))) - set_here
        origins |= dict.fromkeys(_keys(layer), str(source))
    before = dict(_objective_of(tree))
    for override in overrides:
        _override(tree, override)
    places = [override.partition("=")[0].split(".") for override in overrides]
    if ["objective"] not in places:
        set_here = {place[1] for place in places if place[0] == "objective"}
        inherited = (inherited | _foreign(before, _objective_of(tree))) - set_here
    try:
        if inherited:
            schema.drop_inherited(tree, inherited)
        return schema.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ConfigError(f"{_origin(error, path, overrides, origins)}: {explain(error)}") from None


def _layers(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[Path, "_Object"]]:
    """A config file and the bases below it, the lowest base first."""
    here = path.resolve()
    if here in above:
        raise ConfigError(f"{path}: base leads back to this file: {' -> '.join(map(str, (*above, here)))}")
    tree = _read(path)
    if (base := tree.pop("base", None)) is None:
        return [(path, tree)]
    if not isinstance(base, str) or not base.strip():
        raise ConfigError(
            f'{path}: base = {shorten(json.dumps(base))}: expected a config file, e.g. "vitb16_dive.json"'
        )
    below = path.parent / base
    if not below.is_file():
        known = sorted(each.name for each in below.parent.glob("*.json"))
        raise ConfigError(f"{path}: base = {base}: no such file as {below}{nearest(below.name, known)}")
    return [*_layers(below, (*above, here)), (path, tree)]


def _read(path: Path) -> "_Object":
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
        raise ConfigError(f"{path}: duplicate key {place}")
    return tree


def _merge(tree: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Puts a layer over a tree: objects key by key, other values whole."""
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _keys(tree: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """The dotted keys of all values and sections of a tree."""
    for key, value in tree.items():
        yield f"{place}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{place}{key}.")


def _objective_of(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    objective = tree.get("objective")
    return objective if isinstance(objective, dict) else {}


def _foreign(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """The keys of an ``objective`` that were chosen for another method than the one that it names now."""

    def part(objective: Mapping[str, Any], half: str) -> Any:
        value = objective.get(half)
        return value.get("name") if isinstance(value, dict) else value

    default = ObjectiveConfig().name
    if before.get("name", default) != after.get("name", default):
        return set(before) - {"name"}
    if any(part(before, half) != part(after, half) for half in ("target", "reference")):
        return set(before) - {"name", "target", "reference"}
    return set()


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
            raise ValueError(f"{shorten(value)} contains a zero byte, or is not valid UTF-8")
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
        raise ConfigError(f"override {shorten(override)}: duplicate key {twice}")
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


def _origin(error: ValidationError, path: Path, overrides: Sequence[str], origins: Mapping[str, str]) -> str:
    """The source of the first mistake: the last override of its key or section, or the file that sets it."""
    key = key_path(first_mistake(error))
    place = f"{key}."
    for override in reversed(overrides):
        overridden = f"{override.partition('=')[0]}."
        if place != "." and (place.startswith(overridden) or overridden.startswith(place)):
            return f"command line ({shorten(override)})"
    return origins.get(key, str(path))
