"""Reads a config: a JSON file, the files it is based on, and overrides from the command line."""

import contextlib
import copy
import json
import os
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

HALVES = ("target", "reference")
"""Keys of ``objective`` that name a loss: by its name alone, or as a section with its options."""


def load_config(name: str, overrides: Sequence[str], folder: Path | None, schema: type[C]) -> C:
    """Reads a config by path or by its name in ``folder``, and applies overrides.

    A file may name a ``base``, relative to it: its own sections are merged into the base's, key by key. Where a
    file or an override names another method, options of the former method that the new one lacks are left out.

    Args:
        name: a path, or the name of a file in ``folder`` with or without ``.json``.
        overrides: ``section.key=value``; the value is JSON, otherwise a string.
        schema: the config's type.

    Raises:
        ConfigError: no such file, invalid JSON, a circle of bases, an unknown or ill-typed key, or keys that do
            not go together.
    """
    path = find_config(name, folder)
    layers = _Layers()
    for file, tree in _read_with_bases(path):
        layers.add_file(file, tree)
    layers.add_overrides(overrides)
    if layers.inherited and isinstance(layers.tree["objective"], dict):
        schema.drop_inherited(layers.tree, layers.inherited)
    try:
        return schema.model_validate_json(json.dumps(layers.tree))
    except ValidationError as error:
        raise ConfigError(f"{_origin(error, path, overrides, layers.origins)}: {explain(error)}") from None


class _Layers:
    """Config files and overrides merged into one tree."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        """The file that sets each dotted key."""
        self.inherited: dict[str, Mapping[str, Any]] = {}
        """Keys of ``objective`` that were set for another method than the one it names now, each with the
        ``objective`` that they were set for."""

    def add_file(self, path: Path, tree: Mapping[str, Any]) -> None:
        """Merges a file over the layers below it."""
        before = copy.deepcopy(_objective_of(self.tree))
        for half in HALVES:
            if isinstance(_objective_of(tree).get(half), dict):
                self._name_in_section(half)
        _merge(self.tree, tree)
        self.origins |= dict.fromkeys(_keys(tree), str(path))
        self._update_inherited(before, set(_keys(_objective_of(tree))))

    def add_overrides(self, overrides: Sequence[str]) -> None:
        """Applies overrides in order.

        Raises:
            ConfigError: one is not ``section.key=value``, or names a base.
        """
        before = copy.deepcopy(_objective_of(self.tree))
        set_here = set[str]()
        for override in overrides:
            keys, value = _parse_override(override)
            if keys[0] == "objective" and len(keys) > 2:
                self._name_in_section(keys[1])
            _apply(self.tree, keys, value, override)
            if keys == ["objective"]:
                # The section is replaced: nothing in it is inherited.
                before, self.inherited = {}, {}
            elif keys[0] == "objective":
                set_here |= {".".join(keys[1:end]) for end in range(2, len(keys) + 1)}
                set_here |= set(_keys(value, f"{'.'.join(keys[1:])}.")) if isinstance(value, dict) else set()
        self._update_inherited(before, set_here)

    def _name_in_section(self, half: str) -> None:
        """Writes a loss that is only named as a section, so that options set above it belong to it."""
        objective = self.tree.get("objective")
        if isinstance(objective, dict) and half in HALVES and isinstance(objective.get(half), str):
            objective[half] = {"name": objective[half]}

    def _update_inherited(self, before: Mapping[str, Any], set_here: set[str]) -> None:
        """Adds the options of ``before`` if its method was replaced; options set together with a name are not."""
        after = _objective_of(self.tree)
        foreign = _foreign(before, after)
        if "name" in set_here and after.get("name") is not None and any(_loss_of(before, half) for half in HALVES):
            # A method that is named again replaces losses that were named below it.
            foreign = set(_keys(before)) - {"name"}
        # The first method of a key is the one that it was set for.
        former = dict.fromkeys(foreign, before) | self.inherited
        self.inherited = {key: objective for key, objective in former.items() if key not in set_here}


def _read_with_bases(path: Path) -> list[tuple[Path, "_Object"]]:
    """A config file and its bases, the lowest base first."""
    chain: list[tuple[Path, _Object]] = []
    files: list[Path] = []
    below: Path | None = path
    while below is not None:
        path, here = below, below.resolve()
        if here in files:
            raise ConfigError(f"{path}: base leads back to this file: {' -> '.join(map(str, (*files, here)))}")
        tree = _read(path)
        below = _pop_base(path, tree)
        files.append(here)
        chain.insert(0, (path, tree))
    return chain


def _pop_base(path: Path, tree: "_Object") -> Path | None:
    """Removes ``base`` from a config file's tree; returns the file that it names, None where there is none."""
    if "base" not in tree:
        return None
    base = tree.pop("base")
    if not isinstance(base, str) or not base.strip():
        raise ConfigError(
            f'{path}: base = {shorten(json.dumps(base))}: expected a config file, e.g. "vitb16_dive.json"'
        )
    below = path.parent / os.path.expanduser(base)
    try:
        is_file = below.is_file()
        known = [] if is_file else sorted(each.name for each in below.parent.glob("*.json"))
    except OSError as error:
        raise ConfigError(f"{path}: base = {shorten(base)}: {error.strerror}") from error
    if not is_file:
        raise ConfigError(f"{path}: base = {shorten(base)}: no such file: {below}{nearest(below.name, known)}")
    return below


def _read(path: Path) -> "_Object":
    try:
        tree = _parse(read_text(path))
        _check_values(tree)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}{_guess_format(path)}") from error
    if not isinstance(tree, _Object):
        raise ConfigError(f"{path}: expected a JSON object with sections {', '.join(Config.model_fields)}")
    if (key := _duplicate_key(tree)) is not None:
        raise ConfigError(f"{path}: duplicate key {key}")
    return tree


def _merge(tree: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Puts a layer over a tree: objects are merged key by key, other values replaced."""
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
    """The ``objective`` section of a tree that is not validated; empty where there is none."""
    objective = tree.get("objective")
    return objective if isinstance(objective, dict) else {}


def _loss_of(objective: Mapping[str, Any], half: str) -> Any:
    """The name of the loss that an ``objective`` sets for a half; None where it leaves it to the method."""
    section = objective.get(half)
    return section.get("name") if isinstance(section, dict) else section


def _foreign(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """The keys of ``before``, an ``objective``, that were set for another method than that of ``after``."""
    default = ObjectiveConfig().name
    if before.get("name", default) != after.get("name", default):
        return set(_keys(before)) - {"name"}
    changed = [half for half in HALVES if _loss_of(before, half) != _loss_of(after, half)]
    if not changed:
        return set()
    # The weight belongs to the reference loss.
    kept = set() if "reference" in changed else {"weight", "reference_every"}
    options = set(before) - {"name", *HALVES} - kept
    nested = {key for key in _keys(before) if key.partition(".")[0] in changed and "." in key}
    return options | nested


def find_config(name: str, folder: Path | None = None) -> Path:
    """The file of a config's name: a path, otherwise a file in ``folder``.

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
    """A JSON object that remembers its first duplicate key."""

    duplicate: str | None = None

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        if len(self) < len(pairs):
            self.duplicate = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)


def _parse(text: str) -> Any:
    """The value of a JSON text; numbers that are not finite are left to the section that has them."""
    try:
        return json.loads(text, object_pairs_hook=_Object)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def _duplicate_key(tree: Any) -> str | None:
    """The dotted key of the first duplicate in an object of a tree."""
    if isinstance(tree, _Object) and tree.duplicate is not None:
        return tree.duplicate
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    below = ((key, _duplicate_key(value)) for key, value in children)
    return next((f"{key}.{duplicate}" for key, duplicate in below if duplicate is not None), None)


MAX_DEPTH = 64
"""Maximum depth of nested objects and lists; a config needs five, DeepSpeed's section a few more."""

_TOO_DEEP = f"nested more than {MAX_DEPTH} deep; no section needs that"


def _check_values(value: Any, depth: int = 0) -> None:
    """Validates what holds for the values of all sections.

    Raises:
        ValueError: a text is not Unicode or has a zero byte, which no path can hold; or nested too deeply.
    """
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{shorten(value)} contains a zero byte, or is not valid UTF-8")
    elif isinstance(value, dict | list):
        if depth >= MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        for child in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_values(child, depth + 1)


def _parse_override(override: str) -> tuple[list[str], Any]:
    """The keys and the value of ``section.key=value``."""
    place, separator, text = override.partition("=")
    keys = place.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"override {shorten(override)}: expected section.key=value, e.g. train.epochs=1")
    if keys[0] == "base":
        raise ConfigError(
            f"override {shorten(override)}: only a file can have a base; name the config by --config"
        )
    try:
        value = _parse(text)
    except ValueError:
        value = text
    try:
        if len(keys) > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        _check_values([*keys, value])
    except ValueError as error:
        raise ConfigError(f"override {shorten(override)}: {error}") from error
    if (duplicate := _duplicate_key(value)) is not None:
        raise ConfigError(f"override {shorten(override)}: duplicate key {duplicate}")
    return keys, value


def _apply(tree: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    """Sets a value in a tree; missing sections are created."""
    for depth, key in enumerate(keys[:-1], start=1):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {shorten(override)}: {'.'.join(keys[:depth])} is a value, not a section")
    tree[keys[-1]] = value


def _guess_format(path: Path) -> str:
    """The probable format of a file that is not JSON, for the end of a message."""
    if path.suffix.lower() in (".yaml", ".yml"):
        return "; a config is JSON, not YAML"
    with contextlib.suppress(OSError, ValueError):
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            if line.lstrip().startswith(("//", "#", "/*")):
                return f"; line {number} is a comment, which JSON does not have: remove it"
    return ""


def _origin(error: ValidationError, path: Path, overrides: Sequence[str], origins: Mapping[str, str]) -> str:
    """The source of the first mistake: the last override of its key or section, or the file that sets it."""
    mistake = first_mistake(error)
    # A validator of several sections begins its message with the key.
    key = key_path(mistake) or str(mistake.get("ctx", {}).get("error", "")).partition(":")[0].partition(" ")[0]
    place = f"{key}."
    for override in reversed(overrides):
        overridden = f"{override.partition('=')[0]}."
        if place != "." and (place.startswith(overridden) or overridden.startswith(place)):
            return f"command line ({shorten(override)})"
    # A missing key has the origin of its section.
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return origins.get(key, str(path))
