"""The files of a checkpoint: what is valid is read back, what is not is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_checkpoints import RUN, VALIDATION, seal, write_checkpoint

from dive_fast.checkpoint import manifest
from dive_fast.checkpoint.manifest import CorruptCheckpointError, Evaluation, FormatError


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_manifest_lists_size_and_checksum(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    files = manifest.read_manifest(path)["files"]
    assert files.keys() == {"identity.json", "rank00000.safetensors", "trainer.json"}
    assert files["trainer.json"] == manifest.describe_file(path / "trainer.json")
    assert files["trainer.json"]["bytes"] == (path / "trainer.json").stat().st_size
    assert manifest.is_complete(path)


def test_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    seal(path, format=1)
    with pytest.raises(FormatError, match="checkpoint format 1, but this version reads format 2: finish that run"):
        manifest.read_manifest(path)
    assert manifest.run_id(path) == ""


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"trainer.json": {"bytes": 1, "sha256": ""}},
        {"trainer.json": {}, "identity.json": {}},
        {"trainer.json": {"bytes": 1.0, "sha256": ""}, "identity.json": {"bytes": 1, "sha256": ""}},
        {name: {"bytes": 1, "sha256": ""} for name in ("trainer.json", "identity.json", "../secret")},
        {name: {"bytes": 1, "sha256": ""} for name in ("trainer.json", "identity.json", "/etc/passwd")},
        [],
    ],
)
def test_manifest_with_invalid_files_is_refused(tmp_path: Path, files: Any) -> None:
    path = write_checkpoint(tmp_path)
    seal(path, files=files)
    with pytest.raises(CorruptCheckpointError, match=r"manifest.json: not valid in checkpoint format 2"):
        manifest.read_manifest(path)
    assert manifest.missing_file(path) == "manifest.json: not valid in checkpoint format 2"
    assert manifest.run_id(path) is None


def test_missing_file_names_the_first_one(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    assert manifest.missing_file(path) is None
    tensors = path / "rank00000.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1])
    assert manifest.missing_file(path) == "rank00000.safetensors is missing or truncated"
    tensors.unlink()
    assert not manifest.is_complete(path)
    (tmp_path / "elsewhere").write_bytes(content)
    tensors.symlink_to(tmp_path / "elsewhere")
    assert manifest.missing_file(path) == "rank00000.safetensors is missing or truncated"
    (path / "manifest.json").unlink()
    assert manifest.missing_file(path) == "no file manifest.json"


def test_list_checkpoints_is_ordered_and_skips_others(tmp_path: Path) -> None:
    for step in (10, 2, 4):
        write_checkpoint(tmp_path, step)
    (tmp_path / "step00000004/manifest.json").unlink()
    for name in ("step2", "step00000002.keep", "steps", ".step00000006.partial"):
        write_checkpoint(tmp_path / "copy", 6).rename(tmp_path / name)
    names = [path.name for path in manifest.list_checkpoints(tmp_path)]
    assert names == ["step00000002", "step00000010"]
    assert manifest.step_number(manifest.checkpoint_path(tmp_path, 10)) == 10


def test_trainer_and_identity_are_read_back(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 7)
    numbers = manifest.read_trainer(path)
    assert (numbers["step"], numbers["validation"], numbers["metrics"]) == (7, VALIDATION, {"loss": 0.5})
    assert manifest.read_identity(path) == {"train": {"seed": 0}}
    assert manifest.run_id(path) == RUN


@pytest.mark.parametrize(
    "values",
    [
        {"step": -1},
        {"step": 2.0},
        {"updates": True},
        {"total_steps": 2**31},
        {"run": 5},
        {"loss_scale": {}},
        {"metrics": {"loss": "low"}},
        {"validation": VALIDATION | {"best": 1}},
        {"validation": VALIDATION | {"more": 1}},
    ],
)
def test_trainer_with_invalid_values_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    path = write_checkpoint(tmp_path)
    change(path / "trainer.json", **values)
    with pytest.raises(CorruptCheckpointError, match=r"trainer.json: not valid in checkpoint format 2"):
        manifest.read_trainer(path)


def test_identity_that_is_no_object_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    (path / "identity.json").write_text("[]")
    with pytest.raises(CorruptCheckpointError, match=r"identity.json: not valid"):
        manifest.read_identity(path)


def test_evaluation_is_added_without_the_manifest(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    assert manifest.read_evaluation(path) is None
    evaluation = Evaluation(VALIDATION, {"accuracy/a set": 0.5, "accuracy/other": None})
    manifest.write_evaluation(path, evaluation)
    assert manifest.read_evaluation(path) == evaluation
    assert manifest.is_complete(path)
    change(path / "evaluation.json", metrics={"accuracy": "high"})
    with pytest.raises(CorruptCheckpointError, match="remove this file to evaluate again"):
        manifest.read_evaluation(path)


def test_tensors_are_read_by_kind_and_name(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    stored = manifest.Tensors(path)
    assert stored.shapes("weights") == stored.shapes("exp_avg") == {"a": (3, 2), "b": (3, 2)}
    assert stored.shapes("random") == {}
    expected = load_file(path / "rank00000.safetensors")["exp_avg/b"]
    assert torch.equal(stored.read("exp_avg", "b", torch.device("cpu")), expected)


def test_tensors_refuse_another_kind_of_file(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    (path / "rank00000.safetensors").write_bytes(b"text")
    with pytest.raises(CorruptCheckpointError, match=r"rank00000.safetensors: not a safetensors file"):
        manifest.Tensors(path)
