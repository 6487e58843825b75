"""Atomic writes: an error leaves the old file and nothing else."""

import os
from pathlib import Path

import pytest

from dive_fast.io.atomic_files import atomic_file, atomic_path, write_atomic


def test_error_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_atomic(path, b"old")
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.writelines([b"ne", "w"])  # type: ignore[list-item]
    with pytest.raises(TypeError), atomic_path(path) as partial:
        partial.write_bytes("new")  # type: ignore[arg-type]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"report.json": b"old"}


def test_temporary_name_has_the_same_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "trace.json.gz") as partial:
        assert partial.name.endswith(".json.gz")
        partial.write_bytes(b"new")
        assert not (tmp_path / "trace.json.gz").exists()
    assert (tmp_path / "trace.json.gz").read_bytes() == b"new"


def test_private_file_of_a_library_gets_the_umasks_mode(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with atomic_path(tmp_path / "file") as partial:
        partial.unlink()
        os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
