"""Checkpoints: what is in them, whether one is whole, and going on from it.

A checkpoint is a folder of safetensors and JSON. It fits any number of ranks and any ZeRO stage, and reading it
executes nothing:

=============================  ==========================================================================
``rank<number>.safetensors``   weights and moments of the parameters that this rank wrote; its random state
``trainer.json``               what is no tensor: steps, updates, loss scale, evaluations so far, the run
``identity.json``              what decides the result of the run (:mod:`dive_fast.train.run_identity`)
``manifest.json``              each file's size and SHA-256; written last
``evaluation.json``            outcome of an evaluation of these weights, added once it is there
=============================  ==========================================================================

:mod:`dive_fast.checkpoint.saver` writes it beside, under another name, and renames it when it is whole: a folder
called ``step<number>`` is whole, or has been damaged since, which its manifest tells.
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
"""Of all checkpoints, in the folder of a run."""
NAME = re.compile(r"step\d{8}")
MANIFEST, TRAINER, IDENTITY = "manifest.json", "trainer.json", "identity.json"
EVALUATION = "evaluation.json"
"""Not in the manifest, since it is written after the checkpoint."""
WEIGHTS, FIXED, OBJECTIVE, RANDOM = "weights", "fixed", "objective", "random"
"""What the names of a checkpoint's tensors begin with: tuned weights, untuned ones and buffers, the objective's
state, the random generators'."""


class DamagedError(ConfigError):
    """A checkpoint is not what its manifest says."""


class FormatError(ConfigError):
    """A checkpoint of another version of this project, which does not say what decides its run."""


def is_whole(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are there in their full size.

    Raises:
        FormatError: it has another format.
    """
    return missing_file(checkpoint) is None


def written_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were whole once, oldest first; one that is being removed has another name."""
    return sorted(
        path for path in folder.glob("step*") if NAME.fullmatch(path.name) and (path / MANIFEST).is_file()
    )


class Tensors:
    """The tensors of a checkpoint, whichever file they lie in."""

    def __init__(self, checkpoint: Path) -> None:
        """Opens all files.

        Raises:
            DamagedError: one cannot be read.
        """
        self._file_of: dict[str, Any] = {}
        for name in sorted(read_manifest(checkpoint)["files"]):
            if name in (TRAINER, IDENTITY):
                continue
            try:
                file = safe_open(inside(checkpoint, name), "pt")
            except (OSError, ValueError, SafetensorError) as error:
                raise DamagedError(f"{checkpoint / name}: no safetensors: {error}") from error
            self._file_of |= dict.fromkeys(file.keys(), file)

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Of all tensors of a kind, by their names without it."""
        names = (name for name in self._file_of if name.startswith(f"{kind}/"))
        return {
            name.removeprefix(f"{kind}/"): tuple(self._file_of[name].get_slice(name).get_shape()) for name in names
        }

    def read(self, kind: str, name: str, device: torch.device) -> Tensor:
        """One tensor."""
        tensor: Tensor = self._file_of[f"{kind}/{name}"].get_tensor(f"{kind}/{name}")
        return tensor.to(device)


def read_manifest(checkpoint: Path) -> Mapping[str, Any]:
    """The manifest, held to its form: it may come from anywhere.

    Raises:
        DamagedError: it is none.
    """
    path = checkpoint / MANIFEST
    with validating(path):
        manifest = read_json(path)
        written_by = manifest["format"]
        require(type(written_by) is int)
    if written_by != FORMAT:
        raise FormatError(
            f"{checkpoint}: a checkpoint of format {written_by}, not {FORMAT} as now: finish that run with "
            "the version that began it, set train.output to another folder, or train.resume=never to train again"
        )
    with validating(path):
        files = manifest["files"]
        require(TRAINER in files and IDENTITY in files)
        # Plain names: nothing outside the folder is opened.
        require(all(Path(name).name == name and name.isprintable() for name in files))
        require(all(type(file["bytes"]) is int and type(file["sha256"]) is str for file in files.values()))
    return manifest  # type: ignore[no-any-return]


def read_trainer(checkpoint: Path) -> Mapping[str, Any]:
    """``trainer.json``, held to its form.

    Raises:
        DamagedError: it is none.
    """
    path = checkpoint / TRAINER
    with validating(path):
        numbers = read_json(path)
        scale, validation = numbers["loss_scale"], numbers["validation"]
        require(scale.keys() == {*STATE, "dynamic"} and type(scale["value"]) is float)
        require(type(scale["dynamic"]) is bool and type(numbers["run"]) is str)
        _check_validation(validation)
        counts = [numbers["step"], numbers["updates"], numbers["total_steps"]]
        counts += [scale[name] for name in COUNTS]
        require(all(type(value) in (float, NoneType) for value in numbers["metrics"].values()))
        require(all(type(count) is int and 0 <= count < 2**31 for count in counts))
    return numbers  # type: ignore[no-any-return]


def read_identity(checkpoint: Path) -> Identity:
    """What decides the result of a checkpoint's run.

    Raises:
        DamagedError: it cannot be read.
    """
    path = checkpoint / IDENTITY
    with validating(path):
        found = read_json(path)
        require(isinstance(found, dict))
    return found  # type: ignore[no-any-return]


class Evaluation(NamedTuple):
    """An evaluation of the weights of a checkpoint, after which the run has not made another step."""

    validation: dict[str, Any]
    """As :func:`trainer` has it, this evaluation included."""
    metrics: dict[str, float | None]
    """What it has found, for ``metrics.jsonl``."""


def write_evaluation(checkpoint: Path, evaluation: Evaluation) -> None:
    """Adds an evaluation to a checkpoint of the same step, so that it counts whatever the run is resumed with.

    Raises:
        OSError: it cannot be written.
    """
    write_atomic(checkpoint / EVALUATION, (json.dumps(evaluation._asdict(), indent=2) + "\n").encode())


def read_evaluation(checkpoint: Path) -> Evaluation | None:
    """What :func:`write_evaluation` has added; None: nothing.

    Raises:
        DamagedError: it is not as it was written.
    """
    path = checkpoint / EVALUATION
    if not path.exists():
        return None
    with validating(path, "; remove this file to evaluate again"):
        found = read_json(path)
        validation, metrics = found["validation"], found["metrics"]
        _check_validation(validation)
        require(all(type(value) in (float, int, NoneType) for value in metrics.values()))
    return Evaluation(validation, metrics)


def _check_validation(found: Mapping[str, Any]) -> None:
    require(found.keys() == {"best", "best_step", "since_best", "select"})
    require(type(found["best"]) in (float, NoneType) and type(found["select"]) in (str, NoneType))
    counts = found["best_step"], found["since_best"]
    require(all(type(count) is int and 0 <= count < 2**31 for count in counts))


@contextmanager
def validating(path: Path, remedy: str = "") -> Iterator[None]:
    """Whatever is missing, or of another type, in a JSON file."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path}: not as checkpoints of format {FORMAT} have it{remedy}") from error


def require(holds: bool) -> None:
    if not holds:
        raise ValueError("of another form")


def fingerprint(file: Path) -> dict[str, Any]:
    """Size and SHA-256."""
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def run_of(checkpoint: Path) -> str | None:
    """The id of the run that wrote a checkpoint; empty for another format; None: it is too damaged to say."""
    try:
        read_manifest(checkpoint)
        return str(read_trainer(checkpoint)["run"])
    except FormatError:
        return ""
    except DamagedError:
        return None


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint after so many steps, in a folder of checkpoints."""
    return folder / f"step{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The number of steps in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step"))


def missing_file(checkpoint: Path) -> str | None:
    """What a folder lacks of a whole checkpoint; None: nothing."""
    if not (checkpoint / MANIFEST).is_file():
        return f"no file {MANIFEST}"
    try:
        files = read_manifest(checkpoint)["files"]
    except DamagedError as error:
        return str(error).removeprefix(f"{checkpoint}/")
    for name, file in files.items():
        path = checkpoint / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size != file["bytes"]:
            return f"{name} is not there in its full size"
    return None
