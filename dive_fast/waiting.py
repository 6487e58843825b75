"""Reports about long waits on standard error."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist
from tqdm import tqdm

REPORT_SECONDS = 30.0
"""Seconds of waiting until the first report, and between two reports."""


@contextmanager
def waiting(message: Callable[[float], str], limit: float | None = None, code: int = 1) -> Iterator[None]:
    """Reports every :data:`REPORT_SECONDS` seconds what the block waits for.

    Args:
        message: returns the line for the seconds waited so far.
        limit: seconds after which the process exits, even if its main thread is blocked; None: never.
        code: exit code at the limit.
    """
    done = threading.Event()

    def watch() -> None:
        start = time.monotonic()
        while True:
            remaining = REPORT_SECONDS if limit is None else min(REPORT_SECONDS, start + limit - time.monotonic())
            if done.wait(max(0.0, remaining)):
                return
            waited = time.monotonic() - start
            if limit is not None and waited >= limit:
                try:
                    report(f"error: {message(waited)}")
                finally:
                    os._exit(code)
            report(message(waited))

    thread = threading.Thread(target=watch, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def report(line: str) -> None:
    """Prints a line on standard error, which may be closed: Ctrl-C ends ``tee`` too."""
    with suppress(OSError, ValueError):
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def rank_name() -> str:
    """``rank <number>``, for lines that each rank prints."""
    return f"rank {dist.get_rank() if dist.is_initialized() else 0}"
