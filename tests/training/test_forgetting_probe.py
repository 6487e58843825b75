"""The forgetting probe: which pairs are held out, and recalls among pairs with equal captions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from dive_fast.data.sources.sample_table import Sample
from dive_fast.data.sources.source import Source
from dive_fast.distributed import Ranks
from dive_fast.evaluation.retrieval import paired_recalls
from dive_fast.model.features import Pairs
from dive_fast.training.forgetting_probe import MIN_PAIRS, caption_numbers, hold_out, hold_out_images

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("requested", "count", "batch_size", "number"),
    [
        (500, 100_000, 512, 500),
        (500, 4800, 128, 480),  # a tenth
        (500, 499, 8, 0),
        (500, 500, 8, MIN_PAIRS),
        (60, 600, 545, 55),  # the batch stays possible
        (60, 600, 551, 0),
        (60, 600, 700, 0),  # the batch is reported where it is used
        (49, 5000, 8, 0),
        (0, 5000, 8, 0),
        (500, 0, 0, 0),
    ],
)
def test_hold_out_spreads_pairs_evenly(requested: int, count: int, batch_size: int, number: int) -> None:
    held_out = hold_out(requested, count, batch_size)
    assert len(held_out.samples) == number
    assert bool(held_out.remark) == (number == 0 and requested > 0)
    assert list(held_out.samples) == sorted(set(held_out.samples))
    gaps = {after - before for before, after in zip(held_out.samples, held_out.samples[1:])}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert set(held_out.samples) <= set(range(count))


def by_loop(pairs: Pairs, captions: list[str]) -> dict[str, float]:
    """Recalls by a loop over all pairs: an answer is right if its caption is that of the query."""
    similarity, count = pairs.image @ pairs.text.T, len(captions)
    hits = {"image_to_text_r1": 0, "text_to_image_r1": 0}
    for query in range(count):
        hits["image_to_text_r1"] += captions[int(similarity[query].argmax())] == captions[query]
        hits["text_to_image_r1"] += captions[int(similarity[:, query].argmax())] == captions[query]
    return {name: number / count for name, number in hits.items()}


def random_pairs(captions: list[str]) -> Pairs:
    """Images near their captions; equal captions have equal embeddings."""
    row_of = {caption: F.normalize(torch.randn(6), dim=0) for caption in captions}
    texts = torch.stack([row_of[caption] for caption in captions])
    return Pairs(F.normalize(texts + 0.5 * torch.randn(len(captions), 6)), texts)


def test_paired_recalls_equal_a_loop_with_equal_captions() -> None:
    captions = [f"caption {index % 17}" for index in range(40)]
    pairs = random_pairs(captions)
    numbers = torch.tensor([index % 17 for index in range(40)])
    expected = by_loop(pairs, captions)
    assert paired_recalls(pairs, numbers, ALONE) == pytest.approx(expected)
    assert 0.1 < expected["image_to_text_r1"] < 1
    assert paired_recalls(pairs, torch.arange(40), ALONE) != expected


def test_paired_recalls_count_ties_as_wrong_unless_captions_are_equal() -> None:
    collapsed = Pairs(torch.ones(8, 1), torch.ones(8, 1))
    for captions, share in ((torch.arange(8), 1 / 8), (torch.tensor([0, 0, 1, 2, 3, 4, 5, 6]), 2 / 8)):
        assert set(paired_recalls(collapsed, captions, ALONE).values()) == {share}
    assert set(paired_recalls(collapsed, torch.zeros(8, dtype=torch.int64), ALONE).values()) == {1.0}


def test_caption_numbers_compare_tokens() -> None:
    def tokenizer(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[tiny.VOCABULARY[word] for word in text.split()[:2]] for text in texts])

    captions = ["a cat", "the dog", "a cat", "the dog of a", "a photo"]
    assert caption_numbers(captions, tokenizer).tolist() == [0, 1, 0, 1, 2]


def test_no_pair_of_a_held_out_image_is_trained_on() -> None:
    """Each image has two rows, as in tables of captions."""
    files = [Path(f"{row // 2}.jpg") for row in range(1200)]
    table = Source.of([Sample(f"{row}", file, texts=(f"caption {row}",)) for row, file in enumerate(files)])
    held_out = hold_out_images(60, table, 8)
    images = {files[row] for row in held_out.samples}
    assert len(held_out.samples) == 60
    assert list(held_out.untrained) == [row for row, file in enumerate(files) if file in images]
    hashes = np.array([[row // 2 % 256, row // 512, *[7] * 14] for row in range(1200)], np.uint8)
    assert hold_out_images(60, replace(table, hashes=hashes), 8) == held_out
    single = Source.of([Sample(f"{row}", files[0]) for row in range(600)])
    assert hold_out_images(60, single, 8).remark.startswith("no forgetting probe: 600 of the 600 pairs have its")
