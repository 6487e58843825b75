"""Recalls of image-text retrieval, compared with a loop over all pairs."""

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
from dive_fast.evaluation.datasets.evaluation_set import Captioned
from dive_fast.evaluation.datasets.resolve import open_evaluation
from dive_fast.evaluation.zero_shot import measure
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
        captions = [f"caption {i} of {k}{' and so on' * (i % 3)}" for k in range(1 + i % 4)]
        samples[f"{i:03d}"] = {"jpg": tiny.jpeg(i), "txt": "\n".join(captions).encode() + b"\n\n"}
    tiny.write_tar(root / "set/0.tar", samples)
    return root


def opened(root: Path) -> Captioned:
    data = open_evaluation(EvaluationSet(format="webdataset", path=str(root / "set"), task="retrieval"))
    assert isinstance(data, Captioned)
    return data


def model_of(root: Path) -> tuple[Towers, Any]:
    config = ModelConfig(name=f"local-dir:{root / 'model'}")
    return create(config).eval(), tokenizer_of(config)


def recalls(root: Path, batch_size: int) -> dict[str, float]:
    towers, tokenizer = model_of(root)
    measured = measure(towers, tokenizer, opened(root), ALONE, batch_size=batch_size, workers=0)
    assert (measured.classifier, measured.samples) == ("captions", COUNT)
    return measured.scores


def by_loop(root: Path) -> dict[str, float]:
    """Recalls by open_clip's model and transform, in a loop over all pairs."""
    model: Any = open_clip.create_model(f"local-dir:{root / 'model'}").eval()
    tokenizer = tokenizer_of(ModelConfig(name=f"local-dir:{root / 'model'}"))
    transform = open_clip.image_transform(32, is_train=False)
    data = opened(root)
    captions = data.captions()
    with torch.no_grad():
        images = torch.stack([transform(data.source.image(i)) for i in range(COUNT)])
        similarity = (
            model.encode_image(images, normalize=True)
            @ model.encode_text(tokenizer([text for texts in captions for text in texts]), normalize=True).T
        )
    owner = [i for i, texts in enumerate(captions) for _ in texts]
    expected = {}
    for k in (1, 5, 10):
        best = [similarity[i].topk(k).indices.tolist() for i in range(COUNT)]
        hits = sum(any(owner[text] == i for text in best[i]) for i in range(COUNT))
        expected[f"image_to_text_r{k}"] = hits / COUNT
        best = [similarity[:, text].topk(k).indices.tolist() for text in range(len(owner))]
        hits = sum(owner[text] in best[text] for text in range(len(owner)))
        expected[f"text_to_image_r{k}"] = hits / len(owner)
    return expected


def test_recalls_equal_a_loop_over_all_pairs(folder: Path) -> None:
    expected = by_loop(folder)
    assert 0 < expected["image_to_text_r5"] < 1
    for batch_size in (4, 100):
        assert recalls(folder, batch_size) == expected


def test_image_without_caption_raises(tmp_path: Path) -> None:
    tiny.write_tar(tmp_path / "set/0.tar", {"a": {"jpg": tiny.jpeg(0), "txt": b" \n"}})
    with pytest.raises(DataError, match=r"1 its caption is empty; the first: 0.tar/a"):
        opened(tmp_path)


def test_recalls_of_pairs_equal_those_of_grouped_captions(folder: Path, tmp_path: Path) -> None:
    """Three captions per image, as three samples or as one; raw and prepared."""
    texts = {i: [f"picture {i % 3} {word}" for word in ("here", "there", "everywhere")] for i in range(7)}
    grouped = {f"{i}": {"jpg": tiny.jpeg(i), "txt": "\n".join(captions).encode()} for i, captions in texts.items()}
    pairs = {
        f"{i}-{k}": {"jpg": tiny.jpeg(i), "txt": captions[k].encode()}
        for k in range(3)
        for i, captions in texts.items()
    }
    for name, samples in (("grouped", grouped), ("pairs", pairs)):
        tar = tiny.write_tar(tmp_path / name / "0.tar", samples)
        source = RawSource(open_webdataset(str(tar), ".txt"))
        prepare(source, tmp_path / f"{name} ready", PrepareOptions(), 1)
    scores = {}
    towers, tokenizer = model_of(folder)
    for name in ("grouped", "pairs", "grouped ready", "pairs ready"):
        kind = "prepared" if "ready" in name else "webdataset"
        config = EvaluationSet(format=kind, path=str(tmp_path / name), task="retrieval")  # type: ignore[arg-type]
        data = open_evaluation(config)
        assert isinstance(data, Captioned)
        assert [sorted(captions) for captions in data.captions()] == [
            sorted(captions) for captions in texts.values()
        ]
        assert data.remarks == (
            ("21 samples are 7 distinct images, each with all its captions",) if "pairs" in name else ()
        )
        measured = measure(towers, tokenizer, data, ALONE, batch_size=4, workers=0)
        assert measured.samples == 7
        scores[name] = measured.scores
    assert scores["pairs"] == scores["grouped"]
    assert scores["pairs ready"] == scores["grouped ready"] == scores["grouped"]


def test_recalls_rank_ties_in_set_order(folder: Path, tmp_path: Path) -> None:
    """As with the K largest similarities: one of several equal captions is first, not none and not all."""
    samples = {f"{i}": {"jpg": tiny.jpeg(i), "txt": b"a man"} for i in range(4)}
    tiny.write_tar(tmp_path / "set/0.tar", samples)
    towers, tokenizer = model_of(folder)
    for batch_size in (1, 3, 100):
        scores = measure(towers, tokenizer, opened(tmp_path), ALONE, batch_size=batch_size, workers=0).scores
        assert scores["image_to_text_r1"] == scores["text_to_image_r1"] == 1 / 4
        assert scores["image_to_text_r5"] == 1
