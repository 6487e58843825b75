"""Messages for users: one printable line, and what an error of the machine means."""

import pytest
import torch

from dive_fast.errors import MAX_LENGTH, ConfigError, MachineError, machine_error, nearest


def test_message_is_one_printable_line() -> None:
    message = str(ConfigError("a\n  \x1b[2Jb\u202e\tc"))
    assert message == r"a \x1b[2Jb\u202e c"


def test_long_message_keeps_both_ends() -> None:
    message = str(ConfigError(f"start {'x' * 10_000} end"))
    assert len(message) <= MAX_LENGTH + len(" ... ")
    assert message.startswith("start xx")
    assert message.endswith("xx end")


def test_nearest_suggests_only_similar_words() -> None:
    assert nearest("learning_rat", ["seed", "learning_rate"]) == "; did you mean learning_rate?"
    assert nearest("precision", ["seed", "epochs"]) == ""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device", "/x"), "/x: the disk is full"),
        (PermissionError(13, "Permission denied", "/x"), "/x: permission denied"),
        (FileExistsError(17, "File exists", "/x"), "/x: it exists and is not a folder"),
        (OSError(24, "Too many open files"), "too many open files: raise the limit (ulimit -n"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), "--shm-size"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error."), "--shm-size"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), "memory of the machine"),
        (RuntimeError("received 0 items of ancillary data"), "ulimit -n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "train.activation_checkpointing"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered\nmore"), "device-side assert"),
        (MemoryError(), "the memory of the machine is full"),
        (MachineError("as it is"), "as it is"),
    ],
)
def test_machine_error_explains_system_errors(error: Exception, says: str) -> None:
    explained = machine_error(error)
    assert explained is not None
    assert says in str(explained)
    assert "\n" not in str(explained)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), FileNotFoundError(2, "x"), ValueError("memory")])
def test_machine_error_is_none_for_bugs(error: Exception) -> None:
    assert machine_error(error) is None
