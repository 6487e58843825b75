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

import deepspeed
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dive_fast.checkpoint import lineage
from dive_fast.checkpoint import zero_state as state
from dive_fast.checkpoint.export import full_state
from dive_fast.checkpoint.zero_state import MOMENTS, Trained
from dive_fast.config.schema import ConfigError
from dive_fast.distributed import Ranks
from dive_fast.engine.step import Engine
from dive_fast.engine.update import COUNTS, STATE
from dive_fast.identity import Identity
from dive_fast.io.atomic_files import write_whole
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


def tensors(engine: Engine) -> dict[str, Tensor]:
    """What this rank writes, copied to the CPU; all ranks call it.

    Tuned parameters are dealt out to the ranks in turn, so that all write about as much.
    """
    return dict(_tensors(engine))


class RunRecord(NamedTuple):
    """What a checkpoint says of the run that wrote it."""

    run: str
    """Id of the run (:mod:`dive_fast.checkpoint.lineage`)."""
    total_steps: int = 0
    """Of the whole run, which the learning rate's schedule ends with."""
    identity: Identity = {}  # noqa: RUF012 - never changed
    start: Path | None = None
    """The checkpoint that the run began from, which stays."""


def trainer(
    engine: Engine, step: int, validation: dict[str, Any], metrics: dict[str, Any], record: RunRecord
) -> dict[str, Any]:
    """What is no tensor, for ``trainer.json``.

    Args:
        validation: what evaluations so far have found, for :func:`load` to give back.
        metrics: the newest ones, likewise.
        record: of the run.
    """
    return {
        "run": record.run,
        "total_steps": record.total_steps,
        "step": step,
        "updates": state.updates_of(engine),
        "loss_scale": engine.scale.state_dict(),
        "validation": validation,
        "metrics": metrics,
    }


def is_whole(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are there in their full size.

    Raises:
        FormatError: it has another format.
    """
    return _missing(checkpoint) is None


def written_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were whole once, oldest first; one that is being removed has another name."""
    return sorted(
        path for path in folder.glob("step*") if NAME.fullmatch(path.name) and (path / MANIFEST).is_file()
    )


def find(resume: str, folder: Path, ranks: Ranks) -> Path | None:
    """The checkpoint that ``train.resume`` stands for, read through and whole; None to start from the beginning.

    All ranks call it. ``auto`` considers the checkpoints of the folder's present run alone
    (:mod:`dive_fast.checkpoint.lineage`), passes over a damaged one and reports it.

    Raises:
        ConfigError: a named checkpoint is not there or not whole; all that ``auto`` finds are damaged; or it has
            another format.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return _named(Path(resume), f"train.resume = {resume}", ranks)
    damaged: list[DamagedError] = []
    candidates: list[tuple[Path, str | None]] = []
    start = None
    with ranks.together(ConfigError):
        if ranks.first:
            present = lineage.read(folder)
            candidates = _of_run(written_checkpoints(folder), present)
            start = None if present is None else present.start
    candidates, start = ranks.as_first((candidates, start))
    for path, missing in reversed(candidates):
        try:
            if missing is not None:
                raise DamagedError(f"{path}: {missing}")
            verify(path, ranks)
        except DamagedError as error:
            ranks.say(f"passed over: {error}")
            damaged.append(error)
        else:
            return path
    if damaged:
        raise ConfigError(
            f"all checkpoints in {folder} are damaged ({damaged[0]}); train.resume=never trains from the beginning"
        )
    if start is not None:
        return _named(Path(start), f"{folder}: the run began from {start}", ranks)
    return None


def _named(path: Path, what: str, ranks: Ranks) -> Path:
    with ranks.together(ConfigError):
        if (missing := _missing(path)) is not None:
            raise ConfigError(f"{what}: no whole checkpoint there ({missing}){_nearby(path)}")
    verify(path, ranks)
    return path


def _nearby(path: Path) -> str:
    """The end of a message that names checkpoints, where a path leads to a run or to the folder of them."""
    found = [each for folder in (path, path / FOLDER, path.parent) for each in written_checkpoints(folder)]
    if found:
        return f"; there is {found[0] if len(found) == 1 else f'{found[0]} to {found[-1].name}'}"
    return "; expected auto, never, or a folder such as runs/a/checkpoints/step00001000"


def _of_run(paths: list[Path], present: lineage.Lineage | None) -> list[tuple[Path, str | None]]:
    """Those of the present run with what each lacks; a damaged one that does not say whose it is may be."""
    found: list[tuple[Path, str | None, str | None]] = []
    for path in paths:
        run = None
        try:
            if (missing := _missing(path)) is None:
                run = read_trainer(path)["run"]
        except DamagedError as error:
            missing = str(error)
        except FormatError:
            if present is None:
                raise
            continue  # of an older run, which the present one takes the place of
        found.append((path, missing, run))
    own = present.run if present is not None else next((run for *_, run in reversed(found) if run), None)
    return [(path, missing) for path, missing, run in found if run in (own, None)]


def verify(checkpoint: Path, ranks: Ranks) -> None:
    """Holds each file to the manifest's checksum; all ranks call it, each reads its share.

    Raises:
        DamagedError: a file is another.
    """
    with ranks.together(DamagedError):
        files = read_manifest(checkpoint)["files"]
        for name in sorted(files)[ranks.rank :: ranks.world_size]:
            try:
                found = fingerprint(checkpoint / name)
            except OSError as error:
                raise DamagedError(f"{checkpoint / name}: {error.strerror}") from error
            if found != files[name]:
                raise DamagedError(f"{checkpoint / name}: changed since it was written; remove {checkpoint}")


def load(engine: Engine, checkpoint: Path) -> Mapping[str, Any]:
    """Goes on from a checkpoint; returns what :func:`trainer` has put into it, its ``step`` for one.

    All ranks call it. They may be another number of ranks, at another ZeRO stage, than those that wrote it.

    Args:
        checkpoint: as :func:`find` found it.

    Raises:
        ConfigError: the checkpoint is of another model, or other parameters are tuned.
    """
    ranks = engine.ranks
    with ranks.together(ConfigError):
        numbers, stored = read_trainer(checkpoint), Tensors(checkpoint)
        wanted = {name: tuple(state.shape_of(parameter)) for name, parameter in state.tuned(engine)}
        for kind in (WEIGHTS, *MOMENTS):
            _same_parameters(checkpoint, wanted, stored.shapes(kind))
        own = engine.towers.state_dict(keep_vars=True)
        fixed = {name: tuple(state.shape_of(tensor)) for name, tensor in own.items() if name not in wanted}
        _same_parameters(checkpoint, fixed, stored.shapes(FIXED))
        average = {name: tuple(tensor.shape) for name, tensor in engine.objective.state_dict().items()}
        if stored.shapes(OBJECTIVE) != average:
            raise ConfigError(f"{checkpoint}: of another objective; start a new run, or set train.output")

    def read(name: str) -> Trained:
        moments = {key: stored.read(key, name, ranks.device) for key in MOMENTS}
        return Trained(name, stored.read(WEIGHTS, name, ranks.device), moments)

    state.put(engine, read, numbers["updates"])
    for name in fixed:
        _fix(own[name], stored.read(FIXED, name, ranks.device))
    engine.objective.load_state_dict({name: stored.read(OBJECTIVE, name, ranks.device) for name in average})
    # Ranks that were not there when it was written keep what their seed gave them.
    on_cpu, random = torch.device("cpu"), stored.shapes(RANDOM)
    if (name := f"cpu/{ranks.rank}") in random:
        torch.set_rng_state(stored.read(RANDOM, name, on_cpu))
    if ranks.device.type == "cuda" and (name := f"cuda/{ranks.rank}") in random:
        torch.cuda.set_rng_state(stored.read(RANDOM, name, on_cpu), ranks.device)
    engine.scale.load_state_dict(numbers["loss_scale"])
    engine.at_step(numbers["step"])
    return numbers


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
    with _held_to_its_form(path):
        manifest = read_json(path)
        written_by = manifest["format"]
        _must(type(written_by) is int)
    if written_by != FORMAT:
        raise FormatError(
            f"{checkpoint}: a checkpoint of format {written_by}, not {FORMAT} as now: finish that run with "
            "the version that began it, set train.output to another folder, or train.resume=never to train again"
        )
    with _held_to_its_form(path):
        files = manifest["files"]
        _must(TRAINER in files and IDENTITY in files)
        # Plain names: nothing outside the folder is opened.
        _must(all(Path(name).name == name and name.isprintable() for name in files))
        _must(all(type(file["bytes"]) is int and type(file["sha256"]) is str for file in files.values()))
    return manifest  # type: ignore[no-any-return]


def read_trainer(checkpoint: Path) -> Mapping[str, Any]:
    """``trainer.json``, held to its form.

    Raises:
        DamagedError: it is none.
    """
    path = checkpoint / TRAINER
    with _held_to_its_form(path):
        numbers = read_json(path)
        scale, validation = numbers["loss_scale"], numbers["validation"]
        _must(scale.keys() == {*STATE, "dynamic"} and type(scale["value"]) is float)
        _must(type(scale["dynamic"]) is bool and type(numbers["run"]) is str)
        _check_validation(validation)
        counts = [numbers["step"], numbers["updates"], numbers["total_steps"]]
        counts += [scale[name] for name in COUNTS]
        _must(all(type(value) in (float, NoneType) for value in numbers["metrics"].values()))
        _must(all(type(count) is int and 0 <= count < 2**31 for count in counts))
    return numbers  # type: ignore[no-any-return]


def read_identity(checkpoint: Path) -> Identity:
    """What decides the result of a checkpoint's run.

    Raises:
        DamagedError: it cannot be read.
    """
    path = checkpoint / IDENTITY
    with _held_to_its_form(path):
        found = read_json(path)
        _must(isinstance(found, dict))
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
    write_whole(checkpoint / EVALUATION, (json.dumps(evaluation._asdict(), indent=2) + "\n").encode())


def read_evaluation(checkpoint: Path) -> Evaluation | None:
    """What :func:`write_evaluation` has added; None: nothing.

    Raises:
        DamagedError: it is not as it was written.
    """
    path = checkpoint / EVALUATION
    if not path.exists():
        return None
    with _held_to_its_form(path, "; remove this file to evaluate again"):
        found = read_json(path)
        validation, metrics = found["validation"], found["metrics"]
        _check_validation(validation)
        _must(all(type(value) in (float, int, NoneType) for value in metrics.values()))
    return Evaluation(validation, metrics)


def _check_validation(found: Mapping[str, Any]) -> None:
    _must(found.keys() == {"best", "best_step", "since_best", "select"})
    _must(type(found["best"]) in (float, NoneType) and type(found["select"]) in (str, NoneType))
    counts = found["best_step"], found["since_best"]
    _must(all(type(count) is int and 0 <= count < 2**31 for count in counts))


@contextmanager
def _held_to_its_form(path: Path, remedy: str = "") -> Iterator[None]:
    """Whatever is missing, or of another type, in a JSON file."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path}: not as checkpoints of format {FORMAT} have it{remedy}") from error


def _must(holds: bool) -> None:
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


def _missing(checkpoint: Path) -> str | None:
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


def _tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    ranks = engine.ranks
    for place, found in enumerate(state.gathered(engine)):
        if place % ranks.world_size == ranks.rank:
            yield f"{WEIGHTS}/{found.name}", _on_cpu(found.weights)
            for key, moment in found.moments.items():
                yield f"{key}/{found.name}", _on_cpu(moment)
    tuned = {name for name, _ in state.tuned(engine)}
    for name, tensor in full_state(engine, without=tuned).items():
        yield f"{FIXED}/{name}", tensor.clone()
    if ranks.first:
        for name, tensor in engine.objective.state_dict().items():
            yield f"{OBJECTIVE}/{name}", _on_cpu(tensor)
    yield f"{RANDOM}/cpu/{ranks.rank}", torch.get_rng_state()
    if ranks.device.type == "cuda":
        yield f"{RANDOM}/cuda/{ranks.rank}", torch.cuda.get_rng_state(ranks.device)


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy in pageable memory: page-locked memory is faster to copy to, but torch never gives it back."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _same_parameters(
    checkpoint: Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            here, there = wanted.get(name, "not there"), found.get(name, "not there")
            raise ConfigError(
                f"{checkpoint}: of another model, or other parameters are tuned: {name} is {here} here and "
                f"{there} in the checkpoint; start a new run, or set train.output"
            )


def _fix(tensor: Any, value: Tensor) -> None:
    """Sets a buffer, or a parameter that is not tuned."""
    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0, enabled=hasattr(tensor, "ds_id")):
        if not hasattr(tensor, "ds_id") or torch.distributed.get_rank() == 0:
            with torch.no_grad():
                tensor.copy_(value)
