"""The examples do what they say."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from distributed import run_script

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
EXAMPLE = EXAMPLES / "add_a_method.py"
# As a user's: interpreted kernels of the towers would take most of the time.
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "0"}


def test_added_method_trains_in_under_80_lines(tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 80
    options = ["objective.text_share=0.25", "train.max_steps=2", "train.epochs=1", "evaluate.sets={}"]
    options += [f"train.output={tmp_path / 'run'}", "data.target.workers=0", "data.reference.workers=0"]
    options += ["teacher.mode=online", "data.target.batch_size=16", "data.reference.batch_size=16"]
    command = [sys.executable, str(EXAMPLE), *options]
    run = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    results = ast.literal_eval(run.stdout.splitlines()[-1])
    assert 0 < results["image_norm"] < 1
    assert results["loss"] == pytest.approx(
        results["contrastive_loss"] + 10 * results["distillation_loss"], abs=2e-2
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["image_norm"] < 1e-4
    objective = json.loads((tmp_path / "run/config.json").read_text())["config"]["objective"]
    assert (objective["name"], objective["text_share"], objective["weight"]) == ("both_towers", 0.25, 10)


def test_added_method_refuses_an_option_it_lacks(tmp_path: Path) -> None:
    run = run_script(str(EXAMPLE), "objective.decay=0.5", cwd=tmp_path)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "unknown key objective.decay" in run.stderr
    assert "weight, reference_every, text_share" in run.stderr


def called(tmp_path: Path, example: str, call: str) -> dict[str, float]:
    """The result of a call of an example's function, in a process as its user's."""
    script = tmp_path / "call.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\nfrom pathlib import Path\nimport {example}\n"
        f"print({example}.{call})\n"
    )
    done = run_script(str(script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return dict(ast.literal_eval(done.stdout.splitlines()[-1]))


def test_own_data_example_trains_on_folders(tmp_path: Path) -> None:
    results = called(tmp_path, "own_data", "main(Path('data'), count=64)")
    assert results.keys() == {"before", "after", "rsa"}
    assert all(0.3 < value < 1 for value in results.values())
    assert (tmp_path / "data/run/model.safetensors").is_file()


def test_losses_keep_geometry_in_a_plain_loop(tmp_path: Path) -> None:
    results = called(tmp_path, "losses_in_open_clip", "main(steps=4)")
    assert results["weight 0"] < results["weight 1"] < 1


def test_losses_example_needs_no_engine(tmp_path: Path) -> None:
    source = (EXAMPLES / "losses_in_open_clip.py").read_text()
    imported = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name and name.startswith("dive_fast")} == {
        "dive_fast",
        "dive_fast.data.demo",
    }


def test_notebook_runs_and_is_stored_without_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    notebook = nbformat.read(EXAMPLES / "demo.ipynb", as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "RSA 0." in printed
    assert "true: " in printed
    # The table, the picture of the run, and the picture that is classified.
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert shown.count("image/png") == 2
    assert "text/markdown" in shown
