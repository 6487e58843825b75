"""Tunes CLIP on folders of pictures from Python: ``python examples/own_data.py [folder]``.

The pictures are the demo's, written as your data would be: a folder for each class, and a csv of captioned
pictures that have nothing to do with the classes. The model is the demo's too, so that all of it takes seconds on
a CPU: too few pictures and steps to learn much.
``dive-fast init`` and ``dive-fast train`` do the same from the command line (docs/own_data.md).
"""

import csv
import sys
from pathlib import Path

from dive_fast import Config, compare, evaluate, train
from dive_fast.data.demo import splits


def write_data(folder: Path, count: int) -> None:
    """Writes ``train/<class>/*.jpg``, ``val/<class>/*.jpg``, and captioned pictures with their csv files."""
    for part, split in (("train", "target"), ("val", "id")):
        for index in range(count):
            sample = splits.sample(split, index)
            path = folder / part / sample.text / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            sample.image.save(path)
    for name, split in (("captions", "reference"), ("heldout", "reference_heldout")):
        (folder / name).mkdir(exist_ok=True)
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, delimiter="\t")
            rows.writerow(["title", "filepath"])
            for index in range(count):
                sample = splits.sample(split, index)
                sample.image.save(folder / name / f"{index}.jpg")
                rows.writerow([sample.text, f"{name}/{index}.jpg"])


def make_config(folder: Path) -> Config:
    """A complete config; docs/config.md describes every key, and ``dive-fast init`` writes one for your data."""
    template = "a picture of a {} shape"
    val = {"format": "folder", "path": str(folder / "val"), "templates": template, "role": "id"}
    return Config.model_validate(
        {
            # For real pictures: {"name": "ViT-B-16-quickgelu", "pretrained": "openai"}
            "model": {"name": "demo"},
            "data": {
                "target": {
                    "format": "folder",
                    "path": str(folder / "train"),
                    "templates": template,
                    "batch_size": 32,
                    "workers": 0,
                },
                "reference": {
                    "format": "csv",
                    "path": str(folder / "captions.csv"),
                    "image_root": str(folder),
                    "batch_size": 32,
                    "workers": 0,
                },
            },
            # For CLIP: weight 1000, learning rate 1e-5. The demo's embeddings move further.
            "objective": {"name": "dive", "weight": 0.1},
            "train": {"epochs": 3, "learning_rate": 3e-4, "warmup_steps": 2, "precision": "fp32"},
            "evaluate": {"sets": {"val": val}, "workers": 0},
        }
    )


def main(folder: Path, count: int = 400) -> dict[str, float]:
    """Writes the data, tunes the model, and measures what it has learned and kept.

    Args:
        count: pictures to train on, to measure on, and with captions.
    """
    write_data(folder, count)
    config = make_config(folder)
    run = folder / "run"
    train(config, run)
    sets = {"val": config.evaluate.sets["val"]}
    before, after = evaluate(config.model, sets, workers=0), evaluate(run, sets, workers=0)
    geometry = compare(config.model, run, folder / "heldout.csv")["metrics"]
    return {"before": before["val"], "after": after["val"], "rsa": geometry["rsa"]}


if __name__ == "__main__":
    results = main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_data"))
    print({name: round(value, 3) for name, value in results.items()})
