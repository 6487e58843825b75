"""The command for a GPU keeps what it found, whatever becomes of a part."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import gpu_check
import pytest
from gpu_check import Part, parts, run, step_ratios


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
            assert Path(command[0]).exists(), part.name
            assert any((gpu_check.REPOSITORY / word).is_file() for word in command[1:]), part.name
