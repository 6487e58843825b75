"""Reports of long waits: repeated on standard error, and an end of the process at the limit."""

import subprocess
import sys
import time

import pytest

from dive_fast import waiting


def test_short_wait_reports_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with waiting.waiting(lambda waited: "never"):
        pass
    assert capsys.readouterr().err == ""


def test_long_wait_is_reported_repeatedly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "REPORT_SECONDS", 0.01)
    seconds: list[float] = []

    def message(waited: float) -> str:
        seconds.append(waited)
        return f"report {len(seconds)}"

    with waiting.waiting(message):
        deadline = time.monotonic() + 10
        while len(seconds) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
    assert capsys.readouterr().err.startswith("report 1\nreport 2\n")
    assert seconds == sorted(seconds)
    assert seconds[0] >= 0.01


LIMITED = """
import time
from dive_fast.waiting import waiting
with waiting(lambda waited: f"waited {waited:.0f} s", limit=0.05, code=76):
    time.sleep(60)
"""


def test_limit_ends_the_process() -> None:
    run = subprocess.run([sys.executable, "-P", "-c", LIMITED], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (76, "error: waited 0 s\n")


def test_report_to_a_closed_reader_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, _: str) -> None:
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stderr", Closed())
    waiting.report("a line")
