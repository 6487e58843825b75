"""Workers chosen by cores, ranks of a node, and the work of both halves."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dive_fast.config import worker_counts
from dive_fast.config.load import load_config
from dive_fast.config.schema import Config


def cores(monkeypatch: pytest.MonkeyPatch, own: int, machine: int, ranks: int = 1) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(own)))
    monkeypatch.setattr(os, "cpu_count", lambda: machine)
    monkeypatch.setattr(worker_counts, "_CGROUP", Path("/nonexistent"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))


def counts(target: Any, reference: Any, evaluate: Any = 4, **objective: Any) -> tuple[int, int, int]:
    tree = {
        "model": {"name": "ViT-B-32"},
        "data": {
            "target": {"format": "folder", "path": "x"} | target,
            "reference": {"format": "webdataset", "path": "y"} | reference,
        },
        "objective": objective,
        "evaluate": {"workers": evaluate},
    }
    config = Config.model_validate_json(json.dumps(worker_counts.with_worker_counts(tree)))
    assert config.data.reference is not None
    return config.data.target.workers, config.data.reference.workers, config.evaluate.workers


AUTO = {"workers": "auto"}


def test_halves_share_the_cores_by_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, own=16, machine=16)
    assert counts(AUTO, AUTO, "auto") == (8, 8, 15)
    assert counts(AUTO | {"batch_size": 512}, AUTO | {"batch_size": 256}) == (10, 5, 4)
    assert counts(AUTO, AUTO, reference_every=4) == (12, 3, 4)
    assert counts(AUTO, {"workers": 5}) == (10, 5, 4)
    assert counts({"workers": 3}, {"workers": 0}) == (3, 0, 4)


def test_every_loader_has_a_worker_and_none_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, own=1, machine=1)
    assert counts(AUTO, AUTO, "auto") == (1, 1, 1)
    assert counts(AUTO, {"workers": 9}) == (1, 9, 4)
    cores(monkeypatch, own=256, machine=256)
    assert counts(AUTO, AUTO, "auto") == (16, 16, 16)


def test_ranks_share_a_node_unless_each_is_bound_to_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, own=128, machine=128, ranks=8)
    assert worker_counts.cores_of_rank() == 16
    cores(monkeypatch, own=16, machine=128, ranks=8)
    assert worker_counts.cores_of_rank() == 16
    cores(monkeypatch, own=64, machine=128, ranks=8)  # a container of half of the machine
    assert worker_counts.cores_of_rank() == 8


def test_a_container_bound_to_cores_does_not_bind_its_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cores(monkeypatch, own=8, machine=128, ranks=4)
    assert worker_counts.cores_of_rank() == 8
    monkeypatch.setattr(worker_counts, "_CGROUP", tmp_path)
    (tmp_path / "cpuset.cpus.effective").write_text("0-3,8,10-12\n")
    assert worker_counts.cores_of_rank() == 2


def test_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cores(monkeypatch, own=64, machine=64)
    monkeypatch.setattr(worker_counts, "_CGROUP", tmp_path)
    for limit, expected in (("max 100000", 64), ("650000 100000", 6), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(limit)
        assert worker_counts.cores_of_rank() == expected


@pytest.mark.parametrize("workers", ["automatic", -1, None, [2]])
def test_other_words_are_refused(workers: Any) -> None:
    with pytest.raises(ValueError, match="workers"):
        counts({"workers": workers}, AUTO)


def test_a_config_file_and_the_command_line_may_say_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, own=8, machine=8)
    sections = {"model": {"name": "ViT-B-32"}, "data": {"target": {"format": "folder", "path": "x"} | AUTO}}
    (tmp_path / "a.json").write_text(json.dumps(sections))
    sections["data"]["reference"] = {"format": "webdataset", "path": "y"}  # type: ignore[dict-item]
    (tmp_path / "b.json").write_text(json.dumps(sections))
    for name, overrides, expected in (
        ("a", ["evaluate.workers=auto"], (7, 7)),
        ("b", ["data.reference.workers=auto"], (4, 7)),
        ("b", ["evaluate.workers=2"], (3, 2)),
        ("a", ["data.target.workers=5"], (5, 5)),
    ):
        config = load_config(str(tmp_path / f"{name}.json"), overrides, None, Config)
        assert (config.data.target.workers, config.evaluate.workers) == expected
