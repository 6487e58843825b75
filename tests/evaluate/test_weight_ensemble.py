"""Ensembles lie on the line between two models, ends included, and the best on ID validation is kept."""

import json
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import pytest
import tiny
import torch
import torch.distributed as dist
from distributed import run_ranks, run_script
from safetensors.torch import load_file
from torch import Tensor

from dive_fast.data.prompts import read_templates
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError
from dive_fast.evaluate import weight_ensemble as ensemble
from dive_fast.evaluate.classifier import classifier
from dive_fast.evaluate.zero_shot import evaluate
from dive_fast.methods.run_config import RunConfig
from dive_fast.model import head as heads
from dive_fast.model import towers

ALONE = Ranks(0, 1, torch.device("cpu"))
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A config with two evaluation sets, and a tuned model in its run folder."""
    folder = tmp_path_factory.mktemp("ensemble")
    written = tiny.write_config(folder)
    seen = {key: written["data"]["target"][key] for key in tiny.EVALUATION}
    other = tiny.write_target(folder / "other")
    written["evaluate"] = {
        "sets": {"seen": seen, "other": {key: other[key] for key in tiny.EVALUATION}},
        "workers": 0,
    }
    model = towers.create(RunConfig.model_validate_json(json.dumps(written)).model)
    torch.manual_seed(0)
    moved = {name: value + 0.05 * torch.randn(value.shape) for name, value in model.state_dict().items()}
    (folder / "run").mkdir()
    towers.save(model.export(moved), folder / "run/model.safetensors")
    (folder / "config.json").write_text(json.dumps(written))
    return written


def ends(tree: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = towers.create(RunConfig.model_validate_json(json.dumps(tree)).model)
    return model.export(model.state_dict()), load_file(f"{tree['train']['output']}/model.safetensors")


def test_an_ensemble_is_on_the_line_and_its_ends_are_the_models(tree: dict[str, Any]) -> None:
    pretrained, tuned = ends(tree)
    for alpha, end in ((0.0, pretrained), (1.0, tuned)):
        found = ensemble.interpolate(pretrained, tuned, alpha)
        assert all(torch.equal(found[name], end[name]) for name in tuned)
    middle = ensemble.interpolate(pretrained, tuned, 0.3)
    for name, after in tuned.items():
        expected = 0.7 * pretrained[name].double() + 0.3 * after.double()
        torch.testing.assert_close(middle[name].double(), expected, rtol=1e-6, atol=1e-6)
    counted = ensemble.interpolate({"n": torch.tensor(3)}, {"n": torch.tensor(5)}, 0.5)
    assert counted["n"] == 5


def test_every_alpha_is_measured_and_the_best_on_validation_is_kept(tree: dict[str, Any]) -> None:
    config = RunConfig.model_validate_json(json.dumps(tree))
    weights = Path(tree["train"]["output"]) / "model.safetensors"
    report, state, head, _ = ensemble.ensemble(config, weights, ALONE, chosen_on="other", alphas=(0.2, 0.5, 0.8))
    assert head is None
    rows = report["accuracies"]
    assert [row["alpha"] for row in rows] == [0, 0.2, 0.5, 0.8, 1]
    pretrained, tuned = ends(tree)
    tokenizer = towers.tokenizer_of(config.model)
    for row in rows:
        model = towers.create(config.model).eval()
        model.load_exported(ensemble.interpolate(pretrained, tuned, row["alpha"]))
        assert evaluate(model, tokenizer, config.evaluate, ALONE) == {key: row[key] for key in ("seen", "other")}
    best = max(row["other"] for row in rows[1:-1])
    assert report["alpha"] == next(row["alpha"] for row in rows[1:-1] if row["other"] == best)
    wanted = ensemble.interpolate(pretrained, tuned, report["alpha"])
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert report["chosen_on"] == "other"


def test_a_trained_head_is_mixed_with_that_of_the_prompts(tree: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.model_validate_json(json.dumps(tree))
    run, names = Path(tree["train"]["output"]), tuple(f"class number {i}" for i in range(5))
    for file in run.iterdir():
        shutil.copy(file, tmp_path)
    trained = heads.Head(torch.randn(5, 24), torch.randn(5), names)
    heads.save(trained, tmp_path / "head.safetensors")
    found = ensemble.ensemble(config, tmp_path / "model.safetensors", ALONE, alphas=(0.4,))
    model, tokenizer = towers.create(config.model).eval(), towers.tokenizer_of(config.model)
    # At 0 the head of the prompts decides as the prompts do; at 1 the trained one.
    first, _, last = found.report["accuracies"]
    assert {"alpha": 0.0} | evaluate(model, tokenizer, config.evaluate, ALONE) == first
    start = classifier(model, tokenizer, names, read_templates(config.data.target.templates)) * model.scale()
    model.load_exported(load_file(run / "model.safetensors"))
    assert {"alpha": 1.0} | evaluate(model, tokenizer, config.evaluate, ALONE, trained) == last
    ensemble.write(found, tmp_path / "out")
    mixed = heads.load(tmp_path / "out/ensemble_head.safetensors")
    assert mixed.class_names == names
    torch.testing.assert_close(mixed.weight, 0.6 * start.detach() + 0.4 * trained.weight)
    torch.testing.assert_close(mixed.bias, 0.4 * trained.bias)
    assert heads.find_head(tmp_path / "out/ensemble.safetensors") == tmp_path / "out/ensemble_head.safetensors"
    assert heads.find_head(tmp_path / "out/model.safetensors") is None


def test_what_cannot_be_an_ensemble_is_told(tree: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.model_validate_json(json.dumps(tree))
    weights = Path(tree["train"]["output"]) / "model.safetensors"
    with pytest.raises(ConfigError, match=r"evaluate\.sets has no id; it has seen, other"):
        ensemble.ensemble(config, weights, ALONE, chosen_on="id")
    none = RunConfig.model_validate_json(json.dumps(tree | {"evaluate": {}}))
    with pytest.raises(ConfigError, match=r"evaluate\.sets: alpha is chosen on one of them"):
        ensemble.ensemble(none, weights, ALONE)
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"broken\.safetensors: not weights of local-dir:"):
        ensemble.ensemble(config, tmp_path / "broken.safetensors", ALONE)
    towers.save({"some": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"other\.safetensors: not weights of local-dir:"):
        ensemble.ensemble(config, tmp_path / "other.safetensors", ALONE)


def test_the_command_leaves_a_model_a_report_and_a_picture(tree: dict[str, Any], tmp_path: Path) -> None:
    run = Path(tree["train"]["output"])

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        config = str(run.parent / "config.json")
        return run_script("launch/ensemble.py", "--config", config, *arguments, cwd=ROOT)

    done = call("--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/ensemble.json").read_text())
    assert f"alpha = {report['alpha']:g}, chosen on seen" in done.stdout
    assert len(report["accuracies"]) == 11
    assert (tmp_path / "out/ensemble.png").read_bytes().startswith(b"\x89PNG")
    model = open_clip.create_model(tree["model"]["name"], load_weights=False)
    open_clip.load_checkpoint(model, str(tmp_path / "out/ensemble.safetensors"))
    wanted = ensemble.interpolate(*ends(tree), report["alpha"])
    assert all(torch.equal(model.state_dict()[name], wanted[name]) for name in wanted)
    refused = call("--weights", str(tmp_path / "nowhere.safetensors"))
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "nowhere.safetensors: no such file or folder" in line
    assert "Traceback" not in refused.stderr


def encodes_its_share(tree: dict[str, Any], run: Path) -> int:
    """How many classes this rank encodes the prompts of for the head that training began with."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    counted = []
    encode = towers.Towers.encode_text

    def count(self: towers.Towers, tokens: Tensor, length: int | None = None) -> Tensor:
        counted.append(next(self.parameters()).device)
        return encode(self, tokens, length)

    config = RunConfig.model_validate_json(json.dumps(tree))
    stopped = mock.patch.object(ensemble, "interpolate", side_effect=StoppedError)
    with mock.patch.object(towers.Towers, "encode_text", count), stopped, suppress(StoppedError):
        ensemble.ensemble(config, run / "model.safetensors", ranks)
    return len(counted)


class StoppedError(Exception):
    """Ends an ensemble before it measures anything."""


def test_class_prompts_are_shared_by_the_ranks_and_encoded_on_their_device(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, names = Path(tree["train"]["output"]), tuple(f"class number {i}" for i in range(5))
    for file in run.iterdir():
        shutil.copy(file, tmp_path)
    heads.save(heads.Head(torch.randn(5, 24), torch.randn(5), names), tmp_path / "head.safetensors")
    # One more each: the width is found by encoding a text.
    shares = run_ranks(2, encodes_its_share, tree, tmp_path)
    assert sorted(shares) == [2 + 1, 3 + 1]
    seen = []

    def spy(model: towers.Towers, *_: Any) -> None:
        seen.append((next(model.parameters()).device.type, model.autocast))
        raise StoppedError

    monkeypatch.setattr(ensemble, "classifier", spy)
    monkeypatch.setattr(towers.Towers, "load_exported", lambda model, _: model)  # into no memory
    config = RunConfig.model_validate_json(json.dumps(tree | {"train": tree["train"] | {"precision": "bf16"}}))
    with pytest.raises(StoppedError):
        ensemble.ensemble(config, tmp_path / "model.safetensors", Ranks(0, 1, torch.device("meta")))
    assert seen == [("meta", None)]


def test_an_ensemble_without_a_head_leaves_none_of_another(tree: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.model_validate_json(json.dumps(tree))
    weights = Path(tree["train"]["output"]) / "model.safetensors"
    found = ensemble.ensemble(config, weights, ALONE, alphas=(0.4,))
    (tmp_path / "ensemble_head.safetensors").write_bytes(b"of another run")
    ensemble.write(found, tmp_path)
    assert heads.find_head(tmp_path / "ensemble.safetensors") is None
    # The folder says how images are preprocessed: open_clip reads it with the weights.
    assert json.loads((tmp_path / "open_clip_config.json").read_text())["preprocess_cfg"]["size"] == [32, 32]
