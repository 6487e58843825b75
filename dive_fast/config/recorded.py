"""The config in a run's ``config.json``, which can be used instead of the one that the run was started with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "config.json"
"""Name of the file in a run folder."""
KEYS = ("config", "versions", "device", "commit")
"""Keys that distinguish a run's ``config.json`` from that of other tools, such as Hugging Face models."""


def is_recorded(tree: Any) -> bool:
    """Whether the content of a file is a run's ``config.json``."""
    return isinstance(tree, Mapping) and all(key in tree for key in KEYS) and isinstance(tree["config"], dict)


def config_of_run(tree: Mapping[str, Any], file: Path, is_base: bool) -> dict[str, Any]:
    """The config of a run, for the folder in which it lies now.

    Args:
        tree: content of its ``config.json``.
        file: path of the file.
        is_base: whether another config is based on it, whose run has a folder of its own.
    """
    config: dict[str, Any] = dict(tree["config"])
    train, teacher = _section(config, "train"), _section(config, "teacher")
    before, now = train.pop("output", None), _folder(file)
    if not is_base:
        train["output"] = str(now)
    if not isinstance(before, str):
        return config
    # A default that was filled in: the teacher cache moves with its folder.
    path = teacher.get("path")
    if isinstance(path, str) and Path(path) == Path(before) / "teacher":
        teacher["path"] = str(now / "teacher")
    return config


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A copy of a section, which replaces it in the config; an invalid one is left as it is."""
    section = config.get(name)
    if not isinstance(section, dict):
        return {}
    config[name] = dict(section)
    return config[name]


def _folder(file: Path) -> Path:
    # A run folder has a name, which tables show.
    return file.parent if file.parent.name else file.parent.absolute()
