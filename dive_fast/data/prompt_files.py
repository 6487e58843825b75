"""Class names and templates, from files or open_clip; imports no torch, so mistakes are reported at once."""

import re
from collections.abc import Sequence

from dive_fast.data.sources.source import locate
from dive_fast.errors import DataError, naming
from dive_fast.io.safe_read import parse_json, read_text

SHIPPED_TEMPLATES = ("imagenet", "simple")
"""Names of open_clip's lists of templates."""


class Template:
    """A prompt template: its text has ``{}`` in place of the class name."""

    def __init__(self, template: str) -> None:
        self.template = template

    def __call__(self, class_name: str) -> str:
        """The prompt of a class."""
        return self.template.replace("{}", class_name)


def read_class_names(name: str) -> tuple[str, ...]:
    """Class names from open_clip (``imagenet``), a text file with one name per line, or a JSON list.

    Raises:
        DataError: the file does not exist, is empty, or has an empty line or lines that are not plain names.
    """
    if name == "imagenet":
        return imagenet_names()
    text = _text(name, "class names")
    if text.lstrip()[:1] in ("[", "{"):
        return _json_list(name, text, "class name", "class names, in label order, or one name per line")
    lines = _lines(name, text, "class names")
    table = _numbered(lines)
    if table is not None:
        prefix, example = table
        raise DataError(
            f"{name}: each line begins with {prefix}, which would be part of the class name "
            f"({example[:40]!r}); keep only the names"
        )
    _refuse_code(name, lines, "class name")
    return tuple(lines)


def imagenet_names() -> tuple[str, ...]:
    """open_clip's names of ImageNet's 1000 classes; its import takes seconds."""
    import open_clip

    return tuple(open_clip.IMAGENET_CLASSNAMES)


_NUMBERED = re.compile(r"(n[0-9]{8}|[0-9]+)\.?[\s:,;]")


def _numbered(lines: Sequence[str]) -> tuple[str, str] | None:
    """The kind of prefix that all lines of a table have, and the first such line; None: the lines are names."""
    for rows in (lines, lines[1:] if len(lines) > 2 else []):  # the first line may be a header
        starts = [match[1] for match in map(_NUMBERED.match, rows) if match]
        if not rows or len(starts) < len(rows):
            continue
        if all(start.startswith("n") for start in starts):
            return "a WordNet id", rows[0]
        numbers = [int(start) for start in starts if start.isdecimal()]
        if numbers in (list(range(len(rows))), list(range(1, len(rows) + 1))):
            return "its number", rows[0]
    return None


def _refuse_code(name: str, lines: Sequence[str], entry: str) -> None:
    """Refuses the syntax of a programming language or of YAML, which would become part of every prompt.

    Args:
        entry: the noun for a line, for messages.

    Raises:
        DataError: all lines are quoted or list items, or the first one is a comment.
    """
    if all(re.fullmatch(r"""(["']).*\1,?""", line) for line in lines):
        raise DataError(
            f"{name}: all lines are quoted, and the quotes would be part of each {entry} ({lines[0][:40]!r}); "
            "remove them, or write a JSON list"
        )
    if all(line.startswith("- ") for line in lines):
        raise DataError(f"{name}: each line begins with '- ', which would be part of the {entry}; remove it")
    if lines[0].startswith("#"):
        raise DataError(
            f"{name}: its first line is a comment, {lines[0][:40]!r}, which would be a {entry}; remove it"
        )


def _json_list(name: str, text: str, entry: str, entries: str) -> tuple[str, ...]:
    try:
        values = parse_json(text)
    except ValueError as error:
        raise DataError(
            f"{name}: begins like JSON but is not valid: {error}; expected one {entry} per line"
        ) from error
    is_list = isinstance(values, list) and len(values) > 0
    if not is_list or not all(isinstance(value, str) and value.strip() for value in values):
        raise DataError(f"{name}: expected a JSON list of {entries}")
    return tuple(value.strip() for value in values)


def read_templates(name: str, key: str = "", content: str = "the class name") -> tuple[Template, ...]:
    """Templates from open_clip (``imagenet``, ``simple``), a file with one per line, or ``name`` as the only one.

    Args:
        name: ``imagenet``, ``simple``, a file, or a template itself.
        key: config key for messages.
        content: the noun for what ``{}`` stands for, for messages.

    Raises:
        DataError: the file does not exist, or a template has no ``{}``.
    """
    if name in SHIPPED_TEMPLATES:
        import open_clip  # seconds

        shipped = {"imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
        return tuple(Template(template("{}")) for template in shipped[name])
    with naming(key):
        lines = [name] if "{}" in name else _templates_in(name, content)
        for line in lines:
            if "{}" not in line:
                raise DataError(f"{name}: template {line!r} has no {{}} for {content}")
            if (field := re.search(r"\{\w+\}", line)) is not None:
                raise DataError(
                    f"{name}: template {line!r} has an unknown placeholder {field[0]}; use {{}} for {content}"
                )
    return tuple(Template(line) for line in lines)


def check_class_names(name: str) -> None:
    """Reads the file of class names if ``name`` is one; open_clip's list is not imported.

    Raises:
        DataError: as :func:`read_class_names`.
    """
    if name != "imagenet":
        read_class_names(name)


def check_templates(name: str, key: str = "") -> None:
    """Reads the templates if they are a file or a single one; open_clip's lists are not imported.

    Args:
        key: config key for messages.

    Raises:
        DataError: as :func:`read_templates`.
    """
    if name not in SHIPPED_TEMPLATES:
        read_templates(name, key)


def _templates_in(name: str, content: str) -> Sequence[str]:
    if not name.startswith("demo:") and not locate(name).exists():
        raise DataError(f"{name}: no such file of templates; a template itself must have {{}} for {content}")
    text = _text(name, "templates")
    if text.lstrip().startswith("["):
        return _json_list(name, text, "template", "templates, or one template per line")
    lines = _lines(name, text, "templates")
    _refuse_code(name, lines, "prompt")
    return lines


_SEPARATORS = "[\x0b\x0c\x1c-\x1f\x85\u2028\u2029]"


def _text(name: str, contents: str) -> str:
    try:
        return read_text(locate(name), "utf-8-sig").rstrip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name}: cannot read {contents}: {reason}") from error


def _lines(name: str, text: str, contents: str) -> Sequence[str]:
    # str.splitlines also splits at form feeds and Unicode separators, which other tools keep inside a line.
    lines = [re.sub(_SEPARATORS, " ", line).strip() for line in re.split(r"\r\n|\r|\n", text)]
    if lines == [""]:
        raise DataError(f"{name}: expected {contents}, one per line; the file is empty")
    if "" in lines:  # skipping it would shift the labels of all later names
        raise DataError(f"{name}: expected {contents}, one per line; line {lines.index('') + 1} is empty")
    return lines
