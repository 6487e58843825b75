"""Classifiers: the cache of prompt embeddings, labels with several classes, and the rows of a head."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from open_clip import IMAGENET_CLASSNAMES
from torch import Tensor

from dive_fast.config.schema import ModelConfig
from dive_fast.data.classes import synsets
from dive_fast.data.prompt_files import read_templates
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError
from dive_fast.evaluation.classifier import Classifier, cached_classifier, classifier, select_head_rows
from dive_fast.evaluation.datasets import imagenet
from dive_fast.model.head import Head
from dive_fast.model.towers import Towers, create, tokenizer_of

ALONE = Ranks(0, 1, torch.device("cpu"))
NAMES = ("cat", "dog", "sea lion", "teapot", "yurt")


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_model(tmp_path_factory.mktemp("model"))


def built(name: str) -> tuple[Towers, Any]:
    config = ModelConfig(name=name)
    return create(config).eval(), tokenizer_of(config)


def test_cached_classifier_is_keyed_by_all_inputs(name: str, tmp_path: Path) -> None:
    towers, tokenizer = built(name)
    simple = read_templates("simple")
    first = cached_classifier(towers, tokenizer, NAMES, simple, ALONE, tmp_path)
    assert torch.equal(first, classifier(towers, tokenizer, NAMES, simple))
    (file,) = tmp_path.iterdir()

    def refuse(texts: list[str]) -> Tensor:
        assert len(texts) == 4, "only the tokenizer probes are tokenized again"
        tokens: Tensor = tokenizer(texts)
        return tokens

    with torch.no_grad():  # the image tower is not part of the key
        towers.visual.proj.add_(1)
    assert torch.equal(cached_classifier(towers, refuse, NAMES, simple, ALONE, tmp_path), first)
    assert list(tmp_path.iterdir()) == [file]
    assert cached_classifier(towers, tokenizer, NAMES[:4], simple, ALONE, tmp_path).shape == (4, 24)
    # The same weights with another activation, as a pretrained tag may select it.
    gelu = towers.text.transformer.resblocks[0].mlp.gelu
    towers.text.transformer.resblocks[0].mlp.gelu = torch.nn.SiLU()
    assert not torch.equal(cached_classifier(towers, tokenizer, NAMES, simple, ALONE, tmp_path), first)
    towers.text.transformer.resblocks[0].mlp.gelu = gelu
    cached_classifier(towers, tokenizer, NAMES, simple[:2], ALONE, tmp_path)
    towers.autocast = torch.bfloat16
    cached_classifier(towers, tokenizer, NAMES, simple, ALONE, tmp_path)
    towers.autocast = None
    with torch.no_grad():
        towers.text.text_projection.add_(0.1)
    assert not torch.equal(cached_classifier(towers, tokenizer, NAMES, simple, ALONE, tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 6
    assert cached_classifier(towers, tokenizer, NAMES, simple, ALONE, None).shape == (5, 24)
    file.write_bytes(b"no tensors")
    towers, tokenizer = built(name)
    with pytest.raises(ConfigError, match=f"{file.name}: cannot read the classifier: .*; remove the file"):
        cached_classifier(towers, tokenizer, NAMES, simple, ALONE, tmp_path)


def test_logit_of_label_is_largest_of_its_classes() -> None:
    torch.manual_seed(0)
    features, weight, bias = torch.randn(6, 4), torch.randn(5, 4), torch.randn(5)
    members = ((3,), (0, 4, 2), (1, 0))
    logits = Classifier("head", weight, bias, members).logits(features)
    class_logits = features @ weight.T + bias
    for row in range(6):
        for label, classes in enumerate(members):
            assert logits[row, label] == max(class_logits[row, c] for c in classes)
    assert torch.equal(Classifier("head", weight, bias).logits(features), class_logits)
    assert Classifier("prompts", weight, None, members).num_labels == 3


def test_head_rows_need_all_classes() -> None:
    head = Head(torch.arange(8.0).reshape(4, 2), torch.arange(4.0), ("a", "b", "c", "b"))
    rows = select_head_rows(head, ("c", "a"))
    assert rows is not None
    assert (rows.weight.tolist(), rows.bias.tolist(), rows.joined_by) == ([[4, 5], [0, 1]], [2, 0], "name")
    assert select_head_rows(head, ("a", "d")) is None
    all_rows = select_head_rows(head, head.class_names)
    assert all_rows is not None
    assert torch.equal(all_rows.weight, head.weight)
    with pytest.raises(ConfigError, match=r"the head has two classes called 'b'.*--head none"):
        select_head_rows(head, ("a", "b"))
    with pytest.raises(ConfigError, match="the data set has two classes called 'a'"):
        select_head_rows(head, ("a", "c", "a"))


@pytest.mark.parametrize("subset", ["", "r", "a"])
@pytest.mark.parametrize("names", [tuple(IMAGENET_CLASSNAMES), synsets()], ids=["names", "ids"])
def test_head_rows_of_imagenet_are_selected_by_number(subset: str, names: tuple[str, ...]) -> None:
    """Two classes are called "missile", so a name does not identify a row."""
    head = Head(torch.arange(2000.0).reshape(1000, 2), torch.arange(1000.0), names)
    numbers = imagenet.classes_of(subset)
    class_names = tuple(IMAGENET_CLASSNAMES[number] for number in numbers)
    rows = select_head_rows(head, class_names, numbers)
    assert rows is not None
    assert rows.joined_by == "number"
    assert rows.bias.tolist() == list(numbers)
    assert rows.weight[:, 0].tolist() == [2 * number for number in numbers]
    if subset == "r" and names == tuple(IMAGENET_CLASSNAMES):
        with pytest.raises(ConfigError, match="the head has two classes called 'missile'"):
            select_head_rows(head, class_names)
