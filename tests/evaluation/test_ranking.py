"""Positions of right answers in both directions, compared with a sort by products in exact arithmetic."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import Tensor

from dive_fast.distributed import Ranks
from dive_fast.evaluation import ranking
from dive_fast.evaluation.ranking import Positions, rank
from dive_fast.model.towers import unit

ALONE = Ranks(0, 1, torch.device("cpu"))


def in_order(similarity: list[list[Fraction]], answers_of: list[set[int]]) -> list[int]:
    """The place of each query's first right answer among all answers, sorted one by one."""
    places = []
    for values, right in zip(similarity, answers_of, strict=True):
        order = sorted(range(len(values)), key=lambda answer: (-values[answer], answer))
        places.append(next(place for place, answer in enumerate(order) if answer in right))
    return places


def naive(images: Tensor, texts: Tensor, text_of: Tensor, matches: tuple[Tensor, Tensor]) -> Positions:
    exact = [[[Fraction(value) for value in row] for row in rows.tolist()] for rows in (images, texts[text_of])]
    similarity = [
        [sum((a * b for a, b in zip(x, y, strict=True)), Fraction()) for y in exact[1]] for x in exact[0]
    ]
    captions_of: list[set[int]] = [set() for _ in images]
    images_of: list[set[int]] = [set() for _ in text_of]
    for image, caption in zip(*(side.tolist() for side in matches), strict=True):
        captions_of[image].add(caption)
        images_of[caption].add(image)
    turned = [list(column) for column in zip(*similarity, strict=True)]
    return Positions(torch.tensor(in_order(similarity, captions_of)), torch.tensor(in_order(turned, images_of)))


Case = tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]


def case(kind: str, num_images: int, num_captions: int, width: int, seed: int = 0) -> Case:
    """Embeddings and right pairs; each image has a caption, and each caption an image."""
    generator = torch.Generator().manual_seed(seed)
    images, texts = (torch.randn(count, width, generator=generator) for count in (num_images, num_captions))
    text_of = torch.arange(num_captions)
    if kind == "equal rows":
        images, text_of = images[torch.arange(num_images) // 3], text_of // 2
        texts = texts[: int(text_of.max()) + 1]
        texts[-1] = texts[0]
    if kind == "texts of no caption":
        texts, text_of = texts.repeat_interleave(2, 0) + torch.arange(2 * num_captions)[:, None] % 2, 2 * text_of
    if kind == "near ties":  # closer than fp32 can tell, in all pairs
        images, texts = (
            1 + 1e-7 * torch.randint(0, 3, rows.shape, generator=generator) for rows in (images, texts)
        )
    if kind == "all equal":
        images, texts = torch.ones_like(images), torch.ones_like(texts)
    images, texts = unit(images), unit(texts)
    if kind == "zeros":
        images, texts = torch.zeros_like(images), torch.zeros_like(texts)
    if kind == "few values":  # exact ties of rows that differ
        images, texts = (rows.sign() / 2 for rows in (images, texts))
    image_of = torch.arange(num_captions) * num_images // num_captions
    return images, texts, text_of, (image_of, torch.arange(num_captions))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "TILE", (4, 8))
    monkeypatch.setattr(ranking, "FP64_AT_ONCE", 20)


KINDS = ("random", "equal rows", "near ties", "all equal", "few values", "zeros", "texts of no caption")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_images", "num_captions", "width"), [(1, 1, 3), (9, 23, 5), (8, 16, 8), (13, 13, 4)])
def test_positions_equal_a_sort_of_exact_products(
    kind: str, num_images: int, num_captions: int, width: int
) -> None:
    for seed in range(3):
        inputs = case(kind, num_images, num_captions, width, seed)
        positions, expected = rank(*inputs, ALONE), naive(*inputs)
        for each, wanted in zip(positions, expected, strict=True):
            assert each.tolist() == wanted.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_change_no_position(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case(kind, 20, 46, 33)
    expected = rank(*inputs, ALONE)
    for tile in ((1, 1), (7, 16), (20, 5)):
        monkeypatch.setattr(ranking, "TILE", tile)
        for each, wanted in zip(rank(*inputs, ALONE), expected, strict=True):
            assert each.tolist() == wanted.tolist()


@pytest.mark.parametrize("shape", [(600, 8 * 300), (3, 16), (5, 7)])
@pytest.mark.parametrize("axis", [0, 1])
def test_sums_of_masks_do_not_overflow(shape: tuple[int, int], axis: int) -> None:
    weights = torch.ones(shape[axis])
    for mask in (torch.ones(shape, dtype=torch.bool), torch.rand(shape) < 0.3):
        assert ranking._sum(mask, axis, weights).tolist() == mask.sum(axis).tolist()
    weights[1] = 4
    expected = mask.sum(axis) + 3 * mask.select(axis, 1)
    assert ranking._sum(mask, axis, weights).tolist() == expected.tolist()


def test_several_right_images_of_a_caption() -> None:
    images, texts, _, _ = case("random", 12, 4, 6)
    captions = torch.arange(12) % 4
    inputs = images, texts, torch.arange(4), (torch.arange(12), captions)
    for each, wanted in zip(rank(*inputs, ALONE), naive(*inputs), strict=True):
        assert each.tolist() == wanted.tolist()


def test_similarities_do_not_depend_on_other_pairs() -> None:
    left, right = (torch.randn(50, 37, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    rows = torch.arange(50)
    together = ranking._similarities(left, right, rows, rows)
    exact = [
        sum(Fraction(a) * Fraction(b) for a, b in zip(*pair, strict=True))
        for pair in zip(left.tolist(), right.tolist(), strict=True)
    ]
    assert together.tolist() == pytest.approx([float(value) for value in exact], abs=1e-13)
    for first, last in pairwise((0, 1, 8, 50)):
        part = ranking._similarities(left, right, rows[first:last], rows[first:last])
        assert part.tolist() == together[first:last].tolist()


def _compare_with_one_rank() -> None:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    for kind in KINDS:
        inputs = case(kind, 19, 31, 12)
        for each, wanted in zip(rank(*inputs, ranks), rank(*inputs, ALONE), strict=True):
            assert each.tolist() == wanted.tolist()


def test_ranks_change_no_position() -> None:
    run_ranks(2, _compare_with_one_rank)
