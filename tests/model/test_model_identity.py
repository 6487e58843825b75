"""Identity of a model: it changes with weights, preprocessing and architecture, not with the path or a head."""

import json
from pathlib import Path
from typing import Any

import tiny
import torch

from dive_fast.config.schema import ModelConfig
from dive_fast.identity import Identity
from dive_fast.model.model_identity import model_identity, weights_digest
from dive_fast.model.towers import create


def test_model_identity_changes_with_each_part(tmp_path: Path) -> None:
    def of(folder: str, **changed: Any) -> Identity:
        config = ModelConfig(name=tiny.write_model(tmp_path / folder, **changed))
        return json.loads(json.dumps(model_identity(create(config))))  # type: ignore[no-any-return]

    base = of("base")
    assert of("moved") == base
    for name, changed in {
        "weights": {"seed": 1},
        "preprocess": {"preprocess": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}},
        "architecture": {"config": tiny.QUICKGELU},
    }.items():
        other = of(name, **changed)
        assert {key for key in base if base[key] != other[key]} == {name}


def test_weights_digest_leaves_out_a_head(tmp_path: Path) -> None:
    towers = create(ModelConfig(name=tiny.write_model(tmp_path)))
    before = weights_digest(towers)
    towers.head = torch.nn.Linear(24, 3)
    assert weights_digest(towers) == before
    with torch.no_grad():
        towers.logit_scale += 1e-6
    assert weights_digest(towers) != before
