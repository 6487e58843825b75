"""Learned prompts: contexts by hand and in float64, tokens of class names, and their files."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from torch import Tensor

from dive_fast.config.schema import ModelConfig
from dive_fast.errors import ConfigError
from dive_fast.evaluation.feature_identity import features_identity
from dive_fast.model import prompt_file
from dive_fast.model.learned_prompts import (
    AttendsTo,
    ClassTokens,
    LearnedPrompts,
    NameAttention,
    attend,
    check_text_tower,
    encode_classes,
    initial_context,
    tokenize_classes,
)
from dive_fast.model.towers import Towers, create, tokenizer_of

PHRASE, WIDTH = "a photo of a", tiny.TEXT["width"]
NAMES = ("dog", "Siamese cat", "dog", "very " * 90 + "long", "great grey owl")
"""A name of one token, two equal ones, and one that exceeds the context."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelConfig:
    return ModelConfig(name=tiny.write_model(folder / "clip"))


@pytest.fixture(scope="module")
def towers(model: ModelConfig) -> Towers:
    return create(model).eval()


@pytest.fixture(scope="module")
def classes(model: ModelConfig) -> ClassTokens:
    return tokenize_classes(tokenizer_of(model), "argmax", NAMES, PHRASE)


def learned(towers: Towers, classes: ClassTokens, attention: NameAttention | None = None) -> LearnedPrompts:
    return LearnedPrompts(initial_context(towers, classes, False, 0), PHRASE, attention)


def moved(attention: NameAttention) -> NameAttention:
    """The attention with an output that is not zero."""
    torch.nn.init.xavier_uniform_(attention.output.weight, generator=torch.Generator().manual_seed(3))
    return attention


@torch.no_grad()
def encoded(towers: Towers, prompts: LearnedPrompts, classes: ClassTokens) -> Tensor:
    return encode_classes(towers, prompts, classes, range(len(classes.tokens)))


def test_attention_equals_worked_example() -> None:
    query, keys = torch.tensor([[1.0, 0.0]]), torch.eye(2)
    weights = attend(query, keys, keys, torch.tensor([True, True]))
    assert weights[0].tolist() == pytest.approx([0.669762, 0.330238], abs=1e-6)
    assert (query + weights)[0].tolist() == pytest.approx([1.669762, 0.330238], abs=1e-6)


@pytest.mark.parametrize("attends_to", ["name", "context_and_name"])
def test_contexts_with_attention_equal_float64(attends_to: AttendsTo) -> None:
    attention, heads, length = moved(NameAttention(6, 2, seed=1, attends_to=attends_to)), 2, 3
    generator = torch.Generator().manual_seed(0)
    context, names = torch.randn(2, 6, generator=generator), torch.randn(2, length, 6, generator=generator)
    lengths = (3, 1)
    contexts = attention(context, names, torch.arange(length) < torch.tensor(lengths)[:, None])
    v, e = context.double().numpy(), names.double().numpy()
    q, k, w, o = (layer.weight.detach().double().numpy().T for layer in attention.children())

    def norm(rows: np.ndarray) -> np.ndarray:
        centred = rows - rows.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)

    for number, count in enumerate(lengths):
        attended = norm(e[number, :count])
        if attends_to == "context_and_name":
            attended = np.concatenate([norm(v), attended])
        queries, keys, values = norm(v) @ q, attended @ k, attended @ w
        parts = []
        for head in range(heads):
            own = slice(3 * head, 3 * head + 3)
            scores = np.exp(queries[:, own] @ keys[:, own].T / math.sqrt(3))
            parts.append(scores / scores.sum(1, keepdims=True) @ values[:, own])
        expected = v + np.concatenate(parts, axis=1) @ o
        np.testing.assert_allclose(contexts[number].detach().numpy(), expected, atol=1e-5)


def test_phrase_at_the_start_is_the_hand_made_prompt(
    towers: Towers, classes: ClassTokens, model: ModelConfig
) -> None:
    tokens = tokenizer_of(model)([f"{PHRASE} {name}." for name in NAMES])
    with torch.no_grad():
        expected = towers.encode_text(tokens, 77)
    assert torch.equal(encoded(towers, learned(towers, classes), classes), expected)
    assert classes.name_lengths == (1, 2, 1, 77 - 6, 3)
    assert classes.lengths == (8, 9, 8, 77, 10)
    assert torch.equal(expected[0], expected[2])
    assert classes.texts[1] == "a photo of a Siamese cat."


def test_full_stop_that_joins_a_name_is_left_out() -> None:
    def tokenize(texts: list[str]) -> Tensor:
        rows, words = torch.zeros(len(texts), 9, dtype=torch.long), {"a": 2, "dog": 3, "cat": 4}
        for row, text in zip(rows, texts, strict=True):
            ids = [words.get(word, 1) for word in text.split()]
            row[: len(ids) + 1] = torch.tensor([*ids, 9])
        return rows

    classes = tokenize_classes(tokenize, "argmax", ["dog", "cat dog"], "a")
    assert classes.tokens[:, :4].tolist() == [[2, 3, 9, 0], [2, 4, 3, 9]]
    assert (classes.name_lengths, classes.lengths) == ((1, 2), (3, 4))
    assert classes.texts == ("a dog", "a cat dog")


def test_zero_output_has_the_bits_of_a_shared_context(towers: Towers, classes: ClassTokens) -> None:
    shared = encoded(towers, learned(towers, classes), classes)
    attention = NameAttention(WIDTH, 4)
    assert torch.equal(encoded(towers, learned(towers, classes, attention), classes), shared)
    assert not torch.allclose(encoded(towers, learned(towers, classes, moved(attention)), classes), shared)


def test_classes_are_independent_of_order_and_neighbours(
    towers: Towers, classes: ClassTokens, model: ModelConfig
) -> None:
    prompts = learned(towers, classes, moved(NameAttention(WIDTH, 4)))
    rows = encoded(towers, prompts, classes)
    order = [4, 0, 3, 1, 2]
    permuted = tokenize_classes(tokenizer_of(model), "argmax", [NAMES[row] for row in order], PHRASE)
    torch.testing.assert_close(encoded(towers, prompts, permuted), rows[order], rtol=0, atol=1e-5)
    with torch.no_grad():
        alone = encode_classes(towers, prompts, classes, range(1, 2))
    torch.testing.assert_close(alone, rows[1:2], rtol=0, atol=1e-5)


def test_random_context_is_equal_for_one_seed(towers: Towers, classes: ClassTokens) -> None:
    first, second, other = (initial_context(towers, classes, True, seed) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == (4, WIDTH)


def test_unusable_names_and_contexts_are_refused(model: ModelConfig, folder: Path) -> None:
    tokenizer = tokenizer_of(model)
    with pytest.raises(ConfigError, match="class 1 has the name ' '"):
        tokenize_classes(tokenizer, "argmax", ["dog", " "], PHRASE)
    with pytest.raises(ConfigError, match="leave no space for class names"):
        tokenize_classes(tokenizer, "argmax", ["dog"], "X " * 80)
    with pytest.raises(ConfigError, match="it has no tokens"):
        tokenize_classes(tokenizer, "argmax", ["dog"], "")
    with pytest.raises(ConfigError, match="width of 6 is not divisible"):
        NameAttention(6, 4)
    text = tiny.FEW_TOKENS["text_cfg"] | {"no_causal_mask": True}
    name = tiny.write_model(folder / "not causal", tiny.FEW_TOKENS | {"text_cfg": text})
    with pytest.raises(ConfigError, match="not a causal one of open_clip"):
        check_text_tower(create(ModelConfig(name=name)))


def test_file_restores_prompts_for_another_model(
    towers: Towers, classes: ClassTokens, model: ModelConfig, folder: Path
) -> None:
    prompts, path = learned(towers, classes, moved(NameAttention(WIDTH, 4))), folder / "prompts.safetensors"
    fit = prompt_file.fit_of(towers, tokenizer_of(model))
    prompts.origin = prompt_file.Origin(fit, "contcoop", "old", "digest", ("a photo of a {}.",), NAMES)
    prompt_file.save(prompts, path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[prompt_file.METADATA])
    assert about["class_independent"] is True
    assert (about["method"], about["fit"]["width"], about["templates"]) == (
        *("contcoop", WIDTH),
        ["a photo of a {}."],
    )
    assert path.stat().st_size < 4 * (4 * WIDTH**2 + 4 * WIDTH) + 3000
    loaded = prompt_file.load(path)
    assert loaded.origin == prompts.origin
    other = copy.deepcopy(towers)
    with torch.no_grad():
        other.text.token_embedding.weight.mul_(1.5)
    prompt_file.attach(loaded, path, other, tokenizer_of(model))
    unseen = tokenize_classes(tokenizer_of(model), "argmax", ["unseen thing"], loaded.phrase)
    for each in (towers, other):
        assert torch.equal(encoded(each, loaded, unseen), encoded(each, prompts, unseen))
    # The context follows the token embeddings of the new model; what was learned does not change.
    assert not torch.allclose(encoded(towers, loaded, unseen), encoded(other, loaded, unseen))


def test_options_of_the_attention_are_kept_and_part_of_the_identity(
    towers: Towers, classes: ClassTokens, model: ModelConfig, folder: Path
) -> None:
    tokenizer, path, other = tokenizer_of(model), folder / "options.safetensors", copy.deepcopy(towers)
    origin = prompt_file.Origin(prompt_file.fit_of(towers, tokenizer), "contcoop", "old", "digest", (), NAMES)
    identities = list[str]()
    for options in ({}, {"heads": 2}, {"residual": False}, {"attends_to": "context_and_name"}):
        attention = NameAttention(WIDTH, **({"heads": 4} | options))
        attention.load_state_dict(moved(NameAttention(WIDTH, 4)).state_dict())
        prompts = learned(towers, classes, attention)
        prompts.origin = origin
        prompt_file.save(prompts, path)
        loaded = prompt_file.load(path)
        assert torch.equal(encoded(towers, loaded, classes), encoded(towers, prompts, classes))
        prompt_file.attach(loaded, path, other, tokenizer)
        identities.append(features_identity(other, tokenizer, torch.device("cpu"))["model"]["prompts"])
    assert len(set(identities)) == 4
    content = path.read_bytes()
    for before, after, message in (
        (b"context_and_name", b"name_and_context", r"dive_fast .heads = 4, attends_to = name_and_context"),
        (b'heads\\": 4', b'heads\\": 0', r"dive_fast .heads = 0, attends_to = context_and_name"),
        (b'heads\\": 4', b'heads\\": "', r"not prompts of this|cannot be read as prompts"),
        (PHRASE.encode(), b"a photograph", r"phrase 'a photograph' stands for .2, 32.: the file was changed"),
    ):
        assert before in content
        path.write_bytes(content.replace(before, after))
        with pytest.raises(ConfigError, match=message):
            prompt_file.attach(prompt_file.load(path), path, other, tokenizer)


def test_file_is_refused_by_models_that_do_not_fit(
    towers: Towers, classes: ClassTokens, model: ModelConfig, folder: Path
) -> None:
    prompts, tokenizer = learned(towers, classes), tokenizer_of(model)
    fit = prompt_file.fit_of(towers, tokenizer)
    for key, value in (("width", 64), ("vocabulary", 5), ("context_length", 64), ("tokenizer", "other")):
        prompts.origin = prompt_file.Origin(fit._replace(**{key: value}), "coop", "old", "", (), ())
        with pytest.raises(ConfigError, match=f"learned with old, whose {prompt_file.NAMES[key]} is not that"):
            prompt_file.attach(prompts, Path("p"), towers, tokenizer)
    assert towers.prompts is None
    (folder / "text").write_text("x")
    with pytest.raises(ConfigError, match="cannot be read as prompts"):
        prompt_file.load(folder / "text")
    with pytest.raises(ConfigError, match="not prompts of this version"):
        prompt_file.load(folder / "clip" / "open_clip_model.safetensors")
