"""The checkpoint that a run resumes from: the newest complete one of its run, or the named one."""

import shutil
from pathlib import Path

import pytest
from small_checkpoints import ALONE, RUN, seal, write_checkpoint

from dive_fast.checkpoint import lineage, manifest
from dive_fast.checkpoint.resume import find_checkpoint, verify
from dive_fast.errors import ConfigError


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_auto_finds_the_newest_and_never_finds_none(tmp_path: Path) -> None:
    assert find_checkpoint("auto", tmp_path, ALONE) is None
    older, newest = write_checkpoint(tmp_path, 4), write_checkpoint(tmp_path, 6)
    assert find_checkpoint("auto", tmp_path, ALONE) == newest
    assert find_checkpoint(str(older), tmp_path, ALONE) == older
    (newest / "manifest.json").unlink()
    assert find_checkpoint("auto", tmp_path, ALONE) == older
    assert find_checkpoint("never", tmp_path, ALONE) is None


def test_auto_skips_a_truncated_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older, newest = write_checkpoint(tmp_path, 4), write_checkpoint(tmp_path, 6)
    (newest / "rank00000.safetensors").write_bytes(b"")
    assert find_checkpoint("auto", tmp_path, ALONE) == older
    line = f"skipped a corrupt checkpoint: {newest}: rank00000.safetensors is missing or truncated\n"
    assert capsys.readouterr().out == line


def test_flipped_bit_is_detected(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    flip_bit(path / "rank00000.safetensors")
    with pytest.raises(ConfigError, match=rf"changed since it was written; remove {path}"):
        verify(path, ALONE)
    with pytest.raises(ConfigError, match="changed since it was written"):
        find_checkpoint(str(path), tmp_path, ALONE)


def test_auto_stops_if_all_checkpoints_are_corrupt(tmp_path: Path) -> None:
    for step in (4, 6):
        flip_bit(write_checkpoint(tmp_path, step) / "trainer.json")
    message = r"all checkpoints in .* are corrupt \(.*step00000006.*\); set train.resume=never to start over"
    with pytest.raises(ConfigError, match=message):
        find_checkpoint("auto", tmp_path, ALONE)


def test_named_path_suggests_checkpoints_nearby(tmp_path: Path) -> None:
    older, _ = (write_checkpoint(tmp_path / "checkpoints", step) for step in (4, 6))
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints/step00000005"):
        message = rf"not a complete checkpoint \(no file .*\); checkpoints there: {older} to step00000006"
        with pytest.raises(ConfigError, match=message):
            find_checkpoint(str(path), tmp_path, ALONE)
    with pytest.raises(ConfigError, match=r"expected auto, never, or a folder such as"):
        find_checkpoint(str(tmp_path / "Auto"), tmp_path / "other", ALONE)


def test_auto_ignores_checkpoints_of_another_run(tmp_path: Path) -> None:
    own = write_checkpoint(tmp_path, 4)
    write_checkpoint(tmp_path, 6, run="fedcba9876543210")
    lineage.resume(tmp_path, RUN)
    assert find_checkpoint("auto", tmp_path, ALONE) == own
    shutil.rmtree(own)
    assert find_checkpoint("auto", tmp_path, ALONE) is None


def test_auto_starts_again_where_the_run_started(tmp_path: Path) -> None:
    start = write_checkpoint(tmp_path / "other", 4)
    lineage.begin(tmp_path / "run", tmp_path / "run/checkpoints", start)
    assert find_checkpoint("auto", tmp_path / "run/checkpoints", ALONE) == start
    shutil.rmtree(start)
    with pytest.raises(ConfigError, match=rf"the run started from {start}: not a complete checkpoint"):
        find_checkpoint("auto", tmp_path / "run/checkpoints", ALONE)


def test_auto_ignores_another_format_of_an_older_run(tmp_path: Path) -> None:
    older = write_checkpoint(tmp_path, 4)
    seal(older, format=1)
    with pytest.raises(manifest.FormatError):
        find_checkpoint("auto", tmp_path, ALONE)
    lineage.resume(tmp_path, RUN)
    assert find_checkpoint("auto", tmp_path, ALONE) is None


def test_auto_ignores_copies_under_other_names(tmp_path: Path) -> None:
    newest = write_checkpoint(tmp_path, 6)
    for name in (f"{newest.name}.keep", f"{newest.name}0", "steps"):
        shutil.copytree(newest, tmp_path / name)
    assert find_checkpoint("auto", tmp_path, ALONE) == newest
