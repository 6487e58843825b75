"""Files that are whole or not there: an error on the way leaves what was there, and nothing else."""

from pathlib import Path

import pytest

from dive_fast.files import whole_file, whole_path, write_whole


def test_an_error_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_whole(path, b"old")
    with pytest.raises(TypeError), whole_file(path) as file:
        file.writelines([b"ne", "w"])  # type: ignore[list-item]
    with pytest.raises(TypeError), whole_path(path) as partial:
        partial.write_bytes("new")  # type: ignore[arg-type]
    assert {found.name: found.read_bytes() for found in tmp_path.iterdir()} == {"report.json": b"old"}


def test_a_library_is_given_a_name_with_the_same_ending(tmp_path: Path) -> None:
    with whole_path(tmp_path / "trace.json.gz") as partial:
        assert partial.name.endswith(".json.gz")
        partial.write_bytes(b"new")
        assert not (tmp_path / "trace.json.gz").exists()
    assert (tmp_path / "trace.json.gz").read_bytes() == b"new"
