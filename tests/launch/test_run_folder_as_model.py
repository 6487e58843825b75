"""The folder of a run as the model of every command: ``model.name=local-dir:<run>``."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from distributed import run_script

LAUNCH = Path(__file__).parents[2] / "launch"
PREPROCESS = {
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.25, 0.3],
    "interpolation": "bilinear",
    "resize_mode": "squash",
}
"""Differs from open_clip's default in every respect."""
COMMANDS = (
    ("train", "--dry-run"),
    ("cache",),
    ("train",),
    ("evaluate", "--weights", "pretrained"),
    ("geometry",),
    ("ensemble",),
)


def run(folder: Path, name: str, config: str, *options: str) -> None:
    command = str(LAUNCH / f"{name}.py"), "--config", str(folder / config), *options
    result = run_script(*command, cwd=folder)
    assert result.returncode == 0, (name, result.stdout + result.stderr)


@pytest.mark.slow
def test_run_folder_of_a_siglip_is_a_model_for_every_command(tmp_path: Path) -> None:
    config = tiny.reduced("ViT-B-16-SigLIP") | {"custom_text": True, "init_logit_bias": -10}
    config["text_cfg"]["hf_tokenizer_name"] = str(tmp_path / "model")
    tree = tiny.write_config(tmp_path, max_steps=2)
    tiny.write_tokenizer(tmp_path / "model")
    tree["model"]["name"] = tiny.write_model(tmp_path / "model", config, 0, PREPROCESS)
    tree["evaluate"] = {
        "sets": {"val": {key: tree["data"]["target"][key] for key in tiny.EVALUATION}},
        "workers": 0,
    }
    (tmp_path / "first.json").write_text(json.dumps(tree))
    tree["model"]["name"] = f"local-dir:{tmp_path / 'run'}"
    tree["train"]["output"] = str(tmp_path / "second")
    (tmp_path / "second.json").write_text(json.dumps(tree))

    run(tmp_path, "train", "first.json")
    # Nothing is read from the model that the first run started from.
    shutil.rmtree(tmp_path / "model")
    for name, *options in COMMANDS:
        run(tmp_path, name, "second.json", *options)

    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("run", "second"))
    # The weights and their preprocessing are the same: so is the accuracy, to the last bit.
    assert second["rows"][0]["before"] == first["rows"][0]["after"]
    (row,) = (json.loads(line) for line in (tmp_path / "second/results.jsonl").read_text().splitlines())
    assert row["value"] == first["rows"][0]["after"]
    files = (json.loads((tmp_path / name / "open_clip_config.json").read_text()) for name in ("run", "second"))
    exported, again = files
    assert exported == again
    assert PREPROCESS.items() <= again["preprocess_cfg"].items()
