"""Measures rows per second read in random order from a teacher cache: ``python benchmarks/cache.py --gib 4``."""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from loss_report import REPOSITORY, commit, device_name, slug, write_json

from dive_fast.data.batch import ReferenceBatch, Text
from dive_fast.teacher import cache_files as store
from dive_fast.teacher.teacher import CachedTeacher

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
STEP_SECONDS = 0.27
"""Predicted time of a DiVE step, ViT-B/16, B = B' = 512, on an H200: 114 TFLOP at 430 TFLOP/s."""


def make(folder: Path, layout: store.Layout) -> None:
    """Writes a cache of random rows."""
    partial = store.partial_name(folder)
    store.create(partial, layout, {})
    writer = store.Writer(partial, layout, 0)
    rows = np.random.default_rng(0).normal(size=(store.BLOCK, layout.width)).astype(np.float32)
    for block in layout.blocks:
        count = len(layout.view_and_samples(block)[1])
        writer.write(block, {half: rows[:count] for half in store.HALVES})
    writer.close()
    store.finish(partial, folder, layout)


def drop_pages(folder: Path) -> None:
    """Drops the files from the page cache, so that they are read from disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(teacher: CachedTeacher, batch_size: int, batches: int, seed: int) -> float:
    """Median seconds to read a batch, rows of both halves, to the device."""
    rng = np.random.default_rng(seed)
    empty = torch.empty(0, device=DEVICE)
    seconds = []
    for _ in range(batches):
        sample = torch.from_numpy(rng.integers(0, teacher.store.layout.samples, batch_size))
        batch = ReferenceBatch(empty, Text(empty, empty, 0), sample, torch.zeros_like(sample), ())
        begin = time.perf_counter()
        teacher(batch)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def main() -> None:
    """Measures, prints a table and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=4, help="size of the cache, both halves")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="folder for the cache; default: the system's temporary folder")
    parser.add_argument("--results", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    layout = store.Layout(int(options.gib * 2**30 / (8 * options.width)), 1, options.width, "float32")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name) / "cache"
        make(folder, layout)
        seconds = {}
        for verify in (True, False):
            drop_pages(folder)
            teacher = CachedTeacher(folder, {}, verify)
            checked = "verified" if verify else "not verified"
            # With checksums, the first batch reads complete blocks: nearly all of a small cache.
            seconds[f"first batch, from disk, {checked}"] = measure(teacher, options.batch_size, 1, 0)
            seconds[f"from disk, {checked}"] = measure(teacher, options.batch_size, options.batches // 10 or 1, 1)
            measure(teacher, options.batch_size, options.batches, 2)
            seconds[f"from memory, {checked}"] = measure(teacher, options.batch_size, options.batches, 3)
    device = device_name()
    print(
        f"{layout.samples} pairs of {layout.width}, {options.gib:g} GiB, batches of {options.batch_size}, {device}"
    )
    print("| | rows/s | ms a batch | of a step |\n|---|---|---|---|")
    for case, median in seconds.items():
        rate = 2 * options.batch_size / median
        print(f"| {case} | {rate:,.0f} | {1e3 * median:.2f} | {100 * median / STEP_SECONDS:.2f} % |")
    path = (options.results or REPOSITORY / "build/benchmarks") / f"{slug(device)}-cache.json"
    write_json(path, {"device": device, "commit": commit(), "gib": options.gib, "seconds": seconds})
    print(path)


if __name__ == "__main__":
    main()
