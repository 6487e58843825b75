"""The grid of a sweep: keys with their values, and the runs that their combinations make."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dive_fast.config.schema import Config
from dive_fast.errors import ConfigError
from dive_fast.identity import digest

SEED, CACHE = "train.seed", "teacher.path"
SET_BY_SWEEP = ("train.output", "train.resume", CACHE)
"""Keys that a sweep sets itself."""
MEASUREMENT = ("evaluate.sets", "evaluate.geometry", "evaluate.probe")
"""Sections that say what is measured: runs that differ in them cannot be compared."""
MAX_NAME = 80
"""Maximum characters of a run folder's name."""
_OPENING, _CLOSING = "[{", "]}"
LOADING = ("batch_size", "workers", "hw_decoder_load")
"""Keys of ``data.reference`` that do not change the teacher's embeddings."""
WARMUP_SHARE, MAX_WARMUP_SHARE = 10, 5
"""A warm-up longer than a fifth of a short run is set to a tenth of it."""


@dataclass(frozen=True)
class Value:
    """A value of a swept key."""

    text: str
    """The value as in an override: JSON, otherwise a string."""

    @property
    def parsed(self) -> Any:
        """The value as the config reads it."""
        try:
            return json.loads(self.text)
        except ValueError:
            return self.text

    @property
    def number(self) -> float | None:
        """The value as a finite number; None if it is not one."""
        parsed = self.parsed
        if isinstance(parsed, bool) or not isinstance(parsed, int | float) or not math.isfinite(parsed):
            return None
        return float(parsed)

    def __str__(self) -> str:
        """The value in tables and names: equal numbers have equal texts."""
        return self.text if self.number is None else number_text(self.number)


Values = Mapping[str, Value]
"""The values of one run, by key."""


@dataclass(frozen=True)
class Planned:
    """A run of a sweep."""

    name: str
    """Name of its folder in the sweep's folder."""
    values: Values
    overrides: tuple[str, ...]
    """All overrides of its config."""
    settings: str
    """Digest of its complete config."""
    label: str
    """Its values as text."""

    @property
    def point(self) -> tuple[tuple[str, str], ...]:
        """The values without the seed, which runs of one point share."""
        return tuple((key, str(value)) for key, value in self.values.items() if key != SEED)


def number_text(number: float) -> str:
    """A number in few characters: ``1e-5``, ``1000``, ``0.3``."""
    text = f"{number:g}" if float(f"{number:g}") == number else repr(number)
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", text).replace("e+", "e")


def describe(values: Values) -> str:
    """The values as text: ``objective.weight=100, train.learning_rate=1e-5``."""
    return ", ".join(f"{key}={value}" for key, value in values.items()) or "the config as it is"


def describe_over(over: Mapping[str, Sequence[Value]]) -> str:
    """The keys of a grid with their values as text."""
    return "; ".join(f"{key} = {' | '.join(map(str, values))}" for key, values in over.items())


def parse_over(items: Sequence[str], seeds: str | None = None) -> dict[str, list[Value]]:
    """The keys of a grid and their values.

    Args:
        items: ``section.key=value,value,...``; commas inside of brackets and quotes do not separate values.
        seeds: values of ``train.seed``, separated by commas.

    Raises:
        ConfigError: an item without a key or value, a duplicate key or value, or a key that cannot be swept.
    """
    over: dict[str, list[Value]] = {}
    for item in [*items, *([] if seeds is None else [f"{SEED}={seeds}"])]:
        key, separator, text = item.partition("=")
        if not separator or "." not in key:
            raise ConfigError(f"--over {item}: expected section.key=value,value, e.g. objective.weight=10,100")
        if key in over:
            option = "--over and --seeds" if key == SEED and seeds is not None else "--over"
            raise ConfigError(f"{option} {key}: the key is named twice; write all its values after one =")
        over[key] = values = [Value(part) for part in split_values(text, f"--over {key}")]
        shown = [str(value) for value in values]
        if repeated := next((text for text in shown if shown.count(text) > 1), None):
            raise ConfigError(f"--over {key}: duplicate value {repeated}; keep one")
        _check_key(key)
    return over


def _check_key(key: str) -> None:
    if key in SET_BY_SWEEP:
        raise ConfigError(f"--over {key}: the sweep sets this key itself; --output names its folder")
    if key.startswith("evaluate.") and any(f"{key}.".startswith(f"{part}.") for part in MEASUREMENT):
        raise ConfigError(
            f"--over {key}: runs that are measured on different data cannot be compared; set it once"
        )


def split_values(text: str, source: str = "--over") -> list[str]:
    """Splits a text at its commas, except inside of brackets and double quotes.

    Raises:
        ConfigError: an empty value, or a bracket or quote that is not closed.
    """
    parts, start, depth, quoted, escaped = [], 0, 0, False, False
    for position, character in enumerate(text):
        if quoted:
            quoted = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            quoted = True
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    if quoted or depth:
        raise ConfigError(f"{source}={text}: a {'quote' if quoted else 'bracket'} is not closed")
    if not all(part.strip() for part in parts):
        raise ConfigError(f"{source}={text}: an empty value; write values between single commas")
    return [part.strip() for part in parts]


def short_runs(
    named: Collection[str], steps: int | None, epochs: int | None, warmup_steps: Callable[[], int]
) -> list[str]:
    """Overrides that make runs short, with a warm-up that fits unless it is set.

    Args:
        named: keys that are overridden or swept.
        steps: ``--steps``, which sets ``train.max_steps``.
        epochs: ``--epochs``, which sets ``train.epochs``.
        warmup_steps: reads the warm-up of the config.

    Raises:
        ConfigError: a key that an option sets is set next to it.
    """
    added = []
    for option, key, value in (("--steps", "train.max_steps", steps), ("--epochs", "train.epochs", epochs)):
        if value is not None:
            if key in named:
                raise ConfigError(f"{option} sets {key}, which is set next to it; keep one")
            added.append(f"{key}={value}")
    if steps is not None and "train.warmup_steps" not in named and warmup_steps() * MAX_WARMUP_SHARE > steps:
        added.append(f"train.warmup_steps={max(1, steps // WARMUP_SHARE)}")
    return added


def plan(
    over: Mapping[str, Sequence[Value]],
    overrides: Sequence[str],
    output: Path,
    load: Callable[[Sequence[str]], Config],
) -> list[Planned]:
    """The runs of a grid, in the order of its keys; each config is loaded.

    Args:
        overrides: overrides of all runs.
        output: folder of the sweep.
        load: reads the config with overrides.

    Raises:
        ConfigError: a config is invalid, or two runs have the same one.
    """
    _check_overrides(over, overrides)
    varied = [key for key, values in over.items() if len(values) > 1] or list(over)
    labels = _labels(varied)
    grid: list[tuple[Values, list[str], Config]] = []
    for combination in itertools.product(*over.values()):
        values: Values = dict(zip(over, combination, strict=True))
        chosen = [*overrides, *(f"{key}={value.text}" for key, value in values.items())]
        grid.append((values, chosen, load(chosen)))
    if grid and grid[0][2].train.resume != "auto":
        raise ConfigError("train.resume: a sweep resumes its own runs; remove the key, or start a run by train")
    caches = _caches([config for _, _, config in grid], output)
    runs: list[Planned] = []
    known: dict[str, Values] = {}
    for (values, chosen, config), cache in zip(grid, caches, strict=True):
        content = digest(config.model_dump(mode="json"))
        if content in known:
            raise ConfigError(f"--over: {describe(known[content])} and {describe(values)} are the same settings")
        known[content] = values
        name = run_name({labels[key]: values[key] for key in varied})
        paths = [_path_override("train.output", output / name)]
        paths += [] if cache is None else [_path_override(CACHE, cache)]
        label = describe({key: values[key] for key in varied})
        runs.append(Planned(name, values, (*chosen, *paths), digest([content, *paths]), label))
    names = [run.name.lower() for run in runs]
    if repeated := next((run.name for run in runs if names.count(run.name.lower()) > 1), None):
        raise ConfigError(
            f"--over: several runs would have the name {repeated}; make their values differ in letters"
        )
    return runs


def _path_override(key: str, path: Path) -> str:
    """The override of a path, in quotes if it would be read as a number or other JSON."""
    text = str(path)
    return f"{key}={text if isinstance(Value(text).parsed, str) else json.dumps(text)}"


def _check_overrides(over: Mapping[str, object], overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0]
        if key in over:
            raise ConfigError(f"{key} is in --over and in the override {override}; keep one")
        if key == "train.output":
            raise ConfigError(f"{override}: the sweep sets this key itself; --output names its folder")


def _caches(configs: Sequence[Config], output: Path) -> list[Path | None]:
    """The teacher cache of each run: one for all runs of equal teachers; None leaves ``teacher.path`` as it is.

    Raises:
        ConfigError: ``teacher.path`` names one cache, and the runs need several.
    """
    teachers = [_teacher(config) if config.teacher.mode == "cache" else None for config in configs]
    several = len({teacher for teacher in teachers if teacher is not None}) > 1
    named = next((config.teacher.path for config in configs if config.teacher.path is not None), None)
    if named is not None and several:
        raise ConfigError(
            f"teacher.path = {named} names one teacher cache, but --over changes what the teacher embeds; remove "
            "teacher.path, and each teacher gets a cache in the sweep's folder"
        )
    if named is not None:
        return [None] * len(configs)
    folder = [output / (f"teacher-{teacher[:8]}" if several and teacher else "teacher") for teacher in teachers]
    return [path if teacher is not None else None for path, teacher in zip(folder, teachers, strict=True)]


def _teacher(config: Config) -> str | None:
    """A digest of the settings that a teacher cache depends on; None without a reference set."""
    reference = config.data.reference
    if reference is None:
        return None
    settings = reference.model_dump(mode="json", exclude=set(LOADING))
    crops = None if reference.views == "eval" else config.train.seed
    return digest([config.model.model_dump(mode="json"), settings, config.teacher.dtype, crops])


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """A short name of each key: its last part, or the complete key if two share that."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)}


def run_name(values: Values) -> str:
    """The name of a run folder: ``weight-100_learning_rate-1e-5``, with a digest where that is not unique."""
    exact = "_".join(f"{label}-{value}" for label, value in values.items()) or "run"
    name = re.sub(r"[^A-Za-z0-9.+_-]+", "-", exact)
    if name == exact and len(name) <= MAX_NAME:
        return name
    ending = hashlib.sha256(exact.encode()).hexdigest()[:8]
    return f"{name[: MAX_NAME - 9].strip('-.')}-{ending}"
