"""Report of one run of the loss benchmarks: a JSON file and a table of ratios."""

import json
import os
import re
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ceiling
import torch
from losses import CASES, COMPETITORS, DEVICE, INTERPRETED, LEAVES, Case

REPOSITORY = Path(__file__).parents[1]


class Report:
    """Every case of a run with its outcome: ``measured``, ``out of memory`` or ``failed``; figures if measured."""

    def __init__(self, dtype: str, folder: Path | None = None) -> None:
        self.dtype, self.folder = dtype, folder
        self.entries: list[dict[str, Any]] = []
        self.device = device_name()
        self.ceiling = ceiling.measure(getattr(torch, dtype))

    def begin(self, case: Case) -> dict[str, Any]:
        """Adds a case, whose outcome is ``failed`` until its figures are recorded."""
        self.entries.append({**case._asdict(), "outcome": "failed"})
        return self.entries[-1]

    def measured(self, case: Case, figures: dict[str, Any]) -> None:
        """Records the figures of the last case."""
        self.entries[-1] |= figures
        if "seconds" in figures:
            least = self.ceiling.seconds(case, getattr(torch, self.dtype))
            self.entries[-1]["share_of_ceiling"] = least / figures["seconds"]

    @property
    def path(self) -> Path:
        """Path of the JSON file: in ``results`` for a complete run on a GPU, otherwise in ``build``."""
        on_gpu, complete = DEVICE.type == "cuda", len(self.entries) == len(CASES)
        folder = self.folder or REPOSITORY / ("benchmarks/results" if on_gpu and complete else "build/benchmarks")
        name = f"{slug(self.device)}-losses{'' if self.dtype == 'float16' else '-' + self.dtype}"
        # An incomplete run must not overwrite a complete one.
        return folder / f"{name}{'-part' if on_gpu and not complete else ''}.json"

    def write(self) -> None:
        """Writes all figures so far."""
        about = {
            "device": self.device,
            "interpreted": INTERPRETED,
            "dtype": self.dtype,
            "torch": torch.__version__,
            "triton": _triton_version(),
            "commit": commit(),
            "ceiling": self.ceiling._asdict(),
            "complete": len(self.entries) == len(CASES),
        }
        write_json(self.path, {**about, "cases": self.entries})
        if about["complete"]:
            self.path.with_stem(f"{self.path.stem}-part").unlink(missing_ok=True)

    def table(self) -> str:
        """Markdown: eager's time and extra memory, then ratios to them; largest error, share of the ceiling."""
        lines = [f"| {self.dtype} | " + " | ".join(COMPETITORS) + " |", "|---" * (1 + len(COMPETITORS)) + "|"]
        rows: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {}
        for entry in self.entries:
            key = entry["operation"], entry["batch"], entry["width"]
            rows.setdefault(key, {})[entry["competitor"]] = entry
        for key in sorted(rows, key=lambda key: (list(LEAVES).index(key[0]), *key[1:])):
            row, peer = rows[key], rows[key].get("eager", {})
            cells = [_cell(row[name], peer) if name in row else "" for name in COMPETITORS]
            lines.append(f"| {key[0]} {key[1]} x {key[2]} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def times(self) -> str:
        """Markdown of each case's milliseconds: between calls, issued by the host, and in the device's kernels."""
        columns = ("seconds", "host_seconds", "device_seconds")
        lines = ["| case | wall, ms | host, ms | kernels, ms |", "|---" * 4 + "|"]
        for entry in self.entries:
            if entry["outcome"] == "measured":
                cells = " | ".join(f"{1e3 * entry[column]:.3f}" for column in columns)
                lines.append(f"| {Case(*(entry[name] for name in Case._fields))} | {cells} |")
        return "\n".join(lines)

    def summary(self) -> str:
        """Time of the Triton losses over eager PyTorch's for each size of the joint loss."""
        seconds = {
            (entry["batch"], entry["width"], entry["competitor"]): entry["seconds"]
            for entry in self.entries
            if entry["operation"] == "joint" and entry["outcome"] == "measured"
        }
        return ", ".join(
            f"{batch} x {width}: {seconds[batch, width, 'triton'] / seconds[batch, width, 'eager']:.2f}"
            for batch, width, competitor in sorted(seconds)
            if competitor == "triton" and (batch, width, "eager") in seconds
        )


def _cell(entry: dict[str, Any], eager: dict[str, Any]) -> str:
    if entry["outcome"] != "measured":
        return str(entry["outcome"])
    error = f"({max(entry['errors'].values()):.0e}, {100 * entry['share_of_ceiling']:.2g} %)"
    if entry is eager or eager.get("outcome") != "measured":
        return f"{1e3 * entry['seconds']:.3f} ms, {entry['peak_extra_bytes'] / 2**20:.2f} MiB {error}"
    time, memory = (entry[name] / eager[name] for name in ("seconds", "peak_extra_bytes"))
    return f"{time:.2f}x, {memory:.3f}x {error}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        try:
            json.dump(content, file, indent=1)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def device_name() -> str:
    """Name of the device in results."""
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"


def slug(device: str) -> str:
    """Name of a device in file names."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def commit() -> str | None:
    """Commit of this checkout, with a suffix if there are uncommitted changes."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
