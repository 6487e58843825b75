"""Measurement of sets: compared with open_clip and with counts by hand, on any number of ranks."""

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
from same_metrics import assert_same_metrics
from torch import Tensor, nn

from dive_fast.config.schema import EvaluateConfig, EvaluationSet, ModelConfig
from dive_fast.data.classes import synsets
from dive_fast.data.prompt_files import read_templates
from dive_fast.data.samples import EvaluationSamples
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.data.transforms import Preprocess
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError, DataError
from dive_fast.evaluation.classifier import cached_classifier, classifier
from dive_fast.evaluation.datasets import imagenet
from dive_fast.evaluation.datasets.resolve import (
    open_evaluation,
    open_set,
    open_sets,
    remarks_on_missing_classes,
    remarks_on_untrained_classes,
)
from dive_fast.evaluation.datasets.strict_samples import StrictSamples
from dive_fast.evaluation.zero_shot import accuracy, evaluate, measure
from dive_fast.model.head import Head
from dive_fast.model.towers import Towers, create, tokenizer_of, unit

ALONE = Ranks(0, 1, torch.device("cpu"))
COLOURS = ["red", "lime", "blue"]
COUNTS = [1, 2, 3, 7, 8]
NAMES = ["cat", "dog", "a very old and rather large sea lion", "dog"]


class Eye(nn.Module):
    """An image tower whose features are the mean colour."""

    def encode_image(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def labels(count: int) -> list[int]:
    """Labels of which every third is wrong: the colour of image i is i modulo 3."""
    return [(i + (i % 3 == 1)) % 3 for i in range(count)]


def colours(folder: Path, count: int) -> str:
    """Writes a tar of images of one colour each."""
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
    tiny.write_shards(root / "pairs", count=9)
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
    results["scores"] = all_scores(root, ranks)
    # More ranks than classes in one case; in the last, the classifier is read from disk.
    towers, tokenizer = towers_of(root)
    for case in range(3):
        names = NAMES[:1] if case == 1 else NAMES[:3]
        weight = cached_classifier(towers, tokenizer, names, read_templates("simple"), ranks, root / "kept")
        results[f"classifier {case}"] = weight
    return results


def all_scores(root: Path, ranks: Ranks) -> list[dict[str, float]]:
    """All metrics of a classified set, of one with fewer images than ranks, and of a retrieval set."""
    towers, tokenizer = towers_of(root)
    classes = {"class_names": str(root / "tars/classes.txt"), "templates": "simple"}
    pairs = EvaluationSet(format="webdataset", path=str(root / "pairs"), task="retrieval")
    tars = EvaluationSet(format="webdataset", path=str(root / "tars"), **classes)
    single = EvaluationSet(format="webdataset", path=str(root / "1.tar"), **classes)
    return [
        measure(towers, tokenizer, open_evaluation(data), ranks, batch_size=4, workers=0).scores
        for data in (tars, single, pairs)
    ]


@pytest.mark.parametrize("templates", ["simple", "{}", "a photo of a {}."])
@pytest.mark.parametrize("config", [tiny.CLIP, tiny.QUICKGELU])
def test_classifier_equals_open_clip(tmp_path: Path, config: dict[str, Any], templates: str) -> None:
    name = tiny.write_model(tmp_path, config)
    towers, tokenizer = create(ModelConfig(name=name)).double(), tokenizer_of(ModelConfig(name=name))
    model: Any = open_clip.create_model(name).double()
    prompts = read_templates(templates)
    # A template listed twice counts twice, although its prompt is encoded once.
    for repeated in (prompts, (*prompts, str.lower, prompts[0], str.upper)):
        expected = open_clip.build_zero_shot_classifier(model, tokenizer, NAMES, repeated).T
        weights = classifier(towers, tokenizer, NAMES, repeated)
        assert weights.shape == (4, 24)
        assert torch.allclose(weights, expected, rtol=0, atol=1e-12)
        assert not weights.requires_grad


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_accuracy_counts_nearest_classes(folder: Path, batch_size: int, workers: int) -> None:
    for count in COUNTS if workers == 0 else [7]:
        right = sum(label == i % 3 for i, label in enumerate(labels(count)))
        assert accuracy_on_colours(folder, count, ALONE, batch_size, workers) == right / count
    assert [sum(label == i % 3 for i, label in enumerate(labels(count))) for count in COUNTS] == [1, 1, 2, 5, 5]


def test_metrics_are_equal_on_two_ranks(folder: Path) -> None:
    alone = {
        (count, batch_size): accuracy_on_colours(folder, count, ALONE, batch_size)
        for count, batch_size in itertools.product(COUNTS, [2, 100])
    }
    for results in run_ranks(2, on_each_rank, folder):
        assert results.pop("sets") == evaluate_sets(folder, ALONE)
        for metrics, expected in zip(results.pop("scores"), all_scores(folder, ALONE), strict=True):
            assert_same_metrics(metrics, expected)
        towers, tokenizer = towers_of(folder)
        for case in range(3):
            names = NAMES[:1] if case == 1 else NAMES[:3]
            weight = classifier(towers, tokenizer, names, read_templates("simple"))
            assert torch.equal(results.pop(f"classifier {case}"), weight)
        assert results == alone


def test_evaluate_uses_names_and_templates_of_each_set(folder: Path) -> None:
    name = f"local-dir:{folder / 'model'}"
    model: Any = open_clip.create_model(name).eval()
    tokenizer = tokenizer_of(ModelConfig(name=name))
    transform = open_clip.image_transform(32, is_train=False)
    expected = {}
    for kind, class_names, templates in [
        ("tars", [f"class number {i}" for i in range(5)], open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("images", [f"kind {i}" for i in range(4)], open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ]:
        weights = open_clip.build_zero_shot_classifier(model, tokenizer, class_names, templates)
        source, names, _ = open_set(EvaluationSet.model_validate(sets(folder)[kind]))
        assert list(names) == class_names
        with torch.no_grad():
            images = torch.stack([transform(source.image(i)) for i in range(len(source))])
            nearest = (model.encode_image(images, normalize=True) @ weights).argmax(1)
        expected[kind] = sum(int(nearest[i]) == sample.label for i, sample in enumerate(source.samples)) / len(
            source
        )
    assert evaluate_sets(folder, ALONE) == expected


def test_measure_equals_open_clip_on_imagenet_r(folder: Path, tmp_path: Path) -> None:
    """Compares with a plain loop over open_clip's model, transform and classifier, in ImageNet-R's layout."""
    name = f"local-dir:{folder / 'model'}"
    wnids = synsets("r")
    for label, wnid in enumerate(wnids):
        for copy in range(1 + label % 2):
            path = tmp_path / "imagenet-r" / wnid / f"{copy}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tiny.jpeg(7 * label + copy, size=(50 + label % 9, 40)))
    model: Any = open_clip.create_model(name).eval()
    tokenizer = tokenizer_of(ModelConfig(name=name))
    transform = open_clip.image_transform(32, is_train=False)
    class_names = [open_clip.IMAGENET_CLASSNAMES[synsets().index(wnid)] for wnid in wnids]
    prompts = open_clip.SIMPLE_IMAGENET_TEMPLATES
    weights = open_clip.build_zero_shot_classifier(model, tokenizer, class_names, prompts)
    labels, nearest, in_top5, logits_of_all = [], [], 0, []
    for path in sorted((tmp_path / "imagenet-r").rglob("*.jpg")):
        with torch.no_grad():
            features = model.encode_image(transform(Image.open(path))[None], normalize=True)
        logits = (100 * features @ weights)[0]
        labels.append(wnids.index(path.parent.name))
        nearest.append(int(logits.argmax()))
        in_top5 += labels[-1] in logits.topk(5).indices
        logits_of_all.append(logits / 100 * model.logit_scale.exp().detach())
    towers, tokenizer = towers_of(folder)
    data = open_evaluation(EvaluationSet(dataset="imagenet-r", path=str(tmp_path), templates="simple"))
    measured = measure(towers, tokenizer, data, ALONE, batch_size=16, workers=0)
    assert (measured.samples, measured.classifier) == (300, "prompts")
    assert measured.scores["top1"] == sum(a == b for a, b in zip(labels, nearest, strict=True)) / 300
    assert measured.scores["top5"] == in_top5 / 300
    assert 0 < measured.scores["top1"] < measured.scores["top5"] < 1
    hits = [sum(a == b == label for a, b in zip(labels, nearest, strict=True)) for label in range(200)]
    recalls = [hit / labels.count(label) for label, hit in enumerate(hits)]
    assert measured.scores["mean_class_recall"] == pytest.approx(sum(recalls) / 200)
    probabilities = torch.stack(logits_of_all).double().softmax(1)
    of_label = probabilities[range(300), labels]
    one_hot = torch.nn.functional.one_hot(torch.tensor(labels), 200)
    expected = {
        "confidence": probabilities.amax(1).mean(),
        "nll": -of_label.log().mean(),
        "brier": (probabilities - one_hot).square().sum(1).mean(),
    }
    for metric, value in expected.items():
        assert measured.scores[metric] == pytest.approx(float(value), rel=1e-5)
    # A head of all 1000 classes, two of which share a name, as vanilla_ft trains it on ImageNet. Its rows contain
    # the scale of its logits.
    head_names = tuple(open_clip.IMAGENET_CLASSNAMES)
    weight = torch.zeros(1000, 24)
    rows = classifier(towers, tokenizer, class_names, prompts) * towers.scale().detach()
    weight[list(imagenet.classes_of("r"))] = rows
    by_head = measure(
        *(towers, tokenizer, data, ALONE),
        batch_size=16,
        workers=0,
        head=Head(weight, torch.zeros(1000), head_names),
    )
    assert_same_metrics(by_head.scores, measured.scores)
    assert (by_head.classifier, by_head.samples) == ("head", 300)


def test_untrained_classes_of_the_sets_of_the_target_are_reported(folder: Path) -> None:
    section = sets(folder)["images"]
    tree = {"sets": {"val": section | {"role": "id"}, "other": section, "far": section | {"role": "ood"}}}
    config = EvaluateConfig.model_validate_json(json.dumps(tree))
    opened = open_sets(config.sets, ALONE)
    kinds = [f"kind {i}" for i in range(4)]
    assert remarks_on_untrained_classes(config, opened, kinds) == []
    (line,) = remarks_on_untrained_classes(config, opened, kinds[1:])
    assert line.startswith(
        "evaluate.sets.val.role: 1 of the 4 classes of val are none of data.target, e.g. 'kind 0'"
    )
    selecting = config.model_copy(update={"select": "other"})
    keys = [line.split(":")[0] for line in remarks_on_untrained_classes(selecting, opened, kinds[1:])]
    assert keys == ["evaluate.sets.val.role", "evaluate.select"]


def test_remarks_on_missing_classes_name_one(folder: Path) -> None:
    config = EvaluateConfig.model_validate_json(json.dumps({"sets": sets(folder)}))
    opened = open_sets(config.sets, ALONE)
    kinds = [f"kind {i}" for i in range(4)]
    assert remarks_on_missing_classes(opened, kinds) == []
    (line,) = remarks_on_missing_classes(opened, [*kinds, "kind 4"])
    assert "evaluate.sets.images has 4 of the 5 classes of data.target: 'kind 4', for example" in line


def test_evaluate_uses_head_for_sets_with_its_classes(folder: Path) -> None:
    towers, tokenizer = towers_of(folder)
    torch.manual_seed(0)
    # More classes than the set, in another order.
    names = ("kind 3", "another", "kind 0", "kind 2", "kind 1")
    head = Head(torch.randn(5, 24), torch.randn(5), names)
    config = EvaluateConfig.model_validate_json(json.dumps({"sets": sets(folder), "batch_size": 3, "workers": 0}))
    by_head = evaluate(towers, tokenizer, config, ALONE, head)
    by_prompts = evaluate(towers, tokenizer, config, ALONE)
    assert by_head["tars"] == by_prompts["tars"]
    source, _, _ = open_set(config.sets["images"])
    with torch.no_grad():
        images = torch.stack([tiny.shown(towers.preprocess, source.image(i)) for i in range(len(source))])
        logits = unit(towers.encode_image(images)) @ head.weight.T + head.bias
    chosen = [names[row] for row in (logits - torch.tensor([0, torch.inf, 0, 0, 0])).argmax(1).tolist()]
    right = sum(name == f"kind {sample.label}" for name, sample in zip(chosen, source.samples, strict=True))
    assert by_head["images"] == right / len(source)
    data = open_evaluation(config.sets["images"])
    assert measure(towers, tokenizer, data, ALONE, batch_size=3, workers=0, head=head).classifier == "head"
    wide = Head(torch.randn(5, 7), torch.randn(5), names)
    with pytest.raises(ConfigError, match="the head is for features of width 7, the model's have 24"):
        evaluate(towers, tokenizer, config, ALONE, wide)


def test_accuracy_of_broken_image_raises(tmp_path: Path) -> None:
    samples = {f"{i}": {"jpg": tiny.jpeg(i) if i != 2 else b"no picture", "cls": b"0"} for i in range(4)}
    source = open_webdataset(str(tiny.write_tar(tmp_path / "a.tar", samples)), ".cls")
    eye: Any = Eye()
    preprocess = Preprocess((8, 8), (0.0,) * 3, (1.0,) * 3, "bicubic", "squash")
    with pytest.raises(DataError, match=r"sample a.tar/2: cannot decode the image"):
        accuracy(eye, torch.eye(3), StrictSamples(source, preprocess), ALONE, 2, 0)


def test_accuracy_of_infinite_logits_raises(folder: Path) -> None:
    with pytest.raises(DataError, match="the logits are not finite"):
        accuracy_with_weights(folder, torch.eye(3) * torch.inf)


def accuracy_with_weights(folder: Path, weights: Tensor) -> float:
    preprocess = Preprocess((8, 8), (0.0,) * 3, (1.0,) * 3, "bicubic", "squash")
    samples = StrictSamples(open_webdataset(str(folder / "3.tar"), ".cls"), preprocess)
    eye: Any = Eye()
    return accuracy(eye, weights, samples, ALONE, 2, 0)


def test_evaluate_reports_metric_of_each_set(folder: Path) -> None:
    towers, tokenizer = towers_of(folder)
    images = sets(folder)["images"]
    config = {name: images | {"metric": name} for name in ("top1", "top5", "mean_class_recall", "macro_f1")}
    tree = EvaluateConfig.model_validate_json(json.dumps({"sets": config, "workers": 0}))
    metrics = evaluate(towers, tokenizer, tree, ALONE)
    data = open_evaluation(tree.sets["top1"])
    measured = measure(towers, tokenizer, data, ALONE, batch_size=256, workers=0)
    assert metrics == {name: measured.scores[name] for name in config}
    assert metrics["top5"] == 1  # there are four classes


def test_open_set_names_sample_without_class_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    tar = tiny.write_tar(tmp_path / "a.tar", {"k": {"jpg": tiny.jpeg(0), "cls": b"-1"}})
    names = str(tmp_path / "names.txt")
    for path, message in [
        (folder / "tars", ".*: sample shard-00000.tar/0002 has label 2, but there are 2 class names"),
        (tar, r": k\.cls: -1 is not a label: classes are counted from 0"),
    ]:
        config = EvaluationSet(format="webdataset", path=str(path), class_names=names)
        with pytest.raises(DataError, match=rf"^{path}{message}$"):
            open_set(config)
