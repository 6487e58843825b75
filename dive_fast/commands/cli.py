"""Shared by all commands that take a config: the argument parser, the run folder, and the reporting of errors.

A command's main function is decorated with :func:`guarded` and returns the exit code: 0 for success, 2 for a
mistake in the command, config or data. docs/reliability.md lists the exit codes.
"""

import argparse
import functools
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dive_fast.commands.lean_imports import lean_imports
from dive_fast.config.shipped import CONFIGS

if TYPE_CHECKING:
    from dive_fast.config.schema import Config, EvaluateConfig, ModelConfig
    from dive_fast.methods.run_config import RunConfig


def parser(description: str | None, example: str, required: bool = True) -> argparse.ArgumentParser:
    """Creates an argument parser with ``--config`` and overrides of the config.

    Args:
        description: text for ``--help``.
        example: an example of an override, for ``--help``.
        required: whether the command needs a config.
    """
    config_parser = _Parser(description=description)
    config_parser.add_argument(
        "--config",
        required=required,
        help="path of a config, JSON or YAML; a run folder, for its config; or the name of a shipped config",
    )
    config_parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    config_parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help=f"override of a config value, e.g. {example}"
    )
    return config_parser


def add_kept(group: argparse._ActionsContainer) -> None:
    """Adds ``--kept``, the sets that a comparison of runs weighs against the ID set."""
    group.add_argument(
        "--kept",
        nargs="+",
        metavar="SET",
        help="sets whose mean is what is kept (`probe`: all of the probe); default: OOD and zero-shot sets, R@1 "
        "and RSA of the probe",
    )


class _Parser(argparse.ArgumentParser):
    """Argument parser that says where configs come from if ``--config`` is missing."""

    def error(self, message: str) -> NoReturn:
        if "required: --config" not in message:
            super().error(message)
        names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.json")))
        self.exit(
            2,
            "error: --config is missing: name a config file, a run folder or a shipped config\n"
            "  dive-fast init --target photos/  writes a config for your data\n"
            "  dive-fast keys                   lists the keys of a config\n"
            f"  shipped configs: {names}\n",
        )


def count(minimum: int) -> Callable[[str], int]:
    """Argument type for an integer of at least ``minimum``, which is not negative."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least {minimum}")
        return int(text)

    return parse


def load_config(
    name: str, overrides: Sequence[str], announcement: str = "", check: "Callable[[Config], None] | None" = None
) -> "RunConfig":
    """Reads a config by path or by its name among the shipped ones.

    The methods import torch, which takes seconds: everything but their losses and options is validated before, by
    pydantic alone, so that a typo is reported at once.

    Args:
        announcement: line that rank 0 prints after that, before the seconds of imports.
        check: validates the config further, before the announcement (:mod:`dive_fast.evaluation.early_checks`).

    Raises:
        ConfigError: as :func:`dive_fast.methods.run_config.load_run_config`.
        UserError: as ``check``.
    """
    from dive_fast.config.load import load_config
    from dive_fast.methods.method_list import ListedConfig

    checked = load_config(name, overrides, CONFIGS, ListedConfig)
    if check is not None:
        check(checked)
    if os.environ.get("RANK", "0") == "0":
        for remark in checked.origins.remarks:
            print(remark, file=sys.stderr)
        if announcement:
            print(announcement, flush=True)
    with lean_imports():
        from dive_fast.distributed import use_cpu_without_gpu

        use_cpu_without_gpu()
        # The methods import open_clip, and it timm.
        from dive_fast.methods.run_config import load_run_config

        return load_run_config(name, overrides, CONFIGS)


def check_model_options(parser: argparse.ArgumentParser, options: argparse.Namespace, missing: str) -> None:
    """Checks that ``--config`` or ``--model`` is set, and that ``--pretrained`` and overrides go with it.

    Args:
        missing: the error where neither or both are set.
    """
    if (options.config is None) == (options.model is None):
        parser.error(missing)
    if options.model is not None and options.overrides:
        parser.error(f"{options.overrides[0]}: overrides go with --config")
    if options.config is not None and options.pretrained is not None:
        parser.error("--pretrained goes with --model; a config has model.pretrained")


def config_or_model(
    options: argparse.Namespace, check: "Callable[[ModelConfig, Config | None], None]"
) -> "tuple[RunConfig | None, ModelConfig, EvaluateConfig]":
    """The config, its model and its ``evaluate`` section; or no config, the model of ``--model``, and defaults.

    Args:
        check: validates the model, and the config if there is one, before the seconds of imports.

    Raises:
        ConfigError: as :func:`load_config`.
        UserError: as ``check``.
    """
    from dive_fast.config.schema import EvaluateConfig, ModelConfig

    if options.config is not None:
        config = load_config(
            options.config, options.overrides, check=lambda checked: check(checked.model, checked)
        )
        return config, config.model, config.evaluate
    model = ModelConfig(name=options.model, pretrained=options.pretrained)
    check(model, None)
    return None, model, EvaluateConfig()


def run_folder(output: str | None, config: str) -> Path:
    """``train.output`` if it is set, otherwise ``runs/`` and the config's name."""
    return Path(output or f"runs/{Path(config).stem}")


REPORT_SECONDS = {True: 2.0, False: 10.0}
"""How long a rank whose error another one reports waits before it exits, in a process group and before they join.
Launchers end all ranks once one has ended, also a slower one that is about to report: the error would be lost."""


def report_error(error: Exception, options: argparse.Namespace) -> int:
    """Prints a user's mistake in one line, once for all ranks that share it.

    Args:
        options: the parsed arguments, repeated in the command that rebuilds a stale teacher cache.

    Returns:
        Exit code 2.
    """
    from dive_fast.teacher.cache_files import StaleCacheError

    command = f": {_rebuild_command(options)}" if isinstance(error, StaleCacheError) else ""
    if _should_report(error):
        prefix = "" if os.environ.get("RANK", "0") == "0" else _rank_prefix()
        print(f"{prefix}error: {_with_origin(str(error), options)}{command}", file=sys.stderr)
    else:
        time.sleep(REPORT_SECONDS[_in_group()])
    return 2


def _with_origin(message: str, options: argparse.Namespace) -> str:
    """A message that begins with a config key, and where the key is set; other messages are unchanged."""
    from dive_fast.config.explain import named_key, with_origin
    from dive_fast.config.load import read_origins
    from dive_fast.errors import ConfigError

    if named_key(message) is None or getattr(options, "config", None) is None:
        return message
    try:
        return with_origin(message, read_origins(options.config, options.overrides, CONFIGS))
    except ConfigError:  # the files have changed since
        return message


def _should_report(error: Exception) -> bool:
    """Whether this process reports an error.

    Ranks in a process group share their errors, and only rank 0 reports them. Before they join, the first rank of
    each machine reports, since machines may differ, and each rank reports a :class:`LaunchError`.
    """
    from dive_fast.errors import LaunchError

    rank = os.environ.get("RANK", "0")
    if rank == "0" or _in_group():
        return rank == "0"
    return isinstance(error, LaunchError) or os.environ.get("LOCAL_RANK", "0") == "0"


def _in_group() -> bool:
    """Whether this rank is in a process group; does not import torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_initialized())


def guarded(main: Callable[..., int]) -> Callable[..., int]:
    """Decorates a command's main function: machine errors become one line, bugs keep their traceback.

    Exit codes: 1 for errors of memory, disk or a device; 76 if no batch arrives; 130 for Ctrl-C.
    """

    @functools.wraps(main)
    def guarded_main(arguments: list[str] | None = None) -> int:
        with ignore_closed_output():
            handler = logging.StreamHandler()
            handler.setFormatter(_LogFormatter())
            logging.basicConfig(handlers=[handler])
            try:
                return main(arguments)
            except KeyboardInterrupt:
                return 130
            except Exception as error:
                from dive_fast.errors import StalledError, machine_error

                cause = error if isinstance(error, StalledError) else machine_error(error)
                if cause is None:
                    raise
                print(f"{_rank_prefix()}error: {cause}", file=sys.stderr)
                return 76 if isinstance(error, StalledError) else 1

    return guarded_main


class _LogFormatter(logging.Formatter):
    """Formats ``warning: message``, without the name of the module."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


def _rank_prefix() -> str:
    """Prefix of a line that any rank may print; empty without a launcher."""
    return f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""


@contextmanager
def ignore_closed_output() -> Iterator[None]:
    """Ignores errors of writing to stdout and stderr in the context.

    Ctrl-C ends ``tee`` together with the run, which still has to save a checkpoint; a log may be on a full disk.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _ClosableOutput(sys.stdout), _ClosableOutput(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in streams:
            try:
                stream.flush()
            except OSError:
                # Python would flush again at exit, and change the exit code.
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _ClosableOutput:
    """Wraps a stream and ignores errors of writing to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def _rebuild_command(options: argparse.Namespace) -> str:
    """The command that rebuilds the teacher cache of a config."""
    adopt = getattr(options, "adopt", None)
    arguments = ["--config", options.config, "--rebuild", *(["--adopt", str(adopt)] if adopt else [])]
    return f"dive-fast cache {shlex.join(arguments + options.overrides)}"
