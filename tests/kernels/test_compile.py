"""Every kernel variant that can be launched also compiles, without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_kernels_compile_for_hopper_without_spills(tmp_path):
    # The interpreter is chosen once per process, so the compiler runs in another process.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-W", "ignore", "benchmarks/compile_kernels.py", "--output", str(tmp_path)]
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    table = (tmp_path / "kernels_sm90.md").read_text()
    # The committed table has the same kernels and variants; their resources depend on the compiler.
    committed = (REPOSITORY / "benchmarks" / "results" / "kernels_sm90.md").read_text()
    assert kernel_variants(table) == kernel_variants(committed), (
        "run `python benchmarks/compile_kernels.py` and commit its table"
    )


def kernel_variants(table):
    return re.findall(r"^\| (\w+_kernel) \| (\w+) \| (\d+) \|", table, re.MULTILINE)


def test_interpreter_is_refused():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-P", "benchmarks/compile_kernels.py"]
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "TRITON_INTERPRET is set" in run.stderr
