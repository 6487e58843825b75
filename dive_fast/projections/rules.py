"""The methods in weight space by name: from the ``projection`` section of a config to a rule.

Every module of this folder is read once, for its :class:`Projection` classes. A new rule is one new file; nothing
is listed here.
"""

import importlib
import pkgutil
from functools import cache
from typing import Any, NamedTuple

from dive_fast import projections
from dive_fast.config.explain import expected_one_of, nearest_key
from dive_fast.config.options import validate_options
from dive_fast.config.schema import NO_PROJECTION, ProjectionConfig
from dive_fast.config.section import KeyedError, Section
from dive_fast.errors import ConfigError
from dive_fast.projections.projection import Projection


class Choice(NamedTuple):
    """A rule and its options."""

    rule: type[Projection]
    options: Section


@cache
def table() -> dict[str, type[Projection]]:
    """All rules by name."""
    rules: dict[str, type[Projection]] = {}
    for module in sorted(pkgutil.iter_modules(projections.__path__), key=lambda module: module.name):
        loaded = importlib.import_module(f"{projections.__name__}.{module.name}")
        for rule in vars(loaded).values():
            if not isinstance(rule, type) or rule.__module__ != loaded.__name__ or not hasattr(rule, "name"):
                continue
            if issubclass(rule, Projection) and rules.setdefault(rule.name, rule) is not rule:
                raise ValueError(f"{loaded.__name__}: a projection named {rule.name} exists already")
    return rules


def choose(section: ProjectionConfig) -> Choice | None:
    """The rule of a ``projection`` section, options validated and defaults filled in; None without one.

    Raises:
        KeyedError: an unknown name, or an option that the rule lacks or cannot have.
    """
    options: dict[str, Any] = dict(section.model_extra or {})
    names = [NO_PROJECTION, *table()]
    if section.name not in names:
        raise KeyedError("projection.name", expected_one_of("projection.name", section.name, names))
    if section.name == NO_PROJECTION:
        if options:
            key = f"projection.{next(iter(options))}"
            hint = nearest_key(key, ["name"])
            raise KeyedError(
                key,
                f"unknown key {key}{hint} (valid: name; projection.name = {NO_PROJECTION} has no options: name "
                f"one of {', '.join(names[1:])})",
            )
        return None
    rule = table()[section.name]
    keys = {option: f"projection.{option}" for option in options}
    return Choice(rule, validate_options(rule.Options, options, keys, rule.name, others=["name"]))


def resolve(section: ProjectionConfig) -> ProjectionConfig:
    """The same section with all options written out.

    Raises:
        KeyedError: as :func:`choose`.
    """
    choice = choose(section)
    return section if choice is None else ProjectionConfig(name=section.name, **choice.options.model_dump())


def create(section: ProjectionConfig) -> Projection | None:
    """The rule that a ``projection`` section chooses; None without one.

    Raises:
        ConfigError: an unknown name or option.
    """
    try:
        choice = choose(section)
    except KeyedError as error:
        raise ConfigError(str(error)) from error
    return None if choice is None else choice.rule(choice.options)


def title_of(section: ProjectionConfig) -> str | None:
    """The rule's name in figures and tables; None without one.

    Raises:
        KeyedError: as :func:`choose`.
    """
    choice = choose(section)
    return None if choice is None else choice.rule.title
