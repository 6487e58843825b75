"""Modules that take seconds to import are not imported for help, for a mistake, or for a list of keys."""

import json
import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "torchvision",
    "open_clip",
    "timm",
    "transformers",
    "deepspeed",
    "triton",
    "matplotlib",
    "datasets",
)
SETS = '{"typo": {"dataset": "imagenett", "path": "/data"}}'
MODEL = ("--model", "ViT-B-32", "--pretrained", "openai")
COMMANDS = {
    "help": ["--help"],
    "help of a command": ["train", "--help"],
    "unknown command": ["trian"],
    "keys": ["keys", "train"],
    "keys of a method": ["keys", "dive"],
    "keys of a rule": ["keys", "digrap"],
    "keys of a section": ["keys", "objective"],
    "keys, all": ["keys", "--all"],
    "help of sweep": ["sweep", "--help"],
    "help of report": ["report", "--help"],
    "unknown key": ["train", "--config", "vitb16_dive", "train.epoch=3"],
    "no such config": ["train", "--config", "vitb16_div"],
    "unknown method": ["train", "--config", "vitb16_dive", "objective.name=divee"],
    "unknown rule": ["train", "--config", "vitb16_dive", "projection.name=ftpp"],
    "unknown model": ["train", "--config", "vitb16_dive", "model.name=ViT-B-61"],
    "unknown set of a config": [
        "train",
        "--config",
        "vitb16_flyp",
        f"evaluate.sets={SETS}",
        "evaluate.select=typo",
    ],
    "unknown set": ["evaluate", *MODEL, "--datasets", "imagenett", "--root", "/data"],
    "known set that is not there": ["evaluate", *MODEL, "--datasets", "pets", "--root", "/no-such-folder"],
    "unknown model of a name": ["evaluate", "--model", "ViT-B-61", "--datasets", "pets", "--root", "/data"],
    "unknown model to export": ["export", "--to", "onnx", "ViT-B-61", "/no-such-folder/model"],
    "no weights": ["ensemble", "--config", "vitb16_dive", "train.output=/no-such-folder/run"],
    "no set to measure the shift of": ["shift", *MODEL, "--fit", "/no-such-folder", "--sets", "/no-such.json"],
    "help of prepare": ["prepare", "--help"],
    "nothing to prepare": ["prepare", "--format", "folder", "--input", "/no-such-folder", "--output", "x"],
    "no output folder": ["tpgm", "--config", "vitb16_dive", "--weights", "/", "--output", "/dev/null/x"],
}
PROGRAM = """
import contextlib, io, json, sys
from dive_fast.commands import console

heavy, commands = json.load(sys.stdin)
for name, arguments in commands.items():
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = console.main(arguments)
        except SystemExit as exit:
            code = exit.code
    print(json.dumps([name, code, output.getvalue(), [each for each in heavy if each in sys.modules]]))
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[int, str, list[str]]]:
    """Exit code, output and heavy modules of each command, all of which run in one process."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps([HEAVY, COMMANDS]), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {name: (code, output, heavy) for name, code, output, heavy in lines}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_ends_without_heavy_imports(outcomes: dict[str, tuple[int, str, list[str]]], name: str) -> None:
    code, output, heavy = outcomes[name]
    assert heavy == [], output
    is_mistake = not name.startswith(("help", "keys"))
    assert code == (2 if is_mistake else 0), output
    assert output.startswith("error: ") == is_mistake, output


def test_mistakes_are_named(outcomes: dict[str, tuple[int, str, list[str]]]) -> None:
    assert 'objective.name = "divee": expected one of ' in outcomes["unknown method"][1]
    assert 'projection.name = "ftpp": expected one of none, digrap, ' in outcomes["unknown rule"][1]
    for name in ("unknown set", "unknown set of a config"):
        assert "no data set is known as imagenett; did you mean imagenet?" in outcomes[name][1]
    for name in ("unknown model", "unknown model of a name", "unknown model to export"):
        assert "model.name: open_clip has no model ViT-B-61; did you mean ViT-B-16?" in outcomes[name][1]
    assert "no pets found" in outcomes["known set that is not there"][1]
    assert "evaluate.sets.typo.dataset" in outcomes["unknown set of a config"][1]
    assert "/no-such-folder: no such folder" in outcomes["nothing to prepare"][1]
    assert "/no-such-folder/run/model.safetensors is missing" in outcomes["no weights"][1]


def test_trackers_are_absent_in_the_context_alone() -> None:
    code = (
        "import importlib.util, sys; from dive_fast.commands.lean_imports import UNUSED, lean_imports\n"
        "with lean_imports():\n"
        "    assert [importlib.util.find_spec(name) for name in UNUSED] == [None, None]\n"
        "assert not {*UNUSED} & sys.modules.keys()"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
