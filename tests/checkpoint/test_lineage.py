"""The current run of a folder: an older run is replaced completely or not at all, and foreign files are kept."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import ALONE, write_checkpoint

from dive_fast.checkpoint import lineage
from dive_fast.checkpoint.resume import find_checkpoint
from dive_fast.errors import UserError


class KilledError(BaseException):
    """Stands for a kill of the process."""


def test_new_run_is_read_back(tmp_path: Path) -> None:
    assert lineage.read(tmp_path / "checkpoints") is None
    begun = lineage.begin(tmp_path, tmp_path / "checkpoints", start=tmp_path / "other")
    assert lineage.read(tmp_path / "checkpoints") == begun
    assert (begun.start, begun.is_begun) == (str(tmp_path / "other"), True)
    assert lineage.begin(tmp_path, tmp_path / "checkpoints").run != begun.run


@pytest.mark.parametrize("name", ["config.json", "open_clip_config.json", "model.safetensors", "tracking"])
def test_begin_refuses_files_that_no_run_has_written(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match=f"holds {name}, which no run has written"):
        lineage.begin(tmp_path, tmp_path / "checkpoints")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_begin_accepts_a_run_without_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"config": {}, "versions": {}, "device": "cpu", "commit": null}')
    (tmp_path / "metrics.jsonl").touch()
    lineage.begin(tmp_path, tmp_path / "checkpoints")
    assert (tmp_path / lineage.REPLACED / "metrics.jsonl").exists()


def test_begin_with_keep_moves_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoints")
    (tmp_path / "metrics.jsonl").write_text("kept")
    assert lineage.begin(tmp_path, tmp_path / "checkpoints", keep=True).is_begun
    assert (tmp_path / "metrics.jsonl").read_text() == "kept"
    assert not (tmp_path / lineage.REPLACED).exists()


def test_files_of_the_last_run_with_a_checkpoint_are_kept(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for text in ("first", "second"):
        lineage.begin(tmp_path, checkpoints)
        (tmp_path / "metrics.jsonl").write_text(text)
    lineage.begin(tmp_path, checkpoints)  # the second run ended before it had a checkpoint
    assert (tmp_path / lineage.REPLACED / "metrics.jsonl").read_text() == "first"
    lineage.remove_replaced(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("operation", range(1, 8))
def test_kill_during_begin_leaves_the_old_or_the_new_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: int
) -> None:
    checkpoints = tmp_path / "checkpoints"
    old = lineage.begin(tmp_path, checkpoints)
    files = {name: f"old {name}" for name in ("metrics.jsonl", "model.safetensors", "config.json")}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    calls = iter(range(1, 100))

    def dies(function: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            if next(calls) == operation:
                raise KilledError
            return function(*arguments)

        return wrapped

    with monkeypatch.context() as patch, contextlib.suppress(KilledError):
        patch.setattr(lineage, "write_atomic", dies(lineage.write_atomic))
        patch.setattr(Path, "rename", dies(Path.rename))
        lineage.begin(tmp_path, checkpoints)
    current = lineage.read(checkpoints)
    assert current is not None
    if current.run == old.run:
        assert all((tmp_path / name).read_text() == text for name, text in files.items())
        return
    if not current.is_begun:
        lineage.complete(tmp_path, checkpoints, current)
    assert {name: (tmp_path / lineage.REPLACED / name).read_text() for name in files} == files
    assert not any((tmp_path / name).exists() for name in files)
    assert lineage.read(checkpoints) == current._replace(is_begun=True)


@pytest.mark.parametrize("content", ["[]", "{", '{"run": 1, "start": null, "is_begun": true}'])
def test_unreadable_run_file_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / lineage.FILE).write_text(content)
    with pytest.raises(UserError, match=r"run.json: cannot read which run .*; remove it to resume"):
        find_checkpoint("auto", tmp_path, ALONE)


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="checkpoints: not a folder; remove or rename it"):
        lineage.read(tmp_path / "checkpoints")
