"""The demo's comparison, on a small part of the generated world."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dive_fast.data.demo import world
from dive_fast.demo import comparison
from dive_fast.methods.run_config import load_run_config
from dive_fast.model.towers import create, save

CONFIGS = Path(__file__).parents[2] / "launch/configs"


def test_compare_measures_models_against_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIVE_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(world, "NUM_SAMPLES", dict.fromkeys(world.SPLITS, 40))
    config = load_run_config("demo", folder=CONFIGS)
    towers = create(config.model)
    state = towers.state_dict()
    state["visual.proj"] = state["visual.proj"].flip(0)
    save(towers.export(state), tmp_path / "spoilt.safetensors")
    report = comparison.compare(config, {"pretrained": None, "dive": tmp_path / "spoilt.safetensors"})

    assert report["pretrained"]["rsa"] == pytest.approx(1)
    assert report["pretrained"]["zs"] > 0.6
    assert report["dive"]["rsa"] < 0.9
    assert report["dive"]["zs"] < report["pretrained"]["zs"]
    sets = [value for name, value in report["dive"].items() if name.startswith("zs_")]
    assert report["dive"]["zs"] == pytest.approx(sum(sets) / 3)

    comparison.write(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width == 1660
    assert comparison.message(report).startswith("Demo: zero-shot accuracy is ")
    assert comparison.message(report).endswith(" % after DiVE")
    header, first, second = comparison.table(report).splitlines()
    assert header.split()[:4] == ["id", "ood", "zs", "rsa"]
    assert first.split()[0] == "pre-trained"
    assert second.split()[0] == "DiVE"
