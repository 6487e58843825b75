"""Heads are read as they were written, and other files are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dive_fast.errors import ConfigError
from dive_fast.model import head


def test_head_round_trip(tmp_path: Path) -> None:
    written = head.Head(torch.randn(3, 8).half(), torch.randn(3), ("cat", "Größe", "a, b"), "a digest")
    head.save(written, tmp_path / head.FILE)
    loaded = head.load(tmp_path / head.FILE)
    assert loaded.weight.dtype == loaded.bias.dtype == torch.float32
    assert torch.equal(loaded.weight, written.weight.float())
    assert torch.equal(loaded.bias, written.bias)
    assert loaded.class_names == written.class_names
    assert loaded.trained_with == written.trained_with
    assert [path.name for path in tmp_path.iterdir()] == [head.FILE]


def test_load_rejects_files_without_a_head(tmp_path: Path) -> None:
    path = tmp_path / head.FILE
    with pytest.raises(ConfigError, match=r"head.safetensors: cannot be read as a head in safetensors"):
        head.load(path)
    names = {"class_names": '["a", "b"]'}
    for tensors, metadata in [
        ({"weight": torch.zeros(2, 4)}, names),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, None),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(3)}, names),
        ({"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}, names),
        ({"weight": torch.zeros(2), "bias": torch.zeros(2)}, names),
    ]:
        save_file(tensors, path, metadata)
        with pytest.raises(ConfigError, match=r"head.safetensors: not a head"):
            head.load(path)
