"""Cost of opening and reading data sets as they grow: ``python benchmarks/scale.py``.

Synthetic sets of each size are made in a temporary folder (:mod:`scale_sets`), measured one after the other in
fresh processes (:mod:`scale_tasks`), and removed. Figures are bytes, and CPU seconds, which other processes of the
machine disturb less than wall time. A law ``a + b N^p`` is fitted over the sizes.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from loss_report import REPOSITORY, commit, write_json
from scale_report import key, report
from scale_sets import (
    CSV_PROMPTS,
    FOLDER,
    KINDS,
    PREPARED,
    PREPARED_PAIRS,
    TARS_CAPTIONS,
    TARS_LABELS,
    SyntheticSets,
)
from scale_tasks import GROWTH, IMAGE_FOLDER, READ_COUNTS, WEBDATASET, WORKERS, memory

SIZES = (10_000, 100_000, 1_000_000)
RANKS = 4
TINY = 100
PEERS = {IMAGE_FOLDER: FOLDER, WEBDATASET: TARS_CAPTIONS}
"""Peers, with the set that each of them opens."""
PACKAGES = {IMAGE_FOLDER: "torchvision", WEBDATASET: "webdataset"}
RANKED = (FOLDER, TARS_CAPTIONS, CSV_PROMPTS, PREPARED_PAIRS)
"""Kinds of sets that several ranks open."""
LABELLED = (FOLDER, TARS_LABELS, PREPARED)
STEPS = (FOLDER, PREPARED, TARS_CAPTIONS, PREPARED_PAIRS)
"""Kinds of sets of which the parts of a step are measured."""
SAMPLING_SECONDS = 0.1
PARTS = ("open", "ranks", "workers", "first", "labels", "step", "stream", "growth")


# Processes


class Task:
    """A process of :mod:`scale_tasks`."""

    def __init__(self, name: str, arguments: dict[str, Any], cache: Path) -> None:
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": "",
            "DIVE_FAST_CACHE": str(cache),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        command = [sys.executable, str(Path(__file__).with_name("scale_tasks.py")), name, json.dumps(arguments)]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(command, env=environment, text=True, **streams)
        self._errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()

    def line(self) -> dict[str, Any]:
        """The next line of the process.

        Raises:
            RuntimeError: it ended without one.
        """
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            self.process.wait()
            self._reader.join()
            raise RuntimeError(f"a measurement failed: {''.join(self._errors)[-2000:]}")
        return json.loads(line)  # type: ignore[no-any-return]

    def lines(self) -> list[dict[str, Any]]:
        """All lines of the process until it ends.

        Raises:
            RuntimeError: it failed.
        """
        lines = [json.loads(line) for line in self.process.stdout]  # type: ignore[union-attr]
        if self.process.wait():
            self._reader.join()
            raise RuntimeError(f"a measurement failed: {''.join(self._errors)[-2000:]}")
        return lines

    def proceed(self) -> None:
        """Sends the line that the process waits for."""
        self.process.stdin.write("\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]

    def end(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _read_errors(self) -> None:
        self._errors += self.process.stderr  # type: ignore[arg-type]


def node_memory(pids: Sequence[int]) -> int:
    """Bytes of processes and all processes that they have started; pages that they share count once."""
    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            for process in tree:
                with contextlib.suppress(OSError):
                    total += memory(process.pid)["pss"]
    return total


class Peak:
    """The largest memory of processes while it is entered, sampled."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids, self._stop = pids, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.bytes = 0

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLING_SECONDS):
            self.bytes = max(self.bytes, node_memory(self._pids))


def opening(section: dict[str, Any], tiny: dict[str, Any], cache: Path, ranks: int = 1) -> dict[str, Any]:
    """The cost of opening a set in fresh processes at the same time: their sums, and the time of the slowest."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "section": section,
            "tiny": tiny,
            "ranks": ranks,
            "rendezvous": f"{folder}/rendezvous",
        }
        tasks = [Task("open", arguments | {"rank": rank}, cache) for rank in range(ranks)]
        try:
            for task in tasks:
                task.line()
            pids = [task.process.pid for task in tasks]
            before = node_memory(pids)
            with Peak(pids) as peak:
                for task in tasks:
                    task.proceed()
                rows = [task.line() for task in tasks]
            kept = node_memory(pids) - before
        finally:
            for task in tasks:
                task.end()
    figures = rows[0] | {
        "cpu": sum(row["cpu"] for row in rows),
        "wall": max(row["wall"] for row in rows),
        "node_kept": kept,
        "node_peak": max(peak.bytes - before, kept, *(row["peak"] for row in rows)),
    }
    return figures


# Measurements


class Measurement:
    """All figures of one run."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self._commit = commit()
        self.rows: list[dict[str, Any]] = []
        self.write: Callable[[], None] = lambda: None
        """Called after each kind of set, so that an interrupted run leaves its figures."""
        self.tiny_sets = SyntheticSets(folder / "tiny", TINY)

    def add(self, **row: Any) -> None:
        """Records and prints one row."""
        self.rows.append(row | {"commit": self._commit})
        print(json.dumps(row), flush=True)

    def measure(self, count: int) -> None:
        """Measures everything at one size."""
        root = self.folder / str(count)
        try:
            sets = SyntheticSets(root, count, self.options.shard)
            kinds = [kind for kind in KINDS if kind in self.options.kinds]
            for kind in kinds:
                section, tiny = sets.section(kind), self.tiny_sets.section(kind)
                self._kind(kind, count, section, tiny)
                self.write()
            for peer, kind in PEERS.items():
                if kind in kinds and find_spec(PACKAGES[peer]):
                    section, tiny = (self._peer(peer, each.section(kind)) for each in (sets, self.tiny_sets))
                    self._kind(peer, count, section, tiny)
        finally:
            print(f"removing the sets of {count} samples", file=sys.stderr, flush=True)
            shutil.rmtree(root, ignore_errors=True)

    @staticmethod
    def _peer(peer: str, section: dict[str, Any]) -> dict[str, Any]:
        path = section["path"]
        if peer == WEBDATASET:
            tars = sorted(map(str, Path(path).glob("*.tar")))
            path = tars if len(tars) >= WORKERS else tars * WORKERS  # a worker without a tar ends
        return {"format": peer, "path": path, "half": section["half"]}

    def _kind(self, kind: str, count: int, section: dict[str, Any], tiny: dict[str, Any]) -> None:
        parts, is_peer = self.options.parts, kind in PEERS
        row = {"kind": kind, "count": count}
        if "open" in parts:
            with self._cache() as cache:
                for start in ("first",) if is_peer else ("first", "second"):
                    self.add(part="open", **row, start=start, **opening(section, tiny, cache))
        if "ranks" in parts and kind in RANKED and count <= self.options.ranks_up_to:
            with self._cache() as cache:
                for start in ("first", "second"):
                    figures = opening(section, tiny, cache, self.options.ranks)
                    self.add(part="ranks", **row, ranks=self.options.ranks, start=start, **figures)
        arguments = {"section": section, "tiny": tiny}
        with self._cache() as cache:
            if "first" in parts and kind in (TARS_CAPTIONS, WEBDATASET):
                for start in ("first",) if is_peer else ("first", "second"):
                    (figures,) = Task("first", arguments, cache).lines()
                    self.add(part="first", **row, start=start, **figures)
            if "workers" in parts:
                counts = [each for each in READ_COUNTS if each <= self.options.read]
                _, *lines = Task("workers", arguments | {"counts": counts}, cache).lines()
                for line in lines:
                    self.add(part="workers", **row, read=line["count"], **_mean(line["workers"]))
            if "labels" in parts and kind in LABELLED:
                for line in Task("labels", arguments, cache).lines():
                    self.add(**{"part": "labels", **row, "step": line.pop("part")}, **line)
            if "stream" in parts and kind == TARS_CAPTIONS:
                for line in Task("stream", arguments | {"count": count}, cache).lines():
                    self.add(**{"part": "stream", **row, "step": line.pop("part")}, **line)
            if "step" in parts and kind in STEPS:
                for line in Task("step", arguments, cache).lines():
                    self.add(**{"part": "step", **row, "step": line.pop("part")}, **line)

    def growth(self, longest: int) -> None:
        """Measures other work that grows, up to a length."""
        for name, (_, lengths) in GROWTH.items():
            for count in (length for length in lengths if length <= longest):
                with self._cache() as cache:
                    (figures,) = Task("growth", {"name": name, "count": count}, cache).lines()
                self.add(part="growth", kind=name, count=count, **figures)

    @contextlib.contextmanager
    def _cache(self) -> Iterator[Path]:
        """A folder for what is kept between starts, empty at first."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            yield Path(folder)


def _mean(workers: list[dict[str, int]]) -> dict[str, float]:
    """Mean bytes of the workers, by kind."""
    return {name: sum(worker[name] for worker in workers) / len(workers) for name in workers[0]}


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def cpu_name() -> str:
    """Model of the processor."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return "unknown"


def about() -> dict[str, Any]:
    """Machine and versions of a run."""
    packages = ("torch", "torchvision", "webdataset", "datasets", "numpy")
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in packages if _is_installed(name)},
    }


def main() -> None:
    """Measures all sizes; writes the figures and the report after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of samples, e.g. 3000000")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ranks", type=int, default=RANKS, help="processes that open a set at the same time")
    parser.add_argument("--ranks-up-to", type=int, default=SIZES[-1], help="largest size that several ranks open")
    parser.add_argument("--read", type=int, default=READ_COUNTS[-1], help="samples that workers read at most")
    parser.add_argument("--shard", type=int, default=10_000, help="samples in a tar")
    parser.add_argument("--longest", type=int, default=100_000, help="largest length of other work that grows")
    parser.add_argument("--folder", type=Path, help="parent of the temporary sets; default: the system's")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "build/benchmarks", help="folder")
    parser.add_argument("--name", default="scale", help="name of the files of results")
    parser.add_argument("--add", action="store_true", help="keep rows of the file that this run does not measure")
    parser.add_argument("--before", type=Path, help="file of an earlier run, for comparison in the report")
    options = parser.parse_args()
    file, start = options.results / f"{options.name}.json", time.monotonic()
    kept = json.loads(file.read_text()) if options.add and file.exists() else {"rows": []}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="scale-") as folder:
        measurement = Measurement(Path(folder), options)
        results = {name: value for name, value in kept.items() if name == "before"} | about()
        if options.before is not None:
            results["before"] = json.loads(options.before.read_text())

        def write() -> None:
            measured = set(map(key, measurement.rows))
            rows = [row for row in kept["rows"] if key(row) not in measured] + measurement.rows
            results["rows"] = sorted(rows, key=lambda row: row["count"])
            results["minutes"] = (time.monotonic() - start) / 60 + kept.get("minutes", 0)
            write_json(file, results)
            file.with_suffix(".md").write_text(report(results))

        measurement.write = write
        if "growth" in options.parts:
            measurement.growth(options.longest)
            write()
        for count in options.sizes:
            measurement.measure(count)
            write()
    print(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
