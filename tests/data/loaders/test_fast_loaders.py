"""The fast loaders against the plain one, on real files: the same samples, texts and order, and close pixels."""

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
from dive_fast.data.prompts import PromptTable, read_templates
from dive_fast.data.sampler import Order
from dive_fast.data.samples import EvaluationSamples, ReferenceSamples, TargetSamples
from dive_fast.data.sources import source
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.data.transforms import Preprocess
from dive_fast.data.workers import in_workers
from dive_fast.errors import DataError

PREPROCESS = Preprocess((24, 24), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "bicubic", "shortest")
COUNT, BATCH, SEED = 22, 4, 3
FAST = ["dali", "ffcv"]
TOLERANCE = 0.5
"""Mean difference of pixels from PIL's, of 255."""


def picture(height: int, width: int) -> Image.Image:
    """Waves with a little noise: neither flat nor noise alone, which no JPEG keeps."""
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
    made = convert.Options(**{"container": "beton", "shard_samples": 8, "max_side": None} | options)
    prepare(RawSource(open_webdataset(str(raw), text, strict=False)), output, made, workers=1)
    return open_prepared(str(output), text)


@pytest.fixture(scope="module")
def labelled(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return prepared(raw, tmp_path_factory.mktemp("labelled"), ".cls")


@pytest.fixture(scope="module")
def captioned(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return prepared(raw, tmp_path_factory.mktemp("captioned"), ".txt")


def targets(source: Source, tokenizer: Any) -> TargetSamples:
    prompts = PromptTable(source, [f"thing {i}" for i in range(5)], read_templates("simple"), tokenizer)
    return TargetSamples(source, prompts, PREPROCESS, "argmax", SEED)


def difference(one: torch.Tensor, other: torch.Tensor, preprocess: Preprocess = PREPROCESS) -> torch.Tensor:
    """Mean difference of two batches' pixels, image by image, of 255."""
    std = torch.tensor(preprocess.std).view(3, 1, 1)
    return ((one.float() - other.float()).abs() * std * 255).mean((1, 2, 3))


def assert_same_but_for_pixels(one: Any, other: Any) -> None:
    for field in dataclasses.fields(one):
        values = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(values[0]):
            assert_same_but_for_pixels(*values)
        elif field.name != "images" and isinstance(values[0], torch.Tensor):
            assert torch.equal(*values), field.name
        elif field.name != "images":
            assert values[0] == values[1], field.name


def assert_equal(one: Any, other: Any) -> None:
    assert torch.equal(one.images, other.images)
    assert_same_but_for_pixels(one, other)


# The same samples in the same order


@pytest.mark.parametrize("loader", FAST)
@pytest.mark.parametrize("kind", ["target", "eval", "views"])
def test_batches_are_the_plain_ones_over_epochs(
    labelled: Source, captioned: Source, tokenizer: Any, loader: Any, kind: str
) -> None:
    samples: Any = targets(labelled, tokenizer)
    if kind != "target":
        samples = ReferenceSamples(
            captioned, tokenizer, PREPROCESS, "argmax", SEED, 3 if kind == "views" else "eval"
        )
    order = Order(COUNT, BATCH, seed=SEED)
    steps = range(2 * order.steps_per_epoch + 1)
    fast = training_batches(samples, order, steps, Options(loader))
    for found, expected in zip(fast, training_batches(samples, order, steps, Options()), strict=True):
        assert_same_but_for_pixels(found, expected)
        assert found.images.dtype == torch.float32
        assert found.images.is_contiguous()
        assert difference(found.images, expected.images).max() < TOLERANCE


@pytest.mark.parametrize("loader", FAST)
def test_neither_workers_nor_a_resume_change_a_bit(labelled: Source, tokenizer: Any, loader: Any) -> None:
    samples, order = targets(labelled, tokenizer), Order(COUNT, BATCH, seed=SEED)
    whole = list(training_batches(samples, order, range(12), Options(loader)))
    for workers in (1, 3):
        for one, other in zip(
            training_batches(samples, order, range(12), Options(loader, workers)), whole, strict=True
        ):
            assert_equal(one, other)
    for first in (1, 4, 7):  # in the middle, at an epoch's last step, in the next epoch
        rest = training_batches(samples, order, range(first, 12), Options(loader))
        for one, other in zip(rest, whole[first:], strict=True):
            assert_equal(one, other)


@pytest.mark.parametrize("loader", FAST)
@pytest.mark.parametrize("world_size", [2, 3])
def test_shares_of_the_ranks_laid_end_to_end_are_the_batch_of_one(
    labelled: Source, tokenizer: Any, loader: Any, world_size: int
) -> None:
    samples, size = targets(labelled, tokenizer), 6

    def batches(rank: int, ranks: int) -> list[Any]:
        return list(training_batches(samples, Order(COUNT, size, rank, ranks, SEED), range(7), Options(loader)))

    ranks = [batches(rank, world_size) for rank in range(world_size)]
    assert {len(steps) for steps in ranks} == {7}
    for whole, *shares in zip(batches(0, 1), *ranks, strict=True):
        assert torch.equal(torch.cat([share.images for share in shares]), whole.images)
        assert torch.cat([share.sample for share in shares]).tolist() == whole.sample.tolist()


@pytest.mark.parametrize("loader", FAST)
def test_the_last_batch_of_an_evaluation_is_what_is_left(labelled: Source, loader: Any) -> None:
    samples = EvaluationSamples(labelled, PREPROCESS)
    places = [(0, sample) for sample in range(10)]
    batches = list(batches_of(samples, places, 4, Options(loader)))
    assert [len(batch.images) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [sample % 5 for sample in range(10)]
    assert list(batches_of(samples, [], 4, Options(loader))) == []


@pytest.mark.parametrize("loader", ["plain", *FAST])
def test_images_come_in_the_dtype_and_layout_asked_for(labelled: Source, loader: Any) -> None:
    samples, places = EvaluationSamples(labelled, PREPROCESS), [(0, 0), (0, 1)]
    (exact,) = batches_of(samples, places, 2, Options(loader))
    for dtype in (torch.float32, torch.float16):
        for channels_last in (False, True):
            (batch,) = batches_of(samples, places, 2, Options(loader, dtype=dtype, channels_last=channels_last))
            assert batch.images.dtype == dtype
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert batch.images.is_contiguous(memory_format=layout)
            # One unit in the last place: DALI normalises by one multiplication and addition.
            assert torch.allclose(batch.images.float(), exact.images, atol=1e-6, rtol=2**-11)


def test_plain_and_dali_read_a_beton_and_dali_raw_tars_and_folders(
    raw: Path, labelled: Source, tmp_path: Path
) -> None:
    places = [(0, sample) for sample in range(COUNT)]
    tars = open_webdataset(str(raw), ".cls")
    for index in range(COUNT):
        path = tmp_path / str(index % 5) / f"{index:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tars.read(index))
    (expected,) = batches_of(EvaluationSamples(tars, PREPROCESS), places, COUNT, Options())
    for loader in ("plain", "dali"):
        (found,) = batches_of(EvaluationSamples(labelled, PREPROCESS), places, COUNT, Options(loader))
        assert difference(found.images, expected.images).max() < TOLERANCE
        assert found.labels.tolist() == expected.labels.tolist()
    folder = open_folder(str(tmp_path))
    rows = [int(Path(sample.key).stem) for sample in folder.samples]
    for found_source, order in ((tars, list(range(COUNT))), (folder, rows)):
        (found,) = batches_of(EvaluationSamples(found_source, PREPROCESS), places, COUNT, Options("dali"))
        assert difference(found.images, expected.images[order]).max() < TOLERANCE


def test_captions_are_read_as_they_were_tokenised_if_by_the_same_tokenizer(
    raw: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = prepared(raw, tmp_path / "set", ".txt", tokenizer="ViT-B-32")
    places = [(0, sample) for sample in range(COUNT)]

    def texts(tokenizer: Any) -> Any:
        samples = ReferenceSamples(source, tokenizer, PREPROCESS, "argmax", SEED)
        monkeypatch.setattr(samples, "tokenizer", None)
        (batch,) = batches_of(samples, places, COUNT, Options())
        return batch.text.tokens[batch.text.index]

    captions = [sample.texts[0] for sample in source.samples]
    assert torch.equal(texts(tokenizer), tokenizer(captions))
    with caplog.at_level(logging.WARNING), pytest.raises(TypeError):  # it asks the tokenizer, which is gone
        texts(lambda captions: tokenizer(captions, context_length=20))
    assert "captions are tokenised anew" in caplog.text


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
def test_pictures_of_odd_sizes_come_out_as_by_pil(
    tmp_path: Path, loader: Any, size: int, interpolation: str, resize_mode: str
) -> None:
    pictures = {f"{h}x{w}": {"jpg": jpeg(picture(h, w)), "cls": b"0"} for h, w in ODD_SIZES}
    tiny.write_tar(tmp_path / "raw.tar", pictures)
    source = prepared(tmp_path / "raw.tar", tmp_path / "set", ".cls", min_side=1)
    preprocess = Preprocess((size, size), PREPROCESS.mean, PREPROCESS.std, interpolation, resize_mode)
    places = [(epoch, sample) for epoch in range(2) for sample in range(len(source))]
    prompts = PromptTable(source, ["thing"], read_templates("simple"), open_clip.get_tokenizer("ViT-B-32"))
    for samples in (
        TargetSamples(source, prompts, preprocess, "argmax", SEED),
        EvaluationSamples(source, preprocess),
    ):
        if loader == "ffcv" and resize_mode == "longest":
            with pytest.raises(DataError, match="resize_mode longest"):
                list(batches_of(samples, places, 5, Options(loader)))
            continue
        found, expected = (
            torch.cat([batch.images for batch in batches_of(samples, places, 5, Options(name))])
            for name in (loader, "plain")
        )
        assert difference(found, expected, preprocess).max() < TOLERANCE


@pytest.mark.realdata
@pytest.mark.parametrize("loader", FAST)
def test_real_photos_come_out_as_by_pil(real_data: Path, tmp_path: Path, loader: Any) -> None:
    """Among them grey ones, EXIF orientations and a side of 100 pixels; bytes kept, so the same JPEGs for both."""
    tar = real_data / "imagenet_samples" / "imagenet_samples.tar"
    source = prepared(tar, tmp_path / "set", ".cls")
    assert len(source) == 1000
    preprocess = dataclasses.replace(PREPROCESS, size=(224, 224))
    odd = [52, 473, 553]
    places = [(0, sample) for sample in odd + list(range(0, 1000, 31))]
    prompts = PromptTable(
        source, open_clip.IMAGENET_CLASSNAMES, read_templates("a {}"), open_clip.get_tokenizer("ViT-B-32")
    )
    for samples in (
        TargetSamples(source, prompts, preprocess, "argmax", SEED),
        EvaluationSamples(source, preprocess),
    ):
        (found,), (expected,) = (
            batches_of(samples, places, len(places), Options(name)) for name in (loader, "plain")
        )
        assert_same_but_for_pixels(found, expected)
        assert difference(found.images, expected.images).max() < TOLERANCE


# What pictures on the web are like


def odd_files() -> dict[str, bytes]:
    """Every kind of picture, whatever its name says, and what is none."""

    def encode(mode: str, kind: str, **options: Any) -> bytes:
        content = io.BytesIO()
        image = picture(60, 80)
        image.convert("L" if mode == "I;16" else mode).convert(mode).save(content, kind, **options)
        return content.getvalue()

    whole = jpeg(picture(60, 80))
    return {
        "good": whole,
        "grey": encode("L", "JPEG"),
        "cmyk": encode("CMYK", "JPEG"),
        "progressive": encode("RGB", "JPEG", progressive=True),
        "gif": encode("P", "GIF"),
        "png": encode("RGBA", "PNG"),
        "palette": encode("P", "PNG", transparency=3),
        "deep": encode("I;16", "PNG"),
        "webp": encode("RGB", "WEBP"),
        "cut": whole[: len(whole) // 2],
        "without_end": whole[:-2],
        "html": b"<html>404</html>" * 9,
        "empty": b"",
        "größe": whole,
        "bitmap": encode("1", "BMP"),
    }


def test_no_file_ends_a_run_and_each_is_seen_as_by_the_plain_loader(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = odd_files()
    tar = tiny.write_tar(tmp_path / "a.tar", {key: {"jpg": data, "cls": b"0"} for key, data in files.items()})
    samples = EvaluationSamples(open_webdataset(str(tar), ".cls"), PREPROCESS)
    places = [(0, sample) for sample in range(len(files))]
    with caplog.at_level(logging.WARNING):
        found, expected = (
            torch.cat([batch.images for batch in batches_of(samples, places, 4, Options(name))])
            for name in ("dali", "plain")
        )
    told = [message for message in caplog.messages if "takes its place" in message]
    bad = {message.split("sample ")[1].split(":")[0] for message in told}
    assert bad == {"a.tar/cut", "a.tar/html", "a.tar/empty"}
    assert len(told) == 2 * 3 + 2  # by either loader; behind html comes empty, tried twice
    assert difference(found, expected).max() < TOLERANCE
    # What PIL has to decode is handed over as it was cut.
    exact = [
        row
        for row, key in enumerate(files)
        if key not in ("good", "grey", "progressive", "cut", "größe", "html", "empty")
    ]
    assert difference(found, expected)[exact].max() < 1e-3


def test_where_dali_gives_up_pil_goes_on(
    labelled: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = {f"{i:02d}": jpeg(picture(50, 50 + i)) for i in range(20)}
    files["09"] = files["09"][: len(files["09"]) // 2]
    tar = tiny.write_tar(tmp_path / "a.tar", {key: {"jpg": data, "cls": b"0"} for key, data in files.items()})
    samples = EvaluationSamples(open_webdataset(str(tar), ".cls"), PREPROCESS)
    places = [(0, sample) for sample in range(20)]
    expected = torch.cat([batch.images for batch in batches_of(samples, places, 2, Options())])
    # As if it looked whole: DALI gets to see it, and fails for real.
    monkeypatch.setattr(dali, "unsupported_reason", lambda image, data: "")
    with caplog.at_level(logging.WARNING):
        batches = list(batches_of(samples, places, 2, Options("dali")))
    assert [len(batch.images) for batch in batches] == [2] * 10
    assert difference(torch.cat([batch.images for batch in batches]), expected).max() < TOLERANCE
    assert sum("DALI gave up" in message for message in caplog.messages) == 1
    assert sum("a.tar/09: cannot decode" in message for message in caplog.messages) == 2  # by plain, and here


def _collect_garbage(places: Any) -> int:
    return gc.collect()


def test_workers_do_not_shut_down_the_pipelines_of_their_parent() -> None:
    """They would wait for ever for its threads, which they have not inherited."""
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


# What cannot be


@pytest.mark.parametrize("workers", [0, 1])
def test_sixteen_bad_images_in_a_row_end_a_run_in_one_line_with_dali_too(tmp_path: Path, workers: int) -> None:
    tar = tiny.write_tar(tmp_path / "a.tar", {f"{i:02d}": {"jpg": b"<html>", "cls": b"0"} for i in range(20)})
    samples = EvaluationSamples(open_webdataset(str(tar), ".cls"), PREPROCESS)
    with pytest.raises(DataError, match=r"^16 samples in a row are unusable; the last: .*a.tar/15: [^\n]*$"):
        list(batches_of(samples, [(0, 0)], 1, Options("dali", workers)))


@pytest.mark.parametrize(("loader", "module"), [("dali", "nvidia.dali"), ("ffcv", "ffcv.fields")])
def test_a_loader_that_is_not_installed_says_how_to_install_it(
    labelled: Source, monkeypatch: pytest.MonkeyPatch, loader: Any, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"cannot be imported .*install") as error:
        list(batches_of(EvaluationSamples(labelled, PREPROCESS), [(0, 0)], 1, Options(loader)))
    assert "\n" not in str(error.value)


def test_ffcv_says_what_it_cannot_read(raw: Path, tmp_path: Path) -> None:
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
    for at, message in (
        (0, "not a file of FFCV"),
        (8, "its index has 22"),
        (source.samples[1].offset, "damaged"),
    ):
        broken = bytearray(data)
        broken[at : at + 2] = b"\x77\x00"
        source.beton.write_bytes(broken)
        with pytest.raises(DataError, match=message):
            load(source)


def test_a_prepared_set_is_what_its_index_says(raw: Path, captioned: Source) -> None:
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
