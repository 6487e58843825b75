"""README's commands work: those for own data are run one after the other, the others are covered by a test."""

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dive_fast.data.demo import splits

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COVERED = {
    "pip install": "tests/launch/test_wheel.py",
    "make demo": "tests/launch/test_wheel.py",
    "make test": ".github/workflows/test.yml",
    "dive-fast init": "tests/test_readme.py",
    "dive-fast train --config": "tests/test_readme.py",
    "dive-fast train --gpus": "tests/launch/test_launch.py",
    "dive-fast plan": "tests/planner/test_plan.py",
    "deepspeed -q launch/train.py": "tests/faults/test_launcher.py",
    "torchrun": "tests/test_ranks.py",
    "DS_ACCELERATOR=cpu deepspeed": "tests/faults/test_launcher.py",
}
"""The beginnings of README's commands, and the files that run them."""


def commands() -> list[str]:
    """The indented commands, without comments."""
    text = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    return [line.partition(" # ")[0].strip() for line in re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)]


def test_every_command_is_covered_by_a_test() -> None:
    assert len(commands()) >= len(COVERED)
    assert [each for each in commands() if not each.startswith(tuple(COVERED))] == []
    used = [start for start in COVERED if any(each.startswith(start) for each in commands())]
    assert used == list(COVERED)
    assert all((REPOSITORY / path).is_file() for path in COVERED.values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with ``photos``, ``captions.csv`` and ``photo.jpg``, as README expects them."""
    for index in range(60):
        sample = splits.sample("target", index)
        path = tmp_path / "photos" / ("cat", "dog", "tiger")[sample.label % 3] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        sample.image.save(path)
    sample.image.save(tmp_path / "photo.jpg")
    (tmp_path / "captioned").mkdir()
    with open(tmp_path / "captions.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["title", "filepath"])
        for index in range(40):
            sample = splits.sample("reference", index)
            sample.image.save(tmp_path / "captioned" / f"{index}.jpg")
            rows.writerow([sample.text, f"captioned/{index}.jpg"])
    return tmp_path


def called(folder: Path, *command: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_photos_become_a_model_that_classifies(folder: Path) -> None:
    # A small model, and few steps: otherwise as README has it.
    further = {"init": ["--model", "demo"], "train": ["train.epochs=1", "train.warmup_steps=0"]}
    alone = [each for each in commands() if "--gpus" not in each]
    for name, arguments in further.items():
        (command,) = [each for each in alone if each.startswith(f"dive-fast {name} ")]
        printed = called(folder, sys.executable, "-m", *shlex.split(command.replace("-", "_", 1)), *arguments)
    assert "| set | before | after | change |" in printed
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    shares = called(folder, sys.executable, "-c", block)
    assert re.fullmatch(r"\{'cat': [\d.e-]+, 'dog': [\d.e-]+, 'tiger': [\d.e-]+\}\n", shares)
