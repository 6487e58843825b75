"""The loader of an evaluation set, and its default in a config."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from dive_fast.config.schema import EvaluationSet
from dive_fast.data.transforms import Preprocess
from dive_fast.distributed import Ranks
from dive_fast.evaluation.datasets import set_loader
from dive_fast.evaluation.datasets.evaluation_set import Labelled
from dive_fast.evaluation.datasets.resolve import open_evaluation
from dive_fast.evaluation.datasets.set_loader import loader_of, remark_on_loaders
from dive_fast.methods.run_config import RunConfig

PREPROCESS = Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest")


def opened(root: Path) -> Labelled:
    tiny.write_target(root)
    (root / "classes.txt").write_text("\n".join("abcde"))
    path = next(path for path in root.rglob("*.tar")).parent
    data = open_evaluation(
        EvaluationSet(format="webdataset", path=str(path), class_names=str(root / "classes.txt"))
    )
    assert isinstance(data, Labelled)
    return data


def test_loader_of_a_set_is_plain_where_another_cannot_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = opened(tmp_path)
    assert loader_of("plain", data, PREPROCESS) == ("plain", "")
    monkeypatch.setattr(set_loader, "_is_installed", lambda loader: loader == "ffcv")
    assert loader_of("dali", data, PREPROCESS) == ("plain", "it is not installed")
    chosen = loader_of("ffcv", data, PREPROCESS)
    assert chosen.name == "plain"
    assert "dive-fast prepare --container beton" in chosen.reason
    remark_on_loaders("ffcv", {"a": data, "b": data}, PREPROCESS, Ranks(0, 1, torch.device("cpu")))
    assert f"a, b: loader plain instead of ffcv: {chosen.reason}\n" in capsys.readouterr().out
    monkeypatch.setattr(set_loader, "_is_installed", lambda loader: True)
    assert loader_of("dali", data, PREPROCESS) == ("dali", "")


def test_evaluations_load_images_as_the_target_does(tmp_path: Path) -> None:
    tree: dict[str, Any] = tiny.write_config(tmp_path)
    tree["data"]["target"] |= {"workers": 3, "loader": "dali"}
    tree.setdefault("evaluate", {})
    for name in ("workers", "loader"):
        tree["evaluate"].pop(name, None)
    options = RunConfig.model_validate(tree).evaluate
    assert (options.workers, options.loader) == (3, "dali")
    tree["evaluate"] |= {"workers": 0, "loader": "plain"}
    options = RunConfig.model_validate(tree).evaluate
    assert (options.workers, options.loader) == (0, "plain")
