"""Zero-shot accuracy: open_clip's classifier, the right share, and the same one on any number of ranks."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
import torch.distributed as dist
from distributed import run_ranks
from PIL import Image
from torch import Tensor, nn

from dive_fast.config import EvaluateConfig, EvaluationSet, ModelConfig
from dive_fast.data.prompts import read_templates
from dive_fast.data.samples import EvaluationSamples
from dive_fast.data.source import DataError, open_webdataset
from dive_fast.data.views import Preprocess
from dive_fast.evaluate.zero_shot import accuracy, classifier, evaluate, open_set
from dive_fast.ranks import Ranks
from dive_fast.towers import Towers, create, tokenizer_of

ALONE = Ranks(0, 1, torch.device("cpu"))
COLOURS = ["red", "lime", "blue"]
COUNTS = [1, 2, 3, 7, 8]
NAMES = ["cat", "dog", "a very old and rather large sea lion", "dog"]


class Eye(nn.Module):
    """An image tower that sees the mean colour."""

    def encode_image(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def labels(count: int) -> list[int]:
    """Every third is wrong: the colour of picture i is i modulo 3."""
    return [(i + (i % 3 == 1)) % 3 for i in range(count)]


def colours(folder: Path, count: int) -> str:
    """Pictures of one colour each."""
    samples = {}
    for i, label in enumerate(labels(count)):
        content = io.BytesIO()
        Image.new("RGB", (9, 7), COLOURS[i % 3]).save(content, "PNG")
        samples[f"{i:03d}"] = {"png": content.getvalue(), "cls": str(label).encode()}
    return str(tiny.write_tar(folder / f"{count}.tar", samples))


def accuracy_on_colours(folder: Path, count: int, ranks: Ranks, batch_size: int, workers: int = 0) -> float:
    preprocess = Preprocess((8, 8), (0.0,) * 3, (1.0,) * 3, "bicubic", "squash")
    samples = EvaluationSamples(open_webdataset(str(folder / f"{count}.tar"), ".cls"), preprocess)
    eye: Any = Eye()
    return accuracy(eye, torch.eye(3), samples, ranks, batch_size, workers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Colours, a small model, and an evaluation set of each format."""
    root = tmp_path_factory.mktemp("evaluate")
    for count in COUNTS:
        colours(root, count)
    tiny.write_model(root / "model")
    tiny.write_target(root / "tars", count=13)
    for i in range(11):
        path = root / "images" / f"kind {i % 4}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny.jpeg(i))
    return root


def sets(root: Path) -> dict[str, dict[str, Any]]:
    tars = root / "tars"
    return {
        "tars": {"format": "webdataset", "path": str(tars), "class_names": str(tars / "classes.txt")},
        "images": {"format": "folder", "path": str(root / "images"), "templates": "simple"},
    }


def towers_of(root: Path) -> tuple[Towers, Any]:
    config = ModelConfig(name=f"local-dir:{root / 'model'}")
    return create(config).eval(), tokenizer_of(config)


def evaluate_sets(root: Path, ranks: Ranks) -> dict[str, float]:
    towers, tokenizer = towers_of(root)
    config = {"sets": sets(root), "batch_size": 3, "workers": 0}
    return evaluate(towers, tokenizer, EvaluateConfig.model_validate_json(json.dumps(config)), ranks)


def on_each_rank(root: Path) -> dict[Any, Any]:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    results: dict[Any, Any] = {
        (count, batch_size): accuracy_on_colours(root, count, ranks, batch_size)
        for count, batch_size in itertools.product(COUNTS, [2, 100])
    }
    results["sets"] = evaluate_sets(root, ranks)
    return results


@pytest.mark.parametrize("templates", ["simple", "{}", "a photo of a {}."])
@pytest.mark.parametrize("config", [tiny.CLIP, tiny.QUICKGELU])
def test_the_classifier_is_open_clips(tmp_path: Path, config: dict[str, Any], templates: str) -> None:
    name = tiny.write_model(tmp_path, config)
    towers, tokenizer = create(ModelConfig(name=name)).double(), tokenizer_of(ModelConfig(name=name))
    model: Any = open_clip.create_model(name).double()
    prompts = read_templates(templates)
    # A template that stands twice counts twice, though its prompt is encoded once.
    for own in (prompts, (*prompts, str.lower, prompts[0], str.upper)):
        expected = open_clip.build_zero_shot_classifier(model, tokenizer, NAMES, own).T
        found = classifier(towers, tokenizer, NAMES, own)
        assert found.shape == (4, 24)
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
        assert not found.requires_grad


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_accuracy_is_the_share_of_images_whose_nearest_class_is_theirs(
    folder: Path, batch_size: int, workers: int
) -> None:
    for count in COUNTS if workers == 0 else [7]:
        right = sum(label == i % 3 for i, label in enumerate(labels(count)))
        assert accuracy_on_colours(folder, count, ALONE, batch_size, workers) == right / count
    assert [sum(label == i % 3 for i, label in enumerate(labels(count))) for count in COUNTS] == [1, 1, 2, 5, 5]


def test_accuracy_is_the_same_on_two_ranks_whatever_their_shares(folder: Path) -> None:
    alone = {
        (count, batch_size): accuracy_on_colours(folder, count, ALONE, batch_size)
        for count, batch_size in itertools.product(COUNTS, [2, 100])
    }
    for results in run_ranks(2, on_each_rank, folder):
        assert results.pop("sets") == evaluate_sets(folder, ALONE)
        assert results == alone


def test_every_set_is_measured_with_its_own_names_and_templates(folder: Path) -> None:
    name = f"local-dir:{folder / 'model'}"
    model: Any = open_clip.create_model(name).eval()
    tokenizer = tokenizer_of(ModelConfig(name=name))
    transform = open_clip.image_transform(32, is_train=False)
    expected = {}
    for kind, own_names, templates in [
        ("tars", [f"class number {i}" for i in range(5)], open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("images", [f"kind {i}" for i in range(4)], open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ]:
        weights = open_clip.build_zero_shot_classifier(model, tokenizer, own_names, templates)
        source, names, _ = open_set(EvaluationSet.model_validate(sets(folder)[kind]))
        assert list(names) == own_names
        with torch.no_grad():
            images = torch.stack([transform(source.image(i)) for i in range(len(source))])
            nearest = (model.encode_image(images, normalize=True) @ weights).argmax(1)
        expected[kind] = sum(int(nearest[i]) == sample.label for i, sample in enumerate(source.samples)) / len(
            source
        )
    assert evaluate_sets(folder, ALONE) == expected


def test_a_label_without_a_name_is_an_error_that_names_the_sample(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    tar = tiny.write_tar(tmp_path / "a.tar", {"k": {"jpg": tiny.jpeg(0), "cls": b"-1"}})
    names = str(tmp_path / "names.txt")
    for path, sample, label in [
        (folder / "tars", "shard-00000.tar/0002", 2),
        (folder / "images", "kind 2/10.jpg", 2),
        (tar, "a.tar/k", -1),
    ]:
        kind = "folder" if path.name == "images" else "webdataset"
        config = EvaluationSet(format=kind, path=str(path), class_names=names)
        message = rf"^{path}.*: sample {sample} has label {label}, but there are 2 class names$"
        with pytest.raises(DataError, match=message):
            open_set(config)
