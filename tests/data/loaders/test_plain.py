"""The plain loader: what its batches hold, and that neither workers, ranks nor a resume change them."""

import dataclasses
import gc
import io
import logging
import re
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
from dive_fast.data.loaders.loader import Options, batches_of, training_batches
from dive_fast.data.prompts import PromptTable, pack, read_templates
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


def targets(shards: Path, tokenizer: Any) -> TargetSamples:
    source = open_webdataset(str(shards), ".cls")
    return TargetSamples(source, PromptTable(source, NAMES, TEMPLATES, tokenizer), PREPROCESS, "argmax", SEED)


def references(shards: Path, tokenizer: Any, views: Any = "eval") -> ReferenceSamples:
    source = open_webdataset(str(shards), ".txt")
    return ReferenceSamples(source, tokenizer, PREPROCESS, "argmax", SEED, views)


def evaluations(source: Source) -> EvaluationSamples:
    return EvaluationSamples(source, PREPROCESS)


def assert_equal(first: Any, second: Any) -> None:
    """Batches are equal to the last bit."""
    assert type(first) is type(second)
    if dataclasses.is_dataclass(first):
        for field in dataclasses.fields(first):
            assert_equal(getattr(first, field.name), getattr(second, field.name))
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    else:
        assert first == second


# What a batch holds


def test_a_target_batch_holds_fresh_crops_and_prompts_for_each_epoch(shards: Path, tokenizer: Any) -> None:
    samples = targets(shards, tokenizer)
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
            tokens = samples.prompts.draw(samples.source.samples[sample], sample, SEED, epoch)
            assert torch.equal(batch.text.tokens[batch.text.index[row]], tokens.long())
            prompts = {template(NAMES[sample % 5]) for template in TEMPLATES}
            assert any(torch.equal(tokens.long(), row) for row in tokenizer(sorted(prompts)))


def test_a_reference_batch_holds_the_eval_view_and_the_caption(shards: Path, tokenizer: Any) -> None:
    samples = references(shards, tokenizer)
    order = Order(COUNT, BATCH, seed=SEED)
    for batch in training_batches(samples, order, range(order.steps_per_epoch + 1), Options()):
        assert batch.view.tolist() == [0] * BATCH
        for row, sample in enumerate(batch.sample.tolist()):
            assert torch.equal(batch.images[row], tiny.shown(PREPROCESS, samples.source.image(sample)))
            assert batch.keys[row] == samples.source.samples[sample].key
        captions = [samples.source.samples[sample].texts[0] for sample in batch.sample.tolist()]
        assert_equal(batch.text, pack(tokenizer(captions), "argmax"))


def test_k_views_are_k_fixed_crops_taken_in_turn_by_epoch(shards: Path, tokenizer: Any) -> None:
    samples = references(shards, tokenizer, views=3)
    assert samples.num_views == 3
    places = [(epoch, 5) for epoch in range(7)]
    (batch,) = batches_of(samples, places, 7, Options())
    assert batch.view.tolist() == [0, 1, 2, 0, 1, 2, 0]
    image = samples.source.image(5)
    for row, view in enumerate(batch.view.tolist()):
        crop = random_crop((image.height, image.width), SEED, 5, view)
        assert torch.equal(batch.images[row], tiny.shown(PREPROCESS, image, crop))
    assert len({tuple(row.flatten().tolist()) for row in batch.images}) == 3
    assert references(shards, tokenizer).num_views == 1


def test_evaluation_batches_hold_the_eval_view_and_the_label_and_the_last_is_what_is_left(shards: Path) -> None:
    samples = evaluations(open_webdataset(str(shards), ".cls"))
    batches = list(batches_of(samples, [(0, sample) for sample in range(10)], 4, Options()))
    assert [len(batch.images) for batch in batches] == [4, 4, 2]
    images, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "labels"))
    assert labels.tolist() == [sample % 5 for sample in range(10)]
    for row in range(10):
        assert torch.equal(images[row], tiny.shown(PREPROCESS, samples.source.image(row)))
    assert list(batches_of(samples, [], 4, Options())) == []


def test_rows_of_a_csv_come_with_one_of_their_titles_and_no_label(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jpg").write_bytes(tiny.jpeg(0))
    (tmp_path / "list.csv").write_text("title\tfilepath\na cat\ta.jpg\nthe cat\ta.jpg\n")
    source = open_csv(str(tmp_path / "list.csv"), None, group=True)
    samples = TargetSamples(source, PromptTable(source, (), (), tokenizer), PREPROCESS, "argmax", SEED)
    (batch,) = batches_of(samples, [(epoch, 0) for epoch in range(20)], 20, Options())
    assert torch.equal(batch.text.tokens.sort(0)[0], tokenizer(["a cat", "the cat"]).sort(0)[0])
    assert batch.labels.tolist() == [-1] * 20


def test_a_batch_moved_to_a_device_is_the_same_batch() -> None:
    text = Text(torch.ones(2, 3, dtype=torch.long), torch.tensor([0, 1, 0]), 2)
    images, three = torch.rand(3, 3, 2, 2), torch.arange(3)
    for batch in (
        TargetBatch(images, text, three, three + 1, ("a", "b", "c")),
        ReferenceBatch(images, text, three, three + 1, ("a", "b", "c")),
    ):
        assert_equal(batch.to(torch.device("cpu")), batch)
        moved = batch.to(torch.device("meta"))
        assert {moved.images.device.type, moved.text.tokens.device.type, moved.text.index.device.type} == {"meta"}
        # They address the teacher, whose rows lie on the CPU.
        assert (moved.sample.device.type == "meta") == isinstance(batch, TargetBatch)
    assert batch.to(torch.device("meta")).view.device.type == "cpu"


# What does not change a batch


@pytest.mark.parametrize("make", [targets, references])
def test_batches_are_the_same_whatever_the_number_of_workers(shards: Path, tokenizer: Any, make: Any) -> None:
    order = Order(COUNT, BATCH, seed=SEED)
    steps = range(order.steps_per_epoch + 2)
    expected = list(training_batches(make(shards, tokenizer), order, steps, Options()))
    assert len(expected) == len(steps)
    for workers in (1, 2):
        found = list(training_batches(make(shards, tokenizer), order, steps, Options(workers=workers)))
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)


@pytest.mark.parametrize("make", [targets, references])
@pytest.mark.parametrize("first", [1, 5, 6, 11])
def test_a_run_resumed_at_any_step_goes_on_with_the_same_batches(
    shards: Path, tokenizer: Any, make: Any, first: int
) -> None:
    order = Order(COUNT, BATCH, seed=SEED)
    whole = list(training_batches(make(shards, tokenizer), order, range(13), Options()))
    rest = list(training_batches(make(shards, tokenizer), order, range(first, 13), Options()))
    for one, other in zip(rest, whole[first:], strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("make", [targets, references])
def test_shares_of_the_ranks_laid_end_to_end_are_the_batch_of_one(shards: Path, tokenizer: Any, make: Any) -> None:
    samples = make(shards, tokenizer)

    def batches(rank: int, world_size: int) -> list[Any]:
        order = Order(COUNT, BATCH, rank, world_size, SEED)
        return list(training_batches(samples, order, range(7), Options()))

    for whole, *shares in zip(batches(0, 1), batches(0, 2), batches(1, 2), strict=True):
        assert torch.equal(torch.cat([share.images for share in shares]), whole.images)
        assert torch.cat([share.sample for share in shares]).tolist() == whole.sample.tolist()
        rows = torch.cat([share.text.tokens[share.text.index] for share in shares])
        assert torch.equal(rows, whole.text.tokens[whole.text.index])


# Images that cannot be decoded


def broken(folder: Path, bad: set[int], count: int, how: str = "cut") -> Source:
    """A tar some of whose pictures are broken."""
    samples = {}
    for i in range(count):
        data = tiny.jpeg(i)
        if i in bad:
            data = {"cut": data[: len(data) // 2], "noise": b"<html>" * 50, "empty": b""}[how]
        samples[f"{i:03d}"] = {"jpg": data, "cls": str(i).encode()}
    return open_webdataset(str(tiny.write_tar(folder / "a.tar", samples)), ".cls")


@pytest.mark.parametrize("how", ["cut", "noise", "empty"])
def test_an_image_that_cannot_be_decoded_gives_way_to_the_next_with_a_warning(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    samples = evaluations(broken(tmp_path, {1, 2, 5}, 6, how))
    with caplog.at_level(logging.WARNING):
        (batch,) = batches_of(samples, [(0, sample) for sample in range(6)], 6, Options())
    assert batch.labels.tolist() == [0, 3, 3, 3, 4, 0]  # behind the last comes the first
    for row, label in enumerate(batch.labels.tolist()):
        assert torch.equal(batch.images[row], tiny.shown(PREPROCESS, samples.source.image(label)))
    told = [record.getMessage() for record in caplog.records]
    assert [message.split(": ")[1] for message in told] == [f"sample a.tar/{i:03d}" for i in (1, 2, 2, 5)]
    for message in told:
        assert message.startswith(f"{tmp_path}/a.tar: sample ")
        assert message.endswith("; the next sample takes its place")


def test_the_replacement_comes_with_its_own_text_label_and_index(tmp_path: Path, tokenizer: Any) -> None:
    source = broken(tmp_path, {1}, 4)
    prompts = PromptTable(source, NAMES, TEMPLATES, tokenizer)
    samples = TargetSamples(source, prompts, PREPROCESS, "argmax", SEED)
    (batch,) = batches_of(samples, [(0, 1)], 1, Options())
    (expected,) = batches_of(samples, [(0, 2)], 1, Options())
    assert_equal(batch, expected)
    assert batch.keys == ("a.tar/002",)


def assert_sixteen_are_too_many(folder: Path, count: int, workers: int) -> None:
    last = f"a.tar/{(2 + MAX_REPLACEMENTS - 1) % count:03d}"
    samples = evaluations(broken(folder, set(range(2, 2 + MAX_REPLACEMENTS)) | {0, 1}, count))
    message = (
        rf"^16 samples in a row are unusable; the last: {folder}/a\.tar: sample {last}: "
        r"cannot decode the image: [^\n]+$"
    )
    with pytest.raises(DataError, match=message):
        list(batches_of(samples, [(0, 2)], 1, Options(workers=workers)))


@pytest.mark.parametrize("count", [3, MAX_REPLACEMENTS + 4])
def test_sixteen_bad_images_in_a_row_are_an_error_that_names_the_last(tmp_path: Path, count: int) -> None:
    assert_sixteen_are_too_many(tmp_path, count, workers=0)


def test_an_error_in_a_worker_is_told_in_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The worker of an iterator that ends in an error is left to the garbage collector, and waited for so long.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    assert_sixteen_are_too_many(tmp_path, 3, workers=1)
    gc.collect()


def test_fifteen_bad_images_in_a_row_are_none(tmp_path: Path) -> None:
    samples = evaluations(broken(tmp_path, set(range(2, 2 + MAX_REPLACEMENTS - 1)), MAX_REPLACEMENTS + 4))
    (batch,) = batches_of(samples, [(0, 2)], 1, Options())
    assert batch.labels.tolist() == [2 + MAX_REPLACEMENTS - 1]


# What pictures on the web are like


def encode(mode: str, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image = Image.open(io.BytesIO(tiny.jpeg(7)))
    image = image.convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 256 + 77)
    image.save(content, kind, **options)
    return content.getvalue()


def test_every_kind_of_picture_makes_a_training_and_an_evaluation_view(tmp_path: Path) -> None:
    # Whatever the name says: GIFs and PNGs are called .jpg on the web.
    kinds = {
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
    tar = tiny.write_tar(tmp_path / "a.tar", {key: {"jpg": data, "cls": b"0"} for key, data in kinds.items()})
    source = open_webdataset(str(tar), ".cls")
    assert len(source) == len(kinds)
    transform = open_clip.image_transform(24, is_train=False, mean=PREPROCESS.mean, std=PREPROCESS.std)
    places = [(0, sample) for sample in range(len(source))]
    (batch,) = batches_of(evaluations(source), places, len(places), Options())
    for view, (key, data) in zip(batch.images, kinds.items(), strict=True):
        image = Image.open(io.BytesIO(data))
        # As open_clip shows it once it is RGB; open_clip itself resizes palettes, bits and transparency before.
        expected = image.convert("RGB") if key != "deep" else Image.open(io.BytesIO(encode("L", "PNG")))
        assert torch.equal(view, transform(expected)), key
        assert image.mode != "RGB" or torch.equal(view, transform(image)), key
        assert view.std() > 0.1, key
        crop = random_crop((image.height, image.width), 0, 0, 0)
        assert tiny.shown(PREPROCESS, image, crop).shape == (3, 24, 24), key


# Real pictures


@pytest.fixture(scope="module")
def photos(real_data: Path) -> Source:
    return open_webdataset(str(real_data / "imagenet_samples" / "imagenet_samples.tar"), ".cls")


@pytest.mark.realdata
def test_real_photos_one_of_each_class_are_found_and_decoded(photos: Source, tokenizer: Any) -> None:
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
def test_real_oddities_look_as_they_do_to_open_clip(photos: Source, real_data: Path) -> None:
    rows = (real_data / "imagenet_samples" / "oddities.txt").read_text().splitlines()[1:]
    oddities = {row.split("\t")[0]: row.split("\t")[2] for row in rows}
    by_key = {Path(sample.key).name: index for index, sample in enumerate(photos.samples)}
    transform = open_clip.image_transform(64, is_train=False, mean=PREPROCESS.mean, std=PREPROCESS.std)
    samples = EvaluationSamples(photos, dataclasses.replace(PREPROCESS, size=(64, 64)))
    seen = Counter()
    for key, what in oddities.items():
        index = by_key[key]
        image = photos.image(index)
        (batch,) = batches_of(samples, [(0, index)], 1, Options())
        assert batch.labels.tolist() == [index]
        assert torch.equal(batch.images[0], transform(image)), (key, what)
        if found := re.search(r"(\d+)x(\d+)", what):
            assert image.size == (int(found[1]), int(found[2]))
            seen["size"] += 1
        if what == "mode L":
            assert image.mode == "L"
            seen["grey"] += 1
        if found := re.search(r"EXIF orientation (\d)", what):
            # open_clip does not turn a picture as its EXIF says, and models were trained so.
            assert image.getexif()[0x0112] == int(found[1])
            upright = ImageOps.exif_transpose(image)
            assert torch.equal(batch.images[0], transform(upright)) == (int(found[1]) == 0)
            seen["orientation"] += 1
    assert seen == {"grey": 23, "orientation": 3, "size": 12}
