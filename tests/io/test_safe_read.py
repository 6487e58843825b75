"""Readers of untrusted files: valid content is returned, anything else is refused."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest

from dive_fast.io import safe_read
from dive_fast.io.safe_read import (
    below,
    forbid_code_execution,
    inside,
    map_array,
    parse_json,
    read_json,
    read_text,
)


def test_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"größe": [1, 2.5, null, "\\u00e9"]}')
    assert read_json(tmp_path / "a.json") == {"größe": [1, 2.5, None, "é"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NaN", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("1e999", "1e999 is not a finite number"),
        ('{"a": ["\\ud800"]}', "half a surrogate pair"),
        ('{"\\udfff": 1}', "half a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "Expecting property name"),
    ],
)
def test_invalid_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_text_must_be_a_regular_file_of_limited_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            read_text(path)
    (tmp_path / "text").write_text("text")
    assert read_text(tmp_path / "text") == "text"
    monkeypatch.setattr(safe_read, "MAX_TEXT_BYTES", 3)
    with pytest.raises(ValueError, match="4 bytes, more than the limit of 3"):
        read_text(tmp_path / "text")


@pytest.mark.parametrize("name", ["", ".", "..", "a/../b", "/etc/passwd", "a\0b", "//x"])
def test_names_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    for check in (inside, below):
        with pytest.raises(ValueError, match="is not the name of a file below"):
            check(tmp_path, name)


def test_links_are_followed_only_inside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").touch()
    (folder / "link").symlink_to("file")
    (folder / "out").symlink_to(tmp_path / "secret")
    assert inside(folder, "link") == folder / "link"
    assert below(folder, "out") == folder / "out"  # checked by the name alone
    with pytest.raises(ValueError, match="is a link out of its folder"):
        inside(folder, "out")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=r"cannot be resolved|is a link out"):
        inside(folder, "loop")


def test_array_is_mapped(tmp_path: Path) -> None:
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.save(tmp_path / "rows.npy", rows)
    assert np.array_equal(map_array(tmp_path / "rows.npy"), rows)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 2), dtype=np.float32).T, "not plain numbers in row-major order"),
        (np.zeros(3, dtype=">f4"), "not plain numbers in row-major order"),
        (np.zeros(3, dtype=[("a", "<f4")]), "not plain numbers in row-major order"),
        (np.array([socket], dtype=object)[:0], "is not a complete .npy file"),
    ],
)
def test_other_arrays_are_refused(
    tmp_path: Path, array: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]", message: str
) -> None:
    np.save(tmp_path / "rows.npy", array)
    with pytest.raises(ValueError, match=message):
        map_array(tmp_path / "rows.npy")


def test_truncated_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros(100))
    os.truncate(tmp_path / "rows.npy", 200)
    with pytest.raises(ValueError, match=r"rows.npy is not a complete .npy file"):
        map_array(tmp_path / "rows.npy")
    with pytest.raises(FileNotFoundError, match=r"other.npy is missing or not a regular file"):
        map_array(tmp_path / "other.npy")


@pytest.mark.parametrize("before", [None, "0"])
def test_code_execution_is_forbidden_only_inside(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    from transformers import dynamic_module_utils

    original = dynamic_module_utils.get_cached_module_file
    with forbid_code_execution():
        assert os.environ[name] == "1"
        with pytest.raises(ValueError, match="the model needs its own code"):
            dynamic_module_utils.get_cached_module_file("any", "module.py")
    assert os.environ.get(name) == before
    assert dynamic_module_utils.get_cached_module_file is original
