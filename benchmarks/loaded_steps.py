"""Steps next to a loader: ``python benchmarks/loaded_steps.py`` (README.md describes the comparison).

DiVE's step on fixed batches, alone, and with as many images from a loader before each step. Rounds alternate, so
that a ratio is of neighbouring seconds. The images are not trained on: the loader's work is what is measured.
Without a GPU: a tiny model and few images, as a check.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loaders import ALWAYS, DEVICE, OPTIONAL, batches, installed, write_sets
from measure_losses import synchronize
from measure_steps import settle
from micro import write
from real_data import DATA
from steps import Case, running

from dive_fast.data.prepared import convert
from dive_fast.data.prepared.raw import RawSource
from dive_fast.data.prepared.read import open_prepared
from dive_fast.data.prepared.write import prepare
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.webdataset import open_webdataset

CASE = Case("ViT-B-16", 512, "dive_fast") if DEVICE.type == "cuda" else Case("ViT-tiny", 8, "dive_fast")
ROUNDS, STEPS = (3, 8) if DEVICE.type == "cuda" else (1, 2)
LOADED = 256
"""Images of a loader's batch, or those of a step if they are fewer."""
KINDS = ("ImageNet's bytes", "288 px")
FILLING = 4
"""Steps with a loader before a round is timed, after which all queues are full or the loader is too slow."""


def round_of(
    step: Callable[[], object], loaded: Iterator[Any] | None, batches_of_step: int, count: int
) -> tuple[float, float]:
    """Seconds of a step, with all work on the device, and the part of them that waits for the loader."""
    waited, start = 0.0, 0.0
    for number in range(-(FILLING if loaded else 1), count):
        if number == 0:
            synchronize()
            waited, start = 0.0, time.perf_counter()
        if loaded:
            before = time.perf_counter()
            for _ in range(batches_of_step):
                next(loaded)
            waited += time.perf_counter() - before
        step()
    synchronize()
    return (time.perf_counter() - start) / count, waited / count


def row_of(name: str, alone: list[float], beside: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians over rounds: seconds of a step next to a loader, over those alone, and the share that waits."""
    return {
        "loader": name,
        "seconds": statistics.median(seconds for seconds, _ in beside),
        "over_alone": statistics.median(
            seconds / other for (seconds, _), other in zip(beside, alone, strict=True)
        ),
        "waits": statistics.median(waited / seconds for seconds, waited in beside),
    }


def main() -> None:
    """Measures, prints a table and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", default=str(DATA / "imagenet_samples/imagenet_samples.tar"), help="labelled tars"
    )
    parser.add_argument("--images", type=int, default=400 if DEVICE.type == "cuda" else 64)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--loaders", nargs="+", default=[*ALWAYS, *OPTIONAL])
    parser.add_argument("--results", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    _, batch, reference_batch = CASE.sizes
    loaded_batch = min(LOADED, batch + reference_batch)
    batches_of_step, turns = (batch + reference_batch) // loaded_batch, itertools.count()
    rows: list[dict[str, Any]] = []
    print("| images | loader | step, ms | / alone | waits |\n" + "|---" * 5 + "|")
    with tempfile.TemporaryDirectory() as name, running(CASE, 0) as competitor:
        files = write_sets(open_webdataset(options.data, ".cls"), Path(name), options.images)
        settle(competitor, turns)

        def step() -> None:
            competitor.step(next(turns))

        for kind in KINDS:
            if kind not in files:
                continue
            ready = Path(name) / f"{kind}-ready"
            conversion = convert.Options("beton", max_side=None, min_side=1)
            prepare(RawSource(open_folder(str(Path(name) / kind))), ready, conversion, options.workers)
            source = open_prepared(str(ready), ".cls")
            for loader in (each for each in (*ALWAYS, *installed()) if each in options.loaders):
                loaded: Any = batches(loader, source, files[kind], loaded_batch, options.workers)
                alone, beside = [], []
                for _ in range(ROUNDS):
                    alone.append(round_of(step, None, 0, STEPS)[0])
                    beside.append(round_of(step, loaded, batches_of_step, STEPS))
                loaded.close()
                rows.append({"images": kind} | row_of(loader, alone, beside))
                last = rows[-1]
                print(
                    f"| {kind} | {loader} | {1e3 * last['seconds']:.0f} | {last['over_alone']:.2f} "
                    f"| {last['waits']:.0%} |",
                    flush=True,
                )
                write(
                    "loaded-steps", {"case": str(CASE), "workers": options.workers, "rows": rows}, options.results
                )
    by_kind = {
        kind: ", ".join(f"{row['loader']} {row['over_alone']:.2f}" for row in rows if row["images"] == kind)
        for kind in KINDS
    }
    print("measured: " + "; ".join(f"{kind}: {ratios}" for kind, ratios in by_kind.items() if ratios))


if __name__ == "__main__":
    main()
