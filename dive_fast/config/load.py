"""Reads a config: a JSON or YAML file, the files it is based on, and overrides from the command line."""

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from dive_fast.config.explain import explain, first_mistake, key_path, shorten
from dive_fast.config.file_formats import (
    MAX_DEPTH,
    SUFFIXES,
    TOO_DEEP,
    Content,
    FormatError,
    check_values,
    duplicate_key,
    parse_json,
    read_tree,
)
from dive_fast.config.origins import Origins
from dive_fast.config.recorded import FILE, config_of_run, is_recorded
from dive_fast.config.schema import Config, ObjectiveConfig
from dive_fast.config.worker_counts import with_worker_counts
from dive_fast.errors import ConfigError, nearest

C = TypeVar("C", bound=Config)

HALVES = ("target", "reference")
"""Keys of ``objective`` that name a loss: by its name alone, or as a section with its options."""


def load_config(name: str, overrides: Sequence[str], folder: Path | None, schema: type[C]) -> C:
    """Reads a config by path or by its name in ``folder``, and applies overrides.

    A file may name a ``base``, relative to it, otherwise in ``folder``: its own sections are merged into the
    base's, key by key. Where a file or an override names another method, options of the former method that the
    new one lacks are left out. Where it names another projection, all options of the former one are.

    Args:
        name: a path, or the name of a file in ``folder`` with or without its suffix.
        overrides: ``section.key=value``; the value is JSON, otherwise a string.
        schema: the config's type.

    Returns:
        The config, with numbers for this machine where ``workers`` is ``auto``.

    Raises:
        ConfigError: no such file, invalid JSON or YAML, a circle of bases, an unknown or ill-typed key, or keys
            that do not go together.
    """
    path, layers = _merge_layers(name, overrides, folder)
    if layers.inherited and isinstance(layers.tree["objective"], dict):
        schema.drop_inherited(layers.tree, layers.inherited)
    layers.origins.keep(_keys(layers.tree))
    try:
        config = schema.model_validate_json(json.dumps(with_worker_counts(layers.tree)))
    except ValidationError as error:
        raise ConfigError(f"{_origin(error, path, overrides, layers.origins)}: {explain(error)}") from None
    config.set_origins(layers.origins)
    return config


def read_origins(name: str, overrides: Sequence[str], folder: Path | None) -> Origins:
    """Where the keys of a config are set, without validating it; arguments as in :func:`load_config`.

    Raises:
        ConfigError: the files cannot be read, or an override is invalid.
    """
    return _merge_layers(name, overrides, folder)[1].origins


def _merge_layers(name: str, overrides: Sequence[str], folder: Path | None) -> tuple[Path, "_Layers"]:
    path = find_config(name, folder)
    layers = _Layers()
    for file, content in _read_with_bases(path, folder, layers.origins):
        layers.add_file(file, content)
    layers.add_overrides(overrides)
    if layers.origins.is_run:
        train = layers.tree.get("train")
        output = train.get("output") if isinstance(train, dict) else None
        origin = layers.origins.of("train.output").replace(f"set in {path}", "the run's")
        layers.origins.remarks.append(f"{path} is the config of a run: train.output = {output} ({origin})")
    layers.origins.keep(_keys(layers.tree))
    return path, layers


class _Layers:
    """Config files and overrides merged into one tree."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self.origins = Origins()
        self.inherited: dict[str, Mapping[str, Any]] = {}
        """Keys of ``objective`` that were set for another method than the one it names now, each with the
        ``objective`` that they were set for."""

    def add_file(self, path: Path, content: Content) -> None:
        """Merges a file over the layers below it."""
        tree = content.tree
        self._drop_rule_options(tree.get("projection"))
        before = copy.deepcopy(_objective_of(self.tree))
        for half in HALVES:
            if isinstance(_objective_of(tree).get(half), dict):
                self._name_in_section(half)
        _merge(self.tree, tree)
        self.origins.set_in_file(_keys(tree), str(path), content.lines)
        self._update_inherited(before, set(_keys(_objective_of(tree))))

    def add_overrides(self, overrides: Sequence[str]) -> None:
        """Applies overrides in order.

        Raises:
            ConfigError: one is not ``section.key=value``, or names a base.
        """
        before = copy.deepcopy(_objective_of(self.tree))
        set_here = set[str]()
        parsed = [_parse_override(override) for override in overrides]
        # Before all options, which belong to this rule, also those that stand before its name.
        for keys, value in parsed:
            if keys == ["projection", "name"]:
                self._drop_rule_options({"name": value})
        for override, (keys, value) in zip(overrides, parsed, strict=True):
            if keys[0] == "objective" and len(keys) > 2:
                self._name_in_section(keys[1])
            _apply(self.tree, keys, value, override)
            below = _keys(value, f"{'.'.join(keys)}.") if isinstance(value, dict) else ()
            self.origins.set_by_override([".".join(keys), *below], shorten(override))
            if keys == ["objective"]:
                # The section is replaced: nothing in it is inherited.
                before, self.inherited = {}, {}
            elif keys[0] == "objective":
                set_here |= {".".join(keys[1:end]) for end in range(2, len(keys) + 1)}
                set_here |= set(_keys(value, f"{'.'.join(keys[1:])}.")) if isinstance(value, dict) else set()
        self._update_inherited(before, set_here)

    def _drop_rule_options(self, layer: Any) -> None:
        """Removes the options of the projection below, which belong to its rule, where a layer names another."""
        below = self.tree.get("projection")
        if not isinstance(layer, dict) or not isinstance(below, dict):
            return
        if "name" in layer and "name" in below and layer["name"] != below["name"]:
            self.tree["projection"] = {"name": layer["name"]}

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


def _read_with_bases(path: Path, folder: Path | None, origins: Origins) -> list[tuple[Path, Content]]:
    """A config file and its bases, the lowest base first."""
    chain: list[tuple[Path, Content]] = []
    files: list[Path] = []
    below: Path | None = path
    while below is not None:
        path, here = below, below.resolve()
        if here in files:
            raise ConfigError(f"{path}: base leads back to this file: {' -> '.join(map(str, (*files, here)))}")
        content = _use_recorded(path, _read(path), bool(chain), origins)
        below = _pop_base(path, content, folder)
        files.append(here)
        chain.insert(0, (path, content))
    return chain


def _use_recorded(path: Path, content: Content, is_base: bool, origins: Origins) -> Content:
    """The config in a run's ``config.json``; the content of other files is unchanged."""
    if not is_recorded(content.tree):
        return content
    config = config_of_run(content.tree, path, is_base)
    origins.is_run = origins.is_run or not is_base
    if is_base:
        origins.remarks.append(f"base {path} is the config of a run: used without its train.output")
    return Content(config, {})


def _pop_base(path: Path, content: Content, folder: Path | None) -> Path | None:
    """Removes ``base`` from a config file's tree; returns the file that it names, None where there is none."""
    if "base" not in content.tree:
        return None
    base = content.tree.pop("base")
    origin = f"{path}:{content.lines['base']}" if "base" in content.lines else str(path)
    if not isinstance(base, str) or not base.strip():
        raise ConfigError(
            f'{origin}: base = {shorten(json.dumps(base))}: expected a config file, e.g. "vitb16_dive.json"'
        )
    # The folder of the file itself, where a link leads to it.
    beside = (path.resolve() if path.is_symlink() else path).parent / os.path.expanduser(base)
    candidates = [beside, *(folder / name for name in (base, f"{base}.json") if folder is not None)]
    try:
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        known = config_files(beside.parent)
    except OSError as error:
        raise ConfigError(f"{origin}: base = {shorten(base)}: {error.strerror}") from error
    shipped = [] if folder is None else config_files(folder)
    hint = nearest(beside.name, [*known, *shipped])
    raise ConfigError(f"{origin}: base = {shorten(base)}: no such file: {beside}{hint}")


def config_files(folder: Path) -> list[str]:
    """The names of the files in a folder that may be configs."""
    return sorted(file.name for file in folder.glob("*") if file.suffix.lower() in SUFFIXES)


def _read(path: Path) -> Content:
    try:
        content = read_tree(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error}") from error
    except FormatError as error:
        raise ConfigError(f"{path}{'' if error.line is None else f':{error.line}'}: {error}") from error
    if not isinstance(content.tree, dict):
        raise ConfigError(f"{path}: expected an object with sections {', '.join(Config.model_fields)}")
    return content


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
    """The file of a config's name: a path, a file in ``folder``, or a run folder with ``config.json``.

    Raises:
        ConfigError: none exists, and the message names the nearest one that does; or two do.
    """
    if Path(name).is_file():
        return Path(name)
    recorded = Path(name) / FILE
    names = (name, *(f"{name}{suffix}" for suffix in SUFFIXES)) if folder is not None else ()
    for candidate in (folder / each for each in names if folder is not None):
        if candidate.is_file():
            if recorded.is_file():
                raise ConfigError(
                    f"--config {name} is a folder here and a shipped config: write {recorded} or {candidate.name}"
                )
            return candidate
    if recorded.is_file():
        return recorded
    near = config_files(Path(name).parent) if Path(name).parent.is_dir() else []
    shipped = sorted(Path(file).stem for file in config_files(folder)) if folder is not None else []
    hint = nearest(Path(name).name, near) or nearest(Path(name).stem, shipped)
    if not hint and shipped:
        hint = f"; shipped configs: {', '.join(shipped)}"
    is_folder = f" (a folder without {FILE})" if Path(name).is_dir() else ""
    raise ConfigError(f"--config {name}: no such file{is_folder}{hint}")


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
        value = parse_json(text)
    except ValueError:
        value = text
    try:
        if len(keys) > MAX_DEPTH:
            raise ValueError(TOO_DEEP)
        check_values([*keys, value])
    except ValueError as error:
        raise ConfigError(f"override {shorten(override)}: {error}") from error
    if (duplicate := duplicate_key(value)) is not None:
        raise ConfigError(f"override {shorten(override)}: duplicate key {duplicate}")
    return keys, value


def _apply(tree: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    """Sets a value in a tree; missing sections are created."""
    for depth, key in enumerate(keys[:-1], start=1):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {shorten(override)}: {'.'.join(keys[:depth])} is a value, not a section")
    tree[keys[-1]] = value


def _origin(error: ValidationError, path: Path, overrides: Sequence[str], origins: Origins) -> str:
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
    return origins.nearest(key) or str(path)
