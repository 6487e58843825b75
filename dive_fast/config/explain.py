"""The first mistake of a config in one line: its key, what is expected, the nearest valid key."""

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dive_fast.config.origins import Origins
from dive_fast.config.schema import Config
from dive_fast.config.section import KeyedError, Section, section_type, sections
from dive_fast.errors import nearest


def first_mistake(error: ValidationError) -> ErrorDetails:
    """The mistake to report: an unknown key is usually the cause of a missing one, so it comes first."""
    mistakes = error.errors(include_url=False)
    return next((mistake for mistake in mistakes if mistake["type"] == "extra_forbidden"), mistakes[0])


SYNONYMS = {
    "lr": "train.learning_rate",
    "wd": "train.weight_decay",
    "bs": "data.target.batch_size",
    "batch_size": "data.target.batch_size",
    "lambda": "objective.weight",
    "warmup": "train.warmup_steps",
    "num_workers": "data.target.workers",
    "workers": "data.target.workers",
    "output_dir": "train.output",
    "fp16": "train.precision",
    "bf16": "train.precision",
}
"""Keys as other projects name them."""


def nearest_key(place: str, valid: Sequence[str]) -> str:
    """The end of a message that names the nearest key, with its sections."""
    section, _, name = place.rpartition(".")
    if name in SYNONYMS:
        return f"; did you mean {SYNONYMS[name]}?"
    if near := difflib.get_close_matches(name, valid, n=1, cutoff=0.5):
        return f"; did you mean {f'{section}.' if section else ''}{near[0]}?"
    elsewhere = [at for at, part in sections(Config, "") if "<" not in at and name in part.model_fields]
    return f"; did you mean {elsewhere[0]}.{name}?" if elsewhere else ""


def explain(error: ValidationError) -> str:
    """The first mistake in one line: the key, its place, what is expected, the nearest valid key."""
    mistakes, first = error.errors(include_url=False), first_mistake(error)
    place = key_path(first)
    alternatives = [_plain(mistake["msg"]) for mistake in mistakes if key_path(mistake) == place]
    if first["type"] == "extra_forbidden":
        valid = list(_section_at(first["loc"][:-1]))
        return f"unknown key {place}{nearest_key(place, valid)} (valid: {', '.join(valid)})"
    if first["type"] == "missing":
        return f"{place} is missing"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    return f"{place} = {shorten_json(first['input'])}: {' or '.join(alternatives)}"


def key_path(mistake: ErrorDetails) -> str:
    """The dotted key of a mistake; empty where it concerns several sections."""
    if isinstance(cause := mistake.get("ctx", {}).get("error"), KeyedError):
        return cause.key
    keys: list[str] = []
    holder: Any = Config
    for key in mistake["loc"]:
        # Below a plain value pydantic names the branches of a union; they are no keys of the file.
        if holder is None and isinstance(key, str):
            break
        keys.append(str(key))
        holder = _inside(holder, key)
    return ".".join(keys)


_KEY = re.compile(r"[a-z]+(?:\.[\w\[\]-]+)+|model(?=:)")
_SUBJECTS = ("path", "pretrained", "name")
"""Keys that a message is about if it names only their section."""


def named_key(message: str) -> str | None:
    """The dotted key that a message begins with; None where it begins with something that is not a key."""
    match = _KEY.match(message)
    if match is None:
        return None
    holder: Any = Config
    for part in match[0].split("."):
        if holder is None or (get_origin(holder) is not dict and part not in getattr(holder, "model_fields", {})):
            # Options of methods and of DeepSpeed are not fields of a section.
            return match[0] if match[0].startswith(("objective.", "deepspeed.")) else None
        holder = _inside(holder, part)
    return match[0]


def with_origin(message: str, origins: Origins) -> str:
    """A message that begins with a key, with the origin of the key at its end; other messages are unchanged."""
    key = named_key(message)
    if key is None:
        return message
    if section_at(key) is None:
        return message if message.startswith(f"{key} is missing") else f"{message} ({origins.of(key)})"
    subject = next((f"{key}.{name}" for name in _SUBJECTS if f"{key}.{name}" in origins), None)
    return message if subject is None else f"{message} ({subject} is {origins.of(subject)})"


def section_at(key: str) -> type[Section] | None:
    """The section at a dotted key; None where the key is a value."""
    holder: Any = Config
    for part in key.split("."):
        holder = _inside(holder, part)
    return holder if isinstance(holder, type) and issubclass(holder, Section) else None


def shorten(text: str) -> str:
    """A quoted text of bounded length."""
    return _cut(repr(text))


def shorten_json(value: Any) -> str:
    """A value in JSON, of bounded length."""
    return _cut(json.dumps(value, default=str))


def expected_one_of(key: str, value: Any, names: Sequence[str]) -> str:
    """The message for a value that is not one of the names, with the nearest name."""
    hint = nearest(value, names) if isinstance(value, str) else ""
    return f"{key} = {shorten_json(value)}: expected one of {', '.join(names)}{hint}"


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:150]} ... {text[-45:]}"


def _plain(message: str) -> str:
    return message[0].lower() + message[1:]


def _section_at(location: tuple[int | str, ...]) -> dict[str, FieldInfo]:
    holder: Any = Config
    for key in location:
        holder = _inside(holder, key)
    return dict(holder.model_fields)


def _inside(holder: Any, key: int | str) -> Any:
    """The type at a key of the config: a section, a dict of sections, or None for a plain value."""
    if get_origin(holder) is dict:
        return get_args(holder)[1]  # the key is a name that the user chose
    field = getattr(holder, "model_fields", {}).get(key)
    annotation = None if field is None else field.annotation
    return annotation if get_origin(annotation) is dict else section_type(annotation)
