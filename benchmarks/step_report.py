"""Report of a run of ``steps.py``: a JSON file, a table and a picture."""

import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from loss_report import REPOSITORY, commit, device_name, slug, write_json
from losses import DEVICE

RESULTS = REPOSITORY / ("benchmarks/results" if DEVICE.type == "cuda" else "build/benchmarks")
PEER = "flyp_published"
NAMES = {
    "flyp_published": "FLYP as published",
    "dive_published": "DiVE as published",
    "half_precision": "  + fp16 autocast",
    "sequential": "  + sequential halves",
    "cached_teacher": "  + cached teacher",
    "trimmed_text": "  + trimmed text",
    "distinct_texts": "  + distinct texts",
    "fused_losses": "  + fused losses",
    "fast_blocks": "  + fast blocks",
    "compiled_blocks": "  + compiled blocks",
    "flyp_fast": "FLYP, dive_fast",
    "dive_fast": "DiVE, dive_fast",
    "dive_fast_plain": "DiVE, dive_fast, plain blocks",
    "flyp_fast_compiled": "FLYP, dive_fast, compiled",
    "dive_fast_compiled": "DiVE, dive_fast, compiled",
    "dive_fast_bf16": "DiVE, dive_fast, bf16",
    "dive_fast_joint": "DiVE, dive_fast, joint graph",
}


class StepReport:
    """Every case with its outcome: ``not reached``, ``failed``, ``out of memory`` or ``measured``."""

    def __init__(
        self, cases: Sequence[NamedTuple], about: dict[str, Any], minutes: float, folder: Path | None
    ) -> None:
        """Creates the report and starts the time limit.

        Args:
            about: settings of the run, written next to device and versions.
            minutes: time limit; cases that may exceed it are skipped.
        """
        self.entries = {case: case._asdict() | {"outcome": "not reached"} for case in cases}
        self.about, self.folder = about, folder
        self.ends = time.monotonic() + 60 * minutes
        self.longest = 0.0

    def has_time(self) -> bool:
        """Whether a case as long as the longest so far would end in time."""
        return time.monotonic() + self.longest < self.ends

    def record(self, case: NamedTuple, figures: dict[str, Any], seconds: float = 0.0) -> None:
        """Records a case's outcome and figures, and writes all entries so far.

        Args:
            seconds: duration of the case.
        """
        self.entries[case] |= figures
        self.longest = max(self.longest, seconds)
        packages = ("torch", "deepspeed", "open_clip_torch")
        about = {
            "device": device_name(),
            "versions": {name: version(name) for name in packages},
            "commit": commit(),
            **self.about,
        }
        entries = list(self.entries.values())
        for entry in entries:
            entry |= _ratios(entry, _peer(entry, entries))
        write_json(self.path, {**about, "cases": entries})

    @property
    def path(self) -> Path:
        """Path of the JSON file; in ``build`` by default, since only ``steps.py`` runs all cases."""
        return results_path(self.folder or REPOSITORY / "build/benchmarks")

    def table(self) -> str:
        """Markdown."""
        lines = [
            "| model, B | step | time | / FLYP | mean / median | peak memory | / FLYP | TFLOP | MFU | images/s "
            "| min/epoch |",
            "|---" * 11 + "|",
        ]
        for entry in self.entries.values():
            head = f"| {entry['model']}, {entry['batch']} | {_name(entry).strip()} | "
            if entry["outcome"] != "measured":
                lines.append(f"{head}{entry['outcome']} |" + " |" * 8)
                continue
            time_ratio, memory_ratio = (_ratio(entry, name) for name in ("time_ratio", "memory_ratio"))
            mfu = "" if entry["mfu"] is None else f"{100 * entry['mfu']:.0f} %"
            lines.append(
                f"{head}{_seconds(entry['seconds'])} | {time_ratio} | {entry['mean_over_median']:.2f} "
                f"| {_bytes(entry['peak_bytes'])} "
                f"| {memory_ratio} | {entry['flop'] / 1e12:.3g} | {mfu} | {entry['images_per_second']:.0f} "
                f"| {entry['minutes_per_epoch']:.1f} |"
            )
        return "\n".join(lines)


def results_path(folder: Path) -> Path:
    """Path of this device's results in a folder."""
    return folder / f"{slug(device_name())}-steps.json"


def draw(path: Path) -> Path:
    """Draws a results file: bars of step time and peak memory, with their ratios to FLYP as published.

    Returns:
        Path of the picture, next to the file.
    """
    from matplotlib.figure import Figure

    results = json.loads(path.read_text())
    sizes: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in sorted(results["cases"], key=lambda entry: list(NAMES).index(entry["competitor"])):
        sizes.setdefault((entry["model"], entry["batch"]), []).append(entry)
    heights = [1 + len(entries) for entries in sizes.values()]
    figure = Figure(figsize=(12, 0.9 + 0.33 * sum(heights)), layout="constrained")
    about = "dashed: FLYP as published; in brackets: relative to it; light: one lever alone on DiVE as published"
    figure.suptitle(f"One training step, {results['device']}\n", fontsize=14)
    figure.text(0.5, 1 - 0.42 / figure.get_figheight(), about, ha="center", fontsize=9, color="#444444")
    axes = figure.subplots(len(sizes), 2, squeeze=False, sharey="row", height_ratios=heights)
    for row, ((model, batch), entries) in zip(axes, sizes.items(), strict=True):
        for axis, (name, ratio, label, text) in zip(row, _PANELS, strict=True):
            _bars(axis, entries, name, ratio, text)
            axis.set_title(f"{model}, B = {batch}: {label}", fontsize=11, loc="left")
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    return picture


def _bars(axis: Any, entries: list[dict[str, Any]], name: str, ratio: str, text: Any) -> None:
    measured = [entry["outcome"] == "measured" for entry in entries]
    values = [entry[name] if known else 0.0 for entry, known in zip(entries, measured, strict=True)]
    peer = next((v for e, v in zip(entries, values, strict=True) if e["competitor"] == PEER and v), None)
    rows = range(len(entries), 0, -1)
    axis.barh(rows, values, color=[_colour(entry["competitor"]) for entry in entries], height=0.72)
    if peer:
        axis.axvline(peer, color="#444444", linewidth=1, linestyle="--", zorder=0)
    for row, entry, known, value in zip(rows, entries, measured, values, strict=True):
        label = entry["outcome"]
        if known:
            label = text(value) + (f"  ({_ratio(entry, ratio)})" if ratio in entry else "")
        axis.annotate(
            label,
            (value, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color="black" if known else "#888888",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    axis.set_yticks(rows, [_name(entry) for entry in entries])
    for label in axis.get_yticklabels():
        label.set_horizontalalignment("left")
    axis.tick_params(axis="y", length=0, pad=160)
    axis.set_xlim(0, 1.3 * max([*values, 1e-9]))
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def _name(entry: dict[str, Any]) -> str:
    ending = f", B' = {entry['reference_batch']}" if entry.get("reference_batch") else ""
    return NAMES[entry["competitor"]] + ending


def _colour(competitor: str) -> str:
    if "_fast" in competitor:
        return "#1b7f4c"
    return "#6b7280" if competitor.endswith("_published") else "#a7c7e7"


def _peer(entry: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    same = (e for e in entries if (e["model"], e["batch"]) == (entry["model"], entry["batch"]))
    return next((e for e in same if e["competitor"] == PEER), {})


def _ratios(entry: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    if not entry["outcome"] == peer.get("outcome") == "measured":
        return {}
    return {
        "time_ratio": entry["seconds"] / peer["seconds"],
        "memory_ratio": entry["peak_bytes"] / peer["peak_bytes"],
    }


def _ratio(entry: dict[str, Any], name: str) -> str:
    return f"{entry[name]:.2f}x" if name in entry else ""


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.0f} ms"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


_PANELS = (
    ("seconds", "time_ratio", "step time", _seconds),
    ("peak_bytes", "memory_ratio", "peak memory", _bytes),
)


def step_ratios(file: Path) -> dict[str, dict[str, float]]:
    """Ratios of this engine's DiVE to FLYP, by model, at the largest batch for which both were measured.

    Args:
        file: results of ``steps.py``.

    Returns:
        ``dive_over_flyp_peer_time``: time relative to FLYP as published. ``dive_over_flyp_memory``: memory
        relative to this engine's FLYP.
    """
    if not file.exists():
        return {}
    cases = [case for case in json.loads(file.read_text())["cases"] if case["outcome"] == "measured"]
    by_model: dict[str, dict[str, float]] = {}
    for case in sorted(cases, key=lambda case: case["batch"]):
        if case["competitor"] != "dive_fast" or case.get("reference_batch"):
            continue
        same = {c["competitor"]: c for c in cases if (c["model"], c["batch"]) == (case["model"], case["batch"])}
        ratios = {}
        if "flyp_published" in same:
            ratios["dive_over_flyp_peer_time"] = case["seconds"] / same["flyp_published"]["seconds"]
        if "flyp_fast" in same:
            ratios["dive_over_flyp_memory"] = case["peak_bytes"] / same["flyp_fast"]["peak_bytes"]
        if ratios:
            by_model[case["model"]] = {"batch": case["batch"]} | ratios
    return by_model
