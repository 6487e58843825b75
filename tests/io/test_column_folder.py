"""Tests of kept columns: damage of any bit is one of the documented errors, whichever file it is in."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dive_fast.io.column_folder import load_columns, save_columns

DAMAGED = OSError, ValueError, KeyError, TypeError, AttributeError
COLUMNS: dict[str, NDArray[Any]] = {"numbers": np.arange(3, dtype=np.int64), "none": np.empty(0, np.uint8)}


def test_any_changed_bit_is_damage(tmp_path: Path) -> None:
    folder = tmp_path / "columns"
    save_columns(folder, COLUMNS, {"name": "x"}, "stamp")
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        for bit in range(0, 8 * len(data)):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            try:
                loaded = load_columns(folder, "stamp")
            except DAMAGED:
                continue
            # Nothing depends on spaces in a header, or on other lengths than 0 in the description.
            assert loaded is not None, bit
            columns, about = loaded
            assert about == {"name": "x"}
            for name, column in COLUMNS.items():
                np.testing.assert_array_equal(columns[name], column)
                assert columns[name].dtype == column.dtype
        file.write_bytes(data)
