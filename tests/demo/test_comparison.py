"""The demo's comparison, on a small part of its world."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dive_fast.data.demo import world
from dive_fast.demo import comparison as report
from dive_fast.methods.run_config import load_run_config
from dive_fast.model.towers import create, save

CONFIGS = Path(__file__).parents[2] / "launch/configs"


def test_models_are_measured_and_compared_with_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIVE_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(world, "NUM_SAMPLES", dict.fromkeys(world.SPLITS, 40))
    config = load_run_config("demo", folder=CONFIGS)
    towers = create(config.model)
    state = towers.state_dict()
    state["visual.proj"] = state["visual.proj"].flip(0)
    save(towers.export(state), tmp_path / "spoilt.safetensors")
    result = report.compare(config, {"pretrained": None, "dive": tmp_path / "spoilt.safetensors"})

    assert result["pretrained"]["rsa"] == pytest.approx(1)
    assert result["pretrained"]["zs"] > 0.6
    assert result["dive"]["rsa"] < 0.9
    assert result["dive"]["zs"] < result["pretrained"]["zs"]
    sets = [value for name, value in result["dive"].items() if name.startswith("zs_")]
    assert result["dive"]["zs"] == pytest.approx(sum(sets) / 3)

    report.write(result, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == result
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 1000
    header, first, second = report.table(result).splitlines()
    assert header.split()[:4] == ["id", "ood", "zs", "rsa"]
    assert first.split()[0] == "pre-trained"
    assert second.split()[0] == "DiVE"
