"""Measures of geometry, compared with brute force in SciPy and NumPy; invariances, extremes and errors."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import pdist
from scipy.stats import pearsonr
from torch import Tensor

from dive_fast.evaluation.geometry import measures
from dive_fast.evaluation.geometry.measures import (
    GeometryError,
    alignment,
    cka,
    compare,
    describe,
    difference_statistics,
    differences,
    modality_gap,
    rsa,
    uniformity,
)
from dive_fast.kernels import naive
from dive_fast.model.features import Pairs
from dive_fast.model.towers import unit

Array = NDArray[np.float64]


def rows(count: int, width: int, seed: int) -> Tensor:
    return unit(torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def pairs(count: int, seed: int, width: int = 8) -> Pairs:
    """Images in one cone and captions in another, like CLIP's embeddings."""
    cones = rows(2, width, 99)
    return Pairs(*(unit(cones[i] + 0.7 * rows(count, width, 2 * seed + i)) for i in range(2)))


def moved(before: Pairs, by: float, seed: int) -> Pairs:
    return Pairs(*(unit(half + by * rows(len(half), half.shape[1], seed + i)) for i, half in enumerate(before)))


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(rows(width, width, 3)).Q


def expected_rsa(before: Tensor, after: Tensor) -> float:
    distances = [pdist(embeddings.double().numpy(), "cosine") for embeddings in (before, after)]
    return float(pearsonr(*distances).statistic)


def expected_cka(before: Tensor, after: Tensor) -> float:
    """CKA by Gram matrices, as it is defined."""
    count = len(before)
    centre = np.eye(count) - 1 / count
    a, b = (centre @ (half.double().numpy() @ half.double().numpy().T) @ centre for half in (before, after))
    return float(np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)))


# RSA


@pytest.mark.parametrize("count", [3, 4, 50])
def test_rsa_equals_correlation_of_all_distances(count: int) -> None:
    before = rows(count, 8, 0)
    for after in (rows(count, 8, 1), unit(before + 0.3 * rows(count, 8, 2)), unit(before - 2 * before.mean(0))):
        assert rsa(before, after) == pytest.approx(expected_rsa(before, after), abs=1e-12)


def test_rsa_is_precise_in_a_narrow_cone() -> None:
    # Like CLIP's: a narrow cone, in which distances are small compared with similarities.
    cone = rows(1, 32, 0)
    before = unit(cone + 1e-2 * rows(60, 32, 1))
    after = unit(before + 1e-3 * rows(60, 32, 2))
    assert rsa(before, after) == pytest.approx(expected_rsa(before, after), abs=1e-9)
    # Embeddings may be fp32; sums are accumulated in fp64.
    rounded = before.float(), after.float()
    assert rsa(*rounded) == pytest.approx(rsa(*(rows.double() for rows in rounded)), abs=1e-13)


def test_rsa_is_one_for_unchanged_geometry() -> None:
    before = rows(40, 8, 0)
    for after in (before, before @ rotation(8), -before, torch.cat([before, torch.zeros(40, 3)], 1)):
        assert rsa(before, after) == pytest.approx(1, abs=1e-12)
    # A permutation of the samples destroys the correlation.
    assert abs(rsa(before, before[torch.randperm(40, generator=torch.Generator().manual_seed(0))])) < 0.3


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
def test_rsa_from_sums_over_rows_equals_all_distances(spread: float) -> None:
    cone = rows(1, 8, 0)
    before = unit(cone + spread * rows(120, 8, 1))
    after = unit(before + 0.3 * spread * rows(120, 8, 2))
    wide = unit(torch.cat([after, spread * rows(120, 5, 3)], 1))
    # Distances of the oracle have errors of 1e-16: 1e-8 of those in the narrowest cone.
    tolerance = 1e-15 / spread**2 + 1e-12
    for other in (after, wide, unit(before - 1e-3 * spread * before.flip(0))):
        assert rsa(before, other, block=50) == pytest.approx(expected_rsa(before, other), abs=tolerance)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_rsa_from_sums_equals_rsa_pair_by_pair(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    before = unit(rows(1, 8, 0) + spread * rows(60, 8, 1))
    # Rows of unequal lengths from their mean: one is far away.
    before[7] = -before[7]
    after = unit(before + 0.3 * spread * rows(60, 8, 2))
    quick = rsa(before, after)
    monkeypatch.setattr(measures, "WELL_CONDITIONED", math.inf)
    assert quick == pytest.approx(rsa(before, after, block=17), abs=1e-12)


def test_rsa_of_pooled_parts_equals_rsa_of_all_rows() -> None:
    before = pairs(60, 0)
    after = moved(before, 0.3, 9)
    metrics = compare(before, after)
    assert metrics["rsa"] == pytest.approx(rsa(torch.cat(before), torch.cat(after)), abs=1e-13)
    assert metrics["cka"] == pytest.approx(cka(torch.cat(before), torch.cat(after)), abs=1e-13)


# CKA


@pytest.mark.parametrize("count", [3, 8, 50])
def test_cka_equals_centred_gram_matrices(count: int) -> None:
    before = rows(count, 8, 0)
    for after in (rows(count, 8, 1), unit(before + 0.3 * rows(count, 8, 2)), rows(count, 5, 4)):
        assert cka(before, after) == pytest.approx(expected_cka(before, after), abs=1e-12)


def test_cka_ignores_rotation_scale_and_shift() -> None:
    before = rows(40, 8, 0)
    for after in (before, before @ rotation(8), before + rows(1, 8, 5), 3 * before - 0.5):
        assert cka(before, after) == pytest.approx(1, abs=1e-12)
    assert cka(before, rows(40, 8, 1)) < 0.6


# Both


@pytest.mark.parametrize("measure", [rsa, cka])
def test_rsa_and_cka_of_different_widths(measure: object) -> None:
    before, after = rows(20, 8, 0), rows(20, 5, 1)
    expected = {rsa: expected_rsa, cka: expected_cka}[measure](before, after)  # type: ignore[index]
    assert measure(before, after) == pytest.approx(expected, abs=1e-12)  # type: ignore[operator]


@pytest.mark.parametrize("block", [1, 2, 7, 49, 50, 51])
def test_measures_do_not_depend_on_block_size(block: int) -> None:
    before, after = rows(50, 8, 0), rows(50, 8, 1)
    assert rsa(before, after, block) == pytest.approx(rsa(before, after), abs=1e-13)
    assert cka(before, after, block) == pytest.approx(cka(before, after), abs=1e-13)
    assert uniformity(before, block) == pytest.approx(uniformity(before), abs=1e-13)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (0, 0), (5, 4), (3, 5)])
def test_measures_of_too_few_or_unequal_rows_raise(before: int, after: int) -> None:
    for measure in (rsa, cka):
        name = measure.__name__
        message = rf"^{name}: expected the same number of rows, at least 3, got {before} and {after}$"
        with pytest.raises(ValueError, match=message):
            measure(torch.ones(before, 4), torch.ones(after, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measures_without_geometry_raise(dtype: torch.dtype) -> None:
    some = rows(40, 8, 0).to(dtype)
    equal = rows(1, 8, 1).to(dtype).expand(40, 8)
    # Collapsed embeddings: one direction, with rounding.
    nearly_equal = unit(equal.float() * torch.linspace(1, 3, 40)[:, None]).to(dtype)
    for collapsed in (equal, nearly_equal):
        for measure, reason in ((rsa, "equally far from one another"), (cka, "coincide")):
            with pytest.raises(GeometryError, match=rf"before fine-tuning all embeddings .*{reason}"):
                measure(collapsed, some)
            with pytest.raises(GeometryError, match=rf"after fine-tuning all embeddings .*{reason}"):
                measure(some, collapsed)
    # Orthogonal rows do not coincide, but all distances are equal.
    with pytest.raises(GeometryError, match=r"rsa: after .* equally far"):
        rsa(some[:8], torch.eye(8, dtype=dtype))
    assert 0 < cka(some[:8], torch.eye(8, dtype=dtype)) < 1


def test_measures_of_rows_not_finite_raise() -> None:
    some, broken = rows(5, 4, 0), rows(5, 4, 1)
    broken[3, 2] = math.nan
    for measure in (rsa, cka):
        with pytest.raises(
            GeometryError, match=f"{measure.__name__}: after fine-tuning not all embeddings are finite"
        ):
            measure(some, broken)
    with pytest.raises(GeometryError, match="rsa_text: before fine-tuning not all"):
        compare(Pairs(some, broken), Pairs(some, some))


# One model


def test_describe_equals_definitions() -> None:
    model = pairs(30, 0)
    image, text = (half.numpy() for half in model)
    metrics = describe(model)
    assert metrics["alignment"] == pytest.approx(np.mean(np.sum((image - text) ** 2, 1)), abs=1e-12)
    for name, half in (("uniformity_image", image), ("uniformity_text", text)):
        assert metrics[name] == pytest.approx(np.log(np.mean(np.exp(-2 * pdist(half) ** 2))), abs=1e-12)
    assert metrics["modality_gap"] == pytest.approx(np.linalg.norm(image.mean(0) - text.mean(0)), abs=1e-12)
    assert metrics.keys() == {"alignment", "uniformity_image", "uniformity_text", "modality_gap"}


@pytest.mark.parametrize("spread", [1.0, 1e-1, 1e-3])
def test_uniformity_in_fp32_is_precise(spread: float) -> None:
    """Random errors of the products cancel in the sum, also where rows are close together."""
    cone = unit(rows(1, 256, 0) + spread * rows(700, 256, 1)).float()
    directions = unit(cone.double()).numpy()
    expected = np.log1p(np.mean(np.expm1(-2 * pdist(directions) ** 2)))
    assert uniformity(cone, block=300) == pytest.approx(expected, abs=1e-6 * min(1, 10 * spread**2))


def test_alignment_uniformity_and_gap_at_extremes() -> None:
    sphere, equal = rows(2000, 64, 0), rows(1, 64, 1).expand(10, 64)
    assert alignment(Pairs(sphere, sphere)) == modality_gap(Pairs(sphere, sphere)) == 0
    assert alignment(Pairs(sphere, -sphere)) == pytest.approx(4)
    assert modality_gap(Pairs(equal, -equal)) == pytest.approx(2)
    assert uniformity(equal) == pytest.approx(0, abs=1e-12)
    # Random rows in many dimensions are about sqrt(2) apart: log exp(-2 * 2).
    assert uniformity(sphere) == pytest.approx(-4, abs=0.2)


# Difference vectors


def test_difference_statistics_equal_definitions() -> None:
    before = pairs(25, 0)
    after = moved(before, 0.4, 30)
    u, v = (new.numpy() - old.numpy() for new, old in zip(after, before, strict=True))
    m = (u.mean(0) + v.mean(0)) / 2
    lengths = {"image": np.linalg.norm(u, axis=1), "text": np.linalg.norm(v, axis=1)}
    expected: dict[str, float] = {}
    for name, half in (("image", u), ("text", v)):
        expected[f"{name}_norm"] = lengths[name].mean()
        expected[f"{name}_norm_std"] = lengths[name].std()
        for share in (5, 50, 95):
            expected[f"{name}_norm_q{share:02d}"] = np.percentile(lengths[name], share)
        expected[f"{name}_cosine_to_average"] = np.mean(half @ m / lengths[name] / np.linalg.norm(m))
    expected["average_norm"] = float(np.linalg.norm(m))
    expected["average_loss"] = np.mean(np.sum((u - m) ** 2 + (v - m) ** 2, 1))
    expected["pairwise_loss"] = np.mean(np.sum((u - v) ** 2, 1))
    expected["pair_cosine"] = np.mean(np.sum(u * v, 1) / lengths["image"] / lengths["text"])
    total = np.mean(lengths["image"] ** 2 + lengths["text"] ** 2)
    expected["equality"] = 1 - expected["average_loss"] / total
    metrics = difference_statistics(differences(before, after))
    assert metrics == pytest.approx(expected, abs=1e-12)
    assert 0 < metrics["equality"] < 1


def test_avl_and_pvl_equal_the_loss() -> None:
    before = pairs(25, 0)
    after = moved(before, 0.4, 30)
    # With decay 0 the loss's m is the mean of these pairs only.
    loss = naive.difference_loss(*after, *before, torch.zeros(8, dtype=torch.float64), decay=0.0)
    metrics = difference_statistics(differences(before, after))
    for name in ("average_loss", "pairwise_loss", "image_norm", "text_norm"):
        assert metrics[name] == pytest.approx(float(getattr(loss, name)), rel=1e-12)
    assert metrics["average_norm"] == pytest.approx(float(loss.average_vector.norm()), rel=1e-12)


def test_equality_of_equal_and_opposite_vectors() -> None:
    before = pairs(25, 0)
    shift = 0.1 * rows(1, 8, 4)
    parallel = difference_statistics(differences(before, Pairs(before.image + shift, before.text + shift)))
    for name in ("equality", "image_cosine_to_average", "text_cosine_to_average", "pair_cosine"):
        assert parallel[name] == pytest.approx(1, abs=1e-9)
    assert parallel["average_norm"] == pytest.approx(0.1)
    assert parallel["average_loss"] == pytest.approx(0, abs=1e-15)
    opposite = difference_statistics(differences(before, Pairs(before.image + shift, before.text - shift)))
    assert opposite["equality"] == pytest.approx(0, abs=1e-9)
    assert opposite["pair_cosine"] == pytest.approx(-1)


def test_compare_of_unmoved_tower_is_finite() -> None:
    before = pairs(25, 0)
    shift = 0.1 * rows(1, 8, 4)
    half = compare(before, Pairs(before.image + shift, before.text))
    assert half["text_norm"] == half["text_cosine_to_average"] == half["pair_cosine"] == 0
    # u = 2 m and v = 0: m explains half of their squared length.
    assert half["equality"] == pytest.approx(0.5)
    unmoved = compare(before, before)
    assert unmoved["equality"] == 1
    assert unmoved["image_cosine_to_average"] == unmoved["average_norm"] == unmoved["average_loss"] == 0
    assert all(math.isfinite(value) for value in unmoved.values())


def test_differences_of_other_widths_raise() -> None:
    with pytest.raises(GeometryError, match=r"embeddings of one shape, got \(5, 8\) before and \(5, 4\) after"):
        differences(pairs(5, 0), pairs(5, 0, width=4))


# All


def test_compare_covers_halves_and_pooled_embeddings() -> None:
    before = pairs(30, 0)
    after = moved(before, 0.5, 20)
    metrics = compare(Pairs(*(half.float() for half in before)), Pairs(*(half.float() for half in after)), block=7)
    for measure, expected in (("rsa", expected_rsa), ("cka", expected_cka)):
        assert metrics[f"{measure}_image"] == pytest.approx(expected(before.image, after.image), abs=1e-6)
        assert metrics[f"{measure}_text"] == pytest.approx(expected(before.text, after.text), abs=1e-6)
        assert metrics[measure] == pytest.approx(expected(torch.cat(before), torch.cat(after)), abs=1e-6)
    assert {name: metrics[name] for name in describe(after)} == pytest.approx(describe(after), abs=1e-6)
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    # A rotation of both towers changes only the difference vectors.
    rotated = compare(before, Pairs(*(half @ rotation(8) for half in before)))
    assert [rotated[name] for name in ("rsa", "rsa_image", "cka", "cka_text")] == pytest.approx([1] * 4, abs=1e-12)
    assert rotated["alignment"] == pytest.approx(describe(before)["alignment"])
    assert rotated["image_norm"] > 0.1


def test_compare_needs_as_many_captions_as_images() -> None:
    five = pairs(5, 0)
    with pytest.raises(
        GeometryError, match=r"^images and captions: expected the same number of rows, .* 5 and 4$"
    ):
        compare(five, Pairs(five.image, five.text[:4]))
    with pytest.raises(GeometryError, match="at least 3, got 2 and 2"):
        compare(*(Pairs(*(half[:2] for half in five)),) * 2)


MEMORY = """
import resource, sys, torch
from dive_fast.evaluation.geometry.measures import compare
from dive_fast.model.features import Pairs
from dive_fast.model.towers import unit
torch.set_num_threads(2)
count = int(sys.argv[1])
before = Pairs(*(unit(torch.randn(count, 512)) for _ in range(2)))
after = Pairs(*(unit(half + 0.01 * torch.randn(count, 512)) for half in before))
memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
metrics = compare(before, after)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before, metrics["rsa"])
"""


@pytest.mark.slow
def test_compare_memory_grows_with_neither_rows_nor_pairs() -> None:
    """Pooled similarities of 6,000 pairs would take 1.2 GB in fp64 for each model."""
    used = {}
    for count in (2000, 6000):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(count)], capture_output=True, text=True, check=True
        )
        used[count] = int(done.stdout.split()[0]) / 1024
    assert used[6000] < min(200, used[2000] + 25), used
