"""The folder of files that are kept between runs to save work, and can be removed at any time."""

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

UNUSED_DAYS = 90
"""Days without use after which :func:`remove_unused` removes an entry."""


def cache_root() -> Path:
    """``$DIVE_FAST_CACHE``, or ``~/.cache/dive_fast`` where it is not set.

    Raises:
        RuntimeError: the variable is not set, and there is no home folder.
    """
    variable = os.environ.get("DIVE_FAST_CACHE")
    return Path(variable) if variable else Path.home() / ".cache" / "dive_fast"


def cache_folder(kind: str) -> Path:
    """The folder of one kind of kept files, which is created.

    Where the cache cannot be written, it is a folder of this user among the temporary files.

    Args:
        kind: name of the folder: ``indexes``.

    Raises:
        OSError: temporary files cannot be written either.
    """
    with suppress(OSError, RuntimeError):
        folder = cache_root() / kind
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    folder = Path(tempfile.gettempdir()) / f"dive_fast-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user; set DIVE_FAST_CACHE to a folder for kept files")
    (folder / kind).mkdir(exist_ok=True)
    return folder / kind


def mark_used(path: Path) -> None:
    """Records in the modification time of a kept file or folder that it was used now."""
    with suppress(OSError):
        os.utime(path)


def remove_unused(folder: Path) -> None:
    """Removes the entries of a folder of :func:`cache_folder` that have not been used for :data:`UNUSED_DAYS`."""
    oldest = time.time() - 86400 * UNUSED_DAYS
    with suppress(OSError):
        for entry in os.scandir(folder):
            with suppress(OSError):
                if entry.stat(follow_symlinks=False).st_mtime >= oldest:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)
