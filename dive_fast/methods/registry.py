"""The methods by name: from the ``objective`` section of a config to a method.

Every module of this folder is read once: its :class:`TargetLoss` and :class:`ReferenceLoss` classes by their
names, and its ``PRESETS``. A new method is one new file; nothing is listed here. :func:`add` takes parts from outside.
"""

import importlib
import json
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

from pydantic import ValidationError

from dive_fast import methods
from dive_fast.config.schema import ObjectiveConfig
from dive_fast.config.section import KeyedError, Section
from dive_fast.errors import ConfigError, nearest
from dive_fast.methods.method import Method, Needs, Part, Preset, ReferenceLoss, Setting, TargetLoss, needs_of

NONE = "none"
"""The name of no reference loss."""
COMMON = ("name", "weight", "reference_every", "target", "reference")
"""Keys of ``objective`` that are options of no part."""


class Table(NamedTuple):
    """All parts and presets by name."""

    targets: dict[str, type[TargetLoss]]
    references: dict[str, type[ReferenceLoss]]
    presets: dict[str, Preset]


class Choice(NamedTuple):
    """The parts that an ``objective`` section chooses, with their options."""

    preset: Preset | None
    """The preset of these parts; None for a pair without a name."""
    target: type[TargetLoss]
    target_options: Section
    reference: type[ReferenceLoss] | None
    reference_options: Section

    @property
    def needs(self) -> Needs:
        """The requirements of the pair."""
        return needs_of(self.target, self.reference)

    @property
    def title(self) -> str:
        """Name in figures and tables."""
        if self.preset is not None:
            return self.preset.title
        return self.target.title + ("" if self.reference is None else f" + {self.reference.title}")

    @property
    def default_weight(self) -> float | None:
        """The reference loss's weight where the config has none."""
        return None if self.reference is None else self.reference.default_weight


@cache
def table() -> Table:
    """All parts and presets."""
    found = Table({}, {}, {})
    for module in sorted(pkgutil.iter_modules(methods.__path__), key=lambda module: module.name):
        _add(found, importlib.import_module(f"{methods.__name__}.{module.name}"))
    _check(found)
    return found


def add(module: ModuleType) -> None:
    """Adds the parts and presets of a module from outside of this folder, for configs read after it.

    Raises:
        ValueError: a name exists already, or a preset names a part that does not.
    """
    _add(table(), module)
    _check(table())


def _add(found: Table, module: ModuleType) -> None:
    for kind, names in ((TargetLoss, found.targets), (ReferenceLoss, found.references)):
        for part in vars(module).values():
            is_own = isinstance(part, type) and issubclass(part, kind) and part.__module__ == module.__name__
            if is_own and hasattr(part, "name") and names.setdefault(part.name, part) is not part:
                raise ValueError(f"{module.__name__}: a part named {part.name} exists already")
    for preset in getattr(module, "PRESETS", ()):
        if found.presets.setdefault(preset.name, preset) is not preset:
            raise ValueError(f"{module.__name__}: a method named {preset.name} exists already")


def _check(found: Table) -> None:
    for preset in found.presets.values():
        halves = [found.targets.get(preset.target)]
        halves += [] if preset.reference is None else [found.references.get(preset.reference)]
        if None in halves:
            raise ValueError(f"method {preset.name}: no part named {preset.target} or {preset.reference}")
        names = [name for part in halves if part is not None for name in part.Options.model_fields]
        if len({*names, *COMMON}) < len(names) + len(COMMON):
            raise ValueError(f"method {preset.name}: two options of one name among {', '.join(names)}")
        if unknown := {*preset.fixed, *preset.hidden} - set(names):
            raise ValueError(f"method {preset.name}: fixes or hides {', '.join(unknown)}, which no part has")


def options_of(preset: Preset) -> dict[str, type[Part]]:
    """The options that a preset has, each with the part that reads it."""
    found: dict[str, type[Part]] = {}
    for part in _parts(preset):
        found |= dict.fromkeys(set(part.Options.model_fields) - set(preset.fixed) - set(preset.hidden), part)
    return {name: found[name] for part in _parts(preset) for name in part.Options.model_fields if name in found}


def _parts(preset: Preset) -> list[type[Part]]:
    parts: list[type[Part]] = [table().targets[preset.target]]
    return parts if preset.reference is None else [*parts, table().references[preset.reference]]


def choose(objective: ObjectiveConfig) -> Choice:
    """The parts of an ``objective`` section, options validated and defaults filled in.

    Raises:
        KeyedError: an unknown name, or an option that the method lacks or cannot have.
    """
    names = table()
    preset = None
    if objective.name is not None:
        preset = names.presets.get(objective.name)
        if preset is None:
            raise KeyedError("objective.name", _unknown("objective.name", objective.name, names.presets))
    flat = dict(objective.model_extra or {})
    parts: dict[str, tuple[type[Part] | None, dict[str, Any]]] = {}
    for half, known in (("target", names.targets), ("reference", names.references)):
        given = getattr(objective, half)
        if given is not None:
            given = {"name": given} if isinstance(given, str) else dict(given)
            name = given.pop("name", None if preset is None else getattr(preset, half) or NONE)
            place = f"objective.{half}"
            if half == "reference" and name == NONE:
                if given:
                    raise KeyedError(place, f"unknown key {place}.{next(iter(given))}: {NONE} has no options")
                parts[half] = None, {}
            elif not isinstance(name, str) or name not in known:
                choices = [*known, NONE] if half == "reference" else list(known)
                raise KeyedError(f"{place}.name", _unknown(f"{place}.name", name, choices))
            else:
                parts[half] = known[name], given
        elif preset is None:
            raise KeyedError(
                f"objective.{half}", f"objective.{half} is missing: objective.name = null names no method"
            )
        else:
            name = getattr(preset, half)
            part = None if name is None else known[name]
            own = (
                {}
                if part is None
                else {key: value for key, value in preset.fixed.items() if key in part.Options.model_fields}
            )
            for key in [key for key in flat if _is_flat_option(part, preset, key)]:
                own[key] = flat.pop(key)
            parts[half] = part, own
    if flat:
        key = next(iter(flat))
        raise KeyedError(f"objective.{key}", _lacks(objective, preset, key))
    (target, of_target), (reference, of_reference) = parts["target"], parts["reference"]
    assert target is not None and issubclass(target, TargetLoss)
    assert reference is None or issubclass(reference, ReferenceLoss)
    explicit = {half for half in ("target", "reference") if getattr(objective, half) is not None}
    choice = Choice(
        None,
        target,
        _validated(target, of_target, "objective.target" if "target" in explicit else "objective"),
        reference,
        Section()
        if reference is None
        else _validated(
            reference, of_reference, "objective.reference" if "reference" in explicit else "objective"
        ),
    )
    if reference is None and (objective.weight is not None or objective.reference_every != 1):
        key = "weight" if objective.weight is not None else "reference_every"
        raise KeyedError(f"objective.{key}", _lacks(objective, preset, key))
    return choice._replace(preset=_preset_of(choice, preset))


def _is_flat_option(part: type[Part] | None, preset: Preset, key: str) -> bool:
    return part is not None and key in part.Options.model_fields and key not in (*preset.fixed, *preset.hidden)


def _validated(part: type[Part], options: Mapping[str, Any], place: str) -> Section:
    try:
        return part.Options.model_validate_json(json.dumps(options))
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
        mistake = next((each for each in mistakes if each["type"] == "extra_forbidden"), mistakes[0])
        key = ".".join([place, *map(str, mistake["loc"][:1])])
        if mistake["type"] == "extra_forbidden":
            own = list(part.Options.model_fields)
            hint = nearest(str(mistake["loc"][0]), own)
            raise KeyedError(
                key, f"unknown key {key}{hint} (options of {part.name}: {', '.join(own) or 'none'})"
            ) from None
        messages = [each["msg"] for each in mistakes if each["loc"][:1] == mistake["loc"][:1]]
        said = " or ".join(message[0].lower() + message[1:] for message in messages)
        raise KeyedError(key, f"{key} = {json.dumps(mistake['input'], default=str)[:200]}: {said}") from None


def _preset_of(choice: Choice, given: Preset | None) -> Preset | None:
    """The preset whose parts, fixed and hidden options these are; the given one first."""
    candidates = [*([given] if given is not None else []), *table().presets.values()]
    reference = None if choice.reference is None else choice.reference.name
    for preset in candidates:
        if (preset.target, preset.reference) != (choice.target.name, reference):
            continue
        values = choice.target_options.model_dump() | choice.reference_options.model_dump()
        defaults = {
            name: field.default for part in _parts(preset) for name, field in part.Options.model_fields.items()
        }
        wanted = {name: defaults[name] for name in preset.hidden} | dict(preset.fixed)
        if all(values[name] == value for name, value in wanted.items()):
            return preset
    return None


def _unknown(key: str, name: Any, known: Any) -> str:
    known = list(known)
    hint = nearest(name, known) if isinstance(name, str) else ""
    return f"{key} = {json.dumps(name, default=str)[:200]}: expected one of {', '.join(known)}{hint}"


def _lacks(objective: ObjectiveConfig, preset: Preset | None, key: str) -> str:
    if preset is None or objective.target is not None or objective.reference is not None:
        return (
            f"unknown key objective.{key}: the options of a part that is named in objective.target or "
            "objective.reference stand in that section, next to its name"
        )
    own = [*(["weight", "reference_every"] if preset.reference is not None else []), *options_of(preset)]
    if key in preset.fixed:
        return f"objective.{key}: objective.name = {preset.name} fixes it at {json.dumps(preset.fixed[key])}; remove it"
    return (
        f"unknown key objective.{key}{nearest(key, own)} (options of objective.name = {preset.name}: "
        f"{', '.join(own) or 'none'})"
    )


def resolve(objective: ObjectiveConfig) -> ObjectiveConfig:
    """The same objective with all options written out: by the name of its preset, or as two parts.

    Raises:
        KeyedError: as :func:`choose`.
    """
    choice = choose(objective)
    common = {"weight": objective.weight, "reference_every": objective.reference_every}
    values = choice.target_options.model_dump() | choice.reference_options.model_dump()
    if choice.preset is not None:
        own = {name: values[name] for name in options_of(choice.preset)}
        return ObjectiveConfig(name=choice.preset.name, **common, **own)
    reference: dict[str, Any] = {"name": NONE}
    if choice.reference is not None:
        reference = {"name": choice.reference.name, **choice.reference_options.model_dump()}
    target = {"name": choice.target.name, **choice.target_options.model_dump()}
    return ObjectiveConfig(name=None, **common, target=target, reference=reference)


def drop_inherited(objective: dict[str, Any], inherited: set[str]) -> None:
    """Removes options of a base config's method that the method now chosen lacks.

    Args:
        objective: the ``objective`` section, not validated; changed in place.
        inherited: keys of it that stood with another method's name.
    """
    preset = table().presets.get(objective.get("name", ObjectiveConfig().name))
    if preset is None:
        return
    allowed = {"name"}
    for half in ("target", "reference"):
        if objective.get(half) is not None and half not in inherited:
            allowed |= {half}
            has_reference = half == "reference" and objective[half] != NONE
        else:
            part = getattr(preset, half)
            options = {} if part is None else getattr(table(), f"{half}s")[part].Options.model_fields
            allowed |= set(options) - set(preset.fixed) - set(preset.hidden)
            has_reference = half == "reference" and part is not None
        allowed |= {"weight", "reference_every"} if has_reference else set()
    for key in inherited - allowed:
        objective.pop(key, None)


def needs(objective: ObjectiveConfig) -> Needs:
    """The requirements of the method that an ``objective`` section chooses.

    Raises:
        ConfigError: an unknown name or option.
    """
    return _choose(objective).needs


def create(objective: ObjectiveConfig, width: int) -> Method:
    """The method that an ``objective`` section chooses, for embeddings of ``width`` elements.

    Raises:
        ConfigError: an unknown name or option.
    """
    choice, every = _choose(objective), objective.reference_every
    setting = Setting(width)
    reference = None
    if choice.reference is not None:
        weight = choice.reference.default_weight if objective.weight is None else objective.weight
        # A batch at every k-th step counts k times as much.
        setting = Setting(width, every * weight, every)
        reference = choice.reference(choice.reference_options, setting)
    return Method(choice.target(choice.target_options, setting), reference)


def target_options(objective: ObjectiveConfig) -> Section:
    """The options of the target loss.

    Raises:
        ConfigError: an unknown name or option.
    """
    return _choose(objective).target_options


def title_of(objective: ObjectiveConfig) -> str:
    """The method's name in figures and tables.

    Raises:
        ConfigError: an unknown name or option.
    """
    return _choose(objective).title


def _choose(objective: ObjectiveConfig) -> Choice:
    try:
        return choose(objective)
    except KeyedError as error:
        raise ConfigError(str(error)) from error
