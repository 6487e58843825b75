"""DeepSpeed's monitors: their files are in the run folder and contain each step once, also after a resume."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from dive_fast.io.atomic_files import write_atomic

FILE_MONITORS = ("tensorboard", "csv_monitor")


def with_output_paths(deepspeed: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The ``deepspeed`` section with its file monitors below the run folder, unless they name another folder."""
    section = dict(deepspeed)
    for name in FILE_MONITORS:
        if isinstance(options := section.get(name), dict) and options.get("enabled"):
            named = {key: value for key, value in options.items() if value not in ("", None)}
            section[name] = {"output_path": str(folder), "job_name": name} | named
    return section


def discard_after(monitor: Any, last: int) -> None:
    """Removes the events after the point that a run resumes from, since they are logged again.

    Args:
        monitor: DeepSpeed's ``MonitorMaster``.
        last: number of samples at that point; monitors count samples.
    """
    csv = getattr(monitor, "csv_monitor", None)
    if csv is not None and csv.enabled:
        for path in Path(csv.output_path, csv.job_name).glob("*.csv"):
            lines = path.read_text().splitlines(keepends=True)
            write_atomic(path, "".join(line for line in lines if _is_kept(line, last)).encode())
            csv.filenames.append(path.stem)  # the file has its header already
    board = getattr(monitor, "tb_monitor", None)
    if board is not None and board.enabled and getattr(board, "summary_writer", None) is not None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

        # SummaryWriter's purge_step does the same, but DeepSpeed does not pass it on.
        writer = board.summary_writer._get_file_writer()
        writer.add_event(Event(step=last + 1, file_version="brain.Event:2"))
        writer.add_event(Event(step=last + 1, session_log=SessionLog(status=SessionLog.START)))


def _is_kept(line: str, last: int) -> bool:
    with suppress(ValueError):
        return int(line.partition(",")[0]) <= last
    return line.startswith("step")
