"""The fast loaders against the plain one on real files: equal samples, texts and order, and close pixels."""

import dataclasses
import gc
import io
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tiny
import torch
from PIL import Image

from dive_fast.config.schema import ReferenceConfig
from dive_fast.data.loaders import dali
from dive_fast.data.loaders.loader import Options, batches_of, training_batches
from dive_fast.data.open_dataset import open_reference
from dive_fast.data.prepared import convert
from dive_fast.data.prepared.raw import RawSource
from dive_fast.data.prepared.read import open_prepared
from dive_fast.data.prepared.write import prepare
from dive_fast.data.prompt_files import read_templates
from dive_fast.data.prompts import PromptTable, SecondPrompts
from dive_fast.data.sampler import Order
from dive_fast.data.samples import EvaluationSamples, ReferenceSamples, TargetSamples
from dive_fast.data.sources import source
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.tar_stream import open_tar_stream
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.data.stream_order import StreamOrder
from dive_fast.data.transforms import Preprocess
from dive_fast.data.workers import in_workers
from dive_fast.errors import DataError

PREPROCESS = Preprocess((24, 24), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "bicubic", "shortest")
COUNT, BATCH, SEED = 22, 4, 3
FAST = ["dali", "ffcv"]
TOLERANCE = 0.5
"""Maximum mean difference from PIL's pixels, of 255."""


def wave_image(height: int, width: int) -> Image.Image:
    """An image of waves with a little noise; JPEG would not preserve pure noise."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([127 + 90 * np.sin(x / 7 + c) + 30 * np.cos(y / 5 - c) for c in range(3)], -1)
    noise = np.random.default_rng(height * width).normal(0, 6, waves.shape)
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=92)
    return content.getvalue()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return open_clip.get_tokenizer("ViT-B-32")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_shards(tmp_path_factory.mktemp("raw"), COUNT)


def prepared(raw: Path, output: Path, text: str, **options: Any) -> Source:
    conversion = convert.Options(**{"container": "beton", "shard_samples": 8, "max_side": None} | options)
    prepare(RawSource(open_webdataset(str(raw), text, strict=False)), output, conversion, workers=1)
    return open_prepared(str(output), text)


@pytest.fixture(scope="module")
def labelled(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return prepared(raw, tmp_path_factory.mktemp("labelled"), ".cls")


@pytest.fixture(scope="module")
def captioned(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return prepared(raw, tmp_path_factory.mktemp("captioned"), ".txt")


def target_samples(source: Source, tokenizer: Any) -> TargetSamples:
    prompts = PromptTable(source, [f"thing {i}" for i in range(5)], read_templates("simple"), tokenizer)
    second = SecondPrompts(prompts, read_templates("{} at night."), tokenizer)
    return TargetSamples(source, prompts, PREPROCESS, "argmax", SEED, second)


def difference(one: torch.Tensor, other: torch.Tensor, preprocess: Preprocess = PREPROCESS) -> torch.Tensor:
    """Mean difference of the pixels of two batches per image, of 255."""
    std = torch.tensor(preprocess.std).view(3, 1, 1)
    return ((one.float() - other.float()).abs() * std * 255).mean((1, 2, 3))


def assert_equal_except_pixels(one: Any, other: Any) -> None:
    for field in dataclasses.fields(one):
        values = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(values[0]):
            assert_equal_except_pixels(*values)
        elif field.name != "images" and isinstance(values[0], torch.Tensor):
            assert torch.equal(*values), field.name
        elif field.name != "images":
            assert values[0] == values[1], field.name


def assert_equal(one: Any, other: Any) -> None:
    assert torch.equal(one.images, other.images)
    assert_equal_except_pixels(one, other)


# Equal samples in equal order


@pytest.mark.parametrize("loader", FAST)
@pytest.mark.parametrize("kind", ["target", "eval", "views"])
def test_fast_batches_equal_plain_ones_over_epochs(
    labelled: Source, captioned: Source, tokenizer: Any, loader: Any, kind: str
) -> None:
    samples: Any = target_samples(labelled, tokenizer)
    if kind != "target":
        samples = ReferenceSamples(
            captioned, tokenizer, PREPROCESS, "argmax", SEED, 3 if kind == "views" else "eval"
        )
    order = Order(COUNT, BATCH, seed=SEED)
    steps = range(2 * order.steps_per_epoch + 1)
    fast = training_batches(samples, order, steps, Options(loader))
    for actual, expected in zip(fast, training_batches(samples, order, steps, Options()), strict=True):
        assert_equal_except_pixels(actual, expected)
        assert actual.images.dtype == torch.float32
        assert actual.images.is_contiguous()
        assert difference(actual.images, expected.images).max() < TOLERANCE


def test_dali_batches_of_a_stream_equal_plain_ones(raw: Path, tokenizer: Any) -> None:
    stream = open_tar_stream(str(raw), 12)
    samples = ReferenceSamples(stream, tokenizer, PREPROCESS, "argmax", SEED, 3)
    full = list(training_batches(samples, StreamOrder(stream, BATCH, seed=SEED), range(9), Options()))
    for first, workers in ((0, 0), (4, 1)):
        options = Options("dali", workers)
        dali_batches = training_batches(samples, StreamOrder(stream, BATCH, seed=SEED), range(first, 9), options)
        for actual, expected in zip(dali_batches, full[first:], strict=True):
            assert_equal_except_pixels(actual, expected)
            assert difference(actual.images, expected.images).max() < TOLERANCE


@pytest.mark.parametrize("loader", FAST)
def test_fast_batches_do_not_depend_on_workers_or_a_resume(labelled: Source, tokenizer: Any, loader: Any) -> None:
    samples, order = target_samples(labelled, tokenizer), Order(COUNT, BATCH, seed=SEED)
    full = list(training_batches(samples, order, range(12), Options(loader)))
    for workers in (1, 3):
        for one, other in zip(
            training_batches(samples, order, range(12), Options(loader, workers)), full, strict=True
        ):
            assert_equal(one, other)
    for first in (1, 4, 7):  # in the middle, at an epoch's last step, in the next epoch
        rest = training_batches(samples, order, range(first, 12), Options(loader))
        for one, other in zip(rest, full[first:], strict=True):
            assert_equal(one, other)


@pytest.mark.parametrize("loader", FAST)
@pytest.mark.parametrize("world_size", [2, 3])
def test_fast_shares_of_ranks_concatenate_to_the_full_batch(
    labelled: Source, tokenizer: Any, loader: Any, world_size: int
) -> None:
    samples, size = target_samples(labelled, tokenizer), 6

    def batches(rank: int, ranks: int) -> list[Any]:
        return list(training_batches(samples, Order(COUNT, size, rank, ranks, SEED), range(7), Options(loader)))

    ranks = [batches(rank, world_size) for rank in range(world_size)]
    assert {len(steps) for steps in ranks} == {7}
    for full, *shares in zip(batches(0, 1), *ranks, strict=True):
        assert torch.equal(torch.cat([share.images for share in shares]), full.images)
        assert torch.cat([share.sample for share in shares]).tolist() == full.sample.tolist()


@pytest.mark.parametrize("loader", FAST)
def test_last_fast_evaluation_batch_may_be_smaller(labelled: Source, loader: Any) -> None:
    samples = EvaluationSamples(labelled, PREPROCESS)
    sample_keys = [(0, sample) for sample in range(10)]
    batches = list(batches_of(samples, sample_keys, 4, Options(loader)))
    assert [len(batch.images) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [sample % 5 for sample in range(10)]
    assert list(batches_of(samples, [], 4, Options(loader))) == []


@pytest.mark.parametrize("loader", ["plain", *FAST])
def test_images_have_the_requested_dtype_and_layout(labelled: Source, loader: Any) -> None:
    samples, sample_keys = EvaluationSamples(labelled, PREPROCESS), [(0, 0), (0, 1)]
    (exact,) = batches_of(samples, sample_keys, 2, Options(loader))
    for dtype in (torch.float32, torch.float16):
        for channels_last in (False, True):
            (batch,) = batches_of(
                samples, sample_keys, 2, Options(loader, dtype=dtype, channels_last=channels_last)
            )
            assert batch.images.dtype == dtype
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert batch.images.is_contiguous(memory_format=layout)
            assert torch.equal(batch.images, exact.images.to(dtype))


def test_plain_and_dali_read_every_container(raw: Path, labelled: Source, tmp_path: Path) -> None:
    sample_keys = [(0, sample) for sample in range(COUNT)]
    tars = open_webdataset(str(raw), ".cls")
    for index in range(COUNT):
        path = tmp_path / str(index % 5) / f"{index:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tars.read(index))
    (expected,) = batches_of(EvaluationSamples(tars, PREPROCESS), sample_keys, COUNT, Options())
    for loader in ("plain", "dali"):
        (actual,) = batches_of(EvaluationSamples(labelled, PREPROCESS), sample_keys, COUNT, Options(loader))
        assert difference(actual.images, expected.images).max() < TOLERANCE
        assert actual.labels.tolist() == expected.labels.tolist()
    folder = open_folder(str(tmp_path))
    rows = [int(Path(sample.key).stem) for sample in folder.samples]
    for raw_source, order in ((tars, list(range(COUNT))), (folder, rows)):
        (actual,) = batches_of(EvaluationSamples(raw_source, PREPROCESS), sample_keys, COUNT, Options("dali"))
        assert difference(actual.images, expected.images[order]).max() < TOLERANCE


def test_prepared_tokens_are_used_for_the_same_tokenizer(
    raw: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = prepared(raw, tmp_path / "set", ".txt", tokenizer="ViT-B-32")
    sample_keys = [(0, sample) for sample in range(COUNT)]

    def texts(tokenizer: Any) -> Any:
        samples = ReferenceSamples(source, tokenizer, PREPROCESS, "argmax", SEED)
        monkeypatch.setattr(samples, "tokenizer", None)
        (batch,) = batches_of(samples, sample_keys, COUNT, Options())
        return batch.text.tokens[batch.text.index]

    captions = [sample.texts[0] for sample in source.samples]
    assert torch.equal(texts(tokenizer), tokenizer(captions))
    with caplog.at_level(logging.WARNING), pytest.raises(TypeError):  # it calls the removed tokenizer
        texts(lambda captions: tokenizer(captions, context_length=20))
    assert "captions are tokenised again" in caplog.text


# Pixels

ODD_SIZES = [(1, 500), (500, 1), (31, 33), (5000, 40), (40, 5000), (224, 224), (2, 3), (447, 300)]


@pytest.mark.parametrize("loader", FAST)
@pytest.mark.parametrize(
    ("size", "interpolation", "resize_mode"),
    [
        (224, "bicubic", "shortest"),
        (336, "bicubic", "squash"),
        (384, "bilinear", "shortest"),
        (224, "bicubic", "longest"),
    ],
)
def test_fast_pixels_are_close_to_pil_for_odd_sizes(
    tmp_path: Path, loader: Any, size: int, interpolation: str, resize_mode: str
) -> None:
    images = {f"{h}x{w}": {"jpg": jpeg(wave_image(h, w)), "cls": b"0"} for h, w in ODD_SIZES}
    tiny.write_tar(tmp_path / "raw.tar", images)
    source = prepared(tmp_path / "raw.tar", tmp_path / "set", ".cls", min_side=1)
    preprocess = Preprocess((size, size), PREPROCESS.mean, PREPROCESS.std, interpolation, resize_mode)
    sample_keys = [(epoch, sample) for epoch in range(2) for sample in range(len(source))]
    prompts = PromptTable(source, ["thing"], read_templates("simple"), open_clip.get_tokenizer("ViT-B-32"))
    for samples in (
        TargetSamples(source, prompts, preprocess, "argmax", SEED),
        EvaluationSamples(source, preprocess),
    ):
        if loader == "ffcv" and resize_mode == "longest":
            with pytest.raises(DataError, match="resize_mode longest"):
                list(batches_of(samples, sample_keys, 5, Options(loader)))
            continue
        actual, expected = (
            torch.cat([batch.images for batch in batches_of(samples, sample_keys, 5, Options(name))])
            for name in (loader, "plain")
        )
        assert difference(actual, expected, preprocess).max() < TOLERANCE


@pytest.mark.realdata
@pytest.mark.parametrize("loader", FAST)
def test_fast_pixels_are_close_to_pil_for_real_photos(real_data: Path, tmp_path: Path, loader: Any) -> None:
    """Photos include grey ones, EXIF orientations and a side of 100 pixels; both loaders read the same JPEGs."""
    tar = real_data / "imagenet_samples" / "imagenet_samples.tar"
    source = prepared(tar, tmp_path / "set", ".cls")
    assert len(source) == 1000
    preprocess = dataclasses.replace(PREPROCESS, size=(224, 224))
    odd = [52, 473, 553]
    sample_keys = [(0, sample) for sample in odd + list(range(0, 1000, 31))]
    prompts = PromptTable(
        source, open_clip.IMAGENET_CLASSNAMES, read_templates("a {}"), open_clip.get_tokenizer("ViT-B-32")
    )
    for samples in (
        TargetSamples(source, prompts, preprocess, "argmax", SEED),
        EvaluationSamples(source, preprocess),
    ):
        (actual,), (expected,) = (
            batches_of(samples, sample_keys, len(sample_keys), Options(name)) for name in (loader, "plain")
        )
        assert_equal_except_pixels(actual, expected)
        assert difference(actual.images, expected.images).max() < TOLERANCE


# Formats of web images


def odd_files() -> dict[str, bytes]:
    """Images of every format and files that are not images."""

    def encode(mode: str, kind: str, **options: Any) -> bytes:
        content = io.BytesIO()
        image = wave_image(60, 80)
        image.convert("L" if mode == "I;16" else mode).convert(mode).save(content, kind, **options)
        return content.getvalue()

    good = jpeg(wave_image(60, 80))
    return {
        "good": good,
        "grey": encode("L", "JPEG"),
        "cmyk": encode("CMYK", "JPEG"),
        "progressive": encode("RGB", "JPEG", progressive=True),
        "gif": encode("P", "GIF"),
        "png": encode("RGBA", "PNG"),
        "palette": encode("P", "PNG", transparency=3),
        "deep": encode("I;16", "PNG"),
        "webp": encode("RGB", "WEBP"),
        "cut": good[: len(good) // 2],
        "without_end": good[:-2],
        "html": b"<html>404</html>" * 9,
        "empty": b"",
        "größe": good,
        "bitmap": encode("1", "BMP"),
    }


def test_dali_equals_plain_for_every_format(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = odd_files()
    tar = tiny.write_tar(tmp_path / "a.tar", {key: {"jpg": data, "cls": b"0"} for key, data in files.items()})
    samples = EvaluationSamples(open_webdataset(str(tar), ".cls"), PREPROCESS)
    sample_keys = [(0, sample) for sample in range(len(files))]
    with caplog.at_level(logging.WARNING):
        actual, expected = (
            torch.cat([batch.images for batch in batches_of(samples, sample_keys, 4, Options(name))])
            for name in ("dali", "plain")
        )
    warnings = [message for message in caplog.messages if "the next sample replaces it" in message]
    bad = {message.split("sample ")[1].split(":")[0] for message in warnings}
    assert bad == {"a.tar/cut", "a.tar/html", "a.tar/empty"}
    assert len(warnings) == 2 * 3 + 2  # from both loaders; html is followed by empty, which is tried twice
    assert difference(actual, expected).max() < TOLERANCE
    # Formats that PIL decodes are passed on as finished views.
    pil_rows = [
        row
        for row, key in enumerate(files)
        if key not in ("good", "grey", "progressive", "cut", "größe", "html", "empty")
    ]
    assert difference(actual, expected)[pil_rows].max() < 1e-3


def test_dali_failure_falls_back_to_pil(
    labelled: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = {f"{i:02d}": jpeg(wave_image(50, 50 + i)) for i in range(20)}
    files["09"] = files["09"][: len(files["09"]) // 2]
    tar = tiny.write_tar(tmp_path / "a.tar", {key: {"jpg": data, "cls": b"0"} for key, data in files.items()})
    samples = EvaluationSamples(open_webdataset(str(tar), ".cls"), PREPROCESS)
    sample_keys = [(0, sample) for sample in range(20)]
    expected = torch.cat([batch.images for batch in batches_of(samples, sample_keys, 2, Options())])
    # The truncated file is not detected, so that DALI itself fails.
    monkeypatch.setattr(dali, "unsupported_reason", lambda image, data: "")
    with caplog.at_level(logging.WARNING):
        batches = list(batches_of(samples, sample_keys, 2, Options("dali")))
    assert [len(batch.images) for batch in batches] == [2] * 10
    assert difference(torch.cat([batch.images for batch in batches]), expected).max() < TOLERANCE
    assert sum("DALI failed" in message for message in caplog.messages) == 1
    assert (
        sum("a.tar/09: cannot decode" in message for message in caplog.messages) == 2
    )  # from the plain loader and from here


def _collect_garbage(batch: Any) -> int:
    return gc.collect()


def test_workers_leave_the_pipelines_of_their_parent_alone() -> None:
    """Workers would wait forever for threads that a fork does not inherit."""
    from nvidia.dali import Pipeline, types

    gc.disable()
    try:
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
        with pipeline:
            pipeline.set_outputs(types.Constant(1))
        pipeline.run()
        pipeline.cycle = pipeline
        del pipeline
        assert len(list(in_workers(_collect_garbage, [0], workers=1))) == 1
    finally:
        gc.enable()


# Errors


@pytest.mark.parametrize("workers", [0, 1])
def test_dali_fails_after_too_many_unusable_images(tmp_path: Path, workers: int) -> None:
    tar = tiny.write_tar(tmp_path / "a.tar", {f"{i:02d}": {"jpg": b"<html>", "cls": b"0"} for i in range(20)})
    samples = EvaluationSamples(open_webdataset(str(tar), ".cls"), PREPROCESS)
    with pytest.raises(DataError, match=r"^16 samples in a row are unusable; the last: .*a.tar/15: [^\n]*$"):
        list(batches_of(samples, [(0, 0)], 1, Options("dali", workers)))


@pytest.mark.parametrize(("loader", "module"), [("dali", "nvidia.dali"), ("ffcv", "ffcv.fields")])
def test_missing_loader_package_names_the_install_command(
    labelled: Source, monkeypatch: pytest.MonkeyPatch, loader: Any, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"cannot be imported .*install") as error:
        list(batches_of(EvaluationSamples(labelled, PREPROCESS), [(0, 0)], 1, Options(loader)))
    assert "\n" not in str(error.value)


def test_ffcv_rejects_unprepared_and_damaged_data(raw: Path, tmp_path: Path) -> None:
    def load(source: Source) -> None:
        list(batches_of(EvaluationSamples(source, PREPROCESS), [(0, 0), (0, 1)], 2, Options("ffcv")))

    with pytest.raises(DataError, match="--container beton"):
        load(open_webdataset(str(raw), ".cls"))
    section = ReferenceConfig(format="webdataset", path=str(raw), loader="ffcv")
    with pytest.raises(DataError, match=r"^data\.reference: .*loader = ffcv needs a set prepared for it"):
        open_reference(section)
    source = prepared(raw, tmp_path / "set", ".cls")
    assert source.beton is not None
    data = bytearray(source.beton.read_bytes())
    for offset, message in (
        (0, "not an FFCV file"),
        (8, "its index has 22"),
        (source.samples[1].offset, "damaged"),
    ):
        broken = bytearray(data)
        broken[offset : offset + 2] = b"\x77\x00"
        source.beton.write_bytes(broken)
        with pytest.raises(DataError, match=message):
            load(source)


def test_prepared_set_equals_its_source(raw: Path, captioned: Source) -> None:
    tars = open_webdataset(str(raw), ".txt")
    assert [sample.key for sample in captioned.samples] == [sample.key for sample in tars.samples]
    assert [sample.texts for sample in captioned.samples] == [sample.texts for sample in tars.samples]
    assert [captioned.read(index) for index in range(COUNT)] == [tars.read(index) for index in range(COUNT)]
    assert captioned.sizes is not None
    assert captioned.sizes.tolist() == [[image.height, image.width] for image in map(tars.image, range(COUNT))]
    assert captioned.samples[-1] == captioned.samples[COUNT - 1]
    assert captioned.samples[1:3] == [captioned.samples[1], captioned.samples[2]]
    with pytest.raises(IndexError):
        captioned.samples[COUNT]
    assert source.Source is Source
