"""Flips and crop scales: drawn by counters, and equal in every loader."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
from PIL import Image, ImageOps

from dive_fast.config.schema import Config
from dive_fast.data.loaders.loader import Options, batches_of, training_batches
from dive_fast.data.prepared import convert
from dive_fast.data.prepared.raw import RawSource
from dive_fast.data.prepared.read import open_prepared
from dive_fast.data.prepared.write import prepare
from dive_fast.data.prompt_files import read_templates
from dive_fast.data.prompts import PromptTable
from dive_fast.data.sampler import Classes, Order
from dive_fast.data.samples import TargetSamples
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.data.transforms import Augmentation, Preprocess, random_crop

PREPROCESS = Preprocess((24, 24), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "bicubic", "shortest")
COUNT, BATCH, SEED = 20, 4, 3
STRONG = Augmentation((0.2, 0.6), 0.5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Prepared for every loader."""
    folder = tmp_path_factory.mktemp("augmentation")
    raw = open_webdataset(str(tiny.write_shards(folder / "raw", COUNT)), ".cls")
    prepare(RawSource(raw), folder / "set", convert.Options("beton", max_side=None), workers=1)
    return open_prepared(str(folder / "set"), ".cls")


@pytest.fixture(scope="module")
def prompts(source: Source) -> PromptTable:
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return PromptTable(source, [f"thing {i}" for i in range(5)], read_templates("simple"), tokenizer)


def samples_of(source: Source, prompts: PromptTable, augmentation: Augmentation = STRONG) -> TargetSamples:
    return TargetSamples(source, prompts, PREPROCESS, "argmax", SEED, augmentation=augmentation)


def test_default_augmentation_is_the_crop_without_flips() -> None:
    for sample in range(50):
        assert Augmentation().crop((30, 40), 1, sample, 2) == random_crop((30, 40), 1, sample, 2)


def test_flips_have_their_probability_and_do_not_change_crops() -> None:
    for probability in (0.0, 0.25, 1.0):
        crops = [Augmentation((0.5, 1.0), probability).crop((300, 400), 1, sample, 0) for sample in range(4000)]
        share = sum(crop.is_flipped for crop in crops) / len(crops)
        assert abs(share - probability) < 4 * (probability * (1 - probability) / len(crops)) ** 0.5 + 1e-9
        for sample, crop in enumerate(crops[:50]):
            expected = random_crop((300, 400), 1, sample, 0, (0.5, 1.0))
            assert (crop.top, crop.left, crop.height, crop.width) == (
                *(expected.top, expected.left),
                *(expected.height, expected.width),
            )
    # Drawn again in each epoch.
    flips = [STRONG.crop((30, 40), 1, 5, epoch).is_flipped for epoch in range(30)]
    assert 0 < sum(flips) < 30


def test_plain_loader_mirrors_the_resized_crop(source: Source, prompts: PromptTable) -> None:
    samples = samples_of(source, prompts)
    keys = [(epoch, sample) for epoch in range(2) for sample in range(COUNT)]
    (batch,) = batches_of(samples, keys, len(keys), Options())
    flipped = 0
    for row, (epoch, sample) in enumerate(keys):
        image = source.image(sample)
        crop = STRONG.crop((image.height, image.width), SEED, sample, epoch)
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        expected = image.crop(box).resize((24, 24), Image.Resampling.BICUBIC).convert("RGB")
        if crop.is_flipped:
            flipped += 1
            expected = ImageOps.mirror(expected)
        assert torch.equal(batch.images[row], PREPROCESS.to_tensor(expected))
    assert 5 < flipped < len(keys) - 5


@pytest.mark.parametrize("loader", ["dali", "ffcv"])
@pytest.mark.parametrize("workers", [0, 1])
def test_fast_loaders_flip_and_crop_as_the_plain_one(
    source: Source, prompts: PromptTable, loader: Any, workers: int
) -> None:
    samples, order = samples_of(source, prompts), Order(COUNT, BATCH, seed=SEED)
    steps = range(2, 9)  # as after a resume, over two epochs
    fast = training_batches(samples, order, steps, Options(loader, workers))
    difference = []
    for actual, expected in zip(fast, training_batches(samples, order, steps, Options()), strict=True):
        assert actual.sample.tolist() == expected.sample.tolist()
        difference += (actual.images - expected.images).abs().mean((1, 2, 3)).tolist()
    # A missing flip or another crop differs by 0.1 and more.
    assert max(difference) < 0.02


def test_dali_flips_images_that_pil_decodes_once(tmp_path: Path, prompts: PromptTable) -> None:
    images = {f"{row}": {"png": tiny.jpeg(row, (40, 30), "PNG"), "cls": b"0"} for row in range(8)}
    source = open_webdataset(str(tiny.write_tar(tmp_path / "a.tar", images)), ".cls")
    samples, keys = samples_of(source, prompts, Augmentation((0.5, 1.0), 1.0)), [(0, row) for row in range(8)]
    (expected,) = batches_of(samples, keys, 8, Options())
    (actual,) = batches_of(samples, keys, 8, Options("dali"))
    assert float((actual.images - expected.images).abs().max()) < 0.02


def test_repeats_in_a_balanced_epoch_have_other_crops_and_prompts(source: Source, prompts: PromptTable) -> None:
    labels = [0] + [1] * (COUNT - 1)
    order = Order(COUNT, COUNT, seed=SEED, classes=Classes.of(labels))
    (batch,) = training_batches(samples_of(source, prompts), order, range(1), Options())
    repeats = [row for row, sample in enumerate(batch.sample.tolist()) if sample == 0]
    assert len(repeats) == COUNT // 2
    assert len({batch.images[row].numpy().tobytes() for row in repeats}) == len(repeats)
    assert len({int(batch.text.index[row]) for row in repeats}) > 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_scale": [0.9, 0.5]}, "data.target.crop_scale: 0.9 is more than 0.5; set the smaller share first"),
        ({"crop_scale": [0.0, 1.0]}, "greater than 0"),
        ({"horizontal_flip": 1.5}, "less than or equal to 1"),
        ({"balance": "class", "format": "csv"}, "a set of csv has prompts and no classes"),
        ({"balance": "class", "format": "huggingface", "text_column": "x"}, "a set of text_column has prompts"),
        ({"split": "train"}, "data.target.split: only huggingface data has one; remove it"),
        ({"format": "huggingface", "text_column": "x", "label_column": "y"}, "set only one of them"),
    ],
)
def test_invalid_options_are_refused(values: dict[str, Any], message: str) -> None:
    target = {"format": "folder", "path": "-"} | values
    tree = {"model": {"name": "demo"}, "data": {"target": target}, "objective": {"name": "flyp"}}
    with pytest.raises(ValueError, match=r".") as error:
        Config.model_validate_json(json.dumps(tree))
    assert message in str(error.value)
