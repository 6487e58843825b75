"""Measures images per second, CPU seconds and pixel differences from PIL of every loader on the same JPEGs.

``python benchmarks/loaders.py`` (README.md describes the comparison)
"""

import argparse
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

from dive_fast.data.loaders.loader import Options, batches_of, training_batches
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
from dive_fast.data.transforms import Preprocess

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
PREPROCESS = Preprocess(
    (224, 224), open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, "bicubic", "shortest"
)
ALWAYS, OPTIONAL = ("flyp", "plain"), {"dali": "nvidia.dali", "ffcv": "ffcv"}
"""Loaders that are always available, and optional ones with the package that they need."""
STEP_IMAGES_PER_SECOND = {"ViT-B/16": 1024 / 0.206, "ViT-L/14": 768 / 0.664}
"""Images of both sets that an H200 takes per second, by the planned time of a DiVE step (docs/performance.md)."""
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
    loaded = training_batches(samples, Order(len(source), batch_size), range(10**9), options)
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


def tables(figures: dict[str, dict[str, float]], rows: list[dict[str, Any]]) -> str:
    """Markdown tables of speeds and pixel differences."""
    lines = [
        "| loader | images/s | / flyp | CPU s per 1,000 | / flyp | "
        + " | ".join(f"cores for {name}" for name in STEP_IMAGES_PER_SECOND)
        + " |",
        "|---" * (5 + len(STEP_IMAGES_PER_SECOND)) + "|",
    ]
    for loader, row in figures.items():
        cores = [rate * row["cpu_seconds"] / 1000 for rate in STEP_IMAGES_PER_SECOND.values()]
        lines.append(
            f"| {loader} | {row['images_per_second']:.0f} "
            f"| {row['images_per_second_ratio']:.2f} "
            f"| {row['cpu_seconds']:.2f} | {row['cpu_seconds_ratio']:.2f} | "
            + " | ".join(f"{count:.0f}" for count in cores)
            + " |"
        )
    lines += ["", "| images | view | loader | mean | worst image | worst pixel |", "|---|---|---|---|---|---|"]
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
    parser.add_argument("--results", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    device = device_name()
    default = REPOSITORY / ("benchmarks/results" if DEVICE.type == "cuda" else "build/benchmarks")
    path = (options.results or default) / f"{slug(device)}-loaders.json"
    about = {"device": device, "workers": options.workers, "commit": commit()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = open_webdataset(options.data, ".cls")
        conversion = convert.Options("beton", max_side=None, min_side=1)
        prepare(RawSource(raw), folder / "ready", conversion, options.workers)
        source = open_prepared(str(folder / "ready"), ".cls")
        files = [folder / f"{index}.jpg" for index in range(len(source))]
        for index, file in enumerate(files):
            file.write_bytes(source.read(index))
        measured: dict[str, list[tuple[float, float]]] = {loader: [] for loader in (*ALWAYS, *installed())}
        print(f"not installed: {sorted(OPTIONAL.keys() - set(installed()))}")
        for _ in range(options.rounds):
            for loader in measured:
                prefetched: Any = batches(loader, source, files, options.batch_size, options.workers)
                measured[loader].append(measure(prefetched, options.batches, options.batch_size))
                prefetched.close()
            figures = {loader: medians(rounds, measured["flyp"]) for loader, rounds in measured.items()}
            write_json(path, {**about, "loaders": figures, "pixels": []})
        rows = pixels(source, folder)
    write_json(path, {**about, "loaders": figures, "pixels": rows})
    print(f"\n{tables(figures, rows)}\n\n{path}")


if __name__ == "__main__":
    main()
