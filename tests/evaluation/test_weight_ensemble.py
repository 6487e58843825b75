"""Weight ensembles: interpolation with exact endpoints, the choice of alpha, heads, and the command."""

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

from dive_fast.data.prompt_files import read_templates
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError
from dive_fast.evaluation import text_features, weight_ensemble
from dive_fast.evaluation.classifier import classifier
from dive_fast.evaluation.zero_shot import evaluate
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


def endpoints(tree: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = towers.create(RunConfig.model_validate_json(json.dumps(tree)).model)
    return model.export(model.state_dict()), load_file(f"{tree['train']['output']}/model.safetensors")


def test_interpolate_is_linear_with_exact_endpoints(tree: dict[str, Any]) -> None:
    pretrained, tuned = endpoints(tree)
    for alpha, end in ((0.0, pretrained), (1.0, tuned)):
        state = weight_ensemble.interpolate(pretrained, tuned, alpha)
        assert all(torch.equal(state[name], end[name]) for name in tuned)
    middle = weight_ensemble.interpolate(pretrained, tuned, 0.3)
    for name, after in tuned.items():
        expected = 0.7 * pretrained[name].double() + 0.3 * after.double()
        torch.testing.assert_close(middle[name].double(), expected, rtol=1e-6, atol=1e-6)
    integers = weight_ensemble.interpolate({"n": torch.tensor(3)}, {"n": torch.tensor(5)}, 0.5)
    assert integers["n"] == 5


def test_ensemble_measures_all_alphas_and_keeps_the_best(tree: dict[str, Any]) -> None:
    config = RunConfig.model_validate_json(json.dumps(tree))
    weights = Path(tree["train"]["output"]) / "model.safetensors"
    report, state, head, _ = weight_ensemble.ensemble(
        config, weights, ALONE, chosen_on="other", alphas=(0.2, 0.5, 0.8)
    )
    assert head is None
    rows = report["accuracies"]
    assert [row["alpha"] for row in rows] == [0, 0.2, 0.5, 0.8, 1]
    pretrained, tuned = endpoints(tree)
    tokenizer = towers.tokenizer_of(config.model)
    for row in rows:
        model = towers.create(config.model).eval()
        model.load_exported(weight_ensemble.interpolate(pretrained, tuned, row["alpha"]))
        assert evaluate(model, tokenizer, config.evaluate, ALONE) == {key: row[key] for key in ("seen", "other")}
    best = max(row["other"] for row in rows[1:-1])
    assert report["alpha"] == next(row["alpha"] for row in rows[1:-1] if row["other"] == best)
    expected = weight_ensemble.interpolate(pretrained, tuned, report["alpha"])
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert report["chosen_on"] == "other"


def test_ensemble_interpolates_trained_and_prompt_heads(tree: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.model_validate_json(json.dumps(tree))
    run, names = Path(tree["train"]["output"]), tuple(f"class number {i}" for i in range(5))
    for file in run.iterdir():
        shutil.copy(file, tmp_path)
    trained = heads.Head(torch.randn(5, 24), torch.randn(5), names)
    heads.save(trained, tmp_path / "head.safetensors")
    result = weight_ensemble.ensemble(config, tmp_path / "model.safetensors", ALONE, alphas=(0.4,))
    model, tokenizer = towers.create(config.model).eval(), towers.tokenizer_of(config.model)
    # At 0 the head made from prompts classifies like the prompts; at 1 the trained head classifies.
    first, _, last = result.report["accuracies"]
    assert {"alpha": 0.0} | evaluate(model, tokenizer, config.evaluate, ALONE) == first
    start = classifier(model, tokenizer, names, read_templates(config.data.target.templates)) * model.scale()
    model.load_exported(load_file(run / "model.safetensors"))
    assert {"alpha": 1.0} | evaluate(model, tokenizer, config.evaluate, ALONE, trained) == last
    weight_ensemble.write(result, tmp_path / "out")
    mixed = heads.load(tmp_path / "out/ensemble_head.safetensors")
    assert mixed.class_names == names
    torch.testing.assert_close(mixed.weight, 0.6 * start.detach() + 0.4 * trained.weight)
    torch.testing.assert_close(mixed.bias, 0.4 * trained.bias)
    assert heads.find_head(tmp_path / "out/ensemble.safetensors") == tmp_path / "out/ensemble_head.safetensors"
    assert heads.find_head(tmp_path / "out/model.safetensors") is None


def test_ensemble_rejects_invalid_sets_and_weights(tree: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.model_validate_json(json.dumps(tree))
    weights = Path(tree["train"]["output"]) / "model.safetensors"
    with pytest.raises(ConfigError, match=r"evaluate\.sets has no id; it has seen, other"):
        weight_ensemble.ensemble(config, weights, ALONE, chosen_on="id")
    without_sets = RunConfig.model_validate_json(json.dumps(tree | {"evaluate": {}}))
    with pytest.raises(ConfigError, match=r"evaluate\.sets: there is no set to choose alpha on"):
        weight_ensemble.ensemble(without_sets, weights, ALONE)
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"broken\.safetensors: not weights of local-dir:"):
        weight_ensemble.ensemble(config, tmp_path / "broken.safetensors", ALONE)
    towers.save({"some": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"other\.safetensors: not weights of local-dir:"):
        weight_ensemble.ensemble(config, tmp_path / "other.safetensors", ALONE)


def test_ensemble_command_writes_model_report_and_figure(tree: dict[str, Any], tmp_path: Path) -> None:
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
    expected = weight_ensemble.interpolate(*endpoints(tree), report["alpha"])
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)
    refused = call("--weights", str(tmp_path / "nowhere.safetensors"))
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "nowhere.safetensors: no such file or folder" in line
    assert "Traceback" not in refused.stderr


def count_encoded_classes(tree: dict[str, Any], run: Path) -> int:
    """The number of texts that this rank encodes before the first interpolation."""
    text_features.TOKENS_AT_ONCE["cpu"] = 16
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    calls = []
    encode = towers.Towers.encode_text

    def count(self: towers.Towers, tokens: Tensor, length: int | None = None) -> Tensor:
        calls.extend([next(self.parameters()).device] * len(tokens))
        return encode(self, tokens, length)

    config = RunConfig.model_validate_json(json.dumps(tree))
    stopped = mock.patch.object(weight_ensemble, "interpolate", side_effect=StoppedError)
    with mock.patch.object(towers.Towers, "encode_text", count), stopped, suppress(StoppedError):
        weight_ensemble.ensemble(config, run / "model.safetensors", ranks)
    return len(calls)


class StoppedError(Exception):
    """Ends an ensemble before it measures anything."""


def test_ensemble_divides_prompts_among_ranks_on_device(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, names = Path(tree["train"]["output"]), tuple(f"class number {i}" for i in range(5))
    for file in run.iterdir():
        shutil.copy(file, tmp_path)
    heads.save(heads.Head(torch.randn(5, 24), torch.randn(5), names), tmp_path / "head.safetensors")
    counts = run_ranks(2, count_encoded_classes, tree, tmp_path)
    # The distinct prompts, and one more each, since the width is determined by encoding a text.
    assert sum(counts) == 10 + 2
    assert min(counts) >= 4
    seen = []

    def spy(model: towers.Towers, *_: Any) -> None:
        seen.append((next(model.parameters()).device.type, model.autocast))
        raise StoppedError

    monkeypatch.setattr(weight_ensemble, "classifier", spy)
    monkeypatch.setattr(towers.Towers, "load_exported", lambda model, _: model)  # the meta device has no memory
    config = RunConfig.model_validate_json(json.dumps(tree | {"train": tree["train"] | {"precision": "bf16"}}))
    with pytest.raises(StoppedError):
        weight_ensemble.ensemble(config, tmp_path / "model.safetensors", Ranks(0, 1, torch.device("meta")))
    assert seen == [("meta", None)]


def test_ensemble_without_head_removes_an_old_head(tree: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.model_validate_json(json.dumps(tree))
    weights = Path(tree["train"]["output"]) / "model.safetensors"
    result = weight_ensemble.ensemble(config, weights, ALONE, alphas=(0.4,))
    (tmp_path / "ensemble_head.safetensors").write_bytes(b"of another run")
    weight_ensemble.write(result, tmp_path)
    assert heads.find_head(tmp_path / "ensemble.safetensors") is None
    # open_clip reads the preprocessing from the folder of the weights.
    assert json.loads((tmp_path / "open_clip_config.json").read_text())["preprocess_cfg"]["size"] == [32, 32]
