"""The plain loader: contents of its batches, which do not depend on workers, ranks or a resume."""

import dataclasses
import gc
import io
import logging
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tiny
import torch
from PIL import Image, ImageOps

from dive_fast.data.batch import ReferenceBatch, TargetBatch, Text
from dive_fast.data.loaders import plain
from dive_fast.data.loaders.loader import Options, batches_of, training_batches
from dive_fast.data.prompt_files import read_templates
from dive_fast.data.prompts import PromptTable, SecondPrompts, pack
from dive_fast.data.sampler import Order
from dive_fast.data.samples import MAX_REPLACEMENTS, EvaluationSamples, ReferenceSamples, TargetSamples
from dive_fast.data.sources.csv_table import open_csv
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.data.transforms import Preprocess, random_crop
from dive_fast.errors import DataError

PREPROCESS = Preprocess((24, 24), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "bicubic", "shortest")
NAMES = [f"thing number {i}" for i in range(5)]
TEMPLATES = read_templates("simple")
COUNT, BATCH, SEED = 22, 4, 3


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return open_clip.get_tokenizer("ViT-B-32")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_shards(tmp_path_factory.mktemp("shards"), COUNT)


def target_samples(shards: Path, tokenizer: Any) -> TargetSamples:
    source = open_webdataset(str(shards), ".cls")
    prompts = PromptTable(source, NAMES, TEMPLATES, tokenizer)
    second = SecondPrompts(prompts, read_templates("{} at night."), tokenizer)
    return TargetSamples(source, prompts, PREPROCESS, "argmax", SEED, second)


def reference_samples(shards: Path, tokenizer: Any, views: Any = "eval") -> ReferenceSamples:
    source = open_webdataset(str(shards), ".txt")
    return ReferenceSamples(source, tokenizer, PREPROCESS, "argmax", SEED, views)


def evaluation_samples(source: Source) -> EvaluationSamples:
    return EvaluationSamples(source, PREPROCESS)


def assert_equal(first: Any, second: Any) -> None:
    """Checks that batches are equal bit for bit."""
    assert type(first) is type(second)
    if dataclasses.is_dataclass(first):
        for field in dataclasses.fields(first):
            assert_equal(getattr(first, field.name), getattr(second, field.name))
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    else:
        assert first == second


# Contents of a batch


def test_target_batch_has_crops_and_prompts_of_its_epoch(shards: Path, tokenizer: Any) -> None:
    samples = target_samples(shards, tokenizer)
    order = Order(COUNT, BATCH, seed=SEED)
    steps = range(2 * order.steps_per_epoch)
    for step, batch in zip(steps, training_batches(samples, order, steps, Options()), strict=True):
        epoch, expected = order.at(step)
        assert batch.sample.tolist() == expected.tolist()
        assert batch.keys == tuple(f"{sample // 10}.tar/{sample:03d}" for sample in expected)
        assert batch.labels.tolist() == [sample % 5 for sample in expected]
        assert batch.images.shape == (BATCH, 3, 24, 24)
        for row, sample in enumerate(expected.tolist()):
            image = samples.source.image(sample)
            crop = random_crop((image.height, image.width), SEED, sample, epoch)
            assert torch.equal(batch.images[row], tiny.shown(PREPROCESS, image, crop))
            tokens = samples.prompts.draw([samples.source.samples[sample]], [sample], SEED, [epoch])[0]
            assert torch.equal(batch.text.tokens[batch.text.index[row]], tokens.long())
            prompts = {template(NAMES[sample % 5]) for template in TEMPLATES}
            assert any(torch.equal(tokens.long(), row) for row in tokenizer(sorted(prompts)))


def test_reference_batch_has_the_eval_view_and_the_caption(shards: Path, tokenizer: Any) -> None:
    samples = reference_samples(shards, tokenizer)
    order = Order(COUNT, BATCH, seed=SEED)
    for batch in training_batches(samples, order, range(order.steps_per_epoch + 1), Options()):
        assert batch.view.tolist() == [0] * BATCH
        for row, sample in enumerate(batch.sample.tolist()):
            assert torch.equal(batch.images[row], tiny.shown(PREPROCESS, samples.source.image(sample)))
            assert batch.keys[row] == samples.source.samples[sample].key
        captions = [samples.source.samples[sample].texts[0] for sample in batch.sample.tolist()]
        assert_equal(batch.text, pack(tokenizer(captions), "argmax"))


def test_reference_views_are_fixed_crops_that_alternate_by_epoch(shards: Path, tokenizer: Any) -> None:
    samples = reference_samples(shards, tokenizer, views=3)
    assert samples.num_views == 3
    sample_keys = [(epoch, 5) for epoch in range(7)]
    (batch,) = batches_of(samples, sample_keys, 7, Options())
    assert batch.view.tolist() == [0, 1, 2, 0, 1, 2, 0]
    image = samples.source.image(5)
    for row, view in enumerate(batch.view.tolist()):
        crop = random_crop((image.height, image.width), SEED, 5, view)
        assert torch.equal(batch.images[row], tiny.shown(PREPROCESS, image, crop))
    assert len({tuple(row.flatten().tolist()) for row in batch.images}) == 3
    assert reference_samples(shards, tokenizer).num_views == 1


def test_evaluation_batches_have_eval_views_and_labels(shards: Path) -> None:
    samples = evaluation_samples(open_webdataset(str(shards), ".cls"))
    batches = list(batches_of(samples, [(0, sample) for sample in range(10)], 4, Options()))
    assert [len(batch.images) for batch in batches] == [4, 4, 2]
    images, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "labels"))
    assert labels.tolist() == [sample % 5 for sample in range(10)]
    for row in range(10):
        assert torch.equal(images[row], tiny.shown(PREPROCESS, samples.source.image(row)))
    assert list(batches_of(samples, [], 4, Options())) == []


def test_csv_samples_have_one_of_their_titles_and_no_label(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jpg").write_bytes(tiny.jpeg(0))
    (tmp_path / "list.csv").write_text("title\tfilepath\na cat\ta.jpg\nthe cat\ta.jpg\n")
    source = open_csv(str(tmp_path / "list.csv"), None, group=True)
    samples = TargetSamples(source, PromptTable(source, (), (), tokenizer), PREPROCESS, "argmax", SEED)
    (batch,) = batches_of(samples, [(epoch, 0) for epoch in range(20)], 20, Options())
    assert torch.equal(batch.text.tokens.sort(0)[0], tokenizer(["a cat", "the cat"]).sort(0)[0])
    assert batch.labels.tolist() == [-1] * 20


def test_batch_to_device_keeps_its_values() -> None:
    text = Text(torch.ones(2, 3, dtype=torch.long), torch.tensor([0, 1, 0]), 2)
    images, three = torch.rand(3, 3, 2, 2), torch.arange(3)
    for batch in (
        TargetBatch(images, text, three, three + 1, ("a", "b", "c"), text),
        ReferenceBatch(images, text, three, three + 1, ("a", "b", "c")),
    ):
        assert_equal(batch.to(torch.device("cpu")), batch)
        moved = batch.to(torch.device("meta"))
        assert {moved.images.device.type, moved.text.tokens.device.type, moved.text.index.device.type} == {"meta"}
        if isinstance(moved, TargetBatch):
            assert moved.second_text is not None
            assert moved.second_text.tokens.device.type == "meta"
        # Reference indices stay on the CPU, where the teacher's rows are.
        assert (moved.sample.device.type == "meta") == isinstance(batch, TargetBatch)
    assert batch.to(torch.device("meta")).view.device.type == "cpu"


# Workers, resumes and ranks


@pytest.mark.parametrize("make", [target_samples, reference_samples])
def test_batches_do_not_depend_on_the_number_of_workers(shards: Path, tokenizer: Any, make: Any) -> None:
    order = Order(COUNT, BATCH, seed=SEED)
    steps = range(order.steps_per_epoch + 2)
    expected = list(training_batches(make(shards, tokenizer), order, steps, Options()))
    assert len(expected) == len(steps)
    for workers in (1, 2):
        batches = list(training_batches(make(shards, tokenizer), order, steps, Options(workers=workers)))
        for one, other in zip(batches, expected, strict=True):
            assert_equal(one, other)


@pytest.mark.parametrize("make", [target_samples, reference_samples])
@pytest.mark.parametrize("first", [1, 5, 6, 11])
def test_batches_are_equal_after_a_resume_at_any_step(shards: Path, tokenizer: Any, make: Any, first: int) -> None:
    order = Order(COUNT, BATCH, seed=SEED)
    full = list(training_batches(make(shards, tokenizer), order, range(13), Options()))
    rest = list(training_batches(make(shards, tokenizer), order, range(first, 13), Options()))
    for one, other in zip(rest, full[first:], strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("make", [target_samples, reference_samples])
def test_shares_of_ranks_concatenate_to_the_full_batch(shards: Path, tokenizer: Any, make: Any) -> None:
    samples = make(shards, tokenizer)

    def batches(rank: int, world_size: int) -> list[Any]:
        order = Order(COUNT, BATCH, rank, world_size, SEED)
        return list(training_batches(samples, order, range(7), Options()))

    for full, *shares in zip(batches(0, 1), batches(0, 2), batches(1, 2), strict=True):
        assert torch.equal(torch.cat([share.images for share in shares]), full.images)
        assert torch.cat([share.sample for share in shares]).tolist() == full.sample.tolist()
        for name in ("text", "second_text") if isinstance(full, TargetBatch) else ("text",):
            texts, expected = [getattr(share, name) for share in shares], getattr(full, name)
            rows = torch.cat([text.tokens[text.index] for text in texts])
            assert torch.equal(rows, expected.tokens[expected.index])


# Images that cannot be decoded


def broken_source(folder: Path, bad: set[int], count: int, damage: str = "cut") -> Source:
    """A tar with some broken images."""
    samples = {}
    for i in range(count):
        data = tiny.jpeg(i)
        if i in bad:
            data = {"cut": data[: len(data) // 2], "noise": b"<html>" * 50, "empty": b""}[damage]
        samples[f"{i:03d}"] = {"jpg": data, "cls": str(i).encode()}
    return open_webdataset(str(tiny.write_tar(folder / "a.tar", samples)), ".cls")


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_undecodable_image_is_replaced_by_the_next(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    samples = evaluation_samples(broken_source(tmp_path, {1, 2, 5}, 6, damage))
    with caplog.at_level(logging.WARNING):
        (batch,) = batches_of(samples, [(0, sample) for sample in range(6)], 6, Options())
    assert batch.labels.tolist() == [0, 3, 3, 3, 4, 0]  # the first sample follows the last
    for row, label in enumerate(batch.labels.tolist()):
        assert torch.equal(batch.images[row], tiny.shown(PREPROCESS, samples.source.image(label)))
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(": ")[1] for message in messages] == [f"sample a.tar/{i:03d}" for i in (1, 2, 2, 5)]
    for message in messages:
        assert message.startswith(f"{tmp_path}/a.tar: sample ")
        assert message.endswith("; the next sample replaces it")


def test_replacement_has_its_own_text_label_and_index(tmp_path: Path, tokenizer: Any) -> None:
    source = broken_source(tmp_path, {1}, 4)
    prompts = PromptTable(source, NAMES, TEMPLATES, tokenizer)
    samples = TargetSamples(source, prompts, PREPROCESS, "argmax", SEED)
    (batch,) = batches_of(samples, [(0, 1)], 1, Options())
    (expected,) = batches_of(samples, [(0, 2)], 1, Options())
    assert_equal(batch, expected)
    assert batch.keys == ("a.tar/002",)


def test_held_out_sample_is_read_but_never_replaces_another(tmp_path: Path) -> None:
    samples = evaluation_samples(broken_source(tmp_path, {1, 5}, 6))
    (batch,) = batches_of(samples.without({0, 2, 3}), [(0, sample) for sample in (0, 1, 3, 5)], 4, Options())
    assert batch.labels.tolist() == [0, 4, 3, 4]
    (unchanged,) = batches_of(samples, [(0, 1), (0, 5)], 2, Options())
    assert unchanged.labels.tolist() == [2, 0]


def assert_too_many_are_unusable(folder: Path, count: int, workers: int) -> None:
    last = f"a.tar/{(2 + MAX_REPLACEMENTS - 1) % count:03d}"
    samples = evaluation_samples(broken_source(folder, set(range(2, 2 + MAX_REPLACEMENTS)) | {0, 1}, count))
    message = (
        rf"^16 samples in a row are unusable; the last: {folder}/a\.tar: sample {last}: "
        r"cannot decode the image: [^\n]+$"
    )
    with pytest.raises(DataError, match=message):
        list(batches_of(samples, [(0, 2)], 1, Options(workers=workers)))


@pytest.mark.parametrize("count", [3, MAX_REPLACEMENTS + 4])
def test_too_many_unusable_images_in_a_row_are_an_error(tmp_path: Path, count: int) -> None:
    assert_too_many_are_unusable(tmp_path, count, workers=0)


def test_error_in_a_worker_has_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An iterator that ends with an error leaves its worker to the garbage collector, which waits this interval.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    assert_too_many_are_unusable(tmp_path, 3, workers=1)
    gc.collect()


def test_replacement_succeeds_after_fifteen_unusable_images(tmp_path: Path) -> None:
    samples = evaluation_samples(
        broken_source(tmp_path, set(range(2, 2 + MAX_REPLACEMENTS - 1)), MAX_REPLACEMENTS + 4)
    )
    (batch,) = batches_of(samples, [(0, 2)], 1, Options())
    assert batch.labels.tolist() == [2 + MAX_REPLACEMENTS - 1]


# Formats of web images


def encode(mode: str, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image = Image.open(io.BytesIO(tiny.jpeg(7)))
    image = image.convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 256 + 77)
    image.save(content, kind, **options)
    return content.getvalue()


def test_every_image_format_has_train_and_eval_views(tmp_path: Path) -> None:
    # Extensions are wrong on the web: GIFs and PNGs are named .jpg.
    formats = {
        "grey": encode("L", "JPEG"),
        "cmyk": encode("CMYK", "JPEG"),
        "progressive": encode("RGB", "JPEG", progressive=True),
        "gif": encode("P", "GIF"),
        "animated": encode("P", "GIF", save_all=True, append_images=[Image.new("P", (40, 36))]),
        "png": encode("RGBA", "PNG"),
        "palette": encode("P", "PNG", transparency=3),
        "grey_alpha": encode("LA", "PNG"),
        "bits": encode("1", "PNG"),
        "deep": encode("I;16", "PNG"),
        "webp": encode("RGB", "WEBP"),
        "bmp": encode("RGB", "BMP"),
    }
    tar = tiny.write_tar(tmp_path / "a.tar", {key: {"jpg": data, "cls": b"0"} for key, data in formats.items()})
    source = open_webdataset(str(tar), ".cls")
    assert len(source) == len(formats)
    transform = open_clip.image_transform(24, is_train=False, mean=PREPROCESS.mean, std=PREPROCESS.std)
    sample_keys = [(0, sample) for sample in range(len(source))]
    (batch,) = batches_of(evaluation_samples(source), sample_keys, len(sample_keys), Options())
    for view, (key, data) in zip(batch.images, formats.items(), strict=True):
        image = Image.open(io.BytesIO(data))
        # open_clip's result for the RGB image; open_clip itself resizes palettes, bits and transparency first.
        expected = image.convert("RGB") if key != "deep" else Image.open(io.BytesIO(encode("L", "PNG")))
        assert torch.equal(view, transform(expected)), key
        assert image.mode != "RGB" or torch.equal(view, transform(image)), key
        assert view.std() > 0.1, key
        crop = random_crop((image.height, image.width), 0, 0, 0)
        assert tiny.shown(PREPROCESS, image, crop).shape == (3, 24, 24), key


# Real images


@pytest.fixture(scope="module")
def photos(real_data: Path) -> Source:
    return open_webdataset(str(real_data / "imagenet_samples" / "imagenet_samples.tar"), ".cls")


@pytest.mark.realdata
def test_real_photos_of_each_class_are_decoded(photos: Source, tokenizer: Any) -> None:
    assert [sample.label for sample in photos.samples] == list(range(1000))
    assert photos.skipped == []
    preprocess = Preprocess((224, 224), PREPROCESS.mean, PREPROCESS.std, "bicubic", "shortest")
    prompts = PromptTable(photos, open_clip.IMAGENET_CLASSNAMES, TEMPLATES, tokenizer)
    samples = TargetSamples(photos, prompts, preprocess, "argmax", SEED)
    order = Order(1000, 16, seed=SEED)
    for batch in training_batches(samples, order, range(2), Options()):
        assert torch.equal(batch.labels, batch.sample)  # none was replaced
        assert bool((batch.images.flatten(1).std(1) > 0.1).all())
        assert 5 < batch.text.length < 30


@pytest.mark.realdata
def test_real_oddities_equal_open_clip(photos: Source, real_data: Path) -> None:
    rows = (real_data / "imagenet_samples" / "oddities.txt").read_text().splitlines()[1:]
    oddities = {row.split("\t")[0]: row.split("\t")[2] for row in rows}
    by_key = {Path(sample.key).name: index for index, sample in enumerate(photos.samples)}
    transform = open_clip.image_transform(64, is_train=False, mean=PREPROCESS.mean, std=PREPROCESS.std)
    samples = EvaluationSamples(photos, dataclasses.replace(PREPROCESS, size=(64, 64)))
    seen = Counter()
    for key, oddity in oddities.items():
        index = by_key[key]
        image = photos.image(index)
        (batch,) = batches_of(samples, [(0, index)], 1, Options())
        assert batch.labels.tolist() == [index]
        assert torch.equal(batch.images[0], transform(image)), (key, oddity)
        if match := re.search(r"(\d+)x(\d+)", oddity):
            assert image.size == (int(match[1]), int(match[2]))
            seen["size"] += 1
        if oddity == "mode L":
            assert image.mode == "L"
            seen["grey"] += 1
        if match := re.search(r"EXIF orientation (\d)", oddity):
            # open_clip ignores EXIF orientation, and models were trained that way.
            assert image.getexif()[0x0112] == int(match[1])
            upright = ImageOps.exif_transpose(image)
            assert torch.equal(batch.images[0], transform(upright)) == (int(match[1]) == 0)
            seen["orientation"] += 1
    assert seen == {"grey": 23, "orientation": 3, "size": 12}


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_without_numba_are_equal_bit_for_bit(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    sizes = [(30, 70), (90, 25), (24, 24), (300, 40), (61, 80)]
    files = {}
    for index, size in enumerate(sizes):
        content = io.BytesIO()
        noise = np.random.default_rng(index).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(noise).convert(mode).save(content, "PNG")
        files[str(index)] = {"png": content.getvalue(), "cls": b"0"}
    tiny.write_tar(tmp_path / "a.tar", files)
    samples = target_samples(tmp_path / "a.tar", tokenizer)
    order = Order(len(sizes), len(sizes), seed=SEED)

    def batch() -> TargetBatch:
        (batch,) = training_batches(samples, order, range(1), Options())
        return batch

    assert plain._compiled_views(PREPROCESS) is not None
    compiled = batch()
    monkeypatch.setitem(sys.modules, "dive_fast.data.loaders.pil_resize", None)
    monkeypatch.delattr("dive_fast.data.loaders.pil_resize", raising=False)
    assert plain._compiled_views(PREPROCESS) is None
    assert_equal(batch(), compiled)
