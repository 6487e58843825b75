"""Tars in object stores, by fsspec: listed with sizes and versions, and fetched to a folder of this node.

Credentials come from the environment, as the store's own tools read them; no message contains the query or the
user of a URL.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import braceexpand

from dive_fast.errors import DataError, TarError
from dive_fast.io.atomic_files import atomic_path

logger = logging.getLogger(__name__)

ATTEMPTS = 4
"""Attempts to list or to fetch; the store may be busy for a while."""
PAUSE_SECONDS = 1.0
"""Pause after the first failed attempt; it doubles after each."""
SILENT_SECONDS = 60.0
"""Time without a byte after which a request by HTTP fails. The time of a complete tar is not limited."""
ABANDONED_SECONDS = 3600.0
"""Age of the part of a tar whose process was killed, after which another one removes it."""
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


def refuse_url(path: str) -> None:
    """Refuses a path in an object store, where a set on a disk is needed.

    Raises:
        DataError: the path names an object store; the message says where one is read.
    """
    if is_url(path):
        raise DataError(
            f"{shown(path)}: only data.reference with order = stream reads an object store; copy the set to a disk"
        )


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


def fetch(tar: RemoteTar, file: Path, attempts: int = ATTEMPTS) -> None:
    """Copies a tar to a local file, which is complete or absent.

    Args:
        attempts: number of attempts while the store is busy or breaks off.

    Raises:
        TarError: the store refuses, the disk is full, or the tar has changed since it was listed.
    """
    try:
        with _plain_errors(tar.url):
            _retried(lambda: _fetch(tar, file), tar.url, attempts)
    except DataError as error:
        raise TarError(str(error)) from error


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
        if entry.get("size") is None:  # a page of links has no sizes
            entry = store.info(name)
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
    _remove_abandoned(file.parent)
    store.invalidate_cache(place)  # the listing of the start
    entry = store.info(place)
    if entry.get("size") != tar.size or (tar.version and _version(entry) not in (tar.version, "")):
        raise DataError(f"{shown(tar.url)}: changed since it was listed at the start of the run")
    # A name of this process and thread: two of them may fetch the same tar.
    complete = file.with_name(f"{os.getpid()}-{threading.get_ident()}-{file.name}")
    try:
        with atomic_path(complete) as partial:
            store.get_file(place, str(partial))
            if (size := partial.stat().st_size) != tar.size:
                raise OSError(f"{size} of {tar.size} bytes arrived")
        complete.replace(file)
    except FileNotFoundError as error:
        if file.parent.exists():
            raise
        raise OSError("another process removed the folder that it is fetched to") from error


def _remove_abandoned(folder: Path) -> None:
    """Removes parts of a tar that killed processes left in the folder."""
    for path in folder.glob(".partial-*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()


def _store(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it, for this process: those of a parent are not fork-safe."""
    # Only sets in object stores need it.
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout  # fsspec needs it for these URLs

        # By default, a tar that takes more than five minutes fails.
        timeout = ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
        options = {"client_kwargs": {"timeout": timeout}}
    return url_to_fs(url, **options)


def _retried(function: Any, url: str, attempts: int = ATTEMPTS) -> Any:
    """The result of a function that asks a store, which may be busy or break off.

    Raises:
        Exception: that of the last attempt, or one that another attempt does not change.
    """
    for attempt in range(attempts):
        try:
            return function()
        except Exception as raised:  # each store has its own
            error = _request_error(raised)
            if attempt == attempts - 1 or _is_final(error):
                raise error from raised
            logger.warning("%s: %s; tried again", shown(url), _reason(error))
            time.sleep(PAUSE_SECONDS * 2**attempt)
    raise AssertionError


def _request_error(error: Exception) -> Exception:
    """The error of a request that fsspec reports as a missing file, as it does for all errors of HTTP."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    is_request = isinstance(cause, TimeoutError) or type(cause).__module__.partition(".")[0] == "aiohttp"
    return cause if is_request and _status(cause) not in _MISSING else error


def _is_final(error: Exception) -> bool:
    """Whether another attempt would not change an error."""
    if isinstance(error, (DataError, FileNotFoundError, PermissionError, ImportError, ValueError)):
        return True
    status = _status(error)
    refused = status is not None and 400 <= status < 500 and status not in _BUSY
    return refused or _is_full(error) or type(error).__name__ in _FINAL


def _status(error: Exception) -> int | None:
    """The status of an answer by HTTP."""
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


_MISSING = (404, 410)
"""Status of an object that does not exist."""
_BUSY = (408, 425, 429)
"""Status of refusals that end after a while."""
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
        if _is_full(error):
            raise DataError(
                f"{name}: the disk that it is fetched to is full; set DIVE_FAST_CACHE to a folder with free space"
            ) from error
        if _status(error) in (401, 403):
            raise DataError(f"{name}: permission denied ({_reason(error)}); check your credentials") from error
        raise DataError(f"{name}: the store failed: {_reason(error)}") from error


def local_name(tar: RemoteTar) -> str:
    """The name of the folder of a fetched tar, which another version of it does not share."""
    return hashlib.sha256(repr(tuple(tar)).encode()).hexdigest()[:24]
