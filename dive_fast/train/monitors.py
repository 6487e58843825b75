"""DeepSpeed's monitors: their files lie in the run folder, and hold each step once after a resume."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from dive_fast.config.schema import Config
from dive_fast.io.atomic_files import write_atomic

IN_FILES = ("tensorboard", "csv_monitor")


def in_run_folder(config: Config, folder: Path) -> Config:
    """The config with its file monitors below the run folder, where the user has named no other place."""
    section = dict(config.deepspeed)
    for name in IN_FILES:
        if isinstance(options := section.get(name), dict) and options.get("enabled"):
            named = {key: value for key, value in options.items() if value not in ("", None)}
            section[name] = {"output_path": str(folder), "job_name": name} | named
    return config.model_copy(update={"deepspeed": section})


def forget_after(monitor: Any, last: int) -> None:
    """Removes what was logged beyond a point that a run resumes from, since it is logged again.

    Args:
        monitor: DeepSpeed's.
        last: samples so far, which is what monitors count.
    """
    csv = getattr(monitor, "csv_monitor", None)
    if csv is not None and csv.enabled:
        for path in Path(csv.output_path, csv.job_name).glob("*.csv"):
            lines = path.read_text().splitlines(keepends=True)
            write_atomic(path, "".join(line for line in lines if _is_kept(line, last)).encode())
            csv.filenames.append(path.stem)  # it has its header already
    board = getattr(monitor, "tb_monitor", None)
    if board is not None and board.enabled and getattr(board, "summary_writer", None) is not None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

        # As SummaryWriter's purge_step does, which DeepSpeed does not pass on.
        writer = board.summary_writer._get_file_writer()
        writer.add_event(Event(step=last + 1, file_version="brain.Event:2"))
        writer.add_event(Event(step=last + 1, session_log=SessionLog(status=SessionLog.START)))


def _is_kept(line: str, last: int) -> bool:
    with suppress(ValueError):
        return int(line.partition(",")[0]) <= last
    return line.startswith("step")
