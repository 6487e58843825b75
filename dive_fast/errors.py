"""Every exception that a user sees, warnings of rank 0, and the meaning of system errors."""

import difflib
import errno
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

logger = logging.getLogger(__name__)

MAX_LENGTH = 4000
"""Maximum characters of a message; the middle is cut: the start names the file, the end says what to do."""


class UserError(ValueError):
    """Invalid config, data or usage; the one-line message says what to change.

    Characters that move a terminal's cursor or start a new line are escaped, since they may come from a file.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class LaunchError(UserError):
    """Invalid launch of this process: launcher variables, addresses, ports or devices."""


class MachineError(Exception):
    """The machine failed: memory, disk, open files, processes or devices; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class StalledError(Exception):
    """No batch arrived within the time limit; the message is one line."""


class AllRanksError(Exception):
    """Raised on all ranks after the same step, so that no rank has to report it to the others."""


def one_line(text: str) -> str:
    """Text as one printable line of bounded length."""
    line = "".join(map(_escaped, " ".join(text.split())))
    return line if len(line) <= MAX_LENGTH else f"{line[: MAX_LENGTH * 3 // 4]} ... {line[-MAX_LENGTH // 4 :]}"


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


SHARED_MEMORY = (
    "shared memory (/dev/shm) is full: give the container more (docker run --shm-size=16g, or --ipc=host), or use "
    "fewer data.target.workers and data.reference.workers"
)
OPEN_FILES = "too many open files: raise the limit (ulimit -n 65536), or use fewer loader workers"
OUT_OF_MEMORY = (
    "use train.micro_batch_size, train.activation_checkpointing or a smaller batch; --dry-run predicts the memory "
    "of a run"
)
_MEANINGS = (
    ("unable to allocate shared memory", SHARED_MEMORY),
    ("unable to open shared memory", SHARED_MEMORY),
    ("killed by signal: Bus error", f"a loader worker was killed by a bus error: {SHARED_MEMORY}"),
    (
        "killed by signal",
        "{message}; the kernel ends processes when the memory of the machine or container is full",
    ),
    ("exited unexpectedly", "{message}; the kernel ends processes when the memory of the machine is full"),
    ("Too many open files", OPEN_FILES),
    ("received 0 items of ancillary data", OPEN_FILES),
    ("can't allocate memory", "the memory of the machine is full: use a smaller batch or fewer loader workers"),
    ("out of memory", f"{{message}}; {OUT_OF_MEMORY}"),
    ("CUDA error", "{message}"),
)
"""Meanings of messages of PyTorch and the kernel; the first pattern that a message contains counts."""
_ERRNOS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EFBIG: "a file becomes larger than the file system or a limit allows (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EMFILE: OPEN_FILES,
    errno.ENFILE: OPEN_FILES,
    errno.ENOMEM: "the memory of the machine is full",
    errno.EAGAIN: "the limit of processes is reached (ulimit -u)",
    errno.EIO: "the disk or network file system fails",
    errno.ESTALE: "the network file system fails",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.EEXIST: "it exists and is not a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOENT: "no such file or folder",
}
"""Meanings of error numbers of the operating system."""
_PATH_ERRNOS = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT}
"""Error numbers that say nothing without a path."""


def machine_error(error: BaseException) -> MachineError | None:
    """The meaning of an error of the system or of PyTorch if the machine caused it; None: a bug, or unknown."""
    if isinstance(error, MachineError):
        return error
    if (
        isinstance(error, OSError)
        and error.errno in _ERRNOS
        and (error.filename or error.errno not in _PATH_ERRNOS)
    ):
        prefix = "" if error.filename is None else f"{error.filename}: "
        return MachineError(f"{prefix}{_ERRNOS[error.errno]}")
    torch = sys.modules.get("torch")
    device_errors = () if torch is None else (torch.OutOfMemoryError, torch.AcceleratorError)
    if isinstance(error, (RuntimeError, OSError, MemoryError, *device_errors)):
        text = str(error)
        for pattern, meaning in _MEANINGS:
            if pattern.lower() in text.lower():
                # Only the line with the pattern; torch adds advice on debugging.
                line = next((line for line in text.splitlines() if pattern.lower() in line.lower()), pattern)
                return MachineError(meaning.format(message=line.strip()))
    if isinstance(error, MemoryError):
        return MachineError("the memory of the machine is full: use a smaller batch or fewer loader workers")
    return None


class ConfigError(UserError):
    """Invalid config file or override; the one-line message says what to change."""


def nearest(word: str, words: Sequence[str]) -> str:
    """The end of a message that suggests the most similar of some words; empty if none is similar."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


class DataError(UserError):
    """Invalid data; the one-line message names the file and what is expected."""


class ChangedDataError(DataError):
    """A file changed after its data set was listed; no other one may replace it, since more may have changed."""


class TarError(DataError):
    """A tar of a stream cannot be fetched or has changed; its samples are not replaced by others."""


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Puts a config key in front of the messages of errors in the context; an empty key changes nothing."""
    try:
        yield
    except (ConfigError, DataError) as error:
        if not key:
            raise
        raise type(error)(f"{key}: {error}") from error


def warn_on_main_rank(line: str) -> None:
    """Logs a warning on rank 0 only, as all ranks read the same files."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(line)
