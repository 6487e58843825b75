"""A small config in a file, and the error of loading it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dive_fast.config.schema import Config
from dive_fast.config.section import Section, section_type
from dive_fast.errors import ConfigError
from dive_fast.methods.run_config import load_run_config

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "launch" / "configs"

SMALL: dict[str, Any] = {
    "model": {"name": "ViT-B-32"},
    "data": {
        "target": {"format": "folder", "path": "target"},
        "reference": {"format": "webdataset", "path": "reference"},
    },
}


def write(folder: Path, content: Any = SMALL, name: str = "config.json") -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def evaluated(**options: Any) -> str:
    """An override that asks for evaluations during training."""
    sets = {"val": {"format": "folder", "path": "x"}}
    return f"evaluate={json.dumps({'sets': sets, 'every_steps': 2, 'select': 'val', 'patience': 1} | options)}"


def error_of(path: Path, *overrides: str) -> str:
    """The error of loading, without the file or override that it begins with."""
    with pytest.raises(ConfigError) as caught:
        load_run_config(str(path), overrides)
    message = str(caught.value)
    assert "\n" not in message
    if message.startswith("override "):
        return message
    origin = f"{path}: " if message.startswith(f"{path}: ") else message[: message.index("'): ") + len("'): ")]
    assert message.startswith(f"{path}: ") or origin.startswith("command line ('")
    return message.removeprefix(origin)


def sections(section: type[Section] = Config, place: str = "") -> Iterator[tuple[str, list[str]]]:
    """The prefix and the keys of each section."""
    yield place, list(section.model_fields)
    for key, field in section.model_fields.items():
        if (nested := section_type(field.annotation)) is not None:
            yield from sections(nested, f"{place}{key}.{'any.' if key == 'sets' else ''}")
