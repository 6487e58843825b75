"""Outcomes of samples in a file, so that an interrupted measurement under attack resumes within a set."""

import json
from collections.abc import Mapping
from pathlib import Path

from dive_fast.errors import DataError
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import parse_json, read_text


class BlockLog:
    """Outcomes of the samples that have been attacked, one line for each block; removed when the set is complete.

    Its name is that of the measurement's identity, so that lines of other measurements are never read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, count: int) -> dict[int, int]:
        """The outcomes by position of the sample; an incomplete last line, of a killed process, is removed.

        Args:
            count: number of samples of the measurement.

        Raises:
            DataError: the file cannot be read, or a line of it is invalid.
        """
        try:
            text = read_text(self._path)
            if not text.endswith("\n"):
                text = text[: text.rfind("\n") + 1]
                write_atomic(self._path, text.encode())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise DataError(f"{self._path}: cannot read it: {error}; remove it") from error
        outcomes: dict[int, int] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                block = parse_json(line)
                positions, digits = block["positions"], block["outcomes"]
                if not all(type(position) is int and 0 <= position < count for position in positions):
                    raise ValueError("a position is not one of the measurement")
                outcomes |= dict(zip(positions, map(int, digits), strict=True))
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{self._path}: line {number} is not a block: {error}; remove the file") from error
        return outcomes

    def add(self, outcomes: Mapping[int, int]) -> None:
        """Adds the outcomes of a block by position.

        Raises:
            DataError: the file cannot be written.
        """
        line = json.dumps({"positions": list(outcomes), "outcomes": "".join(map(str, outcomes.values()))}) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(line.encode())
        except OSError as error:
            raise DataError(f"{self._path}: cannot write it: {error}") from error

    def remove(self) -> None:
        """Removes the file, and its folder if that is empty.

        Raises:
            DataError: the file cannot be removed.
        """
        try:
            self._path.unlink(missing_ok=True)
            if self._path.parent.is_dir() and not any(self._path.parent.iterdir()):
                self._path.parent.rmdir()
        except OSError as error:
            raise DataError(f"{self._path}: cannot remove it: {error}") from error
