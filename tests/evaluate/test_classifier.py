"""Prompts' embeddings are kept and found again; labels that several classes stand for; a head's own classes."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from open_clip import IMAGENET_CLASSNAMES
from torch import Tensor

from dive_fast.config.schema import ModelConfig
from dive_fast.data.prompts import read_templates
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError
from dive_fast.evaluate.classifier import Classifier, cached_classifier, classifier, of_head
from dive_fast.evaluate.datasets import imagenet
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


def test_a_classifier_is_written_once_and_read_by_all_that_decides_it(name: str, tmp_path: Path) -> None:
    towers, tokenizer = built(name)
    simple = read_templates("simple")
    first = cached_classifier(towers, tokenizer, NAMES, simple, ALONE, tmp_path)
    assert torch.equal(first, classifier(towers, tokenizer, NAMES, simple))
    (file,) = tmp_path.iterdir()

    def refuse(texts: list[str]) -> Tensor:
        assert len(texts) == 4, "only the probe is tokenised again"
        tokens: Tensor = tokenizer(texts)
        return tokens

    with torch.no_grad():  # the image tower plays no part
        towers.visual.proj.add_(1)
    assert torch.equal(cached_classifier(towers, refuse, NAMES, simple, ALONE, tmp_path), first)
    assert list(tmp_path.iterdir()) == [file]
    assert cached_classifier(towers, tokenizer, NAMES[:4], simple, ALONE, tmp_path).shape == (4, 24)
    # The same weights with another activation, as a tag may have it.
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


def test_the_logit_of_a_label_is_the_largest_of_its_classes() -> None:
    torch.manual_seed(0)
    features, weight, bias = torch.randn(6, 4), torch.randn(5, 4), torch.randn(5)
    members = ((3,), (0, 4, 2), (1, 0))
    found = Classifier("head", weight, bias, members).logits(features)
    every = features @ weight.T + bias
    for row in range(6):
        for label, classes in enumerate(members):
            assert found[row, label] == max(every[row, c] for c in classes)
    assert torch.equal(Classifier("head", weight, bias).logits(features), every)
    assert Classifier("prompts", weight, None, members).num_labels == 3


def test_a_head_classifies_only_what_it_has_all_classes_of() -> None:
    head = Head(torch.arange(8.0).reshape(4, 2), torch.arange(4.0), ("a", "b", "c", "b"))
    found = of_head(head, ("c", "a"))
    assert found is not None
    assert (found.weight.tolist(), found.bias.tolist(), found.joined_by) == ([[4, 5], [0, 1]], [2, 0], "name")
    assert of_head(head, ("a", "d")) is None
    whole = of_head(head, head.class_names)
    assert whole is not None
    assert torch.equal(whole[0], head.weight)
    with pytest.raises(ConfigError, match=r"the head has two classes called 'b'.*--head none"):
        of_head(head, ("a", "b"))
    with pytest.raises(ConfigError, match="the data set has two classes called 'a'"):
        of_head(head, ("a", "c", "a"))


@pytest.mark.parametrize("subset", ["", "r", "a"])
@pytest.mark.parametrize("names", [tuple(IMAGENET_CLASSNAMES), imagenet.synsets()], ids=["names", "ids"])
def test_a_head_of_imagenet_is_read_by_number(subset: str, names: tuple[str, ...]) -> None:
    """Two classes are called "missile": by name a row cannot be found, or is the wrong one."""
    head = Head(torch.arange(2000.0).reshape(1000, 2), torch.arange(1000.0), names)
    rows = imagenet.classes_of(subset)
    found = of_head(head, tuple(IMAGENET_CLASSNAMES[row] for row in rows), rows)
    assert found is not None
    assert found.joined_by == "number"
    assert found.bias.tolist() == list(rows)
    assert found.weight[:, 0].tolist() == [2 * row for row in rows]
    if subset == "r" and names == tuple(IMAGENET_CLASSNAMES):
        with pytest.raises(ConfigError, match="the head has two classes called 'missile'"):
            of_head(head, tuple(IMAGENET_CLASSNAMES[row] for row in rows))
