"""Every kernel variant that can be launched also compiles, without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TABLE = REPOSITORY / "benchmarks" / "results" / "kernels_sm90.md"


def compile_kernels(*arguments):
    # The interpreter is chosen once per process, so the compiler runs in another process.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-W", "ignore", "benchmarks/compile_kernels.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


def test_table_is_of_this_code_and_a_sample_compiles_as_it_says():
    # The command writes a table only if all variants compile for Hopper without spills. The digests show that the
    # committed table is of the same code, variants and compiler.
    run = compile_kernels("--sample")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "up to date" in run.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kernels_compile_for_hopper_without_spills(tmp_path):
    run = compile_kernels("--output", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / TABLE.name).read_text() == TABLE.read_text()


def test_outdated_table_is_refused(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import compile_kernels as command\n"
        "from pathlib import Path\n"
        "recorded = [each for each in command.variants() if each.kernel == 'sums_kernel']\n"
        "for table in map(Path, sys.argv[1:]): print(command.outdated(table.read_text(), recorded))\n"
    )
    lines = TABLE.read_text().splitlines(keepends=True)
    rows = [line for line in lines if "| sums_kernel |" in line]
    assert len(rows) == 3
    text = "".join([*lines[:6], *rows])
    tables = {
        "same": text,
        "other code": re.sub(r"\w+ \|\n", "0123456789ab |\n", text, count=1),
        "missing row": text.replace(rows[1], ""),
        "additional row": text + rows[0].replace("sums_kernel", "other_kernel"),
        "other compiler": re.sub(r"Triton [\d.]+\.", "Triton 1.0.0.", text),
    }
    for name, table in tables.items():
        (tmp_path / name).write_text(table)
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-P", "-W", "ignore", "-c", code, *(str(tmp_path / name) for name in tables)]
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    same, *others = run.stdout.splitlines()
    assert same == "[]"
    assert [line.count("the table is") for line in others] == [1] * 4, run.stdout


def test_interpreter_is_refused():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-P", "benchmarks/compile_kernels.py"]
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "TRITON_INTERPRET is set" in run.stderr
