"""Tars in object stores, by fsspec: listed with sizes and versions, and fetched to a folder of this node.

Credentials come from the environment, as the store's own tools read them; no message contains the query or the
user of a URL.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import braceexpand

from dive_fast.errors import DataError
from dive_fast.io.atomic_files import atomic_path

logger = logging.getLogger(__name__)

ATTEMPTS = 4
"""Attempts to list or to fetch; the store may be busy for a while."""
PAUSE_SECONDS = 1.0
"""Pause after the first failed attempt; it doubles after each."""
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://")
_PACKAGES = {"s3": "pip install 'dive_fast[s3]'", "gs": "pip install gcsfs", "http": "pip install aiohttp"}
_PACKAGES |= {"https": "pip install aiohttp", "hf": "pip install huggingface_hub"}


class RemoteTar(NamedTuple):
    """A tar in an object store, as it was listed."""

    url: str
    size: int
    version: str
    """The store's tag of the contents; empty if it has none. Listings of a store do not agree on dates."""

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]


def is_url(path: str) -> bool:
    """Whether a path of the config names an object store."""
    return _URL.match(path) is not None


def shown(url: str) -> str:
    """A URL, or a message that contains some, without user and query."""
    return re.sub(r"\?[^\s'\"]*", "", re.sub(r"://[^/\s'\"@]*@", "://", url))


def list_remote(path: str) -> list[RemoteTar]:
    """The tars that a URL names: a tar, a brace range, a glob, or a folder of tars.

    Raises:
        DataError: there is no tar, or the store refuses; the message is one line without credentials.
    """
    scheme = path.partition("://")[0]
    if re.match(r"[a-z0-9+.-]+://[^/]*@", path) or (scheme in ("http", "https") and "?" in path):
        raise DataError(
            f"{shown(path)}: the URL contains a user or a query, and configs are stored with results; give "
            "credentials in the environment, as the store's own tools read them"
        )
    try:
        urls = list(braceexpand.braceexpand(path))
    except ValueError as error:
        raise DataError(f"{path}: not a brace range: {error}") from error
    tars: list[RemoteTar] = []
    for url in urls:
        with _plain_errors(url):
            tars += _retried(lambda url=url: _list(url), url)  # type: ignore[misc]
    if not tars:
        raise DataError(f"{path}: no tar there; check the name, and whether the credentials may list it")
    names = [tar.name for tar in tars]
    if len(set(names)) < len(names):
        name = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: two tars are called {name}; keys of samples begin with the name of their tar")
    return tars


def fetch(tar: RemoteTar, file: Path) -> None:
    """Copies a tar to a local file, which is complete or absent.

    Raises:
        DataError: the store refuses, or the tar has changed since it was listed.
    """
    with _plain_errors(tar.url):
        _retried(lambda: _fetch(tar, file), tar.url)


def _list(url: str) -> list[RemoteTar]:
    store, place = _store(url)
    if any(character in place for character in "*?["):
        entries = store.glob(place, detail=True).values()
    elif not place.lower().endswith(".tar"):
        entries = store.ls(place, detail=True)
    else:
        entries = [store.info(place)]
    scheme = url.partition("://")[0]
    tars = []
    for entry in sorted(entries, key=lambda entry: entry["name"]):
        name = str(entry["name"])
        if entry.get("type") == "directory" or not name.lower().endswith(".tar"):
            continue
        if entry.get("size") is None:
            raise DataError(f"{shown(url)}: the store does not tell its size")
        full = name if is_url(name) else f"{scheme}://{name.lstrip('/')}"
        tars.append(RemoteTar(full, int(entry["size"]), _version(entry)))
    return tars


def _version(entry: dict[str, Any]) -> str:
    names = ("ETag", "etag", "md5Hash", "blob_id")
    return str(next((entry[name] for name in names if entry.get(name)), ""))


def _fetch(tar: RemoteTar, file: Path) -> None:
    store, place = _store(tar.url)
    file.parent.mkdir(parents=True, exist_ok=True)
    entry = store.info(place)
    if entry.get("size") != tar.size or (tar.version and _version(entry) not in (tar.version, "")):
        raise DataError(f"{shown(tar.url)}: changed since it was listed at the start of the run")
    # A name of this process: two of them may fetch the same tar.
    with atomic_path(file.with_name(f"{os.getpid()}-{file.name}")) as partial:
        store.get_file(place, str(partial))
        if (size := partial.stat().st_size) != tar.size:
            raise OSError(f"{size} of {tar.size} bytes arrived")
    file.with_name(f"{os.getpid()}-{file.name}").replace(file)


def _store(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it, for this process: those of a parent are not fork-safe."""
    # Only sets in object stores need it.
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    return url_to_fs(url)


def _retried(function: Any, url: str) -> Any:
    for attempt in range(ATTEMPTS):
        try:
            return function()
        except (DataError, FileNotFoundError, PermissionError, ImportError, ValueError):
            raise
        except Exception as error:  # each store has its own
            if attempt == ATTEMPTS - 1 or type(error).__name__ in _FINAL:
                raise
            logger.warning("%s: %s; tried again", shown(url), _reason(error))
            time.sleep(PAUSE_SECONDS * 2**attempt)
    raise AssertionError


_FINAL = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "NoSuchBucket",
    "DefaultCredentialsError",
)
"""Errors of stores that another attempt does not change."""


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return shown(lines[0]) if lines else type(error).__name__


@contextmanager
def _plain_errors(url: str) -> Iterator[None]:
    """Turns errors of a store into one line.

    Raises:
        DataError: in their place.
    """
    scheme, name = url.partition("://")[0], shown(url)
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        remedy = _PACKAGES.get(scheme, "install the package of fsspec for it")
        raise DataError(
            f"{name}: {scheme}:// needs a package that is missing ({_reason(error)}): {remedy}"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{name}: it does not exist, or these credentials do not see it") from error
    except PermissionError as error:
        raise DataError(f"{name}: permission denied ({_reason(error)}); check your credentials") from error
    except Exception as error:  # each store has its own
        raise DataError(f"{name}: the store failed: {_reason(error)}") from error


def local_name(tar: RemoteTar) -> str:
    """The name of the folder of a fetched tar, which another version of it does not share."""
    return hashlib.sha256(repr(tuple(tar)).encode()).hexdigest()[:24]
