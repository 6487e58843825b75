"""The command for a GPU keeps what it found, whatever becomes of a part."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import gpu_check
import pytest
from gpu_check import SANITIZER, Part, parts, run, step_ratios


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_part_passes_fails_or_is_killed_with_all_its_children(tmp_path: Path) -> None:
    part = Part("some", (), (), 1)
    assert run(part, python("print('fine')"), 30)["outcome"] == "passed"
    failed = run(part, python("import sys; sys.exit('x' * 5000)"), 30)
    assert failed["outcome"] == "failed"
    assert failed["end"].endswith("x\n")
    assert len(failed["end"]) == gpu_check.TAIL
    path = gpu_check.REPOSITORY / "benchmarks"
    assert run(part, python(f"print('{path}')"), 30)["end"] == "benchmarks\n"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path('{tmp_path}/late').touch()"
    hung = run(part, python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"), 1)
    assert hung["outcome"] == "out of time"
    assert hung["seconds"] < 2.5
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_ratios_are_those_of_the_largest_batch_that_both_have(tmp_path: Path) -> None:
    def case(batch: int, competitor: str, seconds: float, peak: float, **more: Any) -> dict[str, Any]:
        named = {"model": "B", "batch": batch, "competitor": competitor, "outcome": "measured"}
        return named | {"seconds": seconds, "peak_bytes": peak} | more

    cases = [
        case(512, "flyp_published", 10.0, 100.0),
        case(512, "dive_fast", 2.0, 51.0),
        case(512, "dive_fast", 1.0, 40.0, reference_batch=64),
        case(512, "flyp_fast", 1.0, 50.0),
        case(256, "flyp_published", 5.0, 50.0),
        case(256, "dive_fast", 4.0, 26.0),
        {"model": "L", "batch": 256, "competitor": "dive_fast", "outcome": "out of memory"},
    ]
    (tmp_path / "steps.json").write_text(json.dumps({"cases": cases}))
    wanted = {"batch": 512, "dive_over_flyp_peer_time": 0.2, "dive_over_flyp_memory": 1.02}
    assert step_ratios(tmp_path / "steps.json") == {"B": pytest.approx(wanted)}
    assert step_ratios(tmp_path / "none.json") == {}


def test_its_parts_are_commands_that_exist_and_fit(tmp_path: Path) -> None:
    found = parts(tmp_path)
    assert len({part.name for part in found}) == len(found)
    for part in found:
        for command in (part.command, part.rehearsal):
            assert Path(command[0]).exists() or SANITIZER in command[0], part.name
            places = [part.folder / word for word in command[1:]]
            assert any(place.is_file() or (place / "__main__.py").is_file() for place in places), part.name


def test_a_tool_that_is_not_there_is_an_outcome() -> None:
    missing = run(Part("memcheck", (), (), 1), ("/nowhere/compute-sanitizer", "pytest"), 30)
    assert missing == {"part": "memcheck", "outcome": "not installed", "command": SANITIZER}


def test_what_an_earlier_call_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only(name: str, code: str, minutes: str = "9", limit: int = 30) -> tuple[int, dict[str, str]]:
        found = [Part(name, python(code), python(code), limit) for name in ("one", "two", "three")]
        monkeypatch.setattr(gpu_check, "parts", lambda _: found)
        arguments = ["gpu_check.py", "--rehearse", "--minutes", minutes, *(["--only", name] if name else [])]
        monkeypatch.setattr(sys, "argv", arguments)
        ended = gpu_check.main()
        written = json.loads(next((tmp_path / "build/rehearsal").glob("*-gpu-check.json")).read_text())
        return ended, {part["part"]: part["outcome"] for part in written["parts"]}

    monkeypatch.setattr(gpu_check, "REPOSITORY", tmp_path)
    assert only("two", "1") == (0, {"one": "not reached", "two": "passed", "three": "not reached"})
    assert only("three", "1 / 0") == (1, {"one": "not reached", "two": "passed", "three": "failed"})
    now = {"one": "passed", "two": "passed", "three": "failed"}
    assert only("one", "1") == (0, now)
    # Too late to begin, and too short to end.
    slow = "import time; time.sleep(9)"
    assert only("two", "1 / 0", minutes="0.4") == (0, now)
    assert only("two", slow, minutes="0.05", limit=1) == (1, now)
    assert only("three", slow, minutes="0.05", limit=1) == (1, now | {"three": "out of time"})
