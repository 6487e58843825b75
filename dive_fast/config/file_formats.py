"""The formats of config files: JSON with comments, and YAML, both read into the same tree.

YAML is read by PyYAML's parser under the core schema of YAML 1.2, in which ``1e-5`` is a number, and ``no``,
``on`` and dates are strings: PyYAML alone follows YAML 1.1, where ``1e-5`` is a string and ``no`` is false. Keys
are always strings, as in JSON. Nothing in a file is executed, and aliases cannot multiply without a limit.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dive_fast.config.explain import shorten
from dive_fast.io.safe_read import read_text

SUFFIXES = (".json", ".yaml", ".yml")
YAML_SUFFIXES = (".yaml", ".yml")
MAX_DEPTH = 64
"""Maximum depth of nested objects and lists; a config needs five, DeepSpeed's section a few more."""
TOO_DEEP = f"nested more than {MAX_DEPTH} deep; no section needs that"
MAX_YAML_BYTES = 2**20
"""Maximum size of a YAML file, whose parser takes a minute for ten megabytes."""
MAX_YAML_VALUES = 100_000
"""Maximum number of values of a YAML file with its aliases replaced by what they stand for."""


class FormatError(ValueError):
    """Invalid content of a config file.

    Attributes:
        line: the line of the mistake; None where the message has it, or where it is not known.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        """Takes the message and the line, counted from 1."""
        super().__init__(message)
        self.line = line


class Object(dict[str, Any]):
    """An object of a file that remembers its first duplicate key."""

    duplicate: str | None = None

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        """Takes the keys and values in the order of the file."""
        super().__init__(pairs)
        if len(self) < len(pairs):
            self.duplicate = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)


class Content(NamedTuple):
    """The content of a config file."""

    tree: Any
    lines: Mapping[str, int]
    """The line of each dotted key, where the format tells it."""


def read_tree(path: Path) -> Content:
    """The values of a JSON or YAML file, which is chosen by the file's suffix.

    Raises:
        OSError: the file cannot be read.
        FormatError: it is not JSON or YAML, has a key twice, is nested too deeply, or has a text that is not
            Unicode.
    """
    is_yaml = path.suffix.lower() in YAML_SUFFIXES
    try:
        # A byte order mark, which some editors write, is not part of the text.
        text = read_text(path, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"not valid UTF-8 at byte {error.start}: save the file as UTF-8") from None
    except ValueError as error:
        raise FormatError(str(error)) from None
    content = _read_yaml(text) if is_yaml else Content(_read_json(text), {})
    try:
        check_values(content.tree)
    except ValueError as error:
        raise FormatError(f"not valid {'YAML' if is_yaml else 'JSON'}: {error}") from None
    if (key := duplicate_key(content.tree)) is not None:
        raise FormatError(f"duplicate key {key}")
    return content


# JSON

_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|(?://|#)[^\n]*')
_TRAILING_COMMA = re.compile(r",\s*[}\]]")


def parse_json(text: str) -> Any:
    """The value of a JSON text; numbers that are not finite are left to the section that has them.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=Object)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def _read_json(text: str) -> Any:
    # Comments become blanks, so that lines and columns stay.
    plain = _STRING_OR_COMMENT.sub(
        lambda match: match[0] if match[0].startswith('"') else " " * len(match[0]), text
    )
    try:
        return parse_json(plain)
    except json.JSONDecodeError as error:
        before = plain[: error.pos].rstrip()
        comma = len(before) - 1 if before.endswith(",") else error.pos
        if _TRAILING_COMMA.match(plain, comma):
            line = plain.count("\n", 0, comma) + 1
            raise FormatError(f"not valid JSON: line {line} has a comma after the last value; remove it") from None
        block = "; /* is not a comment here: begin each line with //" if plain.startswith("/*", error.pos) else ""
        raise FormatError(f"not valid JSON: {error}{block}") from None
    except ValueError as error:
        raise FormatError(f"not valid JSON: {error}") from None


def duplicate_key(tree: Any) -> str | None:
    """The dotted key of the first duplicate in an object of a tree."""
    if isinstance(tree, Object) and tree.duplicate is not None:
        return tree.duplicate
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    below = ((key, duplicate_key(value)) for key, value in children)
    return next((f"{key}.{duplicate}" for key, duplicate in below if duplicate is not None), None)


def check_values(value: Any, depth: int = 0) -> None:
    """Validates what holds for the values of all sections.

    Raises:
        ValueError: a text is not Unicode or has a zero byte, which no path can hold; or nested too deeply.
    """
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{shorten(value)} contains a zero byte, or is not valid UTF-8")
    elif isinstance(value, dict | list):
        if depth >= MAX_DEPTH:
            raise ValueError(TOO_DEEP)
        for child in [*value, *value.values()] if isinstance(value, dict) else value:
            check_values(child, depth + 1)


# YAML

_TAG = "tag:yaml.org,2002:"
_CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
}
"""Plain scalars that are not strings, and the characters that they begin with (YAML 1.2, section 10.3.2)."""
_CONSTRUCTORS: dict[str, Callable[[str], Any]] = {
    f"{_TAG}null": lambda text: None,
    f"{_TAG}bool": lambda text: {"true": True, "false": False}[text.lower()],
    f"{_TAG}int": lambda text: int(text, 0) if text[:2] in ("0o", "0x") else int(text),
    f"{_TAG}float": lambda text: float(re.sub(r"\.(?=inf|nan)", "", text.lower())),
    f"{_TAG}str": str,
}


def _read_yaml(text: str) -> Content:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml is not typed
        """PyYAML's parser with the scalars of YAML 1.2."""

        yaml_implicit_resolvers: Any = {}  # noqa: RUF012 - as in PyYAML

    for name, (pattern, first) in _CORE_SCHEMA.items():
        Loader.add_implicit_resolver(f"{_TAG}{name}", re.compile(rf"(?:{pattern})\Z"), first)
    if len(text) > MAX_YAML_BYTES:
        raise FormatError(f"not a config: {len(text)} characters, more than the limit of {MAX_YAML_BYTES}")
    try:
        root = yaml.compose(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise FormatError(f"not valid YAML: {error.problem}{_hint(text, mark)}", _line(mark)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise FormatError(f"not valid YAML: {error.reason}: {error.character!r}", line) from None
    except RecursionError:
        raise FormatError(f"not valid YAML: {TOO_DEEP}") from None
    except (ValueError, OverflowError) as error:  # an escape beyond Unicode
        raise FormatError(f"not valid YAML: {error}") from None
    return _Nodes().read(root)


def _line(mark: Any) -> int | None:
    return None if mark is None else mark.line + 1


def _hint(text: str, mark: Any) -> str:
    """The remedy of a frequent mistake, for the end of a message."""
    line = "" if mark is None else text.splitlines()[mark.line : mark.line + 1]
    return "; indent by spaces, not tabs" if line and "\t" in line[0] else ""


class _Nodes:
    """PyYAML's nodes as a tree; aliases are replaced by what they stand for."""

    def __init__(self) -> None:
        self._count = 0
        self._lines: dict[str, int] = {}

    def read(self, root: Any) -> Content:
        """The tree of a document."""
        return Content(None if root is None else self._value(root, (), 0), self._lines)

    def _value(self, node: Any, keys: tuple[str, ...], depth: int) -> Any:
        line = node.start_mark.line + 1
        self._count += 1
        if self._count > MAX_YAML_VALUES:
            raise FormatError(f"more than {MAX_YAML_VALUES} values, aliases included; write a smaller file", line)
        if depth > MAX_DEPTH:
            raise FormatError(f"not valid YAML: {TOO_DEEP}", line)
        if node.id == "sequence" and node.tag == f"{_TAG}seq":
            items = enumerate(node.value)
            return [self._value(child, (*keys, str(index)), depth + 1) for index, child in items]
        if node.id == "mapping" and node.tag == f"{_TAG}map":
            return self._mapping(node, keys, depth)
        construct = _CONSTRUCTORS.get(node.tag)
        if node.id != "scalar" or construct is None:
            raise FormatError(f"{'.'.join(keys)}: unknown tag {shorten(node.tag)}; remove it", line)
        try:
            return construct(node.value)
        except (ValueError, LookupError):
            kind = node.tag.removeprefix(_TAG)
            raise FormatError(f"{'.'.join(keys)}: {shorten(node.value)} is not of type {kind}", line) from None

    def _mapping(self, node: Any, keys: tuple[str, ...], depth: int) -> Object:
        lines: dict[str, int] = {}
        own: list[tuple[str, Any]] = []
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.id != "scalar":
                raise FormatError("a key is a list or an object; expected a name", line)
            # As written: `no`, `1` and dates are names, too.
            name = str(key_node.value)
            if name == "<<" and key_node.style is None:
                merged = self._merged(value_node, keys, depth, line) | merged
                continue
            if name in lines:
                key = ".".join((*keys, name))
                raise FormatError(f"duplicate key {key}, also in line {lines[name]}", line)
            lines[name] = line
            own.append((name, value_node))
        # After merged keys, whose lines they replace.
        values = {name: self._value(child, (*keys, name), depth + 1) for name, child in own}
        self._lines |= {".".join((*keys, name)): line for name, line in lines.items()}
        return Object(list((merged | values).items()))

    def _merged(self, node: Any, keys: tuple[str, ...], depth: int, line: int) -> dict[str, Any]:
        """The keys of ``<<``: an object, or a list of objects of which the first counts."""
        value = self._value(node, keys, depth + 1)
        layers = value if isinstance(value, list) else [value]
        if not all(isinstance(layer, dict) for layer in layers):
            raise FormatError("<< needs an object or a list of objects", line)
        return {name: layer[name] for layer in reversed(layers) for name in layer}
