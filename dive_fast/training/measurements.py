"""Measurements that a run folder stores, each under a digest of everything that determines it."""

import json
import logging
from pathlib import Path
from typing import Any

from dive_fast.distributed import Ranks
from dive_fast.evaluation.zero_shot import Measured
from dive_fast.identity import Identity, digest
from dive_fast.io.atomic_files import write_atomic
from dive_fast.io.safe_read import read_json

logger = logging.getLogger(__name__)

FILE = "measurements.json"


class Measurements:
    """Stored values by the digest of their identity; rank 0 reads and writes, and all ranks call each method.

    A run that resumes, or is started again after its end, reuses them instead of measuring again.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        """Reads the file in a run folder; one that is unreadable counts as empty."""
        self._path, self._ranks = folder / FILE, ranks
        self._stored: dict[str, Any] = {}
        self._used: set[str] = set()
        if ranks.is_main:
            try:
                content = read_json(self._path)
                self._stored = {str(key): value for key, value in content.items() if isinstance(value, dict)}
            except FileNotFoundError:
                pass
            except (OSError, ValueError, AttributeError) as error:
                logger.warning("%s: cannot be read (%s); its sets are measured again", self._path, error)

    def find_set(self, identity: Identity) -> Measured | None:
        """The stored metrics of an evaluation set, without its reliability diagram."""
        stored = self._find(identity)
        if stored is None:
            return None
        try:
            scores = {str(name): float(value) for name, value in stored["scores"].items()}
            counts = int(stored["samples"]), int(stored["left_out"])
            return Measured(scores, stored["classifier"], *counts)
        except (LookupError, TypeError, ValueError, AttributeError):
            return None

    def add_set(self, identity: Identity, measured: Measured) -> None:
        """Stores the metrics of an evaluation set."""
        self._add(identity, measured._replace(reliability=None)._asdict())

    def find_values(self, identity: Identity) -> dict[str, float] | None:
        """Stored values by name."""
        stored = self._find(identity)
        if stored is None or not all(isinstance(value, int | float) for value in stored.values()):
            return None
        return {str(name): float(value) for name, value in stored.items()}

    def add_values(self, identity: Identity, values: dict[str, float]) -> None:
        """Stores values by name."""
        self._add(identity, values)

    def remove_unused(self) -> None:
        """Removes all values that this process has neither read nor added, such as those of other weights."""
        if self._ranks.is_main and set(self._stored) - self._used:
            self._stored = {key: value for key, value in self._stored.items() if key in self._used}
            self._write()

    def _find(self, identity: Identity) -> dict[str, Any] | None:
        key = digest(identity) if self._ranks.is_main else ""
        self._used.add(key)
        stored: dict[str, Any] | None = self._ranks.broadcast(self._stored.get(key))
        return stored

    def _add(self, identity: Identity, values: dict[str, Any]) -> None:
        if self._ranks.is_main:
            key = digest(identity)
            self._used.add(key)
            self._stored[key] = values
            self._write()

    def _write(self) -> None:
        try:
            write_atomic(self._path, (json.dumps(self._stored, indent=1) + "\n").encode())
        except OSError as error:
            logger.warning("cannot write %s: %s; a restarted run measures again", self._path, error)
