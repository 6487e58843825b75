"""What the commands share that take a config: their arguments, the run folder, how a user's mistake is told."""

import argparse
import functools
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

CONFIGS = Path(__file__).parent / "configs"


def parser(description: str | None, example: str, required: bool = True) -> argparse.ArgumentParser:
    """Takes a config and overrides of it.

    Args:
        example: of an override.
        required: whether the command needs a config.
    """
    made = _Parser(description=description)
    made.add_argument("--config", required=required, help="a path, or a name in launch/configs")
    made.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"e.g. {example}")
    return made


class _Parser(argparse.ArgumentParser):
    """Names the configs where none is given."""

    def error(self, message: str) -> NoReturn:
        if "required: --config" in message:
            names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.json")))
            message += f" (shipped configs: {names}; docs/config.md describes all keys)"
        super().error(message)


def count(least: int) -> Callable[[str], int]:
    """The type of an option that is a number from ``least`` on."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number from {least} on")
        return int(text)

    return read


def run_folder(output: str | None, config: str) -> Path:
    """``train.output``, or else the config's own name below ``runs``."""
    return Path(output or f"runs/{Path(config).stem}")


def report_error(error: Exception, options: argparse.Namespace) -> int:
    """Reports a user's mistake in one line, once for all ranks that share it; returns the exit code.

    Args:
        options: what the user gave: a command that mends it repeats them.
    """
    from dive_fast.teacher.cache_files import StaleCacheError

    mend = f": {_rebuild(options)}" if isinstance(error, StaleCacheError) else ""
    if _reports(error):
        name = "" if os.environ.get("RANK", "0") == "0" else _own_name()
        print(f"{name}error: {error}{mend}", file=sys.stderr)
    return 2


def _reports(error: Exception) -> bool:
    """Whether this process reports an error: the first rank does, once ranks have met and share their errors.

    Before, each machine may have an error of its own, and each rank one of how it was launched.
    """
    from dive_fast.errors import LaunchError

    rank, distributed = os.environ.get("RANK", "0"), sys.modules.get("torch.distributed")
    if rank == "0" or (distributed is not None and distributed.is_initialized()):
        return rank == "0"
    return isinstance(error, LaunchError) or os.environ.get("LOCAL_RANK", "0") == "0"


def guarded(main: Callable[..., int]) -> Callable[..., int]:
    """Decorates the function of a command: errors of the machine become one line, bugs keep their traceback.

    Exit codes: 1 for what memory, disk or a device does; 76 where no batch comes; 130 for Ctrl-C.
    """

    @functools.wraps(main)
    def guarded_main(arguments: list[str] | None = None) -> int:
        with ignore_closed_output():
            try:
                return main(arguments)
            except KeyboardInterrupt:
                return 130
            except Exception as error:
                from dive_fast.errors import StalledError, machine_error

                if (found := error if isinstance(error, StalledError) else machine_error(error)) is None:
                    raise
                print(f"{_own_name()}error: {found}", file=sys.stderr)
                return 76 if isinstance(error, StalledError) else 1

    return guarded_main


def _own_name() -> str:
    """For a line that any rank may print; nothing where there is only one."""
    return f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""


@contextmanager
def ignore_closed_output() -> Iterator[None]:
    """Whatever is inside does not end because nobody reads what it prints.

    Ctrl-C ends ``tee`` as it ends the run, which then still has to save; a disk fills up under a log.
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
                # Python would try again at its end, and exit with a code of its own.
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _ClosableOutput:
    """A stream but for errors of writing to it."""

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


def _rebuild(options: argparse.Namespace) -> str:
    """The command that writes the teacher cache of a config anew."""
    adopt = getattr(options, "adopt", None)
    words = ["--config", options.config, "--rebuild", *(["--adopt", str(adopt)] if adopt else [])]
    return f"deepspeed launch/cache.py {shlex.join(words + options.overrides)}"
