"""Writes a config for the user's data, from what the data is and from rules for its size."""

import os
from pathlib import Path
from typing import NamedTuple

from dive_fast.config.load import load_config
from dive_fast.config.schema import Config, TrainConfig
from dive_fast.config.shipped import CONFIGS
from dive_fast.data.holdout import num_held_out
from dive_fast.data.sources.sample_table import printable
from dive_fast.errors import ConfigError
from dive_fast.quickstart.choose_method import choose_method
from dive_fast.quickstart.choose_model import choose_model
from dive_fast.quickstart.choose_settings import choose_settings, holdout_share
from dive_fast.quickstart.class_files import class_files
from dive_fast.quickstart.compose_config import Choices, compose, header
from dive_fast.quickstart.inspect_data import Target, inspect_target
from dive_fast.quickstart.inspect_reference import inspect_reference
from dive_fast.quickstart.write_config import FORMATS, config_text, write_files


class Request(NamedTuple):
    """The user's options."""

    target: str
    command: str
    """The command line, for the head of the file."""
    val: str | None = None
    reference: str | None = None
    model: str | None = None
    pretrained: str | None = None
    method: str | None = None
    class_names: str | None = None
    template: str = "a photo of a {}"
    output: Path | None = None
    file_format: str | None = None
    force: bool = False


class NewConfig(NamedTuple):
    """A config that was written."""

    path: Path
    choices: Choices


def new_config(request: Request) -> NewConfig:
    """Looks at the data, chooses settings, and writes the config and its files of class names.

    Raises:
        ConfigError, DataError: a mistake in the options or the data; nothing is written.
    """
    _check(request)
    model = choose_model(request.model, request.pretrained)
    # Before the data is read, which may take a while.
    choose_method(request.method, request.reference is not None)
    target = inspect_target(request.target, request.val)
    output, file_format = _output(request, target.name)
    train = target.train
    method = choose_method(request.method, request.reference is not None, train.has_classes)
    reference = None if request.reference is None else inspect_reference(request.reference)
    files = class_files(target, request.class_names, output) if train.has_classes else None
    share = None if target.val is not None else _holdout_share(target)
    num_train = len(train.source) - _num_held_out(target, share)
    cores = len(os.sched_getaffinity(0))
    shipped = _shipped_train(method)
    choices = Choices(
        target=target,
        num_train=num_train,
        class_files=files,
        holdout=share,
        template=request.template,
        model=model,
        reference=reference,
        method=method,
        method_train=shipped,
        settings=choose_settings(num_train, None if reference is None else reference.pairs, cores, model.is_demo),
        precision=shipped.precision if has_gpu() and not model.is_demo else "fp32",
    )
    config = compose(choices)
    text = config_text(config.tree, config.comments, header(request.command, choices), file_format)
    write_files(output, text, {} if files is None else files.texts, request.force)
    return NewConfig(output, choices)


def has_gpu() -> bool:
    """Whether this machine has a GPU of NVIDIA or AMD; torch is not asked, since its import takes seconds."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or any(Path(f"/dev/{name}").exists() for name in ("kfd", "dxg"))


def _check(request: Request) -> None:
    """Validates options that need no look at the data."""
    paths = {
        "--target": request.target,
        "--val": request.val,
        "--reference": request.reference,
        "--class-names": request.class_names,
        "--output": None if request.output is None else str(request.output),
    }
    for option, path in paths.items():
        if path is None:
            continue
        if not path.strip():
            raise ConfigError(f"{option} is empty: name a file or folder")
        if printable(path) != path:
            raise ConfigError(
                f"{option} {printable(path)}: not valid UTF-8, which a config cannot hold; rename it"
            )
    is_list = request.template in ("imagenet", "simple") or Path(request.template).is_file()
    if "{}" not in request.template and not is_list:
        raise ConfigError(
            f"--template {request.template!r}: has no {{}} for the class name, e.g. 'a photo of a {{}}'; or name "
            "a file of templates, imagenet or simple"
        )


def _output(request: Request, name: str) -> tuple[Path, str]:
    """The file to write, and its format.

    Raises:
        ConfigError: the suffix is not that of a config, or of another format than the one asked for.
    """
    if request.output is None:
        return Path(f"{name}.{request.file_format or 'yaml'}"), request.file_format or "yaml"
    suffix = request.output.suffix.lower()
    if suffix not in FORMATS:
        raise ConfigError(f"--output {request.output}: the name of a config ends with {', '.join(FORMATS)}")
    if request.file_format not in (None, FORMATS[suffix]):
        raise ConfigError(f"--output {request.output} is not --format {request.file_format}: remove one of them")
    return request.output, FORMATS[suffix]


def _holdout_share(target: Target) -> float | None:
    """The share to hold out; None where there are no classes, or no class has two images."""
    train = target.train
    if not train.has_classes or max(train.class_sizes()) < 2:
        return None
    return holdout_share(len(train.source), len(train.class_sizes()))


def _num_held_out(target: Target, share: float | None) -> int:
    if share is None:
        return 0
    return sum(num_held_out(size, share) for size in target.train.class_sizes() if size)


def _shipped_train(method: str) -> TrainConfig:
    """The ``train`` section of the config that the project ships for a method; the default where there is none."""
    path = CONFIGS / f"vitb16_{method}.json"
    return load_config(str(path), (), None, Config).train if path.is_file() else TrainConfig()
