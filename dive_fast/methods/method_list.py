"""All methods with their options, as ``dive-fast keys`` and figures show them, read without an import of torch.

The list is ``method_list.json``, written from the registry, whose modules need torch; a test compares the two.
``python -m dive_fast.methods.method_list`` writes it again after a change of a method or its options.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import model_validator

from dive_fast.config.explain import expected_one_of
from dive_fast.config.reference import Key, keys_of
from dive_fast.config.schema import NO_PROJECTION, Config
from dive_fast.config.section import KeyedError

FILE = Path(__file__).with_suffix(".json")
REGISTRY = "dive_fast.methods.registry"
"""Imported by every program that adds a method."""


class Group(NamedTuple):
    """Keys that are listed together."""

    place: str
    """Dotted key of their section; empty for the sections themselves."""
    title: str
    """Heading."""
    keys: list[Key]
    words: tuple[str, ...] = ()
    """Names that select the group: methods and losses with these options."""


class Style(NamedTuple):
    """A method in figures."""

    title: str
    colour: str
    """``#rrggbb``"""


class ListedConfig(Config):
    """A config whose method and projection have names of this list, which is validated without torch."""

    @model_validator(mode="after")
    def _check_names(self) -> "ListedConfig":
        if REGISTRY in sys.modules:  # methods that a program has added are not in the list
            return self
        rules = [NO_PROJECTION, *_names("projection")]
        for key, name, names in (
            ("objective.name", self.objective.name, _names("objective")),
            ("projection.name", self.projection.name, rules),
        ):
            if name is not None and name not in names:
                raise KeyedError(key, expected_one_of(key, name, names))
        return self


class MethodList(NamedTuple):
    """The shipped methods."""

    styles: dict[str, Style]
    """By their names in ``objective.name``."""
    groups: list[Group]
    """Methods and options of ``objective``, then those of ``projection``."""


def read() -> MethodList:
    """The list of this package."""
    tree = json.loads(FILE.read_text(encoding="utf-8"))
    groups = [
        Group(place, title, [Key(*key) for key in keys], tuple(words))
        for place, title, keys, words in tree["groups"]
    ]
    return MethodList({name: Style(*style) for name, style in tree["styles"].items()}, groups)


def _names(place: str) -> list[str]:
    """The names that ``<place>.name`` can have."""
    listed = (key.name.partition("=") for group in read().groups if group.place == place for key in group.keys)
    return [value for option, _, value in listed if option == "name" and value]


def styles() -> dict[str, Style]:
    """The methods in figures, with those that a program has added to the registry."""
    if REGISTRY not in sys.modules:
        return read().styles
    return read().styles | from_registry().styles


def from_registry() -> MethodList:
    """The list as the modules of the methods and rules have it; imports torch."""
    from dive_fast.methods import registry

    presets = registry.table().presets.values()
    styles = {preset.name: Style(preset.title, preset.colour) for preset in presets}
    return MethodList(styles, [*_objectives(), *_projections()])


def as_json(listed: MethodList) -> dict[str, Any]:
    """The content of the file."""
    return {"styles": listed.styles, "groups": listed.groups}


def _objectives() -> Iterator[Group]:
    from dive_fast.methods import registry

    table = registry.table()
    presets = table.presets.values()
    names = [_name(preset.name, preset.title, preset.summary) for preset in presets]
    yield Group("objective", "Methods; each has the options of its losses, listed below.", names)
    for half, parts in (("target", table.targets), ("reference", table.references)):
        for name, part in parts.items():
            users = [preset.name for preset in presets if getattr(preset, half) == name]
            if part.Options.model_fields:
                title = f"Options of the {half} loss {name} (methods: {', '.join(users) or 'none'})"
                yield Group("objective", title, list(keys_of(part.Options)), (name, *users))


def _projections() -> Iterator[Group]:
    from dive_fast.projections import rules

    table = rules.table()
    names = [_name(name, rule.title, rule.summary) for name, rule in table.items()]
    yield Group("projection", "Methods in weight space; each has its own options, listed below.", names)
    for name, rule in table.items():
        yield Group("projection", f"Options of the projection {name}", list(keys_of(rule.Options)), (name,))


def _name(name: str, title: str, summary: str) -> Key:
    return Key(f"name={name}", "method", None, False, True, f"{title}: {summary}")


if __name__ == "__main__":
    FILE.write_text(json.dumps(as_json(from_registry()), indent=1) + "\n", encoding="utf-8")
