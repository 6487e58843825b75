"""The methods by name: from the ``objective`` section of a config to a method.

Every module of this folder is read once: its :class:`TargetLoss` and :class:`ReferenceLoss` classes by their
names, and its ``PRESETS``. A new method is one new file; nothing is listed here. :func:`add` takes parts from
outside.
"""

import importlib
import json
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple, get_args

from dive_fast import methods
from dive_fast.config.explain import expected_one_of, nearest_key, shorten_json
from dive_fast.config.options import validate_options
from dive_fast.config.schema import ObjectiveConfig
from dive_fast.config.section import KeyedError, Section
from dive_fast.errors import ConfigError, warn_on_main_rank
from dive_fast.methods.method import (
    HeadOptions,
    Method,
    Needs,
    Part,
    Preset,
    ReferenceLoss,
    Setting,
    TargetLoss,
    Teacher,
    needs_of,
)

NONE = "none"
"""The name of no reference loss."""
COMMON = ("name", "weight", "reference_every", "target", "reference")
"""Keys of ``objective`` that are options of no part."""
HALVES = ("target", "reference")
TEACHERS = get_args(Teacher)


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
    """All parts and presets, with those of :func:`add`."""
    shipped = _shipped()
    return Table(dict(shipped.targets), dict(shipped.references), dict(shipped.presets))


@cache
def _shipped() -> Table:
    known = Table({}, {}, {})
    for module in sorted(pkgutil.iter_modules(methods.__path__), key=lambda module: module.name):
        known = _extended(known, importlib.import_module(f"{methods.__name__}.{module.name}"))
    _check(known)
    return known


def add(module: ModuleType) -> None:
    """Adds the parts and presets of a module from outside of this folder, for configs read after it.

    Raises:
        ValueError: a name exists already or cannot be used, a part's teacher is unknown, or a preset names a part
            that does not exist; nothing is added.
    """
    extended = _extended(table(), module)
    _check(extended)
    table().targets.update(extended.targets)
    table().references.update(extended.references)
    table().presets.update(extended.presets)


def _extended(known: Table, module: ModuleType) -> Table:
    """A copy of a table with the parts and presets of a module."""
    targets, references, presets = dict(known.targets), dict(known.references), dict(known.presets)
    for part in vars(module).values():
        if not isinstance(part, type) or part.__module__ != module.__name__ or not hasattr(part, "name"):
            continue
        is_new = True
        if issubclass(part, TargetLoss):
            is_new = targets.setdefault(part.name, part) is part
        elif issubclass(part, ReferenceLoss):
            is_new = references.setdefault(part.name, part) is part
        if not is_new:
            raise ValueError(f"{module.__name__}: a part named {part.name} exists already")
    for preset in getattr(module, "PRESETS", ()):
        if presets.setdefault(preset.name, preset) is not preset:
            raise ValueError(f"{module.__name__}: a method named {preset.name} exists already")
    return Table(targets, references, presets)


def _check(known: Table) -> None:
    """Validates names and teachers of the parts, and that presets name parts with unambiguous options."""
    if NONE in known.references:
        raise ValueError(f"a reference loss named {NONE}: a config says so for no reference loss; rename it")
    for loss in (*known.targets.values(), *known.references.values()):
        if "name" in loss.Options.model_fields:
            raise ValueError(f"loss {loss.name}: an option called name: a config names the loss so; rename it")
    for target in known.targets.values():
        if target.teacher not in TEACHERS:
            raise ValueError(f"loss {target.name}: teacher = {target.teacher!r}: expected {', '.join(TEACHERS)}")
    for preset in known.presets.values():
        parts: list[type[Part] | None] = [known.targets.get(preset.target)]
        parts += [] if preset.reference is None else [known.references.get(preset.reference)]
        options: list[str] = []
        for name, part in zip((preset.target, preset.reference), parts, strict=False):
            if part is None:
                raise ValueError(f"method {preset.name}: no part named {name}")
            options += part.Options.model_fields
        if len({*options, *COMMON}) < len(options) + len(COMMON):
            raise ValueError(f"method {preset.name}: two options of one name among {', '.join(options)}")
        if unknown := {*preset.fixed, *preset.hidden} - set(options):
            raise ValueError(f"method {preset.name}: fixes or hides {', '.join(unknown)}, which no part has")


def options_of(preset: Preset) -> dict[str, type[Part]]:
    """The options that a config can set for a preset, each with the part that reads it."""
    return {name: part for part in _parts(preset) for name in _free_options(part, preset)}


def _parts(preset: Preset) -> list[type[Part]]:
    return [part for half in HALVES if (part := _part_of(preset, half)) is not None]


class _Selection(NamedTuple):
    """A part with options that are not validated yet."""

    part: type[Part] | None
    options: dict[str, Any]
    keys: dict[str, str]
    """The dotted key of the config that sets each option."""


def choose(objective: ObjectiveConfig) -> Choice:
    """The parts of an ``objective`` section, options validated and defaults filled in.

    Raises:
        KeyedError: an unknown name, or an option that the method lacks or cannot have.
    """
    preset = _named_preset(objective)
    flat = dict(objective.model_extra or {})
    selected = {half: _select(objective, preset, half, flat) for half in HALVES}
    if flat:
        raise _unknown_option(objective, preset, next(iter(flat)))
    target, reference = selected["target"].part, selected["reference"].part
    assert target is not None and issubclass(target, TargetLoss)
    assert reference is None or issubclass(reference, ReferenceLoss)
    if reference is None and (objective.weight is not None or objective.reference_every != 1):
        raise _unknown_option(objective, preset, "weight" if objective.weight is not None else "reference_every")
    options = [_validate(selected[half]) for half in HALVES]
    choice = Choice(None, target, options[0], reference, options[1])
    return choice._replace(preset=_preset_of(choice, preset))


def _named_preset(objective: ObjectiveConfig) -> Preset | None:
    presets = table().presets
    if objective.name is not None and objective.name not in presets:
        raise KeyedError("objective.name", expected_one_of("objective.name", objective.name, list(presets)))
    return None if objective.name is None else presets[objective.name]


def _select(objective: ObjectiveConfig, preset: Preset | None, half: str, flat: dict[str, Any]) -> _Selection:
    """The part of one half: the one that its section names, or the preset's with the options set for it.

    Args:
        flat: options that stand in ``objective`` itself; those of the preset's part are removed.
    """
    key = f"objective.{half}"
    value = getattr(objective, half)
    section: dict[str, Any] = {"name": value} if isinstance(value, str) else dict(value or {})
    keys = {option: f"{key}.{option}" for option in section}
    if "name" in section:
        part = _named_part(half, section.pop("name"))
        if part is None and section:
            option = next(iter(section))
            raise KeyedError(keys[option], f"unknown key {keys[option]}: {NONE} has no options")
        return _Selection(part, section, keys)
    if preset is None:
        missing = f"{key}.name" if section else key
        names = ", ".join(_part_names(half))
        raise KeyedError(missing, f"{missing} is missing: name one of {names}, or a method in objective.name")
    part = _part_of(preset, half)
    if part is None:
        if section:
            option = next(iter(keys.values()))
            raise KeyedError(
                option, f"{option} needs {key}.name: objective.name = {preset.name} has no {half} loss"
            )
        return _Selection(None, {}, {})
    own = _free_options(part, preset)
    for option in section:
        if option in preset.fixed:
            raise KeyedError(keys[option], _is_fixed(keys[option], preset, option))
        if option in flat:
            raise KeyedError(keys[option], f"objective.{option} and {keys[option]} set the same option; keep one")
    direct = {option: flat.pop(option) for option in list(flat) if option in own}
    fixed = {option: value for option, value in preset.fixed.items() if option in part.Options.model_fields}
    return _Selection(part, fixed | direct | section, {option: f"objective.{option}" for option in direct} | keys)


def _named_part(half: str, name: Any) -> type[Part] | None:
    if half == "reference" and name == NONE:
        return None
    parts = _known_parts(half)
    if not isinstance(name, str) or name not in parts:
        raise KeyedError(
            f"objective.{half}.name", expected_one_of(f"objective.{half}.name", name, _part_names(half))
        )
    return parts[name]


def _known_parts(half: str) -> Mapping[str, type[Part]]:
    return table().targets if half == "target" else table().references


def _part_names(half: str) -> list[str]:
    return [*_known_parts(half), *([NONE] if half == "reference" else [])]


def _part_of(preset: Preset, half: str) -> type[Part] | None:
    name = getattr(preset, half)
    return None if name is None else _known_parts(half)[name]


def _free_options(part: type[Part], preset: Preset) -> list[str]:
    """The options of a part that a config can set when the preset is chosen."""
    return [name for name in part.Options.model_fields if name not in (*preset.fixed, *preset.hidden)]


def _validate(selection: _Selection) -> Section:
    part, options, keys = selection
    return Section() if part is None else validate_options(part.Options, options, keys, part.name)


def _preset_of(choice: Choice, named: Preset | None) -> Preset | None:
    """A preset with the same parts, fixed options and defaults of hidden options; the named one if it is one."""
    reference = None if choice.reference is None else choice.reference.name
    values = choice.target_options.model_dump() | choice.reference_options.model_dump()
    for preset in (*([named] if named is not None else []), *table().presets.values()):
        if (preset.target, preset.reference) != (choice.target.name, reference):
            continue
        fields = {name: field for part in _parts(preset) for name, field in part.Options.model_fields.items()}
        expected = {name: fields[name].default for name in preset.hidden} | dict(preset.fixed)
        if all(values[name] == value for name, value in expected.items()):
            return preset
    return None


def _is_fixed(key: str, preset: Preset, option: str) -> str:
    return f"{key}: objective.name = {preset.name} fixes it at {json.dumps(preset.fixed[option])}; remove it"


def _unknown_option(objective: ObjectiveConfig, preset: Preset | None, option: str) -> KeyedError:
    """The error of a key of ``objective`` that belongs to no part of the method."""
    key = f"objective.{option}"
    if option in ("weight", "reference_every"):
        method = (
            "this objective"
            if preset is None or preset.reference is not None
            else f"objective.name = {preset.name}"
        )
        return KeyedError(key, f"{key}: {method} has no reference loss; remove it")
    named = [half for half in HALVES if preset is None or isinstance(getattr(objective, half), str | dict)]
    for half in named:
        value = getattr(objective, half)
        name = value if isinstance(value, str) else (value or {}).get("name")
        part = _known_parts(half).get(name) if isinstance(name, str) else None
        if part is not None and option in part.Options.model_fields:
            section = json.dumps({"name": name, option: "..."})
            return KeyedError(key, f"unknown key {key}: set it in objective.{half}, as {section}")
    if preset is None:
        return KeyedError(key, f"unknown key {key}{nearest_key(key, COMMON)} (valid: {', '.join(COMMON)})")
    if option in preset.fixed:
        return KeyedError(key, _is_fixed(key, preset, option))
    own = [*(["weight", "reference_every"] if preset.reference is not None else []), *options_of(preset)]
    hint = nearest_key(key, [*COMMON, *own])
    return KeyedError(
        key, f"unknown key {key}{hint} (options of objective.name = {preset.name}: {', '.join(own) or 'none'})"
    )


def resolve(objective: ObjectiveConfig) -> ObjectiveConfig:
    """The same objective with all options written out: by the name of its preset, or as two parts.

    Raises:
        KeyedError: as :func:`choose`.
    """
    choice = choose(objective)
    section: dict[str, Any] = {"weight": objective.weight, "reference_every": objective.reference_every}
    if choice.preset is not None:
        values = choice.target_options.model_dump() | choice.reference_options.model_dump()
        section |= {"name": choice.preset.name} | {name: values[name] for name in options_of(choice.preset)}
        return ObjectiveConfig(**section)
    reference: dict[str, Any] = {"name": NONE}
    if choice.reference is not None:
        reference = {"name": choice.reference.name, **choice.reference_options.model_dump()}
    target = {"name": choice.target.name, **choice.target_options.model_dump()}
    return ObjectiveConfig(**section, name=None, target=target, reference=reference)


def drop_inherited(objective: dict[str, Any], inherited: Mapping[str, Mapping[str, Any]]) -> None:
    """Removes options that were set for another method: those that the method now chosen lacks, and the weight.

    Options of one name and different defaults are of different size in the two methods, as weights are; they are
    removed too. A value that the method could have kept and that is not its default is reported.

    Args:
        objective: the ``objective`` section, not validated; changed in place.
        inherited: keys of it that were set for another method, e.g. ``decay`` and ``reference.decay``, each with
            the ``objective`` that they were set for.
    """
    name = objective.get("name", ObjectiveConfig().name)
    preset = table().presets.get(name) if isinstance(name, str) else None
    if preset is None and name is not None:
        return  # an unknown name, which the validation refuses
    allowed = {"name"}
    for half in HALVES:
        section = None if half in inherited else objective.get(half)
        part = _part_in(section, half, preset)
        if section is None:
            allowed |= set() if preset is None or part is None else set(_free_options(part, preset))
        else:
            options = [] if part is None else [f"{half}.{option}" for option in part.Options.model_fields]
            allowed |= {half, f"{half}.name", *options}
        allowed |= {"weight", "reference_every"} if half == "reference" and part is not None else set()
    parts = (*table().targets.values(), *table().references.values())
    known = {*COMMON, *(option for part in parts for option in part.Options.model_fields)}
    for key in inherited.keys() - allowed:
        section_key, _, option = key.partition(".")
        if (option or key) not in known:
            continue  # a mistake in any method, which the validation reports
        section = objective.get(section_key) if option else objective
        if isinstance(section, dict):
            section.pop(option or key, None)
    for key in sorted(inherited.keys() & allowed):
        _drop_of_other_size(objective, key, inherited[key])
    # ``part`` is that of the reference loss, the last half.
    if "weight" in inherited and "weight" in objective and part is not None:
        default = getattr(part, "default_weight", None)
        if objective["weight"] not in (None, default):
            _report_unused("weight", objective["weight"], part, f"{default:g}")
            del objective["weight"]


def _drop_of_other_size(objective: dict[str, Any], key: str, former: Mapping[str, Any]) -> None:
    """Removes an inherited option whose default is another one in the part that it was set for.

    Args:
        key: dotted key in ``objective``.
        former: the ``objective`` that it was set for.
    """
    half, _, option = key.rpartition(".")
    section = objective.get(half) if half else objective
    parts = [_part_with(each, half, option) for each in (former, objective)]
    if not isinstance(section, dict) or option not in section or None in parts:
        return
    old, new = (part.Options.model_fields[option].default for part in parts if part is not None)
    if parts[0] is parts[1] or old == new:
        return
    if section[option] not in (old, new):
        assert parts[1] is not None
        _report_unused(key, section[option], parts[1], shorten_json(new))
    del section[option]


def _report_unused(key: str, value: Any, part: type[Part], default: str) -> None:
    warn_on_main_rank(
        f"objective.{key} = {shorten_json(value)} was set for another method and is not used: the default of "
        f"{part.name} is {default}; set objective.{key} together with the method"
    )


def _part_with(objective: Mapping[str, Any], half: str, option: str) -> type[Part] | None:
    """The part of an ``objective``, not validated, that has an option.

    Args:
        half: the half in whose section the option stands; empty: it stands in ``objective`` itself.
    """
    name = objective.get("name", ObjectiveConfig().name)
    preset = table().presets.get(name) if isinstance(name, str) else None
    for each in (half,) if half else HALVES:
        part = _part_in(objective.get(each), each, preset)
        if part is not None and option in part.Options.model_fields:
            return part
    return None


def _part_in(section: Any, half: str, preset: Preset | None) -> type[Part] | None:
    """The part that a half's section, not validated, names; the preset's where it names none."""
    name = section.get("name") if isinstance(section, Mapping) else section
    if name is None:
        return None if preset is None else _part_of(preset, half)
    return _known_parts(half).get(name) if isinstance(name, str) else None


def needs(objective: ObjectiveConfig) -> Needs:
    """The requirements of the method that an ``objective`` section chooses.

    Raises:
        ConfigError: an unknown name or option.
    """
    return _choose(objective).needs


def is_shipped(objective: ObjectiveConfig) -> bool:
    """Whether a new process knows the method that an ``objective`` section chooses, without :func:`add`.

    Raises:
        ConfigError: an unknown name or option.
    """
    choice, shipped = _choose(objective), _shipped()
    parts = [shipped.targets.get(choice.target.name) is choice.target]
    parts += (
        [] if choice.reference is None else [shipped.references.get(choice.reference.name) is choice.reference]
    )
    return all(parts) and (objective.name is None or objective.name in shipped.presets)


def create(
    objective: ObjectiveConfig, width: int, *, total_steps: int = 1, steps_per_epoch: int = 1, seed: int = 0
) -> Method:
    """The method that an ``objective`` section chooses, for embeddings of ``width`` elements.

    Args:
        total_steps: steps of the complete run.
        steps_per_epoch: steps of one pass over the target set.
        seed: ``train.seed``.

    Raises:
        ConfigError: an unknown name or option.
    """
    choice, every = _choose(objective), objective.reference_every
    setting = Setting(width, total_steps=total_steps, steps_per_epoch=steps_per_epoch, seed=seed)
    reference = None
    if choice.reference is not None:
        weight = choice.reference.default_weight if objective.weight is None else objective.weight
        # A batch at every k-th step counts k times as much.
        weighted = setting._replace(weight=every * weight, reference_every=every)
        reference = choice.reference(choice.reference_options, weighted)
    return Method(choice.target(choice.target_options, setting), reference)


def target_options(objective: ObjectiveConfig) -> Section:
    """The options of the target loss.

    Raises:
        ConfigError: an unknown name or option.
    """
    return _choose(objective).target_options


def has_head_anchor(objective: ObjectiveConfig) -> bool:
    """Whether a head has a start worth keeping to: made from class prompts, or probed, and not random.

    Raises:
        ConfigError: an unknown name or option.
    """
    options = target_options(objective)
    return not isinstance(options, HeadOptions) or options.head_start == "zero_shot" or options.probe


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
