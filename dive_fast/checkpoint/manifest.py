"""The files of a checkpoint and their format: reading, validation and names.

A checkpoint is a folder of safetensors and JSON. It fits any number of ranks and any ZeRO stage, and reading it
executes nothing:

=============================  ==========================================================================
``rank<number>.safetensors``   weights and moments of the parameters that this rank wrote; its random state
``trainer.json``               everything but tensors: steps, updates, loss scale, evaluations so far, the run's id
``identity.json``              everything that determines the run's result (:mod:`dive_fast.training.run_identity`)
``manifest.json``              size and SHA-256 of each file; written last
``evaluation.json``            result of an evaluation of these weights, added when it is available
=============================  ==========================================================================

:mod:`dive_fast.checkpoint.saver` writes it under a temporary name and renames it when it is complete: a folder
called ``step<number>`` is complete, or was damaged later, which its manifest detects.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dive_fast.engine.update import COUNTS, STATE
from dive_fast.errors import ConfigError
from dive_fast.identity import Identity
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import inside, read_json

FORMAT = 2
FOLDER = "checkpoints"
"""Folder of all checkpoints inside a run folder."""
NAME = re.compile(r"step\d{8}")
MANIFEST, TRAINER, IDENTITY = "manifest.json", "trainer.json", "identity.json"
EVALUATION = "evaluation.json"
"""Not listed in the manifest, since it is written after the checkpoint."""
WEIGHTS, FIXED, OBJECTIVE, TEACHER, RANDOM = "weights", "fixed", "objective", "teacher", "random"
AVERAGE, PROJECTION = "average", "projection"
"""Prefixes of tensor names: tuned weights, untuned weights and buffers, state of the method, weights of a moving
teacher, states of the random generators; averaged weights, state of a projection."""


class CorruptCheckpointError(ConfigError):
    """A checkpoint does not match its manifest."""


class FormatError(ConfigError):
    """A checkpoint in the format of another version, which does not store the identity of its run."""


def is_complete(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint exist in their full size.

    Raises:
        FormatError: the checkpoint has another format.
    """
    return missing_file(checkpoint) is None


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a folder, oldest first; one that is being removed has another name."""
    return sorted(
        path for path in folder.glob("step*") if NAME.fullmatch(path.name) and (path / MANIFEST).is_file()
    )


class Tensors:
    """The tensors of a checkpoint, by name, from all of its files."""

    def __init__(self, checkpoint: Path) -> None:
        """Opens all files.

        Raises:
            CorruptCheckpointError: a file cannot be read.
        """
        self._file_of: dict[str, Any] = {}
        for name in sorted(read_manifest(checkpoint)["files"]):
            if name in (TRAINER, IDENTITY):
                continue
            try:
                file = safe_open(inside(checkpoint, name), "pt")
            except (OSError, ValueError, SafetensorError) as error:
                raise CorruptCheckpointError(f"{checkpoint / name}: not a safetensors file: {error}") from error
            self._file_of |= dict.fromkeys(file.keys(), file)

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors of a kind, by name without the prefix."""
        names = (name for name in self._file_of if name.startswith(f"{kind}/"))
        return {
            name.removeprefix(f"{kind}/"): tuple(self._file_of[name].get_slice(name).get_shape()) for name in names
        }

    def read(self, kind: str, name: str, device: torch.device) -> Tensor:
        """Reads one tensor onto a device."""
        tensor: Tensor = self._file_of[f"{kind}/{name}"].get_tensor(f"{kind}/{name}")
        return tensor.to(device)


def read_manifest(checkpoint: Path) -> Mapping[str, Any]:
    """Reads and validates the manifest of a checkpoint, which may come from an untrusted source.

    Raises:
        CorruptCheckpointError: the manifest is missing or invalid.
        FormatError: the checkpoint has another format.
    """
    path = checkpoint / MANIFEST
    with _validating(path):
        manifest = read_json(path)
        version = manifest["format"]
        _require(type(version) is int)
    if version != FORMAT:
        raise FormatError(
            f"{checkpoint}: checkpoint format {version}, but this version reads format {FORMAT}: finish that run "
            "with the version that started it, set train.output to another folder, or set train.resume=never to "
            "train again"
        )
    with _validating(path):
        files = manifest["files"]
        _require(TRAINER in files and IDENTITY in files)
        # Plain file names: nothing outside the folder is opened.
        _require(all(Path(name).name == name and name.isprintable() for name in files))
        _require(all(type(file["bytes"]) is int and type(file["sha256"]) is str for file in files.values()))
    return manifest  # type: ignore[no-any-return]


def read_trainer(checkpoint: Path) -> Mapping[str, Any]:
    """Reads and validates ``trainer.json``.

    Raises:
        CorruptCheckpointError: the file is missing or invalid.
    """
    path = checkpoint / TRAINER
    with _validating(path):
        numbers = read_json(path)
        scale, validation = numbers["loss_scale"], numbers["validation"]
        _require(scale.keys() == {*STATE, "dynamic"} and type(scale["value"]) is float)
        _require(type(scale["dynamic"]) is bool and type(numbers["run"]) is str)
        _check_validation(validation)
        counts = [numbers["step"], numbers["updates"], numbers["total_steps"]]
        counts += [scale[name] for name in COUNTS]
        _require(all(type(value) in (float, NoneType) for value in numbers["metrics"].values()))
        _require(all(type(count) is int and 0 <= count < 2**31 for count in counts))
    return numbers  # type: ignore[no-any-return]


def read_identity(checkpoint: Path) -> Identity:
    """Reads the identity of a checkpoint's run: everything that determines its result.

    Raises:
        CorruptCheckpointError: the file is missing or invalid.
    """
    path = checkpoint / IDENTITY
    with _validating(path):
        identity = read_json(path)
        _require(isinstance(identity, dict))
    return identity  # type: ignore[no-any-return]


class Evaluation(NamedTuple):
    """An evaluation of the weights in a checkpoint, made before the next step of the run."""

    validation: dict[str, Any]
    """State of validation, as in ``trainer.json``, including this evaluation."""
    metrics: dict[str, float | None]
    """Results, as written to ``metrics.jsonl``."""


def write_evaluation(checkpoint: Path, evaluation: Evaluation) -> None:
    """Adds an evaluation to the checkpoint of the same step, so that it counts with any settings of a resumed run.

    Raises:
        OSError: the file cannot be written.
    """
    write_atomic(checkpoint / EVALUATION, (json.dumps(evaluation._asdict(), indent=2) + "\n").encode())


def read_evaluation(checkpoint: Path) -> Evaluation | None:
    """Reads the evaluation that :func:`write_evaluation` added; None if there is none.

    Raises:
        CorruptCheckpointError: the file is invalid.
    """
    path = checkpoint / EVALUATION
    if not path.exists():
        return None
    with _validating(path, "; remove this file to evaluate again"):
        content = read_json(path)
        validation, metrics = content["validation"], content["metrics"]
        _check_validation(validation)
        _require(all(type(value) in (float, int, NoneType) for value in metrics.values()))
    return Evaluation(validation, metrics)


def _check_validation(validation: Mapping[str, Any]) -> None:
    _require(validation.keys() == {"best", "best_step", "since_best", "select"})
    _require(type(validation["best"]) in (float, NoneType) and type(validation["select"]) in (str, NoneType))
    counts = validation["best_step"], validation["since_best"]
    _require(all(type(count) is int and 0 <= count < 2**31 for count in counts))


@contextmanager
def _validating(path: Path, remedy: str = "") -> Iterator[None]:
    """Turns errors of reading and validating a JSON file into a :class:`CorruptCheckpointError` that names it."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{path}: not valid in checkpoint format {FORMAT}{remedy}") from error


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError("unexpected structure")


def describe_file(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as in the manifest."""
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def run_id(checkpoint: Path) -> str | None:
    """The id of the run that wrote a checkpoint; empty for another format; None if it cannot be read."""
    try:
        read_manifest(checkpoint)
        return str(read_trainer(checkpoint)["run"])
    except FormatError:
        return ""
    except CorruptCheckpointError:
        return None


def checkpoint_path(folder: Path, step: int) -> Path:
    """The path of the checkpoint after ``step`` steps, in a folder of checkpoints."""
    return folder / f"step{step:08d}"


def step_number(checkpoint: Path) -> int:
    """The number of steps that a checkpoint's name states."""
    return int(checkpoint.name.removeprefix("step"))


def missing_file(checkpoint: Path) -> str | None:
    """Why a folder is not a complete checkpoint: the first missing or invalid file; None if it is complete."""
    if not (checkpoint / MANIFEST).is_file():
        return f"no file {MANIFEST}"
    try:
        files = read_manifest(checkpoint)["files"]
    except CorruptCheckpointError as error:
        return str(error).removeprefix(f"{checkpoint}/")
    for name, file in files.items():
        path = checkpoint / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size != file["bytes"]:
            return f"{name} is missing or truncated"
    return None
