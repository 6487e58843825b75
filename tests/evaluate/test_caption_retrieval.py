"""Retrieval against a loop over all pairs."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch

from dive_fast.config.schema import EvaluationSet, ModelConfig
from dive_fast.data.prepared.convert import Options as PrepareOptions
from dive_fast.data.prepared.raw import RawSource
from dive_fast.data.prepared.write import prepare
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError
from dive_fast.evaluate.datasets.evaluation_set import Captioned
from dive_fast.evaluate.datasets.resolve import open_evaluation
from dive_fast.evaluate.zero_shot import measure
from dive_fast.model.towers import Towers, create, tokenizer_of

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


def model_of(root: Path) -> tuple[Towers, Any]:
    config = ModelConfig(name=f"local-dir:{root / 'model'}")
    return create(config).eval(), tokenizer_of(config)


def recalls(root: Path, batch_size: int) -> dict[str, float]:
    towers, tokenizer = model_of(root)
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
    with pytest.raises(DataError, match=r"1 its caption is empty; the first: 0.tar/a"):
        opened(tmp_path)


def test_pairs_and_groups_of_the_same_captions_have_the_same_figures(folder: Path, tmp_path: Path) -> None:
    """Three captions an image, as three samples or as one; raw and prepared."""
    texts = {i: [f"picture {i % 3} {word}" for word in ("here", "there", "everywhere")] for i in range(7)}
    grouped = {f"{i}": {"jpg": tiny.jpeg(i), "txt": "\n".join(own).encode()} for i, own in texts.items()}
    pairs = {
        f"{i}-{k}": {"jpg": tiny.jpeg(i), "txt": own[k].encode()} for k in range(3) for i, own in texts.items()
    }
    for name, samples in (("grouped", grouped), ("pairs", pairs)):
        tar = tiny.write_tar(tmp_path / name / "0.tar", samples)
        source = RawSource(open_webdataset(str(tar), ".txt"))
        prepare(source, tmp_path / f"{name} ready", PrepareOptions(), 1)
    found = {}
    towers, tokenizer = model_of(folder)
    for name in ("grouped", "pairs", "grouped ready", "pairs ready"):
        kind = "prepared" if "ready" in name else "webdataset"
        config = EvaluationSet(format=kind, path=str(tmp_path / name), task="retrieval")  # type: ignore[arg-type]
        data = open_evaluation(config)
        assert isinstance(data, Captioned)
        assert [sorted(own) for own in data.captions()] == [sorted(own) for own in texts.values()]
        assert data.remarks == (
            ("21 samples are 7 distinct images, each with all its captions",) if "pairs" in name else ()
        )
        measured = measure(towers, tokenizer, data, ALONE, batch_size=4, workers=0)
        assert measured.samples == 7
        found[name] = measured.scores
    assert found["pairs"] == found["grouped"]
    assert found["pairs ready"] == found["grouped ready"] == found["grouped"]


def test_answers_that_tie_come_in_the_order_of_the_set(folder: Path, tmp_path: Path) -> None:
    """As where the K largest are taken: half of two images with one caption find it, not none, nor both."""
    samples = {f"{i}": {"jpg": tiny.jpeg(i), "txt": b"a man"} for i in range(4)}
    tiny.write_tar(tmp_path / "set/0.tar", samples)
    towers, tokenizer = model_of(folder)
    for batch_size in (1, 3, 100):
        found = measure(towers, tokenizer, opened(tmp_path), ALONE, batch_size=batch_size, workers=0).scores
        assert found["image_to_text_r1"] == found["text_to_image_r1"] == 1 / 4
        assert found["image_to_text_r5"] == 1
