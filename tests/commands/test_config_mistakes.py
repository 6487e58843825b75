"""Mistakes in a config are one line with the key and where it is set, also those noticed after loading."""

import json
from pathlib import Path

import pytest
import tiny
from distributed import run_script

from dive_fast.commands import cli
from dive_fast.commands import train as command
from dive_fast.config import recorded

ROOT = Path(__file__).parents[2]
CONFIG = """\
model:
  name: demo
data:
  target:
    format: folder
    path: {photos}
    workers: 0
objective:
  name: flyp
train:
  output: {run}
evaluate:
  sets:
    val:
      format: folder
      path: {photos}
      templates: a photo of a {{}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mine")
    for label in "ab":
        for number in range(3):
            file = path / f"photos/{label}/{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(tiny.jpeg(number))
    (path / "mine.yaml").write_text(CONFIG.format(photos=path / "photos", run=path / "run"))
    return path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.target.path={folder}/nothere"],
            "data.target: {folder}/nothere: no such folder (data.target.path is set on the command line)",
        ),
        (
            [],
            "data.target.batch_size 512 exceeds the 6 samples of the data set; set it to at most 6 (the default)",
        ),
        (
            ["data.target.batch_size=2", "data.target.templates=a photo"],
            "data.target.templates: a photo: no such file of templates; a template itself must have {{}} for "
            "the class name (set on the command line)",
        ),
        (
            ["data.target.batch_size=2", "data.target.class_names={folder}/no.txt"],
            "data.target.class_names: {folder}/no.txt: cannot read class names: No such file or directory (set "
            "on the command line)",
        ),
        (
            ["evaluate.sets.val.templates=a photo"],
            "evaluate.sets.val.templates: a photo: no such file of templates; a template itself must have {{}} "
            "for the class name (set on the command line)",
        ),
        (
            ['evaluate.sets.val={{"dataset": "pets", "path": "{folder}"}}'],
            "evaluate.sets.val: {folder}: no pets found: expected ",
        ),
        (
            ['evaluate.sets.val={{"dataset": "petz", "path": "x"}}'],
            "evaluate.sets.val.dataset: no data set is known as petz; did you mean pets?",
        ),
    ],
)
def test_mistake_noticed_while_training_names_key_and_origin(
    folder: Path, overrides: list[str], message: str
) -> None:
    formatted = [override.format(folder=folder) for override in overrides]
    environment = {"DS_ACCELERATOR": "cpu"}
    result = run_script(
        "launch/train.py", "--config", str(folder / "mine.yaml"), *formatted, cwd=ROOT, environment=environment
    )
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {message.format(folder=folder)}")


def test_wrong_path_in_a_file_names_its_line(folder: Path) -> None:
    path = folder / "wrong.yaml"
    path.write_text(
        (folder / "mine.yaml").read_text().replace(f"path: {folder}/photos\n    w", "path: nothere\n    w")
    )
    result = run_script("launch/train.py", "--config", str(path), cwd=ROOT, environment={"DS_ACCELERATOR": "cpu"})
    assert f"error: data.target: nothere: no such folder (data.target.path is set in {path}:6)\n" in result.stderr


def test_missing_config_is_a_short_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main([])
    assert caught.value.code == 2
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "error: --config is missing: name a config file, a run folder or a shipped config"
    assert [line.split()[:2] for line in others[:2]] == [["dive-fast", "init"], ["dive-fast", "keys"]]
    assert "vitb16_dive" in others[2]


def test_config_of_a_run_is_announced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "recorded"
    run.mkdir()
    config = cli.load_config(str(folder / "mine.yaml"), []).model_dump(mode="json")
    (run / "config.json").write_text(json.dumps(dict.fromkeys(recorded.KEYS) | {"config": config}))
    assert cli.load_config(str(run), []).train.output == str(run)
    assert (
        capsys.readouterr().err == f"{run}/config.json is the config of a run: train.output = {run} (the run's)\n"
    )
