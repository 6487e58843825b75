"""Run folders that tests write for themselves, with the files that runs leave."""

import json
from pathlib import Path
from typing import Any


def row(name: str, after: float | None, kind: str = "id", metric: str = "top1", **fields: Any) -> dict[str, Any]:
    """A row of a report."""
    return {
        "name": name, "kind": kind, "metric": metric, "before": 0.5, "after": after, "samples": 1000, "left_out": 0
    } | fields  # fmt: skip


def write_run(folder: Path, rows: list[dict[str, Any]] | None, **fields: Any) -> Path:
    """A run folder with its config and, unless ``rows`` is None, its report."""
    folder.mkdir(parents=True)
    sets = {each["name"]: {"path": fields.pop("path", "data"), "role": each["kind"]} for each in rows or []}
    config = {
        "config": {
            "objective": {"name": "dive", "weight": 1000.0},
            "train": {"seed": 0},
            "evaluate": {"sets": sets},
        },
        "steps": 100,
    }
    (folder / "config.json").write_text(json.dumps(config))
    if rows is not None:
        report = {
            "run": folder.name, "weights_step": 90, "steps": 100, "method": "dive", "weight": 1000.0, "seed": 0,
            "rows": rows, "title": "DiVE",
        } | fields  # fmt: skip
        (folder / "report.json").write_text(json.dumps(report))
    return folder
