"""Measurements of one data set in a process of their own: ``python benchmarks/scale_tasks.py TASK ARGUMENTS``.

:mod:`scale` starts these processes. A task prints JSON lines. It first opens a tiny set of the same kind, so that
imports count in no figure. Memory is relative to the process after that.
"""

import contextlib
import gc
import importlib
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

from scale_sets import open_set

READ_COUNTS = (0, 6_000, 26_000, 100_000, 300_000)
"""Numbers of samples after which the memory of workers is measured."""
WORKERS = 2
BATCH = 512
REPEATS = 20
"""Steps whose parts are timed."""
IMAGE_FOLDER, WEBDATASET = "torchvision's ImageFolder", "webdataset library"
"""Peers, as formats of a section."""


def memory(pid: int | str = "self") -> dict[str, int]:
    """Bytes of a process: RSS, PSS, USS, and how many of its own bytes are no unchanged pages of files."""
    figures = dict.fromkeys(("Rss", "Pss", "Private_Clean", "Private_Dirty"), 0)
    with open(f"/proc/{pid}/smaps_rollup") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name in figures:
                figures[name] = 1024 * int(value.split()[0])
    clean, dirty = figures["Private_Clean"], figures["Private_Dirty"]
    return {"rss": figures["Rss"], "pss": figures["Pss"], "uss": clean + dirty, "dirty": dirty}


def peak() -> int:
    """Largest RSS in bytes since :func:`reset_peak`."""
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def reset_peak() -> None:
    """Lets the peak of the RSS start at its current value."""
    Path("/proc/self/clear_refs").write_text("5")


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


class Clock:
    """CPU and wall seconds since its creation."""

    def __init__(self) -> None:
        gc.collect()
        self._cpu, self._wall = cpu_seconds(), time.perf_counter()

    def read(self) -> dict[str, float]:
        """Seconds by kind."""
        return {"cpu": cpu_seconds() - self._cpu, "wall": time.perf_counter() - self._wall}


figures_file: TextIO | None = None
"""Where figures are printed; None: standard output."""


def say(**figures: Any) -> None:
    """Prints one JSON line."""
    print(json.dumps(figures), file=figures_file, flush=True)


def opener(section: dict[str, Any], ranks: tuple[Any, ...] = ()) -> Callable[[], Any]:
    """The function that opens a set, or a peer's set."""
    if section.get("format") == IMAGE_FOLDER:
        from torchvision.datasets import ImageFolder

        return lambda: ImageFolder(section["path"])
    if section.get("format") == WEBDATASET:
        import webdataset

        return lambda: webdataset.WebDataset(section["path"], shardshuffle=100).shuffle(1000)
    return lambda: open_set(section, *ranks)


def join(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """This process among the ranks that open a set; empty for a single process."""
    if arguments.get("ranks", 1) == 1:
        return ()
    import torch
    import torch.distributed as dist

    from dive_fast.distributed import Ranks

    dist.init_process_group(
        "gloo",
        init_method=f"file://{arguments['rendezvous']}",
        rank=arguments["rank"],
        world_size=arguments["ranks"],
    )
    return (Ranks(arguments["rank"], arguments["ranks"], torch.device("cpu")),)


def open_(arguments: dict[str, Any]) -> None:
    """Opens a set when a line comes on stdin, prints the cost, and stays until stdin is closed."""
    opener(arguments["tiny"])()
    ranks = join(arguments)
    function = opener(arguments["section"], ranks)
    gc.collect()
    before = memory()
    reset_peak()
    say(ready=True)
    sys.stdin.readline()
    clock = Clock()
    source = function()
    figures = clock.read()
    highest = peak()
    gc.collect()
    after = memory()
    say(
        **figures,
        samples=None if arguments["section"]["format"] == WEBDATASET else len(source),
        peak=highest - before["rss"],
        **{f"kept_{name}": after[name] - before[name] for name in ("rss", "uss", "dirty")},
    )
    sys.stdin.readline()


def first_sample(arguments: dict[str, Any]) -> None:
    """The cost of the first sample of a set in training order, imports excluded."""
    list(islice(_samples(arguments["tiny"]), 1))
    clock = Clock()
    next(_samples(arguments["section"]))
    say(**clock.read())


def _samples(section: dict[str, Any]) -> Iterator[bytes]:
    source = opener(section)()
    if section["format"] == WEBDATASET:
        yield from (sample["jpg"] for sample in source)
    else:
        from dive_fast.data.sampler import Order

        order = Order(len(source), 1)
        for step in range(len(source)):
            yield source.read(order.sample_keys(step)[0][1])


def workers(arguments: dict[str, Any]) -> None:
    """Memory of worker processes that read the metadata and bytes of samples in training order."""
    # A worker that exits shuts down its copy of this process's queues; nothing else may run at its exit.
    section, counts = arguments["section"], arguments.get("counts", READ_COUNTS)
    opener(arguments["tiny"])()
    source = opener(section)()
    batches, size = batches_in_workers(section, source, max(counts))
    say(owner=memory())
    done = 0
    next(batches)  # the workers have started
    for count in counts:
        while done < count:  # in addition to the few batches that are read ahead
            done += size
            next(batches)
        say(count=count, workers=[memory(pid) for pid in children()])
    os._exit(0)


def batches_in_workers(section: dict[str, Any], source: Any, largest: int) -> tuple[Iterator[Any], int]:
    """Batches of samples that processes read, and the size of a batch; the processes end with this one."""
    size = 64 if section["format"] == WEBDATASET else min(64, len(source))
    num_batches = largest // size + 2
    if section["format"] == WEBDATASET:
        from torch.utils.data import DataLoader

        # As the library's documentation: the workers share the shards, and the set is endless.
        loader = DataLoader(source.repeat().map(_without_bytes), size, num_workers=WORKERS, collate_fn=len)
        return iter(loader), size
    if section["format"] == IMAGE_FOLDER:
        from torch.utils.data import DataLoader, RandomSampler

        chosen = RandomSampler(source, replacement=True, num_samples=num_batches * size)
        loader = DataLoader(_Files(source), size, sampler=chosen, num_workers=WORKERS, collate_fn=len)
        return iter(loader), size
    from dive_fast.data.sampler import Order
    from dive_fast.data.workers import in_workers

    order = Order(len(source), size)
    tasks = (order.sample_keys(step) for step in range(num_batches))
    return in_workers(partial(_read, source), tasks, WORKERS), size


class _Files:
    """An ImageFolder that reads bytes and decodes nothing."""

    def __init__(self, folder: Any) -> None:
        self._folder = folder

    def __len__(self) -> int:
        return len(self._folder)

    def __getitem__(self, row: int) -> int:
        path, label = self._folder.samples[row]
        with open(path, "rb") as file:
            return len(file.read()) + int(label)


def _without_bytes(sample: dict[str, Any]) -> int:
    return len(sample["jpg"])


def _read(source: Any, sample_keys: list[tuple[int, int]]) -> int:
    """Reads samples as a loader does, without decoding them."""
    size = 0
    for _, row in sample_keys:
        sample = source.samples[row]
        size += len(source.read(row)) + len(sample.key) + sum(map(len, sample.texts)) + sample.label
    return size


def children() -> list[int]:
    """Processes that this one has started."""
    import psutil

    return [
        child.pid for child in psutil.Process().children() if "resource_tracker" not in " ".join(child.cmdline())
    ]


def labels(arguments: dict[str, Any]) -> None:
    """CPU seconds of the passes over all labels of a set before a run starts."""
    from dive_fast.data.classes import target_names
    from dive_fast.data.holdout import split
    from dive_fast.data.prompt_files import read_templates
    from dive_fast.data.prompts import PromptTable
    from dive_fast.data.sampler import Classes

    def passes(section: dict[str, Any]) -> dict[str, Callable[[], Any]]:
        source = opener(section)()
        listed = section.get("class_names")
        names, templates = target_names(source, listed), read_templates("simple")
        return {
            "class names": lambda: target_names(source, listed),
            "prompt table without its tokens": lambda: PromptTable(source, names, templates, _no_tokens),
            "class balance": lambda: Classes.of(source.samples.labels),
            "holdout": lambda: split(source, 0.1, "train"),
            "digest": source.digest,
            "modification hash": source.modified,
        }

    for function in passes(arguments["tiny"]).values():
        function()
    for name, function in passes(arguments["section"]).items():
        clock = Clock()
        function()
        say(part=name, **clock.read())


def _no_tokens(texts: list[str]) -> Any:
    """Tokens that cost nothing, all alike."""
    import torch

    return torch.zeros(len(texts), 8, dtype=torch.long)


def step(arguments: dict[str, Any]) -> None:
    """CPU seconds of the parts of a step on the host, for 512 samples."""
    import open_clip
    import torch

    from dive_fast.data.classes import target_names
    from dive_fast.data.prompt_files import read_templates
    from dive_fast.data.prompts import PromptTable
    from dive_fast.data.sampler import Order
    from dive_fast.data.samples import ReferenceSamples, TargetSamples
    from dive_fast.data.text_tokenizer import quick_bpe
    from dive_fast.data.transforms import Preprocess

    torch.set_num_threads(1)
    source = opener(arguments["section"])()
    batch = min(BATCH, len(source))
    order = Order(len(source), batch)
    clock = Clock()
    order.sample_keys(0)
    say(part="permutation of an epoch", **clock.read())
    repeats = min(REPEATS, order.steps_per_epoch)
    steps = [order.sample_keys(number) for number in range(repeats)]
    preprocess = Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest")
    images = torch.zeros(batch, 3, 1, 1)
    tokenizer = quick_bpe(open_clip.get_tokenizer("ViT-B-16"))
    parts: dict[str, Callable[[list[tuple[int, int]]], Any]] = {
        "samples": lambda keys: [source.samples[row] for _, row in keys],
    }
    if arguments["section"]["half"] == "target":
        names = target_names(source, arguments["section"].get("class_names"))
        prompts = PromptTable(source, names, read_templates("simple"), _no_tokens)
        target = TargetSamples(source, prompts, preprocess, "argmax", 0)
        parts["prompts"] = lambda keys: target.batch(keys, images)
        parts["crops"] = lambda keys: [target.crop(key, (32, 32)) for key in keys]
    else:
        reference = ReferenceSamples(source, tokenizer, preprocess, "argmax", 0)
        parts["captions' tokens"] = lambda keys: reference.batch(keys, images)
    clock = Clock()
    for number in range(repeats):
        order.sample_keys(number)
    say(part="places of a step", **{name: value / repeats for name, value in clock.read().items()})
    for name, function in parts.items():
        function(steps[0])
        clock = Clock()
        for keys in steps:
            function(keys)
        say(part=name, **{kind: value / repeats for kind, value in clock.read().items()})


def stream(arguments: dict[str, Any]) -> None:
    """CPU seconds of the order of a stream: until its first batch, for an epoch, and to resume at its end."""
    from dive_fast.config.schema import ReferenceConfig
    from dive_fast.data.sources.tar_stream import open_tar_stream
    from dive_fast.data.stream_order import StreamOrder

    section, window = arguments["section"], ReferenceConfig.model_fields["stream_buffer"].default
    batch = min(BATCH, arguments["count"])
    steps = range(arguments["count"] // batch)

    def order() -> StreamOrder:
        return StreamOrder(open_tar_stream(section["path"], window), batch)

    next(StreamOrder(open_tar_stream(arguments["tiny"]["path"], window), 1).keys_of_steps(range(1)))
    gc.collect()
    before = memory()["rss"]
    reset_peak()
    clock = Clock()
    keys = order().keys_of_steps(steps)
    next(keys)
    say(part="open, and the first batch", **clock.read())
    for _ in keys:
        pass
    say(part="open, and all batches of an epoch", **clock.read(), peak=peak() - before)
    clock = Clock()
    next(order().keys_of_steps(steps[-1:]))
    say(part="resume at the last batch of an epoch", **clock.read())


def results_tables(rows: int) -> None:
    """Adds the results of models on 16 sets each to a folder, one after the other."""
    from dive_fast.evaluation.results import Results

    with tempfile.TemporaryDirectory() as folder:
        for first in range(0, rows, 16):  # a command for each model
            results = Results(Path(folder))
            with results.writing_tables():
                for number in range(first, min(first + 16, rows)):
                    set_, label = f"set{number - first}", f"run{first // 16}"
                    row = {
                        "label": label,
                        "set": set_,
                        "title": set_,
                        "role": "id",
                        "metric": "top1",
                        "value": 0.5,
                    }
                    results.add(row | {"key": f"{number:064x}", "samples": 50_000})


def geometry(pairs: int) -> None:
    """All measures of geometry between two models' embeddings of pairs, 512 wide."""
    from dive_fast.evaluation.geometry.measures import compare

    compare(_embeddings(pairs, 0), _embeddings(pairs, 1))


def retrieval(pairs: int) -> None:
    """Recall at 1 in both directions among pairs, 512 wide."""
    import torch

    from dive_fast.distributed import Ranks
    from dive_fast.evaluation.retrieval import paired_recalls

    captions = torch.arange(pairs)
    paired_recalls(_embeddings(pairs, 0), captions, Ranks(0, 1, torch.device("cpu")))


def _embeddings(pairs: int, seed: int) -> Any:
    import torch

    from dive_fast.model.features import Pairs

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(pairs, 512, generator=generator) for _ in range(2))
    return Pairs(torch.nn.functional.normalize(image), torch.nn.functional.normalize(text))


def metrics(lines: int) -> None:
    """Resumes a run whose metrics have that many lines, ten steps each."""
    import torch

    from dive_fast.config.schema import TrainConfig
    from dive_fast.distributed import Ranks
    from dive_fast.training.metrics import Metrics

    with tempfile.TemporaryDirectory() as folder:
        _write_metrics(Path(folder) / "metrics.jsonl", lines)
        # The parts of a run that its metrics read.
        method = SimpleNamespace(norms={}, target_loss=None, needs=SimpleNamespace(reference=False))
        run: Any = SimpleNamespace(
            config=SimpleNamespace(
                train=TrainConfig(),
                data=SimpleNamespace(target=SimpleNamespace(batch_size=4)),
                objective=SimpleNamespace(reference_every=1),
            ),
            folder=Path(folder),
            ranks=Ranks(0, 1, torch.device("cpu")),
            engine=SimpleNamespace(method=method, features_are_random=False),
            total_steps=10 * lines,
            images_per_step=4,
            target_order=SimpleNamespace(steps_per_epoch=5),
        )
        batches: Any = SimpleNamespace(waited=0.0)
        with contextlib.redirect_stdout(sys.stderr):  # the line of a resume
            Metrics(run, 10 * lines, batches)


def checkpoints(count: int) -> None:
    """Lists the checkpoints of a run that keeps all of them, as a resume does."""
    from dive_fast.checkpoint.manifest import MANIFEST, checkpoint_path, list_checkpoints

    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, count + 1):
            path = checkpoint_path(Path(folder), number)
            path.mkdir()
            (path / MANIFEST).write_text("{}")
        assert len(list_checkpoints(Path(folder))) == count


def runs_report(runs: int) -> None:
    """Compares finished runs with 16 sets each, as ``dive-fast report`` does; their folders are written first."""
    from dive_fast.sweep.run_results import read_runs
    from dive_fast.sweep.runs_report import write_runs_report
    from dive_fast.sweep.runs_table import compare_runs, find_axes, table_text

    with tempfile.TemporaryDirectory() as folder:
        for number in range(runs):
            _write_run(Path(folder) / f"run{number}", number)
        table = compare_runs(read_runs([Path(folder)]))
        axes = find_axes(table)
        table_text("Runs", table, axes)
        write_runs_report(table, axes, Path(folder) / "report", with_page=True)


def _write_run(folder: Path, number: int) -> None:
    kinds = ("id", "ood", "zero_shot", "other")
    rows = [
        {
            "name": f"set{row}",
            "kind": kinds[row % 4],
            "metric": "top1",
            "before": 0.5,
            "after": 0.5 + 0.4 * math.sin(number + row) ** 2,
            "samples": 50_000,
            "left_out": 0,
        }
        for row in range(16)
    ]
    sets = {row["name"]: {"path": f"/data/{row['name']}", "role": row["kind"]} for row in rows}
    config = {
        "config": {"objective": {"name": "dive", "weight": 1e3}, "train": {"seed": 0}, "evaluate": {"sets": sets}},
        "steps": 100,
    }
    report = {"run": folder.name, "weights_step": 90, "steps": 100, "method": "dive", "weight": 1e3, "seed": 0}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "report.json").write_text(json.dumps(report | {"rows": rows, "title": "DiVE"}))


def unfinished_run(lines: int) -> None:
    """Looks for the step that a run without a report has reached, as ``dive-fast report`` does."""
    from dive_fast.sweep.run_results import read_runs

    with tempfile.TemporaryDirectory() as folder:
        _write_run(Path(folder) / "run", 0)
        (Path(folder) / "run/report.json").unlink()
        _write_metrics(Path(folder) / "run/metrics.jsonl", lines)
        read_runs([Path(folder)])


def course(lines: int) -> None:
    """Reads the metrics of a run and draws its geometry over training, as ``dive-fast geometry`` does."""
    from dive_fast.evaluation.geometry.figures import draw_course
    from dive_fast.io.safe_read import parse_json, read_text

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        _write_metrics(path, lines)
        draw_course([parse_json(line) for line in read_text(path).splitlines()], Path(folder) / "course.png")


def _write_metrics(path: Path, lines: int) -> None:
    names = ("loss", "contrastive", "average_loss", "pairwise_loss", "image_norm", "text_norm", "lr", "data_wait")
    with path.open("w") as file:
        for number in range(1, lines + 1):
            line = {"step": 10 * number} | {name: number / (row + 7) for row, name in enumerate(names)}
            file.write(json.dumps(line) + "\n")


def prompts(classes: int) -> None:
    """Tokens of 80 prompts for each class, from two evaluations, and their division into batches."""
    import open_clip
    import torch

    from dive_fast.data.prompts import text_lengths
    from dive_fast.distributed import Ranks
    from dive_fast.evaluation.text_features import KeptTokens, _distinct, _tokenize, batches_by_length

    tokenizer = KeptTokens(open_clip.get_tokenizer("ViT-B-32"))
    texts = [f"a {kind} photo of object {number}." for number in range(classes) for kind in range(80)]
    for _ in range(2):
        tokens, _ = _distinct(_tokenize(tokenizer, texts, Ranks(0, 1, torch.device("cpu"))))
        batches_by_length(text_lengths(tokens, "argmax").tolist(), 1 << 11)


GROWTH: dict[str, tuple[Callable[[int], None], tuple[int, ...]]] = {
    "results tables, rows": (results_tables, (160, 480, 1600)),
    "geometry": (geometry, (1000, 3000, 10_000, 30_000)),
    "retrieval": (retrieval, (1000, 3000, 10_000)),
    "metrics of a resumed run, lines": (metrics, (10_000, 100_000)),
    "checkpoints": (checkpoints, (100, 1000)),
    "runs in dive-fast report": (runs_report, (10, 30, 100)),
    "metrics of an unfinished run in dive-fast report, lines": (unfinished_run, (10_000, 100_000)),
    "curves of geometry over training, lines": (course, (10_000, 100_000)),
    "class prompts without the encoder, classes": (prompts, (100, 300, 1000)),
}
"""Other work that grows with its length: its function and the lengths that are measured."""


def growth(arguments: dict[str, Any]) -> None:
    """CPU seconds of other work of a length, and the peak of its memory."""
    function, (least, *_) = GROWTH[arguments["name"]]
    function(min(least, 64))
    gc.collect()
    before = memory()["rss"]
    reset_peak()
    clock = Clock()
    function(arguments["count"])
    say(**clock.read(), peak=peak() - before)


TASKS = {
    "open": open_,
    "first": first_sample,
    "workers": workers,
    "labels": labels,
    "step": step,
    "stream": stream,
    "growth": growth,
}


if __name__ == "__main__":
    # Standard output is for the figures; libraries print there while they are imported.
    figures_file = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # A training process has imported it before it opens its data; sources import it only where they need it.
    importlib.import_module("dive_fast.data.loaders.plain")
    TASKS[sys.argv[1]](json.loads(sys.argv[2]))
