"""A small CLIP, trained from nothing on CIFAR-100: ``python -m study.model`` in ``benchmarks``."""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from dive_fast.demo import pretrain
from study import sets

CONTEXT = 16
WIDTH = 64
"""Elements of an embedding."""
WEIGHTS, EMBEDDING = "open_clip_model.safetensors", "token_embedding.weight"
INITIAL_STD = 0.02
"""Standard deviation of initial word embeddings, as in open_clip."""
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "small": ({"patch_size": 8, "width": 160, "layers": 4}, {"width": 96, "heads": 3, "layers": 2}),
    "large": ({"patch_size": 4, "width": 192, "layers": 8}, {"width": 128, "heads": 4, "layers": 4}),
}
"""Shapes of the image and the text tower: for two CPU cores, and for a GPU."""


def write_shape(folder: Path, size: str, vocabulary: Iterable[str] | None = None) -> None:
    """Config and tokenizer, as open_clip reads them from a ``local-dir``.

    Args:
        vocabulary: words that the tokenizer knows; default: those of CIFAR's names and of the templates.
    """
    words = pretrain.write_tokenizer(folder, sets.vocabulary() if vocabulary is None else vocabulary, CONTEXT)
    vision, text = SIZES[size]
    config = {
        "model_cfg": {
            "embed_dim": WIDTH,
            "vision_cfg": {"image_size": 32, "head_width": 32, **vision},
            "text_cfg": {"context_length": CONTEXT, "vocab_size": words, "hf_tokenizer_name": "cifar", **text},
        },
        "preprocess_cfg": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def train(
    folder: Path,
    size: str,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    classes: Collection[int] = range(100),
) -> None:
    """Pre-trains on CIFAR-100's train split and writes the complete model to ``folder``.

    Args:
        classes: labels of the classes whose pictures and captions are read; the vocabulary is that of all.
    """
    fine = sets.load("cifar100/cifar100.npz", "train")
    coarse = sets.superclasses("cifar100/cifar100.npz", "train")
    rows = np.flatnonzero(np.isin(fine.labels, list(classes)))
    images = torch.from_numpy(fine.images[rows]).permute(0, 3, 1, 2).contiguous()

    def caption(index: int, random: np.random.Generator) -> str:
        row = rows[index]
        return sets.caption(fine.names[fine.labels[row]], coarse[row], random)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        place = Path(name)
        write_shape(place, size)
        model = pretrain.fit(
            place,
            images,
            caption,
            steps=epochs * len(images) // batch_size,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        pretrain.save(model, place)
        folder.mkdir(exist_ok=True)
        for file in place.iterdir():
            file.replace(folder / file.name)


def with_words(pretrained: Path, folder: Path, words: Iterable[str], seed: int = 0) -> None:
    """Writes the model with more words to its tokenizer; their embeddings are random, as of words never seen.

    Args:
        words: names; those that the tokenizer has stay what they are.
    """
    weights = load_file(pretrained / WEIGHTS)
    vocabulary = json.loads((pretrained / "tokenizer.json").read_text())["model"]["vocab"]
    config = json.loads((pretrained / "open_clip_config.json").read_text())
    marks = {word for word in vocabulary if word.startswith("<")}
    known = set(vocabulary) - marks | {word for name in words for word in name.split()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        place = Path(name)
        config["model_cfg"]["text_cfg"]["vocab_size"] = pretrain.write_tokenizer(place, known, CONTEXT)
        after = json.loads((place / "tokenizer.json").read_text())["model"]["vocab"]
        old = weights[EMBEDDING]
        new = INITIAL_STD * torch.randn(len(after), old.shape[1], generator=torch.Generator().manual_seed(seed))
        for word, row in vocabulary.items():
            new[after[word]] = old[row]
        weights[EMBEDDING] = new
        (place / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(weights, place / WEIGHTS)
        folder.mkdir(exist_ok=True)
        for file in place.iterdir():
            file.replace(folder / file.name)


def digest(folder: Path) -> str:
    """A hash of a pre-trained model's weights, by which results name it."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:16]


def main() -> None:
    """Parses and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()
    begun = time.perf_counter()
    train(
        options.output,
        options.size,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
    )
    print(f"{options.output}: {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
