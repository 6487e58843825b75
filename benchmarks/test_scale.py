"""The benchmark of growing data sets: laws of known costs, sets that every reader opens, figures of a tiny run."""

import json
import sys
from pathlib import Path

import pytest
import scale
import scale_tasks
from scale_report import Law, Run, fit, report
from scale_sets import (
    CSV_PROMPTS,
    FOLDER,
    KINDS,
    NUM_TITLES,
    PAIRS_FOLDER,
    TARS_CAPTIONS,
    TARS_LABELS,
    SyntheticSets,
    open_set,
)

SIZES = 1000, 10_000, 100_000, 1_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIVE_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize(
    "law", [Law(0, 3e-5, 1, 0), Law(2, 1e-6, 1, 0), Law(0.01, 1e-9, 2, 0), Law(0.5, 2e-4, 0.5, 0)], ids=str
)
def test_law_of_known_costs(law: Law) -> None:
    fitted = fit({size: law.at(size) for size in SIZES})
    assert fitted is not None
    assert fitted.p == pytest.approx(law.p, abs=0.011)
    assert fitted.at(3_000_000) == pytest.approx(law.at(3_000_000), rel=0.05)
    assert fitted.error < 0.02


def test_law_of_a_constant_and_of_too_few_sizes() -> None:
    assert fit({1000: 2.0, 10_000: 2.0, 100_000: 2.0}) == pytest.approx((0, 2, 0, 0), abs=1e-9)
    assert fit({1000: 2.0}) is None
    two = fit({1000: 1.0, 100_000: 10.0})
    assert two is not None
    assert two.p == pytest.approx(0.5)


def test_every_kind_of_set_has_all_samples(tmp_path: Path) -> None:
    sets = SyntheticSets(tmp_path, 160, shard=80)
    assert KINDS.keys() == {kind for kind in KINDS if sets.section(kind)["path"].startswith(str(tmp_path))}
    for kind in KINDS:
        section = sets.section(kind)
        source = open_set(section)
        assert len(source) == (160 // NUM_TITLES if kind == CSV_PROMPTS else 160), kind
        assert not source.skipped, kind
        assert not source.ignored, kind
        sample = source.samples[len(source) - 1]
        assert source.image(len(source) - 1).size == (32, 32), kind
        if kind == CSV_PROMPTS:
            assert len(sample.texts) == NUM_TITLES
        elif section["half"] == "target":
            assert {int(label) for label in source.samples.labels} == set(range(sets.num_classes)), kind
        else:
            assert len(sample.texts[0].split()) > 5, kind


def test_sets_that_fill_no_tar_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a multiple of 80"):
        SyntheticSets(tmp_path, 100, shard=80)


def test_report_compares_with_an_earlier_run() -> None:
    def run(seconds: float, commit: str) -> dict[str, object]:
        rows = [
            {"part": "open", "kind": "folder", "count": count, "start": start, "commit": commit}
            | {"cpu": seconds * count, "kept_dirty": 7 * count, "kept_rss": 8 * count, "node_peak": 9 * count}
            for count in (1000, 2000, 4000)
            for start in ("first", "second")
        ]
        return {"cpu": "a CPU", "cores": 2, "python": "3", "versions": {}, "rows": rows}

    text = report(run(1e-3, "new") | {"before": run(4e-3, "old")})
    assert "at commit new, on 2 cores of a CPU" in text
    assert '"Before" is commit old' in text
    assert "| folder | 1 | 2 | 4 | 0.001 N^1.00 | 12,000 | 4 at 4 k | 4 at 4 k |" in text
    assert "| folder | 0.007 | 0.014 | 0.028 | 7 | 0.036 at 4 k | 0.032 | 1 at 4 k |" in text


def test_workers_read_samples_and_have_memory(tmp_path: Path) -> None:
    section = SyntheticSets(tmp_path, 80, shard=80).section(TARS_LABELS)
    batches, size = scale_tasks.batches_in_workers(section, open_set(section), 200)
    assert size == 64
    # Bytes of images, keys and labels of an epoch's only batch.
    assert next(batches) > 64 * 500
    pids = scale_tasks.children()
    assert len(pids) >= scale_tasks.WORKERS
    assert all(0 < scale_tasks.memory(pid)["uss"] <= scale_tasks.memory(pid)["rss"] for pid in pids)


@pytest.mark.parametrize(("kind", "task"), [(TARS_LABELS, "labels"), (FOLDER, "step"), (TARS_CAPTIONS, "step")])
def test_passes_and_parts_of_a_step(
    kind: str, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale_tasks, "BATCH", 40)
    section = SyntheticSets(tmp_path, 80, shard=80).section(kind)
    scale_tasks.TASKS[task]({"section": section, "tiny": section})
    parts = [json.loads(line)["part"] for line in capsys.readouterr().out.splitlines()]
    expected = {"labels": ["class names", "digest"], "step": ["permutation of an epoch", "samples"]}[task]
    assert set(expected) < set(parts)


@pytest.mark.parametrize("kind", [PAIRS_FOLDER, TARS_CAPTIONS])
def test_memory_of_workers_stays_flat(kind: str, tmp_path: Path) -> None:
    """A worker that reads 20,000 samples copies few pages; as Python objects they would be 11 to 13 MB."""
    count = 20_000
    section = SyntheticSets(tmp_path, count).section(kind)
    batches, size = scale_tasks.batches_in_workers(section, open_set(section), count)
    next(batches)
    pids = scale_tasks.children()[-scale_tasks.WORKERS :]
    before = [scale_tasks.memory(pid)["uss"] for pid in pids]
    for _ in range(count // size - 1):
        next(batches)
    growth = [scale_tasks.memory(pid)["uss"] - start for pid, start in zip(pids, before, strict=True)]
    assert max(growth) < 8e6


def test_tiny_run_writes_figures_and_removes_its_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["scale.py", "--sizes", "200", "--shard", "100", "--kinds", TARS_LABELS, "--parts", "open"]
    monkeypatch.setattr(sys, "argv", [*command, "--results", str(tmp_path), "--folder", str(tmp_path)])
    scale.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scale.json", "scale.md"]
    measured = Run(json.loads((tmp_path / "scale.json").read_text()))
    assert measured.sizes == [200]
    for start in ("first", "second"):
        wanted = {"part": "open", "kind": TARS_LABELS, "start": start}
        assert measured.costs("samples", **wanted) == {200: 200}
        assert 0 < measured.costs("cpu", **wanted)[200] < 10


@pytest.mark.slow
def test_ranks_and_peers_of_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["scale.py", "--sizes", "200", "--shard", "100", "--kinds", TARS_CAPTIONS, "--ranks", "2"]
    command += ["--read", "0", "--longest", "500"]
    command += ["--parts", "ranks", "workers", "first", "step", "stream", "growth"]
    monkeypatch.setattr(sys, "argv", [*command, "--results", str(tmp_path), "--folder", str(tmp_path)])
    scale.main()
    measured = Run(json.loads((tmp_path / "scale.json").read_text()))
    assert measured.costs("ranks", part="ranks", kind=TARS_CAPTIONS, start="second") == {200: 2}
    for part in ("workers", "first"):
        assert measured.kinds(part) == [TARS_CAPTIONS, scale_tasks.WEBDATASET]
    assert len(measured.values("step", part="step", kind=TARS_CAPTIONS)) == 4
    assert len(measured.values("step", part="stream", kind=TARS_CAPTIONS)) == 3
    assert {"results tables, rows", "checkpoints"} <= set(measured.kinds("growth"))
