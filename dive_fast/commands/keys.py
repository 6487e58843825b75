"""Lists the keys of a config: ``dive-fast keys``, ``dive-fast keys train``, ``dive-fast keys warm-up``.

A section, a key, a method, or any word of the documentation selects keys. Options of methods are listed by ``keys
objective``, by a method's name, and with ``--all``.
"""

import argparse
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from dive_fast.commands import cli
from dive_fast.config.explain import SYNONYMS
from dive_fast.config.reference import Key, keys_of
from dive_fast.config.schema import Config
from dive_fast.config.section import sections
from dive_fast.methods import method_list
from dive_fast.methods.method_list import Group

OPTIONS = "Methods and their options are not included: dive-fast keys objective, or --all"


@cli.guarded
def main(arguments: list[str] | None = None) -> int:
    """Runs the command; exit code 2 if nothing matches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("word", nargs="?", help="section, key, method, or word of the documentation; default: all")
    parser.add_argument("--all", action="store_true", help="list or search the options of methods too")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    options = parser.parse_args(arguments)
    word = (options.word or "").strip().strip(".")
    groups = list(_plain())
    last = word.rpartition(".")[2]
    if not any(last == key.name for group in groups for key in group.keys):
        word = SYNONYMS.get(last, word)
    known = {name for group in groups for name in (group.place, *(_path(group, key) for key in group.keys))}
    is_option = word.startswith(("objective.", "projection.")) and word not in known
    has_options = options.all or word in ("objective", "projection") or is_option
    if has_options:
        groups += method_list.read().groups
    selected, remark = _select(groups, word)
    if not selected and not has_options and "did you mean" not in remark:
        # The word may be a method, or an option of one.
        has_options, groups = True, groups + method_list.read().groups
        selected, remark = _select(groups, word)
    if not selected:
        print(f"error: {remark}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([_as_json(group, key) for group in selected for key in group.keys], indent=2))
        return 0
    print(*(_as_text(group) for group in selected), sep="\n\n")
    if remark:
        print(f"\n{remark}")
    if not has_options:
        print(f"\n{OPTIONS}")
    return 0


def _plain() -> Iterable[Group]:
    for place, section in sections(Config, ""):
        text = " ".join((section.__doc__ or "").split()) if place else "The sections of a config."
        yield Group(place, text, list(keys_of(section)))


def _select(groups: list[Group], word: str) -> tuple[list[Group], str]:
    """The groups and keys that a word selects, and a remark on how; without any, the remark is the error."""
    if not word:
        return groups, ""
    places = {group.place for group in groups if group.place}
    if word in places:
        return [group for group in groups if f"{group.place}.".startswith(f"{word}.")], ""
    if named := [group for group in groups if word in group.words]:
        names = (f"objective.name={word}", f"projection.name={word}")
        return [*_having(groups, lambda path, key: path in names), *named], ""
    if exact := _having(groups, lambda path, key: word in (path, key.name)):
        return exact, ""
    hint = _nearest(groups, word)
    pattern = re.compile(r"\b" + r"[-_ ]?".join(map(re.escape, re.split("[-_ ]", word))), re.IGNORECASE)
    mentioned = _having(groups, lambda path, key: bool(pattern.search(f"{path} {key.type} {key.text}")))
    if mentioned:
        return mentioned, f"These keys mention {word}; no key is named so{hint}"
    return [], f"no key is named {word}, and no documentation mentions it{hint}"


def _nearest(groups: list[Group], word: str) -> str:
    """The end of a message that names the most similar section or key."""
    names = {key.name: _path(group, key) for group in reversed(groups) for key in group.keys}
    known = names | {name: name for name in (*names.values(), *(group.place for group in groups))}
    near = get_close_matches(word, known, n=1) or get_close_matches(word.rpartition(".")[2], names, n=1)
    return f"; did you mean {known[near[0]]}?" if near else ""


def _having(groups: list[Group], condition: Any) -> list[Group]:
    """The keys that meet a condition, with their groups."""
    kept = (
        group._replace(keys=[key for key in group.keys if condition(_path(group, key), key)]) for group in groups
    )
    return [group for group in kept if group.keys]


def _path(group: Group, key: Key) -> str:
    return f"{group.place}.{key.name}".lstrip(".")


def _as_json(group: Group, key: Key) -> dict[str, Any]:
    """A key as a JSON object."""
    fields = {"key": _path(group, key), "type": key.type.replace("`", ""), "required": key.is_required}
    if not (key.is_required or key.is_section):
        fields["default"] = key.default
    return (
        fields | {"documentation": key.text} | ({"losses_and_methods": list(group.words)} if group.words else {})
    )


def _as_text(group: Group) -> str:
    """A group as plain text of the terminal's width."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)

    def wrap(text: str, indent: str) -> str:
        return textwrap.fill(
            text.replace("`", ""),
            width,
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )

    lines = [wrap(f"{group.place}: {group.title}" if group.place else group.title, "")]
    for key in group.keys:
        default = "" if key.is_section else " (required)" if key.is_required else f" = {json.dumps(key.default)}"
        lines += ["", f"  {_path(group, key)}{default}  [{key.type.replace('`', '')}]", wrap(key.text, "      ")]
    return "\n".join(lines)
