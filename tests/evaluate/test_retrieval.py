"""Retrieval against a loop over all pairs."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch

from dive_fast.config import EvaluationSet, ModelConfig
from dive_fast.data.source import DataError
from dive_fast.evaluate.labelled import Captioned
from dive_fast.evaluate.zero_shot import measure, open_evaluation
from dive_fast.ranks import Ranks
from dive_fast.towers import create, tokenizer_of

ALONE = Ranks(0, 1, torch.device("cpu"))
COUNT = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, and images with one to four captions each."""
    root = tmp_path_factory.mktemp("retrieval")
    tiny.write_model(root / "model")
    samples = {}
    for i in range(COUNT):
        own = [f"caption {i} of {k}{' and so on' * (i % 3)}" for k in range(1 + i % 4)]
        samples[f"{i:03d}"] = {"jpg": tiny.jpeg(i), "txt": "\n".join(own).encode() + b"\n\n"}
    tiny.write_tar(root / "set/0.tar", samples)
    return root


def opened(root: Path) -> Captioned:
    found = open_evaluation(EvaluationSet(format="webdataset", path=str(root / "set"), task="retrieval"))
    assert isinstance(found, Captioned)
    return found


def recalls(root: Path, batch_size: int) -> dict[str, float]:
    config = ModelConfig(name=f"local-dir:{root / 'model'}")
    towers, tokenizer = create(config).eval(), tokenizer_of(config)
    found = measure(towers, tokenizer, opened(root), ALONE, batch_size=batch_size, workers=0)
    assert (found.classifier, found.samples) == ("captions", COUNT)
    return found.scores


def by_hand(root: Path) -> dict[str, float]:
    """open_clip's model and transform, every pair, ranks counted in a loop."""
    model: Any = open_clip.create_model(f"local-dir:{root / 'model'}").eval()
    tokenizer = tokenizer_of(ModelConfig(name=f"local-dir:{root / 'model'}"))
    transform = open_clip.image_transform(32, is_train=False)
    data = opened(root)
    captions = data.captions()
    with torch.no_grad():
        images = torch.stack([transform(data.source.image(i)) for i in range(COUNT)])
        similarity = (
            model.encode_image(images, normalize=True)
            @ model.encode_text(tokenizer([text for own in captions for text in own]), normalize=True).T
        )
    owner = [i for i, own in enumerate(captions) for _ in own]
    found = {}
    for k in (1, 5, 10):
        best = [similarity[i].topk(k).indices.tolist() for i in range(COUNT)]
        hits = sum(any(owner[text] == i for text in best[i]) for i in range(COUNT))
        found[f"image_to_text_r{k}"] = hits / COUNT
        best = [similarity[:, text].topk(k).indices.tolist() for text in range(len(owner))]
        found[f"text_to_image_r{k}"] = sum(owner[text] in best[text] for text in range(len(owner))) / len(owner)
    return found


def test_recalls_are_those_of_a_loop_over_all_pairs(folder: Path) -> None:
    expected = by_hand(folder)
    assert 0 < expected["image_to_text_r5"] < 1
    for batch_size in (4, 100):
        assert recalls(folder, batch_size) == expected


def test_an_image_without_a_caption_is_an_error(tmp_path: Path) -> None:
    tiny.write_tar(tmp_path / "set/0.tar", {"a": {"jpg": tiny.jpeg(0), "txt": b" \n"}})
    with pytest.raises(DataError, match=r"sample 0.tar/a: it has no caption"):
        opened(tmp_path)
