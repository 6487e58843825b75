"""Crops against torchvision's RandomResizedCrop, and views against open_clip's transforms."""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
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

from dive_fast.data.loaders.pil_resize import equals_pil, view_pixels
from dive_fast.data.random_streams import Draw, stream, uniforms
from dive_fast.data.transforms import ASPECT_RATIO, TRAIN_SCALE, Crop, Preprocess, crop_draws, random_crop

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
ODD_SIZES = [(1, 500), (500, 1), (31, 33), (5000, 40), (40, 5000), (1, 1), (2, 3), (375, 500)]
MODES = ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK", "I;16"]


def noise_image(height: int, width: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(height * 10007 + width)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 400, (height, width), dtype=np.uint16))
    if mode == "RGBA":
        return Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def preprocess(size: tuple[int, int], **options: Any) -> Preprocess:
    return Preprocess(size, MEAN, STD, **{"interpolation": "bicubic", "resize_mode": "shortest"} | options)


# Random crops


def test_random_crop_is_a_pure_function_of_seed_sample_and_view() -> None:
    arguments = list(itertools.product([0, 1, 2**63], [0, 1, 10**7], [0, 1, 99]))
    crops = {key: random_crop((300, 400), *key) for key in arguments}
    # In another order, interleaved with other random numbers.
    for key in random.Random(0).sample(arguments, len(arguments)):
        np.random.default_rng().random(3)
        torch.rand(3)
        random_crop((7, 9), 5, 5, 5)
        assert random_crop((300, 400), *key) == crops[key]


def test_random_crop_differs_between_seeds_samples_and_views() -> None:
    # The image is so large that crops never coincide by chance, and the crops so small that they always fit.
    arguments = itertools.product(range(5), range(20), range(5))
    assert len({random_crop((4000, 6000), *key, scale=(0.1, 0.5)) for key in arguments}) == 500


def test_stream_differs_between_purposes() -> None:
    draws = {float(stream(0, purpose, 3, 4).random()) for purpose in Draw}
    assert len(draws) == len(Draw)
    # Neither first and second nor seed and purpose are interchangeable.
    assert stream(0, Draw.CROP, 3, 4).random() != stream(0, Draw.CROP, 4, 3).random()
    assert stream(0, Draw.PROMPT, 3).random() != stream(1, Draw.CROP, 3).random()


def test_random_crop_values_are_stable() -> None:
    # Teacher caches hold embeddings of these crops and would become invalid if the crops changed.
    assert random_crop((300, 400), 0, 0, 0) == Crop(3, 7, 293, 386)
    assert random_crop((300, 400), 0, 1, 2, (0.1, 0.5)) == Crop(87, 84, 146, 179)
    assert random_crop((480, 360), 2**62, 3_000_000, 99) == Crop(2, 3, 469, 352)


@pytest.mark.parametrize("scale", [TRAIN_SCALE, (0.08, 1.0)])
@pytest.mark.parametrize("size", ODD_SIZES)
def test_random_crop_lies_within_images_of_odd_sizes(size: tuple[int, int], scale: tuple[float, float]) -> None:
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
    shares = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (first, second)]
    critical = math.sqrt(-math.log(0.001 / 2) / 2) * math.sqrt(1 / len(first) + 1 / len(second))
    return float(np.abs(shares[0] - shares[1]).max() / critical)


@pytest.mark.parametrize("scale", [TRAIN_SCALE, (0.08, 1.0)])
@pytest.mark.parametrize("size", [(300, 400), (500, 333), (240, 240)])
def test_random_crop_has_the_distribution_of_torchvision(
    size: tuple[int, int], scale: tuple[float, float]
) -> None:
    count = 3000
    torch.manual_seed(1)
    crops = [random_crop(size, 1, sample, 0, scale) for sample in range(count)]
    ours = np.array([(crop.top, crop.left, crop.height, crop.width) for crop in crops], dtype=float)
    theirs = np.array(list(torchvision_crops(size, scale, count)), dtype=float)
    for name, statistic in {
        "area": lambda crops: crops[:, 2] * crops[:, 3],
        "log aspect": lambda crops: np.log(crops[:, 3] / crops[:, 2]),
        # 0 if the crop spans the image.
        "top": lambda crops: crops[:, 0] / np.maximum(size[0] - crops[:, 2], 1),
        "left": lambda crops: crops[:, 1] / np.maximum(size[1] - crops[:, 3], 1),
    }.items():
        assert kolmogorov_smirnov(statistic(ours), statistic(theirs)) < 1, name
    assert (ours.min(0) >= 0).all()


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (5000, 40), (40, 5000), (1, 1)])
def test_random_crop_falls_back_to_the_central_one(size: tuple[int, int]) -> None:
    expected = Crop(*next(torchvision_crops(size, TRAIN_SCALE, 1)))
    assert {random_crop(size, 0, sample, 0) for sample in range(20)} == {expected}


def test_draws_of_many_positions_equal_those_of_their_streams() -> None:
    """Positions and seeds of any size, and counts that end within a block of four."""
    rng = np.random.default_rng(0)
    for seed in (0, 7, 2**62 + 5):
        firsts, seconds = (rng.integers(0, 2**62, 50) for _ in range(2))
        for count in (1, 6, 40):
            expected = [
                stream(seed, Draw.CROP, int(first), int(second)).random(count)
                for first, second in zip(firsts, seconds, strict=True)
            ]
            assert np.array_equal(uniforms(seed, Draw.CROP, firsts, seconds, count), np.array(expected))
    draws = crop_draws(3, [5, 6], [0, 1 << 32])
    for row, (sample, view) in enumerate(((5, 0), (6, 1 << 32))):
        assert random_crop((30, 40), 3, sample, view, draws=draws[row]) == random_crop((30, 40), 3, sample, view)


# Views


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_train_view_equals_torchvision_resized_crop_as_rgb(mode: str, interpolation: str) -> None:
    image = noise_image(61, 83, mode)
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
        actual = tiny.shown(preprocess(size, interpolation=interpolation), image, crop)
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


def test_train_view_equals_open_clip_for_the_same_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise_image(61, 83)
    crop = random_crop((61, 83), 0, 0, 0)
    fixed_crop = staticmethod(lambda *_: (crop.top, crop.left, crop.height, crop.width))
    monkeypatch.setattr(RandomResizedCrop, "get_params", fixed_crop)
    expected = open_clip.image_transform(48, is_train=True, mean=MEAN, std=STD)(image)
    assert torch.equal(tiny.shown(preprocess((48, 48)), image, crop), expected)


@pytest.mark.parametrize("size", [224, 336, 384])
@pytest.mark.parametrize("shape", [(61, 83), (500, 375), (375, 500), (400, 399), (17, 90), (3, 50)])
def test_eval_view_equals_open_clip_for_odd_sizes(size: int, shape: tuple[int, int]) -> None:
    image = noise_image(*shape)
    expected = open_clip.image_transform(size, is_train=False, mean=MEAN, std=STD)(image)
    assert expected.shape == (3, size, size)
    assert torch.equal(tiny.shown(preprocess((size, size)), image), expected)


@pytest.mark.parametrize("mode", MODES)
def test_eval_view_equals_open_clip_for_every_mode(mode: str) -> None:
    image = noise_image(61, 83, mode)
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
def test_eval_view_follows_the_preprocess_config(size: tuple[int, int], options: dict[str, Any]) -> None:
    image = noise_image(61, 83)
    visual = SimpleNamespace(preprocess_cfg={"size": size, "mean": MEAN, "std": STD} | options)
    expected = open_clip.image_transform(size, is_train=False, mean=MEAN, std=STD, **options)(image)
    actual = tiny.shown(Preprocess.of(visual), image)
    assert torch.equal(actual, expected)


def test_preprocess_accepts_one_size_or_two() -> None:
    config = {"mean": list(MEAN), "std": list(STD), "interpolation": "bicubic", "resize_mode": "shortest"}
    for size, expected in [(48, (48, 48)), ([48, 36], (48, 36)), ((48, 36), (48, 36))]:
        assert Preprocess.of(SimpleNamespace(preprocess_cfg=config | {"size": size})) == preprocess(expected)


# Views for loaders with their own decoder


def smooth_image(height: int, width: int) -> Image.Image:
    """An image without noise, as PIL 13 chooses the order of its passes, and so 8-bit rounding, by size."""
    return noise_image(5, 6).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(48, 48), (48, 64)])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_resized_view_region_equals_open_clip(size: tuple[int, int], resize_mode: str) -> None:
    """PIL's ``box`` resizes a view's region."""
    config = preprocess(size, resize_mode=resize_mode)
    rng = np.random.default_rng(0)
    sizes = [(1, 500), (500, 1), (31, 33), (2, 3), (48, 48), *map(tuple, rng.integers(20, 300, (40, 2)).tolist())]
    for height, width in sizes:
        image = smooth_image(height, width)
        for crop in (None, random_crop((height, width), 0, height, width)):
            view = config.eval_view((height, width)) if crop is None else config.train_view(crop)
            part = image.crop(
                (view.crop.left, view.crop.top, view.crop.left + view.crop.width, view.crop.top + view.crop.height)
            )
            top, left, bottom, right = view.region
            actual = part.resize(size[::-1], Image.Resampling.BICUBIC, box=(left, top, right, bottom))
            expected = np.asarray(config.transform(image, crop)).astype(int)
            assert np.abs(np.asarray(actual) - expected).max() <= 2, (height, width, crop)


def test_eval_view_rejects_borders() -> None:
    with pytest.raises(ValueError, match="resize_mode longest has no view"):
        preprocess((48, 48), resize_mode="longest").eval_view((60, 80))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("size", "resize_mode"), [((48, 64), "shortest"), ((48, 48), "shortest"), ((36, 48), "squash")]
)
def test_compiled_views_equal_pil_bit_for_bit(size: Any, interpolation: str, resize_mode: str) -> None:
    """Images are tall, wide, small, or of the view's height or width, in both orders of PIL's passes."""
    assert equals_pil()
    config = preprocess(size, interpolation=interpolation, resize_mode=resize_mode)
    rng = np.random.default_rng(1)
    sizes = [(1, 300), (300, 1), (40, 2000), (2000, 40), (48, 64), (48, 100), (100, 64), (2, 2), (140, 100)]
    for height, width in [*sizes, *rng.integers(1, 300, (40, 2)).tolist()]:
        image = noise_image(height, width)
        drawn = replace(random_crop((height, width), 0, height, width), is_flipped=bool(width % 2))
        for crop in (None, drawn):
            view = config.eval_view((height, width)) if crop is None else config.train_view(crop)
            pixels = np.empty((*size, 3), np.uint8)
            view_pixels(np.array(image), view, pixels)
            assert np.array_equal(pixels, np.asarray(config.transform(image, crop))), (height, width, crop)
