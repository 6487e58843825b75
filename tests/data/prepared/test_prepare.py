"""Tests of preparation: conversion, left-out samples, kills, full disks, and changed options or sources."""

import dataclasses
import io
import json
import os
import random
import resource
import runpy
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tiny
import torch
from distributed import run_script
from PIL import Image
from safetensors.torch import load_file, save_file

from dive_fast.commands import prepare as prepare_command
from dive_fast.data.prepared.beton import write_beton
from dive_fast.data.prepared.convert import LEAST_ASPECT_RATIO, Options, convert, side_for
from dive_fast.data.prepared.format import (
    Manifest,
    Row,
    build_index,
    concatenate_indexes,
    format_of,
    read_manifest,
    write_manifest,
)
from dive_fast.data.prepared.raw import RawDataset, RawSource, UnusableError
from dive_fast.data.prepared.read import open_prepared, verify
from dive_fast.data.prepared.write import prepare
from dive_fast.data.sources.csv_table import open_csv
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.sample_table import SampleTable
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.data.transforms import ASPECT_RATIO, random_crop
from dive_fast.data.workers import FORK
from dive_fast.errors import DataError
from dive_fast.locks import Lock, LockedError

REPOSITORY = Path(__file__).parents[3]
SMALL = Options(shard_samples=4, max_side=64)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def picture(height: int = 60, width: int = 80, mode: str = "RGB") -> Image.Image:
    y, x = np.linspace(0, 8, height)[:, None], np.linspace(0, 9, width)
    waves = np.stack([127 + 90 * np.sin(x + c) + 30 * np.cos(y - c) for c in range(3)], -1)
    return Image.fromarray(waves.clip(0, 255).astype(np.uint8)).convert(mode)


def decoded(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def write_set(path: Path, count: int = 22) -> Path:
    """A tar of captioned and labelled pictures."""
    return (tiny.write_shards(path.with_suffix(""), count, shard=count) / "0.tar").rename(path)


def make(tar: Path, output: Path, options: Options = SMALL, text: str = ".cls", workers: int = 1) -> Manifest:
    return prepare(RawSource(open_webdataset(str(tar), text, strict=False)), output, options, workers)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def launch(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command; with options of a process, in one that has to import everything first."""
    script = str(REPOSITORY / "launch" / "prepare.py")
    if not options:
        return run_script(script, *arguments, cwd=REPOSITORY)
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


# One image


def test_convert_keeps_bytes_of_suitable_jpegs() -> None:
    for image in (picture(), picture(mode="L")):
        for options in ({}, {"progressive": True}, {"quality": 30}):
            data = encoded(image, **options)
            assert convert(data, Options()) == (data, 60, 80, "")
    data = encoded(picture(600, 700))
    assert convert(data, Options(max_side=None)) == (data, 600, 700, "")
    assert convert(data, Options(max_side=600)) == (data, 600, 700, "")


@pytest.mark.parametrize(
    ("mode", "kind", "reason"),
    [
        ("CMYK", "JPEG", "CMYK JPEG"),
        ("RGB", "PNG", "PNG"),
        ("RGBA", "PNG", "PNG"),
        ("P", "GIF", "GIF"),
        ("P", "PNG", "PNG"),
        ("1", "BMP", "BMP"),
        ("RGB", "WEBP", "WEBP"),
    ],
)
def test_convert_other_formats_to_similar_jpegs(mode: str, kind: str, reason: str) -> None:
    data = encoded(picture(mode=mode), kind)
    converted = convert(data, Options())
    assert (converted.height, converted.width, converted.reason) == (60, 80, reason)
    image = Image.open(io.BytesIO(converted.jpeg))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (80, 60))
    if mode not in ("1", "P"):  # a JPEG does not keep dithering
        assert np.abs(decoded(converted.jpeg).astype(int) - decoded(data)).mean() < 2


def test_convert_16_bits_keep_their_upper_8() -> None:
    grey = np.asarray(picture(mode="L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 256 + 77)
    assert np.abs(decoded(convert(encoded(deep, "PNG"), Options()).jpeg)[..., 0].astype(int) - grey).mean() < 2


@pytest.mark.parametrize(
    ("size", "expected"), [((128, 80), (102, 64)), ((65, 3000), (64, 2954)), ((640, 640), (64, 64))]
)
def test_convert_resizes_by_the_shorter_side(size: tuple[int, int], expected: tuple[int, int]) -> None:
    converted = convert(encoded(picture(*size), quality=95), SMALL)
    assert (converted.height, converted.width, converted.reason) == (*expected, "larger")
    expected_pixels = np.asarray(picture(*size).resize(expected[::-1], Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(decoded(converted.jpeg) - expected_pixels).mean() < 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<html>404</html>", "not an image"),
        (b"", "not an image"),
        (encoded(picture())[:900], "a broken image"),
        (encoded(picture(), "PNG")[:900], "a broken image"),
        (encoded(picture(7, 500)), "a side shorter than 8 pixels"),
        (encoded(picture(1, 1), "GIF"), "a side shorter than 8 pixels"),
        (
            encoded(Image.fromarray(np.full((20, 20), 1e5, np.float32)), "TIFF"),
            "32-bit pixels without a known white",
        ),
    ],
)
def test_convert_refuses_unusable_images_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnusableError, match=f"^{reason}$"):
        convert(data, Options())


# A set


def test_prepare_corpus_with_every_defect(tmp_path: Path) -> None:
    good = encoded(picture())
    tiny.write_tar(
        tmp_path / "0.tar",
        {
            "good": {"jpg": good, "txt": "schön".encode()},
            "grüße/日本": {"jpg": good, "txt": b"non-ASCII name"},
            "cut": {"jpg": good[:900], "txt": b"x"},
            "html": {"jpg": b"<html>", "txt": b"x"},
            "gif": {"jpg": encoded(picture(mode="P"), "GIF"), "txt": b"a GIF called jpg"},
            "cmyk": {"jpg": encoded(picture(mode="CMYK")), "txt": b"x"},
            "pixel": {"png": encoded(picture(1, 1), "PNG"), "txt": b"x"},
            "captionless": {"jpg": good},
            "latin": {"jpg": good, "txt": "größe".encode("latin-1")},
            "imageless": {"txt": b"x", "json": b"{}"},
        },
    )
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        member = tarfile.TarInfo("good.jpg")
        member.size = len(good)
        tar.addfile(member, io.BytesIO(good))
    complete = write_set(tmp_path / "1.tar", 10).read_bytes()
    (tmp_path / "1.tar").write_bytes(complete[: len(complete) // 2])
    tiny.write_tar(tmp_path / "2.tar", {})
    (tmp_path / "3.tar").write_bytes(b"")

    manifest = make(tmp_path, tmp_path / "set", text=".txt")
    source = open_prepared(str(tmp_path / "set"), ".txt")
    keys = [sample.key for sample in source.samples]
    assert keys[:4] == ["0.tar/good", "0.tar/grüße/日本", "0.tar/gif", "0.tar/cmyk"]
    assert keys[4:] == [f"1.tar/{i:03d}" for i in range(len(keys) - 4)]
    assert 2 <= len(keys) - 4 < 10
    assert source.samples[0].texts == ("schön",)
    entries = [json.loads(line) for line in (tmp_path / "set/skipped.jsonl").read_text().splitlines()]
    reasons = {entry["key"]: entry["reason"] for entry in entries}
    assert reasons == reasons | {
        "0.tar/good": "duplicate name",
        "0.tar/captionless": "no .txt",
        "0.tar/imageless": "no image",
        "0.tar/latin": "its caption is not UTF-8",
        "0.tar/cut": "a broken image",
        "0.tar/html": "not an image",
        "0.tar/pixel": "a side shorter than 8 pixels",
        "1.tar": "the tar is incomplete",
        "3.tar": "the tar is incomplete",
    }
    assert manifest.skipped == Counter(entry["reason"] for entry in entries)
    assert manifest.converted == {"GIF": 1, "CMYK JPEG": 1}
    assert manifest.samples == len(keys)
    for index in range(len(source)):
        assert source.image(index).format == "JPEG"


def test_prepare_content_is_independent_of_shards_and_workers(tmp_path: Path) -> None:
    tar = write_set(tmp_path / "a.tar")
    manifests = {
        "one": make(tar, tmp_path / "one"),
        "two": make(tar, tmp_path / "two", workers=2),
        "large": make(tar, tmp_path / "large", dataclasses.replace(SMALL, shard_samples=100)),
        "beton": make(tar, tmp_path / "beton", dataclasses.replace(SMALL, container="beton")),
    }
    assert len({manifest.content for manifest in manifests.values()}) == 1
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert [len(manifest.files) for manifest in manifests.values()] == [6, 6, 1, 1]
    assert sorted(files(tmp_path / "beton")) == [
        "data.beton",
        "index.safetensors",
        "manifest.json",
        "skipped.jsonl",
    ]
    raw = open_webdataset(str(tar), ".cls")
    for name in manifests:
        source = open_prepared(str(tmp_path / name), ".cls")
        assert source.digest() == manifests["one"].content
        assert [source.read(i) for i in range(22)] == [raw.read(i) for i in range(22)]
    # Another label, text or pixel gives another set.
    assert make(tar, tmp_path / "texts", text=".txt").content != manifests["one"].content
    assert make(write_set(tmp_path / "b.tar", 21), tmp_path / "less").content != manifests["one"].content


def test_prepare_keeps_texts_and_class_names_of_every_format(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "folder" / name).mkdir(parents=True)
        (tmp_path / "folder" / name / "a.jpg").write_bytes(tiny.jpeg(len(name)))
    source = RawSource(open_folder(str(tmp_path / "folder")))
    assert prepare(source, tmp_path / "one", SMALL, 1).class_names == ["cat", "dog"]
    opened = open_prepared(str(tmp_path / "one"), ".cls")
    assert (opened.class_names, [sample.label for sample in opened.samples]) == (("cat", "dog"), [0, 1])
    with pytest.raises(DataError, match="prepared without captions"):
        open_prepared(str(tmp_path / "one"), ".txt")

    rows = ["title\tfilepath", "a cat\tcat/a.jpg", "the cat\tcat/a.jpg", "a dog\tdog/a.jpg"]
    (tmp_path / "folder" / "list.csv").write_text("\n".join(rows))
    for group, texts in (
        (True, [("a cat", "the cat"), ("a dog",)]),
        (False, [("a cat",), ("the cat",), ("a dog",)]),
    ):
        csv = open_csv(str(tmp_path / "folder/list.csv"), None, group=group)
        prepare(RawSource(csv), tmp_path / f"csv{group}", SMALL, 1)
        opened = open_prepared(str(tmp_path / f"csv{group}"), ".txt")
        assert [sample.texts for sample in opened.samples] == texts


def test_prepare_stores_tokens_of_the_tokenizer(tmp_path: Path) -> None:
    make(
        write_set(tmp_path / "a.tar", 6),
        tmp_path / "set",
        dataclasses.replace(SMALL, tokenizer="ViT-B-32"),
        ".txt",
    )
    source = open_prepared(str(tmp_path / "set"), ".txt")
    assert source.tokens is not None
    expected = open_clip.get_tokenizer("ViT-B-32")([sample.texts[0] for sample in source.samples])
    assert torch.equal(source.tokens.long(), expected)


def test_tokens_that_fit_have_16_bits_and_earlier_sets_are_read(tmp_path: Path) -> None:
    options = dataclasses.replace(SMALL, tokenizer="ViT-B-32")
    manifest = make(write_set(tmp_path / "a.tar", 6), tmp_path / "set", options, ".txt")
    source = open_prepared(str(tmp_path / "set"), ".txt")
    assert source.tokens is not None
    assert (source.tokens.dtype, manifest.format) == (torch.uint16, 2)
    # As an earlier version wrote it.
    index = load_file(tmp_path / "set/index.safetensors")
    save_file(index | {"tokens": index["tokens"].int()}, tmp_path / "set/index.safetensors")
    write_manifest(tmp_path / "set", dataclasses.replace(manifest, format=1))
    earlier = open_prepared(str(tmp_path / "set"), ".txt")
    assert earlier.tokens is not None
    assert torch.equal(earlier.tokens, source.tokens.int())
    assert earlier.digest() == source.digest()


@pytest.mark.parametrize(("largest", "dtype"), [(2**16 - 1, torch.uint16), (2**16, torch.int32)])
def test_shards_with_larger_tokens_widen_all(largest: int, dtype: torch.dtype) -> None:
    parts = []
    for token in (7, largest):
        row = Row("key", 0, 0, 1, 8, 8, -1, ("a",), bytes(16), torch.tensor([token, 0]))
        parts.append(build_index([row]))
    index = concatenate_indexes(parts)
    assert index["tokens"].dtype == dtype
    assert index["tokens"].long().tolist() == [[7, 0], [largest, 0]]
    assert format_of(index) == (2 if dtype == torch.uint16 else 1)


def test_dali_reads_prepared_tars_by_their_index_files(tmp_path: Path) -> None:
    from nvidia.dali import Pipeline, fn

    make(write_set(tmp_path / "a.tar"), tmp_path / "set", text=".txt")
    tars = sorted(map(str, (tmp_path / "set").glob("*.tar")))
    for tar in tars:
        written = Path(tar).with_suffix(".idx").read_text()
        subprocess.run([str(Path(sys.executable).with_name("wds2idx")), tar, f"{tar}.idx"], check=True)
        assert written.split() == Path(f"{tar}.idx").read_text().split()
    pipeline = Pipeline(batch_size=22, num_threads=1, device_id=None)
    with pipeline:
        pipeline.set_outputs(
            *fn.readers.webdataset(
                paths=tars, index_paths=[tar.replace(".tar", ".idx") for tar in tars], ext=["jpg", "txt"]
            )
        )
    pipeline.build()
    images, texts = pipeline.run()
    source = open_prepared(str(tmp_path / "set"), ".txt")
    for index in range(22):
        assert bytes(images.at(index)) == source.read(index)
        assert bytes(texts.at(index)).decode() == source.samples[index].texts[0]


@pytest.mark.parametrize("name", ["ViT-B-99", "hf:openai/clip-vit-base-patch32"])
def test_tokenizer_unknown_to_open_clip_is_refused(tmp_path: Path, name: str) -> None:
    options = dataclasses.replace(SMALL, tokenizer=name)
    with pytest.raises(DataError, match=f"--tokenizer {name}: open_clip has no such model; without --tokenizer"):
        make(write_set(tmp_path / "a.tar"), tmp_path / "set", options, ".txt")


def test_write_beton_is_read_by_ffcv(tmp_path: Path) -> None:
    """Reads with FFCV's own reader and compiled fields."""
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.loader import Loader
    from ffcv.reader import Reader

    options = dataclasses.replace(SMALL, container="beton", tokenizer="ViT-B-32")
    make(write_set(tmp_path / "a.tar"), tmp_path / "set", options, ".txt")
    source = open_prepared(str(tmp_path / "set"), ".txt")
    path = tmp_path / "with_teacher.beton"
    teacher = np.random.default_rng(0).normal(size=(22, 5)).astype(np.float32)
    write_beton(path, source, {"image_teacher": teacher})
    assert source.beton is not None
    kinds = [RGBImageField, IntField, IntField, NDArrayField, NDArrayField]
    assert [type(field) for field in Reader(str(path)).handlers.values()] == kinds
    assert list(Reader(str(source.beton)).handlers) == ["image", "label", "index", "tokens"]
    loader = Loader(str(path), batch_size=22, num_workers=1, pipelines={"image": None}, drop_last=False)
    ((label, index, embeddings, tokens),) = loader
    assert source.tokens is not None
    assert label.flatten().tolist() == [-1] * 22
    assert index.flatten().tolist() == list(range(22))
    assert torch.equal(tokens, source.tokens.int())
    assert torch.equal(embeddings, torch.from_numpy(teacher))
    with pytest.raises(DataError, match="image_teacher: 21 rows for 22 samples"):
        write_beton(path, source, {"image_teacher": teacher[1:]})


# Failures


@pytest.mark.parametrize(
    ("container", "kills"),
    [("tar", 1), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("tar", "beton"))],
)
def test_prepare_resumes_after_kills(tmp_path: Path, container: str, kills: int) -> None:
    command = ["--format", "webdataset", "--input", str(write_set(tmp_path / "a.tar", 300))]
    command += ["--shard-samples", "10", "--max-side", "30", "--workers", "2", "--container", container]
    assert launch(*command, "--output", str(tmp_path / "uninterrupted")).returncode == 0
    output = tmp_path / "set"
    for shards in (random.Random(container).randrange(2, 30), 1)[:kills][::-1]:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "launch/prepare.py"), *command, "--output", str(output)],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while process.poll() is None and len(list(output.glob("*.tar"))) < shards:
            time.sleep(0.001)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (output / "manifest.json").exists()
    assert launch(*command, "--output", str(output)).returncode == 0
    assert files(output) == files(tmp_path / "uninterrupted")


@pytest.mark.slow
def test_prepare_full_disk_leaves_no_partial_file(tmp_path: Path) -> None:
    tar = write_set(tmp_path / "a.tar", 40)
    command = ["--format", "webdataset", "--input", str(tar), "--output", str(tmp_path / "set"), "--workers", "1"]
    command += ["--shard-samples", "10"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    # Without coverage, which would write files in this process too.
    bare = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    full = launch(*command, preexec_fn=limit, env=bare)
    assert full.returncode == 2
    assert "run the same command again" in full.stderr.splitlines()[-1]
    assert "Traceback" not in full.stderr
    assert not list((tmp_path / "set").glob("*.tar"))
    assert launch(*command).returncode == 0
    assert open_prepared(str(tmp_path / "set"), ".cls").samples[39].label == 39 % 5


def test_prepare_leaves_folders_with_other_data_alone(tmp_path: Path) -> None:
    tar = write_set(tmp_path / "a.tar", 6)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="holds other data"):
        make(tar, tmp_path / "mine")
    assert files(tmp_path / "mine") == {"thesis.tex": b"precious"}
    first = make(tar, tmp_path / "set")
    before = files(tmp_path / "set")
    # A complete set, with what a kill right after the manifest would leave.
    (tmp_path / "set" / ".parts").mkdir()
    (tmp_path / "set" / "000009.tar").touch()
    assert make(tar, tmp_path / "set") == first
    assert files(tmp_path / "set") == before
    with pytest.raises(DataError, match=r"prepared with other settings .*quality 95, not 50"):
        make(tar, tmp_path / "set", dataclasses.replace(SMALL, quality=50))
    with pytest.raises(DataError, match=r"prepared with other settings .*source"):
        make(write_set(tmp_path / "b.tar", 7), tmp_path / "set")
    assert files(tmp_path / "set") == before


def test_prepare_without_usable_sample_gives_reasons(tmp_path: Path) -> None:
    tar = tiny.write_tar(tmp_path / "a.tar", {f"{i}": {"jpg": b"<html>", "cls": b"0"} for i in range(3)})
    with pytest.raises(DataError, match="no sample is usable: 3 not an image"):
        make(tar, tmp_path / "set")
    assert not (tmp_path / "set/manifest.json").exists()


def test_open_and_verify_refuse_damaged_sets(tmp_path: Path) -> None:
    make(write_set(tmp_path / "a.tar"), tmp_path / "set")
    folder = tmp_path / "set"
    assert verify(str(folder)).samples == 22
    tar = folder / "000002.tar"
    intact = tar.read_bytes()
    tar.write_bytes(intact[:700] + bytes([intact[700] ^ 1]) + intact[701:])
    with pytest.raises(DataError, match=r"000002.tar: changed since"):
        verify(str(folder))
    assert load_main()(["--verify", str(folder)]) == 2
    for data, message in ((intact[:-512], "has .* bytes"), (None, "is missing")):
        tar.unlink()
        if data is not None:
            tar.write_bytes(data)
        with pytest.raises(DataError, match=f"000002.tar {message}"):
            open_prepared(str(folder), ".cls")
    tar.write_bytes(intact)
    index = (folder / "index.safetensors").read_bytes()
    (folder / "index.safetensors").write_bytes(index[:100])
    with pytest.raises(DataError, match=r"index.safetensors: cannot read it"):
        open_prepared(str(folder), ".cls")
    (folder / "index.safetensors").write_bytes(index)
    manifest = (folder / "manifest.json").read_text()
    for text, message in (
        ("{", "cannot read it"),
        ('{"format": 99}', "not of format 1 or 2; prepare the set again"),
        (None, "not a prepared set"),
    ):
        (folder / "manifest.json").unlink()
        if text is not None:
            (folder / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=message):
            open_prepared(str(folder), ".cls")
    (folder / "manifest.json").write_text(manifest)
    assert len(open_prepared(str(folder), ".cls")) == 22


# The command


def test_command_prepares_torchvision_data_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in ("negative", "positive"):
        folder = tmp_path / "rendered-sst2" / "test" / label
        folder.mkdir(parents=True)
        for i in range(2):
            (folder / f"{i}.png").write_bytes(encoded(picture(40, 50 + i), "PNG"))
    command = ["--format", "torchvision", "--name", "RenderedSST2", "--split", "test", "--input", str(tmp_path)]
    assert load_main()([*command, "--output", str(tmp_path / "set"), "--workers", "1"]) == 0
    assert "4 samples in 1 files\n  re-encoded: 4 (decoded)" in capsys.readouterr().out
    source = open_prepared(str(tmp_path / "set"), ".cls")
    assert (source.class_names, [sample.label for sample in source.samples]) == (
        ("negative", "positive"),
        [0, 0, 1, 1],
    )
    assert source.samples[3].key == "RenderedSST2/test/3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "folder", "--input", "nowhere", "--output", "x"], "nowhere: no such folder"),
        (["--format", "torchvision", "--input", ".", "--output", "x"], "--format torchvision requires --name"),
        (["--format", "torchvision", "--name", "CIFAR", "--input", ".", "--output", "x"], "has no such data set"),
        (
            ["--format", "torchvision", "--name", "CIFAR10", "--input", ".", "--output", "x"],
            "not found or corrupted",
        ),
        (["--format", "folder", "--input", "x"], "--format, --input and --output are required"),
        (["--format", "folder", "--input", "x", "--output", "y", "--quality", "0"], "--quality must be 1 to 100"),
        (["--verify", "nowhere"], "nowhere: not a prepared set"),
    ],
)
def test_command_reports_mistakes_in_one_line(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(REPOSITORY / "launch" / "prepare.py"))["main"]
    try:
        code = main(arguments)
    except SystemExit as ended:  # argparse
        code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


# Writers and readers


def load_main() -> Any:
    return runpy.run_path(str(REPOSITORY / "launch" / "prepare.py"))["main"]


def error_line(main: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that fails; returns its one-line message."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    line = err.rstrip("\n").splitlines()[-1]
    assert "Traceback" not in err
    assert line.startswith("error: "), err
    assert not out
    return line


def test_command_every_torchvision_class_fails_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import inspect
    import socket

    from torchvision import datasets

    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    main = load_main()
    names = [name for name in dir(datasets) if inspect.isclass(getattr(datasets, name))]
    assert len(names) > 60
    for name in names:
        empty = tmp_path / name
        empty.mkdir()
        command = [
            "--format",
            "torchvision",
            "--name",
            name,
            "--input",
            str(empty),
            "--output",
            str(tmp_path / "x"),
        ]
        line = error_line(main, command, capsys)
        assert name in line
        assert "network" not in line, line
        assert not (tmp_path / "x").exists()


class ThirdParty:
    """A third-party data set."""

    classes: Any = ("cat", "dog")

    def __init__(self, item: Any, count: int = 3) -> None:
        self.item, self.count = item, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.item, Exception):
            raise self.item
        return self.item


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((picture(), ["a caption"]), "x/0: its label is list, not the number of a class; .*--format csv"),
        ((picture(), {"boxes": []}), "its label is dict"),
        ((picture(), "cat"), "its label is str"),
        ((picture(), 1.5), "its label is float"),
        ((picture(), torch.zeros(40)), "its label is Tensor"),
        ((picture(), 2), "its label is 2, but there are 2 class names"),
        ((picture(), -1), "its label is -1, but"),
        (picture(), "expected a tuple of picture and label, got Image"),
        ((picture(),), "expected a tuple of picture and label, got tuple"),
        (KeyError("label"), "^x: KeyError: 'label'$"),
        (NotImplementedError(), "^x: NotImplementedError"),
        (ZeroDivisionError("oh"), "^x: ZeroDivisionError: oh$"),
    ],
)
def test_prepare_refuses_invalid_items_before_writing(tmp_path: Path, item: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(RawDataset(ThirdParty(item), "x"), tmp_path / "set", SMALL, 1)
    assert not (tmp_path / "set").exists()


def test_prepare_skips_items_without_picture(tmp_path: Path) -> None:
    class Mixed(ThirdParty):
        def __getitem__(self, index: int) -> Any:
            labels = (0, np.int64(1), torch.tensor(1), np.array(0), 0, 0)
            if index == 4:
                raise FileNotFoundError("gone.jpg")
            return (np.zeros(3) if index == 5 else picture(), labels[index])

    manifest = prepare(RawDataset(Mixed(None, 6), "x"), tmp_path / "set", SMALL, 1)
    assert manifest.skipped == {"cannot be read": 1, "not a picture but ndarray": 1}
    assert [s.label for s in open_prepared(str(tmp_path / "set"), ".cls").samples] == [0, 1, 1, 0]
    with pytest.raises(DataError, match=r"^x: the data set is empty$"):
        prepare(RawDataset(ThirdParty(None, 0), "x"), tmp_path / "other", SMALL, 1)


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ([("tench", "Tinca tinca"), ("tabby", "tabby cat")], ["tench", "tabby"]),
        ([3, np.int64(4)], ["3", "4"]),
        (["naïve", "猫"], ["naïve", "猫"]),
        ({"cat": 0}, []),
        (None, []),
        ([None, "dog"], "the name of class 0 is NoneType"),
        ([(), "dog"], "the name of class 0 is tuple"),
        (["cat", b"do\xe9g".decode("utf-8", "surrogateescape")], r"the name of class 1, do\\xe9g, is not UTF-8"),
    ],
)
def test_raw_dataset_class_names_become_strings(tmp_path: Path, classes: Any, names: Any) -> None:
    dataset = ThirdParty((picture(), 1))
    dataset.classes = classes
    if isinstance(names, str):
        with pytest.raises(DataError, match=names):
            RawDataset(dataset, "x")
        return
    prepare(RawDataset(dataset, "x"), tmp_path / "set", SMALL, 1)
    assert list(open_prepared(str(tmp_path / "set"), ".cls").class_names) == names


def test_command_prepares_imagenet_of_torchvision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = {"n02099601": ("golden retriever",), "n02123045": ("tabby", "tabby cat")}
    for wnid in classes:
        (tmp_path / "in/val" / wnid).mkdir(parents=True)
        (tmp_path / "in/val" / wnid / "0.JPEG").write_bytes(tiny.jpeg(0))
    torch.save((classes, list(classes)), tmp_path / "in/meta.bin")
    command = ["--format", "torchvision", "--name", "ImageNet", "--split", "val", "--input", str(tmp_path / "in")]
    assert load_main()([*command, "--output", str(tmp_path / "set"), "--workers", "1"]) == 0
    capsys.readouterr()
    assert verify(str(tmp_path / "set")).class_names == ["golden retriever", "tabby"]
    # Sets of earlier versions, written with all synonyms, open too.
    manifest = json.loads((tmp_path / "set/manifest.json").read_text())
    manifest["class_names"] = [["golden retriever"], ["tabby", "tabby cat"]]
    (tmp_path / "set/manifest.json").write_text(json.dumps(manifest))
    assert open_prepared(str(tmp_path / "set"), ".cls").class_names == ("golden retriever", "tabby")


def test_prepare_odd_names_and_texts_are_read_back(tmp_path: Path) -> None:
    """Covers keys that are not UTF-8, in files, tars and skipped.jsonl, and captions with unusual characters."""
    latin = b"caf\xe9\n\x1b[2J".decode("utf-8", "surrogateescape")
    caption = "\ufeffnaïve 猫 \x00 \x1b[2J 👩\u200d🚀 \u202e"
    tiny.write_tar(
        tmp_path / f"{latin}.tar",
        {
            latin: {"jpg": tiny.jpeg(0), "txt": caption.encode()},
            f"{latin}broken": {"jpg": b"<html>", "txt": b"x"},
            "blank": {"jpg": tiny.jpeg(0), "txt": b"\n"},
        },
    )
    for shape in (latin, f"{latin}broken"):
        (tmp_path / "folder/cat").mkdir(parents=True, exist_ok=True)
        data = tiny.jpeg(0) if shape == latin else b"<html>"
        (tmp_path / f"folder/cat/{shape}.jpg").write_bytes(data)
    opened = {
        "tar": open_webdataset(str(tmp_path / f"{latin}.tar"), ".txt"),
        "folder": open_folder(str(tmp_path / "folder")),
    }
    for name, raw in opened.items():
        ready = tmp_path / f"{name}_ready"
        manifest = prepare(RawSource(raw), ready, SMALL, 1)
        source = open_prepared(str(ready), ".txt" if name == "tar" else ".cls")
        assert source.samples[0].key == raw.samples[0].key
        assert "caf\\xe9" in source.samples[0].key
        entries = [json.loads(line) for line in (ready / "skipped.jsonl").read_text().splitlines()]
        assert Counter(entry["reason"] for entry in entries) == manifest.skipped == source.prepared_without
        assert source.digest()
    (caption_read,) = open_prepared(str(tmp_path / "tar_ready"), ".txt").samples[0].texts
    assert caption_read == caption.removeprefix("\ufeff").replace("\0", " ").strip()


def test_prepare_writes_no_manifest_if_reading_back_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = write_set(tmp_path / "a.tar", 6)

    def failing(rows: Any) -> Any:
        index = build_index(rows)
        index["offset"] += 1
        return index

    with monkeypatch.context() as disk:
        disk.setattr("dive_fast.data.prepared.write.build_index", failing)
        with pytest.raises(DataError, match=r"0\.tar.*new set cannot be read back"):
            make(tar, tmp_path / "set")
    assert not (tmp_path / "set/manifest.json").exists()


def test_prepare_file_modes_follow_the_umask(tmp_path: Path) -> None:
    tar = write_set(tmp_path / "a.tar", 6)
    before = os.umask(0o027)
    try:
        make(tar, tmp_path / "set")
        make(tar, tmp_path / "beton", dataclasses.replace(SMALL, container="beton"))
    finally:
        os.umask(before)
    for path in [*(tmp_path / "set").iterdir(), *(tmp_path / "beton").iterdir()]:
        assert path.stat().st_mode & 0o777 == 0o640, path


def test_prepare_locks_its_folder(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    ours, theirs = FORK.Pipe()

    def hold() -> None:
        lock = Lock(tmp_path / "set/.lock", "x")
        theirs.send(lock.acquire())
        theirs.recv()

    holder = FORK.Process(target=hold)
    holder.start()
    try:
        assert ours.recv() is None
        with pytest.raises(
            LockedError, match=rf"^prepared set {tmp_path}/set is in use by process {holder.pid} on"
        ):
            make(write_set(tmp_path / "a.tar", 6), tmp_path / "set")
    finally:
        ours.send(None)
        holder.join()
    assert make(tmp_path / "a.tar", tmp_path / "set").samples == 6


# Interrupted and existing sets


def interrupted(tar: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes all shards but no manifest, like a kill at the end."""

    def end(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr("dive_fast.data.prepared.write._finish", end)
        with pytest.raises(KeyboardInterrupt):
            make(tar, output)


def test_prepare_remakes_shards_of_changed_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tar = write_set(tmp_path / "a.tar", 6)
    with tarfile.open(tar) as members:
        at = [member.offset_data for member in members if member.name.endswith("cls")]
    expected = tmp_path / "expected"
    interrupted(tar, tmp_path / "same", monkeypatch)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "same").glob("*.tar")}
    assert make(tar, tmp_path / "same") == make(tar, expected)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "same").glob("*.tar")} == times
    assert not caplog.messages
    # Equal bytes with a new time; only reading all of them could show that they are equal.
    interrupted(tar, tmp_path / "copied", monkeypatch)
    os.utime(tar, ns=(1, 1))
    manifest = make(tar, tmp_path / "copied")
    assert "source_modified changed since the preparation started; all shards are made again" in caplog.text
    assert manifest.content == read_manifest(expected).content
    # Another label, then another encoder version.
    interrupted(tar, tmp_path / "changed", monkeypatch)
    data = bytearray(tar.read_bytes())
    data[at[1] : at[1] + 1] = b"4"
    tar.write_bytes(data)
    with pytest.raises(DataError, match=r"changed: holds a set prepared with other settings \(another source"):
        make(tar, tmp_path / "changed")
    interrupted(tar, tmp_path / "versions", monkeypatch)
    monkeypatch.setattr("dive_fast.data.prepared.write._versions", lambda _: {"pillow": "1"})
    make(tar, tmp_path / "versions")
    assert "versions changed since the preparation started; all shards are made again" in caplog.text


def test_prepare_remakes_shards_with_invalid_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = write_set(tmp_path / "a.tar", 6)
    for number, damage in enumerate(("{", "[]", '{"identity": "another"}')):
        output = tmp_path / f"{number}"
        interrupted(tar, output, monkeypatch)
        (output / ".parts/000001.json").write_text(damage)
        assert make(tar, output) == make(tar, tmp_path / "uninterrupted")


def test_prepare_warns_of_modified_source_of_complete_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tar = write_set(tmp_path / "a.tar", 6)
    first = make(tar, tmp_path / "set")
    assert make(tar, tmp_path / "set") == first
    assert not caplog.messages
    os.utime(tar, ns=(1, 1))
    assert make(tar, tmp_path / "set") == first
    assert "already prepared; its source files were modified or copied since" in caplog.text


def test_raw_dataset_digest_covers_files_labels_and_pixels(tmp_path: Path) -> None:
    class Listed(ThirdParty):
        def __init__(self, root: Path) -> None:
            self.root = str(root)
            self.samples = [(str(root / f"{i}.bmp"), i % 2) for i in range(3)]

        def __len__(self) -> int:
            return len(self.samples)

        def __getitem__(self, index: int) -> Any:
            path, label = self.samples[index]
            return Image.open(path), label

    def listed(folder: Path, red: int = 0, label: int = 0) -> Any:
        folder.mkdir(exist_ok=True)
        for i in range(3):
            Image.new("RGB", (40, 40), (i + red, 0, 0)).save(folder / f"{i}.bmp")
        dataset = Listed(folder)
        dataset.samples[0] = dataset.samples[0][0], label
        return RawDataset(dataset, "x")

    original = listed(tmp_path / "a")
    digest, modified = original.digest(), original.modified()
    assert listed(tmp_path / "b").digest() == digest
    assert modified
    assert listed(tmp_path / "b").modified() != modified
    assert len({digest, listed(tmp_path / "c", red=1).digest(), listed(tmp_path / "d", label=1).digest()}) == 3


# Opening prepared sets


def test_prepared_digest_reads_an_image_of_every_file(tmp_path: Path) -> None:
    make(write_set(tmp_path / "a.tar", 130), tmp_path / "set", dataclasses.replace(SMALL, shard_samples=1))
    tar = tmp_path / "set/000003.tar"  # not among the rows that are spread over the set
    intact = tar.read_bytes()
    tar.write_bytes(intact[:700] + bytes([intact[700] ^ 1]) + intact[701:])
    with pytest.raises(DataError, match=r"sample a\.tar/003: changed since it was prepared"):
        open_prepared(str(tmp_path / "set"), ".cls").digest()


def test_prepared_digest_detects_changed_bytes(tmp_path: Path) -> None:
    make(write_set(tmp_path / "a.tar"), tmp_path / "set")
    source = open_prepared(str(tmp_path / "set"), ".cls")
    before = source.modified()
    assert source.image_ids().tolist() == list(range(22))
    tar = tmp_path / "set/000002.tar"
    intact = tar.read_bytes()
    tar.write_bytes(intact[:700] + bytes([intact[700] ^ 1]) + intact[701:])
    changed = open_prepared(str(tmp_path / "set"), ".cls")
    assert changed.modified() != before
    with pytest.raises(DataError, match=r"sample a\.tar/008: changed since it was prepared; copy or prepare"):
        changed.digest()


def test_image_ids_of_pairs_are_equal_raw_and_prepared(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(tiny.jpeg(ord(name), kind="PNG"))
    rows = ["title\tfilepath", *(f"caption {i}\t{'ab'[i % 2]}.png" for i in range(6))]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    raw = open_csv(str(tmp_path / "list.csv"), None, group=False)
    prepare(RawSource(raw), tmp_path / "set", SMALL, 1)
    for source in (raw, open_prepared(str(tmp_path / "set"), ".txt")):
        assert source.image_ids().tolist() == [0, 1, 0, 1, 0, 1]


def test_open_prepared_skips_empty_captions_of_old_sets(tmp_path: Path) -> None:
    tar = write_set(tmp_path / "a.tar", 6)
    raw = open_webdataset(str(tar), ".txt")
    texts = ("one", "", "three", " \t", "five", "six")
    blank = [dataclasses.replace(s, texts=(text,)) for s, text in zip(raw.samples, texts, strict=True)]
    prepare(RawSource(dataclasses.replace(raw, samples=SampleTable.of(blank))), tmp_path / "set", SMALL, 1)
    source = open_prepared(str(tmp_path / "set"), ".txt")
    assert [s.texts for s in source.samples] == [("one",), ("three",), ("five",), ("six",)]
    assert [key for key, _ in source.skipped] == ["a.tar/001", "a.tar/003"]
    assert [source.read(i) for i in range(4)] == [raw.read(i) for i in (0, 2, 4, 5)]
    assert source.digest() != read_manifest(tmp_path / "set").content


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "folder", "--pairs"], "--pairs is for --format csv; remove it"),
        (["--format", "webdataset", "--image-root", "x"], "--image-root is for --format csv; remove it"),
        (["--format", "csv", "--name", "x"], "--name is for --format torchvision or wilds; remove it"),
        (
            ["--format", "folder", "--split", "val"],
            "--split is for --format huggingface or torchvision or wilds; remove it",
        ),
        (["--format", "torchvision", "--name", "CIFAR10", "--split", "val"], "--split val: it has train and test"),
        (
            ["--format", "torchvision", "--name", "Caltech101", "--split", "val"],
            "it has no splits; remove --split",
        ),
        (["--format", "torchvision", "--name", "FakeData"], "it does not read a folder"),
    ],
)
def test_command_refuses_options_without_effect(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = load_main()([*arguments, "--input", str(tmp_path), "--output", str(tmp_path / "x")])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_command_expands_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, current = tmp_path / "home", tmp_path / "current"
    current.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(current)
    (home / "in/cat").mkdir(parents=True)
    (home / "in/cat/1.jpg").write_bytes(tiny.jpeg(0))
    assert load_main()(["--format", "folder", "--input", "~/in", "--output", "~/out", "--workers", "1"]) == 0
    assert load_main()(["--verify", "~/out"]) == 0
    assert (home / "out").is_dir()
    assert not list(current.iterdir())
    capsys.readouterr()


def test_command_interrupted_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    (tmp_path / "in/cat").mkdir(parents=True)
    (tmp_path / "in/cat/1.jpg").write_bytes(tiny.jpeg(0))
    command = ["--format", "folder", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    with monkeypatch.context() as pressed:
        pressed.setattr("dive_fast.data.prepared.write._finish", interrupt)
        assert load_main()([*command, "--workers", "1"]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted; run the same command to resume")
    assert load_main()([*command, "--workers", "1"]) == 0


def test_command_skips_negative_labels(tmp_path: Path) -> None:
    samples = {str(row): {"jpg": encoded(picture()), "cls": str(row - 1).encode()} for row in range(3)}
    tiny.write_tar(tmp_path / "a.tar", samples)
    run = launch("--format", "webdataset", "--input", str(tmp_path / "a.tar"), "--output", str(tmp_path / "set"))
    assert run.returncode == 0, run.stderr
    assert "left out: 1 (its label is not a non-negative integer)" in run.stdout


def test_command_refuses_output_inside_the_input_folder(tmp_path: Path) -> None:
    (tmp_path / "raw/cat").mkdir(parents=True)
    (tmp_path / "raw/cat/0.jpg").write_bytes(encoded(picture()))
    run = launch("--format", "folder", "--input", str(tmp_path / "raw"), "--output", str(tmp_path / "raw/ready"))
    assert run.returncode == 2
    assert "--output lies in --input, where it would become a class" in run.stderr


def exit_code(folder: Path, options: list[str]) -> object:
    """The exit code of preparing ``folder/raw``."""
    files = ["--input", f"{folder}/raw", "--output", f"{folder}/ready"]
    try:
        return prepare_command.main(["--format", "folder", *files, "--workers", "1", *options])
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize(
    ("options", "side"),
    [
        (["--max-side", "ViT-B-16"], 288),
        (["--max-side", "ViT-L-14-336"], 416),
        (["--max-side", "ViT-B-16", "--crop-share", "0.08"], 928),
        (["--max-side", "100"], 100),
        (["--max-side", "0"], 1000),
    ],
)
def test_max_side_may_be_the_model_that_needs_it(tmp_path: Path, options: list[str], side: int) -> None:
    (tmp_path / "raw/0").mkdir(parents=True)
    Image.new("RGB", (1000, 1100)).save(tmp_path / "raw/0/a.jpg")
    assert exit_code(tmp_path, options) == 0
    sizes = open_prepared(str(tmp_path / "ready"), ".cls").sizes
    assert sizes is not None
    assert sizes.min() == side


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-side", "ViT-B-61"], "did you mean ViT-B-16"),
        (["--crop-share", "0.5"], "goes with a model in --max-side"),
        (["--max-side", "ViT-B-16", "--crop-share", "90"], "--crop-share is a share of 1"),
        (["--max-side", "-5"], "--max-side at least 0"),
    ],
)
def test_wrong_side_is_refused(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw").mkdir()
    assert exit_code(tmp_path, options) == 2
    assert message in capsys.readouterr().err


def test_no_crop_of_the_side_for_a_model_is_enlarged() -> None:
    assert ASPECT_RATIO[0] == LEAST_ASPECT_RATIO
    for size, share in ((224, 0.9), (336, 0.9), (224, 0.3)):
        side = side_for(size, share)
        crops = [random_crop((side, side), 0, sample, 0, (share, 1.0)) for sample in range(300)]
        assert min(min(crop.height, crop.width) for crop in crops) >= size
        assert side * (share * LEAST_ASPECT_RATIO) ** 0.5 < size + 32
