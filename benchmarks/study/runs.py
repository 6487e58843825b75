"""Configs of fine-tuning on CIFAR-10, through the engine as users run it."""

import json
from pathlib import Path
from typing import Any

from study import model, sets

EVALUATED = ("validation", "id", "ood", "zs")
HELDOUT = "heldout"
"""Of the sets: the geometry of the embeddings is measured on it."""


def prepare(folder: Path, size: str = "small", epochs: int = 12, **counts: int) -> Path:
    """Data, pre-trained model and config below ``folder``, made where they are missing; returns the config's path.

    Args:
        epochs: of pre-training.
        counts: as :func:`study.sets.write` takes them.
    """
    data = sets.write(folder / "data", **counts)
    pretrained = folder / f"model-{size}-{epochs}"
    if not pretrained.exists():
        model.train(pretrained, size, epochs=epochs, batch_size=256, learning_rate=1e-3)
    path = folder / "cifar10.json"
    path.write_text(json.dumps(tree(data, pretrained), indent=2) + "\n")
    return path


def tree(data: Path, pretrained: Path) -> dict[str, Any]:
    """A DiVE config; learning rate and lambda are to be chosen."""

    def labelled(name: str) -> dict[str, Any]:
        place = data / name
        names = {"class_names": f"{place}/classes.txt", "templates": f"{place}/templates.txt"}
        return {"format": "webdataset", "path": str(place), **names}

    return {
        "model": {"name": f"local-dir:{pretrained}"},
        "data": {
            "target": labelled("target") | {"batch_size": 128, "workers": 1},
            "reference": {
                "format": "webdataset",
                "path": str(data / "reference"),
                "batch_size": 128,
                "workers": 1,
            },
        },
        "objective": {"name": "dive"},
        "teacher": {"mode": "cache", "path": f"{pretrained}-teacher"},
        "train": {
            "epochs": 2,
            "learning_rate": 3e-4,
            "weight_decay": 0.1,
            "warmup_steps": 15,
            "precision": "fp32",
        },
        "evaluate": {"sets": {name: labelled(name) for name in EVALUATED}, "workers": 0},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
