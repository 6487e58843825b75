"""Tests that pictures of every mode decode equally, raw or prepared, in every loader."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tiny
import torch
from PIL import Image, ImageCms

from dive_fast.data.decode import UnknownWhiteError, decode, looks_like_image
from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.data.prepared.convert import Options as Preparation
from dive_fast.data.prepared.convert import convert
from dive_fast.data.prepared.raw import RawSource, UnusableError
from dive_fast.data.prepared.read import open_prepared
from dive_fast.data.prepared.write import prepare
from dive_fast.data.samples import EvaluationSamples
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.data.transforms import Preprocess

VIEW = Preprocess((24, 24), (0.0,) * 3, (1.0,) * 3, "bicubic", "shortest")


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def picture(mode: str = "RGB") -> Image.Image:
    y, x = np.linspace(0, 3, 60)[:, None], np.linspace(0, 4, 80)
    waves = np.stack([127 + 60 * np.sin(x + c) + 50 * np.cos(y - c) for c in range(3)], -1)
    return Image.fromarray(waves.clip(0, 255).astype(np.uint8)).convert(mode)


def deep(dtype: str) -> Image.Image:
    return Image.fromarray((np.asarray(picture("L")).astype(np.uint32) * 257).astype(dtype))


def png48() -> bytes:
    """A PNG of 48-bit colour, which PIL can read but not write."""
    pixels = np.asarray(picture()).astype(">u2") * 257

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2"))
    header = struct.pack(">IIBBBBB", 80, 60, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(picture(), *profiles, outputMode="LAB")


def transparent(mode: str) -> Image.Image:
    """A picture whose transparent half holds colours."""
    image = picture(mode.replace("P", "RGB").replace("A", "") + "A")
    image.putalpha(Image.fromarray(np.tile(np.repeat(np.uint8([0, 255]), 40), (60, 1))))
    return image


FILES: dict[str, bytes] = {
    "rgb": encode(picture(), "JPEG", quality=95),
    "grey": encode(picture("L"), "JPEG", quality=95),
    "cmyk": encode(picture("CMYK"), "JPEG", quality=95),
    "png": encode(picture(), "PNG"),
    "png48": png48(),
    "png16": encode(deep("uint16"), "PNG"),
    "tiff16": encode(deep("uint16"), "TIFF"),
    "tiff16_big_endian": encode(deep(">u2"), "TIFF"),
    "pgm16": b"P5 80 60 65535\n" + np.asarray(deep("uint16")).astype(">u2").tobytes(),
    "tiff32": encode(picture("I"), "TIFF"),
    "tiff_float": encode(picture("F"), "TIFF"),
    "lab": encode(lab(), "TIFF"),
    "rgba": encode(transparent("RGB"), "PNG"),
    "grey_alpha": encode(transparent("L"), "PNG"),
    "palette": encode(picture().quantize(64), "PNG"),
    "palette_transparent": encode(picture().quantize(64), "PNG", transparency=3),
    "palette_alphas": encode(picture().quantize(64), "PNG", transparency=bytes(range(64))),
    "gif": encode(picture(), "GIF"),
    "bits": encode(picture("1"), "PNG"),
    "webp_alpha": encode(transparent("RGB"), "WEBP", lossless=True, exact=True),
}
ORDINARY = ("rgb", "grey", "png", "png48")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("pictures")
    tiny.write_tar(folder / "a.tar", {key: {"png": data, "cls": b"0"} for key, data in FILES.items()})
    return open_webdataset(str(folder), ".cls")


@pytest.fixture(scope="module")
def plain(raw: Source) -> torch.Tensor:
    return views(raw, "plain")


def views(source: Source, loader: Any) -> torch.Tensor:
    keys = [(0, sample) for sample in range(len(source))]
    batches = batches_of(EvaluationSamples(source, VIEW), keys, len(keys), Options(loader))
    return torch.cat([batch.images for batch in batches]).float()


def test_decode_gives_the_same_picture_for_every_mode(plain: torch.Tensor) -> None:
    colour, grey = (
        VIEW.to_tensor(VIEW.transform(picture(), None)),
        VIEW.to_tensor(VIEW.transform(picture("L"), None)),
    )
    for view, key in zip(plain, FILES, strict=True):
        is_grey = key in (
            "grey",
            "png16",
            "tiff16",
            "tiff16_big_endian",
            "pgm16",
            "tiff32",
            "tiff_float",
            "grey_alpha",
        )
        difference = (view - (grey if is_grey or key == "bits" else colour)).abs()
        assert difference.mean() < (0.2 if key == "bits" else 0.03), key


def test_decode_equals_open_clip_bitwise(plain: torch.Tensor) -> None:
    transform = open_clip.image_transform(24, is_train=False, mean=VIEW.mean, std=VIEW.std)
    for view, (key, data) in zip(plain, FILES.items(), strict=True):
        image = Image.open(io.BytesIO(data))
        if key in ORDINARY:
            assert torch.equal(view, transform(image)), key
        elif "16" not in key:
            with warnings.catch_warnings(action="ignore"):
                assert torch.equal(view, transform(image.convert("RGB"))), key


def test_dali_equals_plain_loader_for_every_mode(raw: Source, plain: torch.Tensor) -> None:
    difference = (views(raw, "dali") - plain).abs().flatten(1)
    for key, row in zip(FILES, difference, strict=True):
        assert row.mean() < (0.004 if key in ("rgb", "grey") else 1e-4), key


def test_prepared_pictures_equal_raw_ones(raw: Source, plain: torch.Tensor, tmp_path: Path) -> None:
    manifest = prepare(RawSource(raw), tmp_path / "set", Preparation(min_side=1), 1)
    assert (manifest.samples, manifest.skipped) == (len(FILES), {})
    source = open_prepared(str(tmp_path / "set"), ".cls")
    for loader in ("plain", "dali"):
        difference = (views(source, loader) - plain).abs().flatten(1)
        for key, row in zip(FILES, difference, strict=True):
            # Loss of a JPEG of quality 95; dithered palettes lose more.
            is_dithered = "palette" in key or key in ("gif", "bits")
            assert row.mean() < (0.03 if is_dithered else 0.008), (loader, key, row.mean())


def test_decode_gives_8_bits_without_warnings() -> None:
    with warnings.catch_warnings(action="error"):
        for key, data in FILES.items():
            assert decode(data).mode == ("L" if key in ("grey",) or "16" in key else "RGB"), key
            assert looks_like_image(data[:12]) or key == "pgm16", key


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((9, 9), 256, np.int32),
        np.full((9, 9), -1, np.int32),
        np.full((9, 9), 0.5, np.float32),
        np.full((9, 9), 1e5, np.float32),
        np.full((9, 9), np.nan, np.float32),
    ],
)
def test_decode_and_convert_refuse_unknown_white(pixels: Any) -> None:
    data = encode(Image.fromarray(pixels), "TIFF")
    with pytest.raises(UnknownWhiteError, match=r"^32-bit pixels from .* have an unknown white level; save it"):
        decode(data)
    with pytest.raises(UnusableError, match=r"^32-bit pixels without a known white$"):
        convert(data, Preparation())


def test_prepare_leaves_out_decompression_bombs(tmp_path: Path) -> None:
    """Covers 195 megapixels, and a text that unpacks beyond PIL's limit; neither may use its memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(side: int, *chunks: bytes) -> bytes:
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + b"".join((chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")))

    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"A" * 2**25, 9))
    rows = chunk(b"IDAT", zlib.compress(bytes(17 * 16)))
    samples = {"many": png(13_965, rows), "text": png(16, text, rows), "good": png(16, rows)}
    tar = tiny.write_tar(tmp_path / "a.tar", {key: {"png": data, "cls": b"0"} for key, data in samples.items()})
    raw = RawSource(open_webdataset(str(tar), ".cls"))
    manifest = prepare(raw, tmp_path / "set", Preparation(), 1)
    assert manifest.skipped == {"too many pixels": 1, "a broken image": 1}
    assert '"a.tar/many", "reason": "too many pixels"' in (tmp_path / "set/skipped.jsonl").read_text()


def test_looks_like_image_rejects_text() -> None:
    for data in (b"", b"BMW is a car", b"<html><body>", b"{}", b"GIF is a format", b"RIFFxxxxWAVE", bytes(12)):
        assert not looks_like_image(data), data
