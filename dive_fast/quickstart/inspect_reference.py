"""Detects the format of a set of image-caption pairs, and counts them."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from dive_fast.config.schema import ReferenceConfig
from dive_fast.data.sources.csv_table import open_csv
from dive_fast.data.sources.huggingface import is_dataset
from dive_fast.data.sources.source import Source, locate
from dive_fast.data.sources.webdataset import list_tars, open_webdataset
from dive_fast.errors import DataError
from dive_fast.quickstart.inspect_data import splits_of_huggingface

EXPECTED = (
    "expected tars of image + .txt, a folder of images with a .txt next to each, a tab-separated csv with title "
    "and filepath, a prepared set of pairs, or a data set of Hugging Face on disk"
)
"""The formats of a reference set, for messages."""
MAX_COUNTED_TARS = 4
"""Tars up to which all pairs are counted; of more, those of the first are, and the others estimated by size."""


class Reference(NamedTuple):
    """Image-caption pairs in the form in which a config names them."""

    format: str
    path: str
    pairs: int
    is_estimate: bool
    source: Source
    """The pairs that were read."""
    keys: dict[str, Any]
    """Further keys of its config section."""


def inspect_reference(path: str) -> Reference:
    """Opens the pairs at a path.

    Raises:
        DataError: there are none; says what there is, and what is expected.
    """
    path = path.rstrip("/") or "/"
    root = locate(path)
    kind = _detect_format(root, path)
    if kind == "webdataset":
        return _tars(path)
    if kind == "csv":
        source = open_csv(path, None, group=False)
    else:
        from dive_fast.data.open_dataset import open_reference  # imports torch

        keys = _train_split(root) if kind == "huggingface" else {}
        source = open_reference(ReferenceConfig.model_validate({"format": kind, "path": path, **keys}))
        return Reference(kind, path, len(source), False, source, keys)
    return Reference(kind, path, len(source), False, source, {})


def _train_split(root: Path) -> dict[str, str]:
    """The key of the training split of a Hugging Face data set that has several."""
    splits = splits_of_huggingface(root, str(root))
    return {"split": str(splits["train"].split)} if len(splits) > 1 else {}


def _detect_format(root: Path, path: str) -> str:
    if not root.exists():
        if re.search(r"[*?{\[]", path) and ".tar" in path:
            return "webdataset"
        raise DataError(f"{path}: no such file or folder; {EXPECTED}")
    if root.is_file():
        kinds = {".tar": "webdataset", ".csv": "csv", ".tsv": "csv"}
        if (kind := kinds.get(root.suffix.lower())) is not None:
            return kind
    elif (root / "manifest.json").is_file():
        return "prepared"
    elif is_dataset(str(root)):
        return "huggingface"
    elif any(root.glob("*.tar")):
        return "webdataset"
    elif next(root.rglob("*.txt"), None) is not None:
        return "folder"
    raise DataError(f"{path}: no image-caption pairs; {EXPECTED}")


def _tars(path: str) -> Reference:
    tars = list_tars(path, [], [])
    if len(tars) <= MAX_COUNTED_TARS:
        source = open_webdataset(path, ".txt")
        return Reference("webdataset", path, len(source), False, source, {})
    source = open_webdataset(str(tars[0]), ".txt")
    size = tars[0].stat().st_size
    estimate = round(len(source) * sum(tar.stat().st_size for tar in tars) / size)
    return Reference("webdataset", path, estimate, True, source, {})
