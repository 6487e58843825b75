"""Waiting that says for what: a line every half minute."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist
from tqdm import tqdm

REPORT_SECONDS = 30.0
"""Seconds of waiting until it is said, and between two lines."""


@contextmanager
def waiting(what: Callable[[float], str], limit: float | None = None, code: int = 1) -> Iterator[None]:
    """Says what the block waits for, every :data:`REPORT_SECONDS` seconds.

    Args:
        what: the line, by the seconds waited so far.
        limit: seconds after which the process ends, whatever its main thread waits in; None: never.
        code: its exit code then.
    """
    done = threading.Event()

    def watch() -> None:
        begun = time.monotonic()
        while True:
            left = REPORT_SECONDS if limit is None else min(REPORT_SECONDS, begun + limit - time.monotonic())
            if done.wait(max(0.0, left)):
                return
            waited = time.monotonic() - begun
            if limit is not None and waited >= limit:
                try:
                    report(f"error: {what(waited)}")
                finally:
                    os._exit(code)
            report(what(waited))

    thread = threading.Thread(target=watch, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def report(line: str) -> None:
    """Prints a line on standard error, whose reader may have gone: Ctrl-C ends ``tee`` too."""
    with suppress(OSError, ValueError):
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def rank_name() -> str:
    """``rank R``, for lines that each rank prints."""
    return f"rank {dist.get_rank() if dist.is_initialized() else 0}"
