"""The GPU check: outcomes of parts, their ratios, and results kept between calls."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import gpu_check
import pytest
from gpu_check import SANITIZER, Part, parts, run
from step_report import step_ratios


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def fake_part(name: str, code: str = "", limit: int = 1) -> Part:
    return Part(name, "Is it?", "It is.", python(code), python(code), limit, 1)


def test_run_passes_fails_or_kills_part_with_its_children(tmp_path: Path) -> None:
    part = fake_part("some")
    assert run(part, python("print('fine')"), 30)["outcome"] == "passed"
    failed = run(part, python("import sys; sys.exit('x' * 5000)"), 30)
    assert failed["outcome"] == "failed"
    assert failed["end"].endswith("x\n")
    assert len(failed["end"]) == gpu_check.TAIL
    path = gpu_check.REPOSITORY / "benchmarks"
    assert run(part, python(f"print('{path}')"), 30)["end"] == "benchmarks\n"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path('{tmp_path}/late').touch()"
    assert run(part, python("print('== 2 skipped in 0.1s ==')"), 30)["outcome"] == "skipped"
    assert run(part, python("print('== 1 passed, 2 skipped in 0.1s ==')"), 30)["outcome"] == "passed"
    hung = run(part, python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"), 1)
    assert hung["outcome"] == "out of time"
    assert hung["seconds"] < 2.5
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_step_ratios_use_largest_batch_measured_for_both(tmp_path: Path) -> None:
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
    expected = {"batch": 512, "dive_over_flyp_peer_time": 0.2, "dive_over_flyp_memory": 1.02}
    assert step_ratios(tmp_path / "steps.json") == {"B": pytest.approx(expected)}
    assert step_ratios(tmp_path / "none.json") == {}


def test_words_that_parts_select_by_name_existing_tests(tmp_path: Path) -> None:
    commands = {command for part in parts(tmp_path) for command in (part.command, part.rehearsal)}
    selecting = [command for command in commands if "-k" in command and "tests/" in "".join(command)]
    assert len(selecting) > 1
    for command in selecting:
        path = gpu_check.REPOSITORY / next(word for word in command if word.startswith("tests/"))
        files = sorted(path.glob("test_*.py")) if path.is_dir() else [path]
        names = [line for file in files for line in file.read_text().splitlines() if line.startswith("def test_")]
        for word in command[command.index("-k") + 1].split(" or "):
            assert any(word in name for name in names), f"{path} has no test for -k {word}"


def test_parts_are_existing_commands(tmp_path: Path) -> None:
    all_parts = parts(tmp_path)
    assert len({part.name for part in all_parts}) == len(all_parts)
    for part in all_parts:
        for command in (part.command, part.rehearsal):
            assert Path(command[0]).exists() or SANITIZER in command[0], part.name
            paths = [part.folder / word for word in command[1:]]
            modules = [path / "__main__.py" for path in paths]
            tests = [part.folder / word for word in command if word.startswith("tests/")]
            assert any(path.is_file() for path in [*paths, *modules]) or any(map(Path.is_dir, tests)), part.name


def test_measured_is_the_line_of_figures_or_the_last(tmp_path: Path) -> None:
    assert gpu_check.measured("a\nmeasured: 1 ms\nmeasured: 2 ms\nDone.\n") == "2 ms"
    assert gpu_check.measured("..\n=== 3 passed in 1.0s ===\n\n") == "3 passed in 1.0s"
    assert gpu_check.measured("") == ""
    result = run(fake_part("one"), python("print('measured: 3 ms')"), 30)
    assert (result["question"], result["predicted"], result["measured"]) == ("Is it?", "It is.", "3 ms")


def test_parts_of_each_call_fit_in_nine_minutes(tmp_path: Path) -> None:
    seconds: dict[int, int] = {}
    order = [part.call for part in parts(tmp_path)]
    assert order == sorted(order)
    for part in parts(tmp_path):
        seconds[part.call] = seconds.get(part.call, 0) + part.seconds
    assert seconds.keys() == {1, 2, 3, 4, 5}
    assert max(seconds.values()) <= 540, seconds


def test_readme_has_question_and_prediction_of_every_part(tmp_path: Path) -> None:
    readme = Path(gpu_check.__file__).with_name("README.md").read_text()
    rows = [f"| {part.call} | `{part.name}` | {part.question} | {part.prediction} |" for part in parts(tmp_path)]
    assert [line for line in readme.splitlines() if line in rows] == rows


def test_run_reports_missing_tool_as_outcome() -> None:
    missing = run(fake_part("memcheck"), ("/nowhere/compute-sanitizer", "pytest"), 30)
    assert missing == {"part": "memcheck", "outcome": "not installed", "command": SANITIZER}


def test_skipped_tests_are_the_outcome_of_their_part(tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    for code, outcome in (
        ("pytest.skip('no GPU')", "skipped"),
        ("pass", "passed"),
        ("raise ValueError", "failed"),
    ):
        tests.write_text(f"import pytest\n\ndef test_it():\n    {code}\n")
        command = (*gpu_check.PYTEST, str(tests), "-n", "0")
        assert run(fake_part("some"), command, 60)["outcome"] == outcome


def test_main_keeps_outcomes_of_earlier_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only(name: str, code: str, minutes: str = "9", limit: int = 30) -> tuple[int, dict[str, str]]:
        fake_parts = [fake_part(name, code, limit) for name in ("one", "two", "three")]
        monkeypatch.setattr(gpu_check, "parts", lambda _: fake_parts)
        arguments = ["gpu_check.py", "--rehearse", "--minutes", minutes, *(["--only", name] if name else [])]
        monkeypatch.setattr(sys, "argv", arguments)
        code = gpu_check.main()
        written = json.loads(next((tmp_path / "build/rehearsal").glob("*-gpu-check.json")).read_text())
        return code, {part["part"]: part["outcome"] for part in written["parts"]}

    monkeypatch.setattr(gpu_check, "REPOSITORY", tmp_path)
    assert only("two", "1") == (0, {"one": "not reached", "two": "passed", "three": "not reached"})
    assert only("three", "1 / 0") == (1, {"one": "not reached", "two": "passed", "three": "failed"})
    now = {"one": "passed", "two": "passed", "three": "failed"}
    assert only("one", "1") == (0, now)
    # Too little time to start, and too little to finish.
    slow = "import time; time.sleep(9)"
    assert only("two", "1 / 0", minutes="0.4") == (0, now)
    assert only("two", slow, minutes="0.05", limit=1) == (1, now)
    assert only("three", slow, minutes="0.05", limit=1) == (1, now | {"three": "out of time"})
