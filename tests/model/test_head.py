"""A trained head comes back as it was written, and what is no head is told."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dive_fast.errors import ConfigError
from dive_fast.model import head


def test_a_head_comes_back_as_it_was(tmp_path: Path) -> None:
    written = head.Head(torch.randn(3, 8).half(), torch.randn(3), ("cat", "Größe", "a, b"), "a digest")
    head.save(written, tmp_path / head.FILE)
    found = head.load(tmp_path / head.FILE)
    assert found.weight.dtype == found.bias.dtype == torch.float32
    assert torch.equal(found.weight, written.weight.float())
    assert torch.equal(found.bias, written.bias)
    assert found.class_names == written.class_names
    assert found.trained_with == written.trained_with
    assert [path.name for path in tmp_path.iterdir()] == [head.FILE]


def test_what_is_no_head_is_told(tmp_path: Path) -> None:
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
        with pytest.raises(ConfigError, match=r"head.safetensors: no head"):
            head.load(path)
