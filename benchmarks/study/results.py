"""The file of results: one JSON line for each finished run; the last line of a run counts."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from study.runs import PRETRAINED, Run

Row = dict[str, Any]
KEY = ("size", "model", *Run.__dataclass_fields__)
"""Fields that identify a run."""


def read(path: Path) -> list[Row]:
    """All lines but a last one that a kill cut off."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.splitlines()]


def latest(rows: list[Row]) -> list[Row]:
    """The last line of each run."""
    lines: dict[str, Row] = {}
    for row in reversed(rows):
        lines.setdefault(_key(row), row)
    return list(lines.values())[::-1]


def of_one_model(rows: Sequence[Row], world: str, methods: Iterable[str]) -> list[Row]:
    """The rows of a world that start from the pre-trained weights which most runs of the methods start from."""
    wanted = set(methods)
    rows = [row for row in rows if row["world"] == world]
    count = Counter(row["model"] for row in rows if row["method"] in wanted)
    model = count.most_common(1)[0][0] if count else None
    return [row for row in rows if row["model"] == model]


def _key(row: Row) -> str:
    # The settings in the line of a pre-trained model are those of some run that starts from it.
    names = ("size", "model", "world", "method") if row["method"] == PRETRAINED else KEY
    return json.dumps([row.get(name) for name in names])


def append(path: Path, row: Row) -> None:
    """Adds a line behind the last complete one, and waits until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write((json.dumps(row) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def has(rows: list[Row], key: Row) -> bool:
    """Whether a run's line is there."""
    return any(all(row.get(name) == value for name, value in key.items()) for row in rows)
