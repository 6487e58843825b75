"""What is told to a user."""

import difflib
import errno
import sys
from collections.abc import Sequence

MAX_LENGTH = 4000
"""Characters of a message; the beginning names the file and the end says what to do, so the middle goes."""


class UserError(ValueError):
    """A mistake that is the user's to mend; the message is one line and says how.

    Whatever a file or a library puts into it: what moves a terminal's cursor or starts a line is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class LaunchError(UserError):
    """This process was launched wrongly: the variables of a launcher, addresses, ports or devices."""


class MachineError(Exception):
    """The machine ends a run: memory, disk, open files, processes or devices; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class StalledError(Exception):
    """No batch comes for longer than the run waits; the message is one line."""


class AllRanksError(Exception):
    """Ends all ranks of a run after the same step: none has to be told that another has failed."""


def one_line(text: str) -> str:
    """Text that a terminal shows as it stands, in one line of bounded length."""
    line = "".join(map(_shown, " ".join(text.split())))
    return line if len(line) <= MAX_LENGTH else f"{line[: MAX_LENGTH * 3 // 4]} ... {line[-MAX_LENGTH // 4 :]}"


def _shown(character: str) -> str:
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
"""What messages of PyTorch and the kernel mean; the first that is part of a message counts."""
_OURS = {
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
    errno.EEXIST: "it is there already, and not a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOENT: "no such file or folder",
}
"""What the operating system says, in words."""
_OF_PATHS = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT}
"""Those that mean nothing without a path."""


def machine_error(error: BaseException) -> MachineError | None:
    """What an error of the system or of PyTorch means, if the machine is its cause; None: a bug, or unknown."""
    if isinstance(error, MachineError):
        return error
    if isinstance(error, OSError) and error.errno in _OURS and (error.filename or error.errno not in _OF_PATHS):
        place = "" if error.filename is None else f"{error.filename}: "
        return MachineError(f"{place}{_OURS[error.errno]}")
    torch = sys.modules.get("torch")
    of_device = () if torch is None else (torch.OutOfMemoryError, torch.AcceleratorError)
    if isinstance(error, (RuntimeError, OSError, MemoryError, *of_device)):
        text = str(error)
        for part, meaning in _MEANINGS:
            if part.lower() in text.lower():
                # The first line says what; torch adds advice on debugging.
                said = next((line for line in text.splitlines() if part.lower() in line.lower()), part)
                return MachineError(meaning.format(message=said.strip()))
    if isinstance(error, MemoryError):
        return MachineError("the memory of the machine is full: use a smaller batch or fewer loader workers")
    return None


class ConfigError(UserError):
    """A user's mistake in a config file or override; the message is one line and says what to do."""


def nearest(word: str, words: Sequence[str]) -> str:
    """The end of a message that names the nearest of some words, if one is near."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


class DataError(UserError):
    """Data that cannot be used; the message names the file and says what was expected."""
