"""Results of run folders, read from the files that runs and ``dive-fast evaluate`` write into them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dive_fast.config.schema import NO_PROJECTION
from dive_fast.errors import DataError, one_line
from dive_fast.evaluation.results import FILE as MEASURED
from dive_fast.evaluation.results import Results
from dive_fast.evaluation.tables import is_adversarial
from dive_fast.io.safe_read import parse_json, read_text
from dive_fast.training.run_report import KINDS, SIMILARITIES

REPORT, CONFIG, METRICS = "report.json", "config.json", "metrics.jsonl"
"""Files of a run folder."""
WEIGHTS = ("model.safetensors", "prompts.safetensors")
"""Its exported weights or prompts."""
NO_MEASUREMENT = ("role", "on_skipped", "metric")
"""Keys of an evaluation set that do not change the data, or that stand in the row itself."""


@dataclass(frozen=True)
class Measure:
    """One metric of a run's weights on one set."""

    name: str
    kind: str
    """One of :data:`dive_fast.training.run_report.KINDS`."""
    metric: str
    before: float | None
    """The value of the pre-trained model; None: unknown."""
    after: float | None
    """The value of the run's weights; None: not a finite number."""
    samples: int | None = None
    left_out: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)
    """What is known about the data: its ``digest``, its ``path`` and further settings."""

    @property
    def is_similarity(self) -> bool:
        """Whether the value is a similarity to the pre-trained model instead of a share."""
        return self.metric in SIMILARITIES


@dataclass(frozen=True)
class RunResult:
    """The results of one run folder, or the reason why there are none."""

    name: str
    folder: Path
    method: str = ""
    title: str = ""
    """Name of the method in tables."""
    weight: float | None = None
    seed: int | None = None
    weights_step: int | None = None
    steps: int | None = None
    measures: tuple[Measure, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Digests of the contents of what was trained, and of what it was trained on."""
    problem: str = ""
    """The reason why the run cannot be compared; empty if it can."""
    remarks: tuple[str, ...] = ()
    """Sentences on the results that were read."""


def read_runs(folders: Sequence[Path]) -> list[RunResult]:
    """The results of run folders; a folder that is not a run but holds some stands for these.

    Several lines may have the same folder: its report, and other weights that ``dive-fast evaluate`` has measured.
    """
    results: list[RunResult] = []
    for folder in dict.fromkeys(path for pattern in folders for path in _expanded(pattern)):
        results += read_folder(folder)
    return _with_unique_names(results)


def _expanded(folder: Path) -> list[Path]:
    if not folder.is_dir() or _is_run(folder):
        return [folder]
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and _is_run(path)) or [folder]
    except OSError:
        return [folder]


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CONFIG, MEASURED))


def read_folder(folder: Path) -> list[RunResult]:
    """The results of one run folder: of its exported weights, and of each other label that was measured."""
    run, labels = read_report(folder), dict[str, list[Measure]]()
    name = folder.absolute().name
    try:
        rows = [row for row in Results(folder).rows if not is_adversarial(row)]
    except DataError as error:
        return [run if run.problem else replace(run, remarks=(*run.remarks, str(error)))]
    for row in rows:
        labels.setdefault(str(row["label"]), []).append(_measured(row))
    others = [
        RunResult(f"{name}: {label}", folder, measures=tuple(measures)) for label, measures in labels.items()
    ]
    if name not in labels:
        return [run, *others] if not run.problem or not others else [*others, run]
    older = [file for file in WEIGHTS if not _is_newer(folder / MEASURED, folder / file)]
    if older:
        remark = f"{folder / MEASURED} is older than {older[0]}: its rows of {name} are not used; measure again"
        others = [other for other in others if other.name != f"{name}: {name}"]
        return [replace(run, remarks=(*run.remarks, remark)), *others]
    known = {(measure.name, measure.metric) for measure in run.measures}
    added = tuple(measure for measure in labels[name] if (measure.name, measure.metric) not in known)
    merged = replace(run, measures=run.measures + added, problem="" if added else run.problem)
    return [merged, *(other for other in others if other.name != f"{name}: {name}")]


def _is_newer(file: Path, weights: Path) -> bool:
    try:
        return file.stat().st_mtime_ns >= weights.stat().st_mtime_ns
    except OSError:
        return True


def read_report(folder: Path) -> RunResult:
    """The results in a run's ``report.json``; without one, the reason why."""
    run = RunResult(folder.absolute().name, folder)
    if not folder.is_dir():
        return replace(run, problem="no such folder" if not folder.exists() else "a file, not a run folder")
    config, problem = _read_object(folder / CONFIG)
    if problem:
        return replace(run, problem=problem)
    settings = _section(config, "config")
    run = replace(run, **_described(config, settings))
    report, problem = _read_object(folder / REPORT)
    if problem:
        is_there = (folder / REPORT).exists() or not config
        return replace(run, problem=problem if is_there else _unfinished(folder, run))
    try:
        rows = report["rows"]
        measures = tuple(_reported(row, settings) for row in rows)
        run = replace(
            run,
            method="+".join(map(str, filter(None, (report["method"], report.get("projection"))))),
            title=one_line(str(report.get("title") or report["method"])),
            weight=_number(report["weight"]),
            seed=_count(report["seed"]),
            weights_step=_count(report["weights_step"]),
            steps=_count(report["steps"]),
            measures=measures,
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return replace(run, problem=f"{REPORT} is not a run's report: {_shown(error)}")
    if not run.measures:
        return replace(run, problem="nothing was measured: evaluate.sets is empty")
    return run


def _shown(error: Exception) -> str:
    return one_line(f"no {error}" if isinstance(error, LookupError) else str(error))


def _read_object(path: Path) -> tuple[dict[str, Any], str]:
    """The object in a JSON file and an empty text, or an empty object and the reason."""
    try:
        content = parse_json(_without_nan(read_text(path)))
    except FileNotFoundError:
        return {}, f"no {path.name}: not a finished run"
    except (OSError, ValueError) as error:
        return {}, one_line(f"{path.name} cannot be read: {error}")
    return (content, "") if isinstance(content, dict) else ({}, f"{path.name} is not an object")


def _without_nan(text: str) -> str:
    """JSON in which numbers that are not finite, which Python writes as NaN and Infinity, are null."""
    if "NaN" not in text and "Infinity" not in text:
        return text
    return json.dumps(json.loads(text, parse_constant=lambda _: None))


def _section(tree: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    for key in keys:
        section = tree.get(key)
        tree = section if isinstance(section, dict) else {}
    return dict(tree)


def _described(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a run that its ``config.json`` has."""
    objective, train = _section(settings, "objective"), _section(settings, "train")
    name, projection = str(objective.get("name") or ""), _section(settings, "projection").get("name")
    name += f"+{projection}" if projection not in (None, NO_PROJECTION) else ""
    return {
        "method": name,
        "title": name,
        "weight": _number_or_none(objective.get("weight")),
        "seed": train.get("seed") if isinstance(train.get("seed"), int) else None,
        "steps": config.get("steps") if isinstance(config.get("steps"), int) else None,
        "inputs": _inputs(config),
    }


def _inputs(config: Mapping[str, Any]) -> dict[str, str]:
    """The digests in the identity of a run."""
    digests = {
        "the pre-trained model": _section(config, "identity", "model").get("weights"),
        "data.target": _section(config, "identity", "data", "target").get("content"),
        "data.reference": _section(config, "identity", "data", "reference").get("content"),
    }
    return {name: digest for name, digest in digests.items() if isinstance(digest, str)}


def _unfinished(folder: Path, run: RunResult) -> str:
    """The state of a run without a report."""
    if any((folder / name).exists() for name in WEIGHTS):
        return f"no {REPORT}: restart its command to measure it, or measure its weights by dive-fast evaluate"
    step = 0
    try:
        lines = read_text(folder / METRICS).splitlines()
    except (OSError, ValueError):
        lines = []
    for line in reversed(lines):
        try:
            step = int(parse_json(line)["step"])
            break
        except (ValueError, LookupError, TypeError):
            continue
    return f"unfinished: step {step} of {run.steps}" if run.steps else "unfinished"


def _reported(row: Mapping[str, Any], settings: Mapping[str, Any]) -> Measure:
    """A row of a report.

    Raises:
        LookupError, TypeError, ValueError: it is not one.
    """
    name, metric, kind = (one_line(str(row[key])) for key in ("name", "metric", "kind"))
    return Measure(
        name=name,
        kind=kind if kind in KINDS else "other",
        metric=metric,
        before=_number(row["before"]),
        after=_number(row["after"]),
        samples=_count(row["samples"]),
        left_out=_count(row.get("left_out")) or 0,
        data=_data_of(name, kind, settings)
        | ({"digest": row["data"]} if isinstance(row.get("data"), str) else {}),
    )


def _data_of(name: str, kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's config says about the data of a set."""
    if kind == "probe":
        section = "evaluate.geometry" if name.startswith("geometry/") else "data.reference"
        data = _section(settings, *section.split("."))
        return {"path": data["path"]} if "path" in data else {}
    options = _section(settings, "evaluate", "sets", name)
    return {key: value for key, value in options.items() if key not in NO_MEASUREMENT and value is not None}


def _measured(row: Mapping[str, Any]) -> Measure:
    """A row of ``results.jsonl``."""
    data = {"path": row["path"]} if isinstance(row.get("path"), str) else {}
    if isinstance(row.get("data_digest"), str):
        data["digest"] = row["data_digest"]
    kind = row.get("role")
    samples, left_out = row.get("samples"), row.get("left_out") or 0
    name, metric, value = one_line(str(row["set"])), one_line(str(row["metric"])), float(row["value"])
    return Measure(name, kind if kind in KINDS else "other", metric, None, value, samples, left_out, data)


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{str(value)[:40]!r} is not a number")
    return float(value) if math.isfinite(value) else None


def _number_or_none(value: Any) -> float | None:
    try:
        return _number(value)
    except ValueError:
        return None


def _count(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{str(value)[:40]!r} is not a count")
    return value


def _with_unique_names(runs: Sequence[RunResult]) -> list[RunResult]:
    """The runs, named by their folder's path where several folders share a name."""
    folders = {run.folder for run in runs}
    names = [folder.absolute().name for folder in folders]
    shared = {name for name in names if names.count(name) > 1}
    named = []
    for run in runs:
        folder = run.folder.absolute().name
        name = f"{run.folder}{run.name.removeprefix(folder)}" if folder in shared else run.name
        named.append(replace(run, name=one_line(name)))
    return named
