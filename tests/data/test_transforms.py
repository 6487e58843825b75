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

from dive_fast.data.loaders.pil_resize import resize
from dive_fast.data.random_streams import Draw, stream
from dive_fast.data.transforms import ASPECT_RATIO, TRAIN_SCALE, Crop, Preprocess, normalise, random_crop

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


# Views of loaders that decode by themselves


def smooth(height: int, width: int) -> Image.Image:
    """No noise: since PIL 13 the order of its passes depends on the size, and so do the 8 bits in between."""
    return picture(5, 6).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(48, 48), (48, 64)])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_the_region_of_a_crop_resized_is_what_open_clip_shows(size: tuple[int, int], resize_mode: str) -> None:
    """PIL's ``box`` is such a region."""
    wanted = preprocess(size, resize_mode=resize_mode)
    rng = np.random.default_rng(0)
    sizes = [(1, 500), (500, 1), (31, 33), (2, 3), (48, 48), *map(tuple, rng.integers(20, 300, (40, 2)).tolist())]
    for height, width in sizes:
        image = smooth(height, width)
        for crop in (None, random_crop((height, width), 0, height, width)):
            view = wanted.eval_view((height, width)) if crop is None else wanted.train_view(crop)
            part = image.crop(
                (view.crop.left, view.crop.top, view.crop.left + view.crop.width, view.crop.top + view.crop.height)
            )
            top, left, bottom, right = view.region
            found = part.resize(size[::-1], Image.Resampling.BICUBIC, box=(left, top, right, bottom))
            expected = np.asarray(wanted.transform(image, crop)).astype(int)
            assert np.abs(np.asarray(found) - expected).max() <= 2, (height, width, crop)


def test_borders_are_no_view() -> None:
    with pytest.raises(ValueError, match="resize_mode longest has no view"):
        preprocess((48, 48), resize_mode="longest").eval_view((60, 80))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pixels_are_normalised_as_by_torchvision(dtype: torch.dtype, channels_last: bool) -> None:
    images = [picture(48, 48), picture(48, 48).rotate(90)]
    wanted = preprocess((48, 48))
    expected = torch.stack([wanted.to_tensor(image) for image in images]).to(dtype)
    pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in images])
    found = normalise(pixels, wanted, dtype, channels_last)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("bilinear", [False, True])
def test_the_compiled_resize_is_pils(bilinear: bool) -> None:
    """To the last bit, but for tall images, whose columns PIL 13 resizes first."""
    resample = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
    rng = np.random.default_rng(1)
    sizes = [(1, 500), (500, 1), (40, 3000), (3000, 40), (48, 64), (48, 100), (100, 64), (2, 2)]
    for height, width in [*sizes, *rng.integers(1, 400, (60, 2)).tolist()]:
        image = picture(height, width)
        whole = (0.0, 0.0, float(height), float(width))
        # In eighths of a pixel: PIL's box is in single precision.
        part = (height // 2 / 8, width // 3 / 8, height - height // 4 / 8, width - width // 5 / 8)
        for top, left, bottom, right in (whole, part):
            found = np.empty((48, 64, 3), np.uint8)
            resize(np.asarray(image), np.array((top, left, bottom, right)), found, bilinear)
            expected = np.asarray(image.resize((64, 48), resample, box=(left, top, right, bottom))).astype(int)
            if height <= 48 or width > 2 * height:
                assert np.array_equal(found, expected), (height, width)
            else:
                assert np.abs(found - expected).mean() < 4, (height, width)  # pictures of pure noise
