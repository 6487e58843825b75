"""Crops against torchvision's RandomResizedCrop, and views against open_clip's transforms."""

import itertools
import math
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import tiny
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from dive_fast.data.views import ASPECT_RATIO, TRAIN_SCALE, Crop, Draw, Preprocess, random_crop, stream

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
ODD_SIZES = [(1, 500), (500, 1), (31, 33), (5000, 40), (40, 5000), (1, 1), (2, 3), (375, 500)]
MODES = ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK", "I;16"]


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(height * 10007 + width)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 400, (height, width), dtype=np.uint16))
    if mode == "RGBA":
        return Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def preprocess(size: tuple[int, int], **options: Any) -> Preprocess:
    return Preprocess(size, MEAN, STD, **{"interpolation": "bicubic", "resize_mode": "shortest"} | options)


# Random crops


def test_a_crop_is_a_pure_function_of_seed_sample_and_view() -> None:
    places = list(itertools.product([0, 1, 2**63], [0, 1, 10**7], [0, 1, 99]))
    crops = {place: random_crop((300, 400), *place) for place in places}
    # In another order, between other random numbers.
    for place in random.Random(0).sample(places, len(places)):
        np.random.default_rng().random(3)
        torch.rand(3)
        random_crop((7, 9), 5, 5, 5)
        assert random_crop((300, 400), *place) == crops[place]


def test_crops_differ_between_seeds_samples_and_views() -> None:
    # So large an image that two crops are never alike by chance, and crops so small that they always fit.
    places = itertools.product(range(5), range(20), range(5))
    assert len({random_crop((4000, 6000), *place, scale=(0.1, 0.5)) for place in places}) == 500


def test_each_purpose_has_random_numbers_of_its_own() -> None:
    draws = {float(stream(0, purpose, 3, 4).random()) for purpose in Draw}
    assert len(draws) == len(Draw)
    # Neither first and second nor seed and purpose may stand for one another.
    assert stream(0, Draw.CROP, 3, 4).random() != stream(0, Draw.CROP, 4, 3).random()
    assert stream(0, Draw.PROMPT, 3).random() != stream(1, Draw.CROP, 3).random()


def test_the_crops_of_a_seed_stay_what_they_are() -> None:
    # A teacher's cache holds embeddings of such crops: other ones would no longer be its images.
    assert random_crop((300, 400), 0, 0, 0) == Crop(3, 7, 293, 386)
    assert random_crop((300, 400), 0, 1, 2, (0.1, 0.5)) == Crop(87, 84, 146, 179)
    assert random_crop((480, 360), 2**62, 3_000_000, 99) == Crop(2, 3, 469, 352)


@pytest.mark.parametrize("scale", [TRAIN_SCALE, (0.08, 1.0)])
@pytest.mark.parametrize("size", ODD_SIZES)
def test_crops_lie_within_images_of_odd_sizes(size: tuple[int, int], scale: tuple[float, float]) -> None:
    for sample in range(200):
        crop = random_crop(size, 0, sample, 0, scale)
        assert crop.height >= 1
        assert crop.width >= 1
        assert 0 <= crop.top <= size[0] - crop.height
        assert 0 <= crop.left <= size[1] - crop.width


def torchvision_crops(
    size: tuple[int, int], scale: tuple[float, float], count: int
) -> Iterator[tuple[int, int, int, int]]:
    image = torch.empty(1).expand(3, *size)  # its size is all that matters
    for _ in range(count):
        yield RandomResizedCrop.get_params(image, list(scale), list(ASPECT_RATIO))


def kolmogorov_smirnov(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    """The largest difference of two samples' distribution functions, over its critical value at 0.1 %."""
    points = np.concatenate([first, second])
    shares = [np.searchsorted(np.sort(own), points, side="right") / len(own) for own in (first, second)]
    critical = math.sqrt(-math.log(0.001 / 2) / 2) * math.sqrt(1 / len(first) + 1 / len(second))
    return float(np.abs(shares[0] - shares[1]).max() / critical)


@pytest.mark.parametrize("scale", [TRAIN_SCALE, (0.08, 1.0)])
@pytest.mark.parametrize("size", [(300, 400), (500, 333), (240, 240)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int], scale: tuple[float, float]) -> None:
    count = 3000
    torch.manual_seed(1)
    own = [random_crop(size, 1, sample, 0, scale) for sample in range(count)]
    ours = np.array([(crop.top, crop.left, crop.height, crop.width) for crop in own], dtype=float)
    theirs = np.array(list(torchvision_crops(size, scale, count)), dtype=float)
    for name, of in {
        "area": lambda crops: crops[:, 2] * crops[:, 3],
        "log aspect": lambda crops: np.log(crops[:, 3] / crops[:, 2]),
        # Where there is no room to move, 0.
        "top": lambda crops: crops[:, 0] / np.maximum(size[0] - crops[:, 2], 1),
        "left": lambda crops: crops[:, 1] / np.maximum(size[1] - crops[:, 3], 1),
    }.items():
        assert kolmogorov_smirnov(of(ours), of(theirs)) < 1, name
    assert (ours.min(0) >= 0).all()


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (5000, 40), (40, 5000), (1, 1)])
def test_where_no_crop_fits_the_central_one_is_torchvisions(size: tuple[int, int]) -> None:
    expected = Crop(*next(torchvision_crops(size, TRAIN_SCALE, 1)))
    assert {random_crop(size, 0, sample, 0) for sample in range(20)} == {expected}


# Views


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_train_view_is_torchvisions_resized_crop_and_then_rgb(mode: str, interpolation: str) -> None:
    image = picture(61, 83, mode)
    for size, sample in itertools.product([(224, 224), (32, 32), (40, 24)], range(3)):
        crop = random_crop((61, 83), 0, sample, 0, (0.2, 1.0))
        expected = TF.resized_crop(
            image,
            crop.top,
            crop.left,
            crop.height,
            crop.width,
            list(size),
            InterpolationMode(interpolation),
            antialias=True,
        )
        expected = TF.normalize(TF.to_tensor(expected.convert("RGB")), MEAN, STD)
        found = tiny.shown(preprocess(size, interpolation=interpolation), image, crop)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_the_train_view_is_open_clips_when_both_take_the_same_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(61, 83)
    crop = random_crop((61, 83), 0, 0, 0)
    same = staticmethod(lambda *_: (crop.top, crop.left, crop.height, crop.width))
    monkeypatch.setattr(RandomResizedCrop, "get_params", same)
    expected = open_clip.image_transform(48, is_train=True, mean=MEAN, std=STD)(image)
    assert torch.equal(tiny.shown(preprocess((48, 48)), image, crop), expected)


@pytest.mark.parametrize("size", [224, 336, 384])
@pytest.mark.parametrize("shape", [(61, 83), (500, 375), (375, 500), (400, 399), (17, 90), (3, 50)])
def test_the_eval_view_is_open_clips_for_odd_images(size: int, shape: tuple[int, int]) -> None:
    image = picture(*shape)
    expected = open_clip.image_transform(size, is_train=False, mean=MEAN, std=STD)(image)
    assert expected.shape == (3, size, size)
    assert torch.equal(tiny.shown(preprocess((size, size)), image), expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_eval_view_is_open_clips_for_every_kind_of_pixel(mode: str) -> None:
    image = picture(61, 83, mode)
    expected = open_clip.image_transform(48, is_train=False, mean=MEAN, std=STD)(image)
    assert torch.equal(tiny.shown(preprocess((48, 48)), image), expected)


@pytest.mark.parametrize("size", [(48, 48), (48, 36), (30, 60)])
@pytest.mark.parametrize(
    "options",
    [
        {"interpolation": "bilinear"},
        {"resize_mode": "squash"},
        {"interpolation": "bilinear", "resize_mode": "squash"},
        {"resize_mode": "longest"},
        {"resize_mode": "longest", "fill_color": 200},
    ],
)
def test_the_eval_view_follows_the_models_preprocess_config(
    size: tuple[int, int], options: dict[str, Any]
) -> None:
    image = picture(61, 83)
    visual = SimpleNamespace(preprocess_cfg={"size": size, "mean": MEAN, "std": STD} | options)
    expected = open_clip.image_transform(size, is_train=False, mean=MEAN, std=STD, **options)(image)
    found = tiny.shown(Preprocess.of(visual), image)
    assert torch.equal(found, expected)


def test_a_size_may_be_one_number_or_two() -> None:
    config = {"mean": list(MEAN), "std": list(STD), "interpolation": "bicubic", "resize_mode": "shortest"}
    for size, expected in [(48, (48, 48)), ([48, 36], (48, 36)), ((48, 36), (48, 36))]:
        assert Preprocess.of(SimpleNamespace(preprocess_cfg=config | {"size": size})) == preprocess(expected)
