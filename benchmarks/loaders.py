"""Measures images per second, CPU seconds and pixel differences from PIL of every loader on the same JPEGs.

``python benchmarks/loaders.py`` (README.md describes the comparison)

Photos are measured as they are, at the bytes of ImageNet, and encoded with a shorter side of 512 and 288 pixels.
Without a GPU, our loaders are measured up to the pixels that a GPU normalises. ``--sides`` compares views of
images stored with several shorter sides with views of the originals.
"""

import argparse
import io
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import psutil
import torch
from loss_report import REPOSITORY, commit, device_name, slug, write_json
from peers.flyp import FlypDataset
from PIL import Image
from real_data import DATA
from torch.utils.data import DataLoader

from dive_fast.data.decode import decode
from dive_fast.data.loaders import pil_resize
from dive_fast.data.loaders.loader import Options, batches_of, load, load_pixels
from dive_fast.data.prefetch import Prefetcher
from dive_fast.data.prepared import convert
from dive_fast.data.prepared.raw import RawSource
from dive_fast.data.prepared.read import open_prepared
from dive_fast.data.prepared.write import prepare
from dive_fast.data.prompt_files import read_templates
from dive_fast.data.prompts import PromptTable
from dive_fast.data.sampler import Order
from dive_fast.data.samples import EvaluationSamples, TargetSamples
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.data.transforms import Preprocess, random_crop

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
PREPROCESS = Preprocess(
    (224, 224), open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, "bicubic", "shortest"
)
ALWAYS, OPTIONAL = ("flyp", "plain"), {"dali": "nvidia.dali", "ffcv": "ffcv"}
"""Loaders that are always available, and optional ones with the package that they need."""
STEP_IMAGES_PER_SECOND = {"ViT-B/16": 1024 / 0.206, "ViT-L/14": 768 / 0.664}
"""Images of both sets that an H200 takes per second, by the planned time of a DiVE step (docs/performance.md)."""
TARGETS_AND_REFERENCES = (
    ("photos", "photos"),
    ("ImageNet's bytes", "512 px"),
    ("ImageNet's bytes", "288 px"),
    ("288 px", "288 px"),
)
"""Pairs of sets, the first as target and the second as reference, for which cores are predicted."""
SHARES = {"full": 1.0, "crop of 0.9": 0.9, "crop of 0.3": 0.3, "crop of 0.08": 0.08}
"""Shares of the area in views of --sides."""
CORES = 16
"""Cores for a GPU, as servers of eight H200s with two CPUs of 64 cores have."""
SIDES = (320, 288, 256, 224)
ODD_SIZES = ((1, 500), (500, 1), (31, 33), (5000, 40))


def installed() -> list[str]:
    """The optional loaders that are installed."""
    return [loader for loader, package in OPTIONAL.items() if find_module(package)]


def find_module(package: str) -> bool:
    """Whether a package, also a nested one, can be imported."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def batches(loader: str, source: Source, files: list[Path], batch_size: int, workers: int) -> Iterator[Any]:
    """Endless training batches on the device, prefetched as in training."""
    if loader == "flyp":
        shuffled = DataLoader(
            FlypDataset(files),
            batch_size,
            shuffle=True,
            num_workers=workers,
            pin_memory=DEVICE.type == "cuda",
            drop_last=True,
            persistent_workers=True,
        )

        first = iter(shuffled)  # starts the workers before other threads run

        def epochs() -> Iterator[Any]:
            yield from first
            while True:
                yield from shuffled

        return Prefetcher(epochs(), lambda pair: [part.to(DEVICE, non_blocking=True) for part in pair], DEVICE)
    prompts = PromptTable(
        source,
        [f"thing {i}" for i in range(1000)],
        read_templates("simple"),
        open_clip.get_tokenizer("ViT-B-16"),
    )
    samples = TargetSamples(source, prompts, PREPROCESS, "argmax", 0)
    dtype = torch.float16 if DEVICE.type == "cuda" else torch.float32
    options = Options(loader, workers, DEVICE, dtype)  # type: ignore[arg-type]
    order = Order(len(source), batch_size)
    load_batches = load if DEVICE.type == "cuda" else load_pixels
    loaded = load_batches(samples, map(order.sample_keys, itertools.count()), options)
    return Prefetcher(loaded, lambda batch: batch.to(DEVICE), DEVICE)


def cpu_seconds() -> float:
    """CPU seconds of this process, its threads and its workers so far."""
    process = psutil.Process()
    times = [each.cpu_times() for each in [process, *process.children(recursive=True)]]
    return sum(each.user + each.system for each in times)


def measure(prefetched: Iterator[Any], num_batches: int, batch_size: int) -> tuple[float, float]:
    """Images per second and CPU seconds per 1,000 images, measured once all queues are full."""
    for _ in islice(prefetched, 4):
        pass
    begin, cpu = time.perf_counter(), cpu_seconds()
    for _ in islice(prefetched, num_batches):
        pass
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    seconds, images = time.perf_counter() - begin, num_batches * batch_size
    return images / seconds, 1000 * (cpu_seconds() - cpu) / images


def medians(rounds: list[tuple[float, float]], peer: list[tuple[float, float]]) -> dict[str, float]:
    """Medians over rounds; ratios are taken within each round, since the machine's speed changes."""
    figures = {}
    for column, name in enumerate(("images_per_second", "cpu_seconds")):
        figures[name] = statistics.median(each[column] for each in rounds)
        ratios = [each[column] / other[column] for each, other in zip(rounds, peer, strict=True)]
        figures[f"{name}_ratio"] = statistics.median(ratios)
    return figures


def pixels(source: Source, folder: Path) -> list[dict[str, Any]]:
    """Pixel differences from PIL, on a scale of 255: each loader, both views, photos and odd sizes."""
    odd = folder / "odd"
    odd.mkdir()
    for height, width in ODD_SIZES:
        y, x = np.mgrid[:height, :width]
        waves = np.stack([127 + 90 * np.sin(x / 7 + c) + 30 * np.cos(y / 5 - c) for c in range(3)], -1)
        noise = np.random.default_rng(0).normal(0, 6, waves.shape)
        image = Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))
        (odd / "0").mkdir(exist_ok=True)
        image.save(odd / "0" / f"{height}x{width}.jpg", quality=92)
    options = convert.Options("beton", max_side=None, min_side=1)
    prepare(RawSource(open_folder(str(odd))), folder / "odd-ready", options, 1)
    rows = []
    for name, set_ in (("photos", source), ("odd sizes", open_prepared(str(folder / "odd-ready"), ".cls"))):
        prompts = PromptTable(set_, ["thing"] * 1000, read_templates("a {}"), open_clip.get_tokenizer("ViT-B-16"))
        kinds = {
            "train": TargetSamples(set_, prompts, PREPROCESS, "argmax", 0),
            "eval": EvaluationSamples(set_, PREPROCESS),
        }
        for view, samples in kinds.items():
            keys = [(0, sample) for sample in range(min(len(set_), 250))]
            expected = pixels_of(samples, keys, "plain")
            for loader in installed():
                rows.append(
                    {
                        "images": name,
                        "view": view,
                        "loader": loader,
                        **pixel_differences(pixels_of(samples, keys, loader), expected),
                    }
                )
            if view == "train" and name == "photos" and "ffcv" in installed():
                differences = pixel_differences(ffcv_pixels(set_, samples, keys), expected)
                rows.append({"images": name, "view": view, "loader": "ffcv's own decoder", **differences})
    return rows


def pixels_of(samples: Any, keys: list[tuple[int, int]], loader: Any) -> torch.Tensor:
    """Pixels ``(N, 3, 224, 224)`` of samples, on a scale of 255."""
    images = [batch.images.cpu() for batch in batches_of(samples, keys, 50, Options(loader, 0, DEVICE))]
    std, mean = (torch.tensor(value).view(3, 1, 1) for value in (PREPROCESS.std, PREPROCESS.mean))
    return (torch.cat(images) * std + mean) * 255


def pixel_differences(actual: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Mean difference over all images, the largest mean of an image, and the largest difference of a pixel."""
    by_image = (actual - expected).abs()
    return {
        "mean": float(by_image.mean()),
        "worst_image": float(by_image.mean((1, 2, 3)).max()),
        "worst_pixel": float(by_image.max()),
    }


def ffcv_pixels(source: Source, samples: Any, keys: list[tuple[int, int]]) -> torch.Tensor:
    """Pixels of the same crops by the functions of FFCV's decoders: fast cosine transform, INTER_AREA."""
    from ffcv.libffcv import imdecode, resize_crop

    images = []
    assert source.sizes is not None
    for key in keys:
        data = np.frombuffer(source.read(key[1]), np.uint8)
        height, width = source.sizes[key[1]].tolist()
        image = np.zeros((height, width, 3), np.uint8)
        imdecode(data, image, height, width, height, width, 0, 0, 1, 1, False, False)
        crop = samples.view(key, (height, width)).crop
        resized = np.zeros((224, 224, 3), np.uint8)
        resize_crop(image, crop.top, crop.top + crop.height, crop.left, crop.left + crop.width, resized)
        images.append(torch.from_numpy(resized).permute(2, 0, 1).float())
    return torch.stack(images)


def write_sets(photos: Source, folder: Path, count: int) -> dict[str, list[Path]]:
    """Writes the sets of JPEGs in class folders; returns the files of each set by its name.

    Args:
        count: images of the sets that are encoded again.
    """
    files = [photos.read(index) for index in range(len(photos))]
    pictures = [decode(file) for file in files[:count]]
    large = [
        file for file in files if len(file) >= 100_000 and np.prod(Image.open(io.BytesIO(file)).size) < 400_000
    ]
    contents = {
        "photos": files,
        "ImageNet's bytes": large * (count // max(1, len(large))),
        **{f"{side} px": [encode(picture, side) for picture in pictures] for side in (512, 288)},
    }
    written = {}
    for name, images in contents.items():
        if images:
            written[name] = [
                folder / name / f"{index % 50:02d}" / f"{index:04d}.jpg" for index in range(len(images))
            ]
        for path, image in zip(written.get(name, ()), images, strict=False):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
    return written


def encode(picture: Image.Image, side: int) -> bytes:
    """A JPEG of quality 95 with this shorter side."""
    scale = side / min(picture.size)
    width, height = (round(length * scale) for length in picture.size)
    content = io.BytesIO()
    picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC).save(content, "JPEG", quality=95)
    return content.getvalue()


def compare_sides(photos: Source, count: int) -> list[dict[str, float]]:
    """Views of photos stored with several shorter sides against views of the originals, and the cost of ``plain``.

    The photos have a shorter side of at least 375 pixels. Crops are central, with an aspect ratio of 1, and cover
    the same part of both, to fractions of a pixel. Mean differences are on a scale of 255.
    """
    files = [photos.read(index) for index in range(len(photos))]
    files = [file for file in files if min(Image.open(io.BytesIO(file)).size) >= 375][:count]
    pixels = np.empty((224, 224, 3), np.uint8)
    assert pil_resize.equals_pil()  # compiled before it is measured
    rows = []
    for side in (0, *SIDES):
        stored = [_stored(file, side) if side else file for file in files]
        seconds = 0.0
        differences: dict[str, list[tuple[float, float]]] = {name: [] for name in SHARES}
        for file, original in zip(stored, files, strict=True):
            start = time.process_time()
            image = decode(file).convert("RGB")
            crop = random_crop((image.height, image.width), 0, len(rows), 0)
            pil_resize.view_pixels(np.asarray(image), PREPROCESS.train_view(crop), pixels)
            seconds += time.process_time() - start
            first = decode(original).convert("RGB")
            for name, share in SHARES.items() if side else ():
                error = np.abs(_central_view(image, share) - _central_view(first, share))
                differences[name].append((error.mean(), 10 * np.log10(255**2 / (error**2).mean())))
        row: dict[str, float] = {"side": side, "kB": float(np.mean([len(file) for file in stored])) / 1000}
        row["CPU ms"] = 1000 * seconds / len(files)
        for name, values in differences.items() if side else ():
            row[f"{name}: mean"], row[f"{name}: dB"] = np.mean(values, axis=0)
        rows.append(row)
    return rows


def _stored(file: bytes, side: int) -> bytes:
    """The image as ``dive-fast prepare --max-side`` stores it."""
    return convert.convert(file, convert.Options(max_side=side)).jpeg


def _central_view(image: Image.Image, share: float) -> Any:
    """The central square with this share of the largest one's area, at the model's size."""
    side = min(image.size) * share**0.5
    box = [(length - side) / 2 for length in image.size]
    box += [start + side for start in box]
    return np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC, tuple(box)), float)  # type: ignore[arg-type]


def cores(figures: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Markdown of the predicted cores that a GPU needs, and its share of waiting with :data:`CORES` of them."""
    models = list(STEP_IMAGES_PER_SECOND)
    cells = [*(f"cores for {name}" for name in models), *(f"waits at {CORES}, {name}" for name in models)]
    lines = [f"| target | reference | loader | {' | '.join(cells)} |", "|---" * (3 + len(cells)) + "|"]
    for target, reference in TARGETS_AND_REFERENCES:
        if not {target, reference} <= figures.keys():
            continue
        for loader in figures[target]:
            seconds = [figures[name][loader]["cpu_seconds"] / 1000 for name in (target, reference)]
            needed = [rate * statistics.mean(seconds) for rate in STEP_IMAGES_PER_SECOND.values()]
            waits = [max(0.0, 1 - CORES / count) for count in needed]
            row = [*(f"{count:.0f}" for count in needed), *(f"{wait:.0%}" for wait in waits)]
            lines.append(f"| {target} | {reference} | {loader} | {' | '.join(row)} |")
    return lines


def tables(figures: dict[str, dict[str, dict[str, float]]], rows: list[dict[str, Any]]) -> str:
    """Markdown tables of speeds, cores and pixel differences."""
    lines = ["| images | kB | loader | images/s | / flyp | CPU s per 1,000 | / flyp |", "|---" * 7 + "|"]
    for name, loaders in figures.items():
        for loader, row in loaders.items():
            rates = f"{row['images_per_second']:.0f} | {row['images_per_second_ratio']:.2f}"
            seconds = f"{row['cpu_seconds']:.2f} | {row['cpu_seconds_ratio']:.2f}"
            lines.append(f"| {name} | {row['kilobytes']:.0f} | {loader} | {rates} | {seconds} |")
    lines += ["", *cores(figures), ""]
    lines += ["| images | view | loader | mean | worst image | worst pixel |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['images']} | {row['view']} | {row['loader']} "
            f"| {row['mean']:.3f} | {row['worst_image']:.3f} | {row['worst_pixel']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints tables and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", default=str(DATA / "imagenet_samples/imagenet_samples.tar"), help="labelled tars"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=16, help="batches of each loader in a round")
    parser.add_argument("--rounds", type=int, default=7, help="rounds over all loaders; medians are reported")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--images", type=int, default=400, help="images of the sets that are encoded again")
    parser.add_argument("--loaders", nargs="+", default=[*ALWAYS, *OPTIONAL], help="to compare, with flyp")
    parser.add_argument("--sides", action="store_true", help="only compare shorter sides of stored images")
    parser.add_argument("--results", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    device = device_name()
    default = REPOSITORY / ("benchmarks/results" if DEVICE.type == "cuda" else "build/benchmarks")
    path = (options.results or default) / f"{slug(device)}-loaders.json"
    about = {"device": device, "workers": options.workers, "commit": commit()}
    photos = open_webdataset(options.data, ".cls")
    if options.sides:
        rows = compare_sides(photos, options.images)
        print("| " + " | ".join(rows[-1]) + " |\n" + "|---" * len(rows[-1]) + "|")
        for row in rows:
            print("| " + " | ".join(f"{row[name]:.3g}" if name in row else "" for name in rows[-1]) + " |")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_sets(photos, folder, options.images)
        sources = {}
        for kind in files:
            conversion = convert.Options("beton", max_side=None, min_side=1)
            prepare(
                RawSource(open_folder(str(folder / kind))), folder / f"{kind}-ready", conversion, options.workers
            )
            sources[kind] = open_prepared(str(folder / f"{kind}-ready"), ".cls")
        loaders = [loader for loader in (*ALWAYS, *installed()) if loader in options.loaders]
        print(f"not installed: {sorted(OPTIONAL.keys() - set(installed()))}")
        measured: dict[str, dict[str, list[tuple[float, float]]]] = {
            kind: {loader: [] for loader in loaders} for kind in files
        }
        for _ in range(options.rounds):
            for kind, rounds in measured.items():
                for loader in loaders:
                    prefetched: Any = batches(
                        loader, sources[kind], files[kind], options.batch_size, options.workers
                    )
                    rounds[loader].append(measure(prefetched, options.batches, options.batch_size))
                    prefetched.close()
            figures = {
                kind: {
                    loader: medians(each, rounds["flyp"])
                    | {"kilobytes": float(np.mean([path.stat().st_size for path in files[kind]])) / 1000}
                    for loader, each in rounds.items()
                }
                for kind, rounds in measured.items()
            }
            write_json(path, {**about, "loaders": figures, "pixels": []})
            print(f"\n{tables(figures, [])}", flush=True)
        rows = pixels(sources["photos"], folder)
    write_json(path, {**about, "loaders": figures, "pixels": rows})
    print(f"\n{tables(figures, rows)}\n\n{path}")


if __name__ == "__main__":
    main()
