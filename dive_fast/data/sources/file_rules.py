"""Rules about names of files and folders: which ones are hidden, skipped, or the same file twice."""

import os
from collections.abc import Sequence
from pathlib import Path

from dive_fast.data.decode import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from dive_fast.errors import DataError

SYSTEM_FOLDERS = frozenset(
    {"__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
)
"""Folders that operating systems create next to the user's own; like hidden folders, they are not classes."""
HIDDEN = "hidden, or made by the system"
"""Reason for ignoring a file or folder that the user did not create."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or was created by the operating system."""
    return (
        name.startswith(".")
        or name in SYSTEM_FOLDERS
        or name.lower() in ("thumbs.db", "ehthumbs.db", "desktop.ini")
    )


def lower_suffix(name: str) -> str:
    """The suffix of a file name in lower case, with its dot; empty if it has none, as that of `.x` and `x.`."""
    dot = name.rfind(".")
    return name[dot:].lower() if 0 < dot < len(name) - 1 else ""


def reason_to_skip(name: str) -> str | None:
    """Why a file is left out regardless of its contents; None: it may be an image or a side file."""
    suffix = lower_suffix(name)
    if is_hidden(name):
        # macOS writes ._x.jpg, which is not an image; .x.jpg may be one.
        return "a hidden file; rename it" if suffix in IMAGE_SUFFIXES and not name.startswith("._") else HIDDEN
    return f"images of suffix {suffix} are not read" if suffix in OTHER_IMAGE_SUFFIXES else None


def refuse_duplicates(paths: Sequence[Path], dataset: str) -> None:
    """Refuses two names of the same tar or folder, whose samples would count twice.

    Args:
        dataset: the path of the data set, for the message.

    Raises:
        DataError: two paths lead to the same file; names both.
    """
    first_name: dict[str, Path] = {}
    for path in paths:
        real = os.path.realpath(path)
        if (other := first_name.get(real)) is not None:
            alias = "" if other == path else f", also as {path}"
            raise DataError(f"{dataset}: names {other} twice{alias}; its samples would count twice")
        first_name[real] = path
