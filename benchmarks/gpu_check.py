"""All that is claimed of a GPU, checked on one in nine minutes: ``make gpu-check``.

Parts run one after the other, each in a process of its own with a limit of its own, the most telling first. What
one of them found is kept when it ends, whatever becomes of the next: results/<device>-gpu-check.json is written
after each, and keeps what earlier calls found of parts that this one does not come to. ``--only`` names parts.
``--rehearse`` runs every part as small as it goes, without a GPU, and leaves its files in ``build``.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from loss_report import REPOSITORY, commit, device_name, slug, write_json
from losses import DEVICE

PYTHON = sys.executable
# Not `python -m pytest`: the folder `kernels` of the working directory would hide Hugging Face's package.
PYTEST = (str(Path(sys.executable).with_name("pytest")), "-q", "-p", "no:cacheprovider")
TAIL = 1500
"""Characters of a part's output that are kept."""
SHORTEST = 30
"""Seconds: with less left no part is begun, or less than its own limit."""
SANITIZER = "compute-sanitizer"
SANITIZED = "other_gradient_paths or two_runs"
"""Tests of kernels, small, that launch all of them."""


class Part(NamedTuple):
    """One thing to be checked."""

    name: str
    command: Sequence[str]
    rehearsal: Sequence[str]
    """The same, small, on a CPU."""
    seconds: int
    """Its limit on a GPU."""
    folder: Path = REPOSITORY
    """Where it runs."""


def parts(results: Path) -> list[Part]:
    """The most telling first; figures of each go to ``results``."""
    folder = ("--results", str(results))
    kernels, engine = "tests/kernels/test_triton.py", "tests/engine/test_step.py"
    steps, precision = "benchmarks/steps.py", "benchmarks/precision.py"
    cache, loaders, losses = "benchmarks/cache.py", "benchmarks/loaders.py", "benchmarks/test_losses.py"
    saves, zero = "benchmarks/saves.py", "benchmarks/zero.py"
    study = ("-m", "study", "run", "--size", "full", "--settings", "small")
    gpu_precision = ("--results", str(results / f"{slug(device_name())}-precision.json"))

    def sanitized(tool: str) -> Part:
        """Reads and writes outside of tensors, or races in shared memory, as the driver sees them."""
        tests = (*PYTEST, kernels, "-k", SANITIZED)
        command = (sanitizer(), "--tool", tool, "--target-processes", "all", "--error-exitcode", "9", *tests)
        return Part(tool, command, (*tests, "--collect-only"), 120)

    return [
        Part("kernels", (*PYTEST, kernels, "-n", "8"), (*PYTEST, kernels, "-k", "upstream_gradient"), 200),
        Part("steps", (PYTHON, steps, "--minutes", "3", *folder), (PYTHON, steps, *folder), 240),
        Part("no waiting", (*PYTEST, engine, "-k", "never_waits"), (*PYTEST, engine, "-k", "never_waits"), 90),
        Part("losses", (*PYTEST, losses, *folder), (*PYTEST, losses, "-k", "naive", *folder), 120),
        Part(
            "ZeRO",
            (PYTHON, zero, "--model", "ViT-B-16", "--batch", "256", *folder),
            (PYTHON, zero, "--model", "ViT-tiny", "--rounds", "2", *folder),
            60,
        ),
        Part(
            "cache",
            (PYTHON, cache, "--gib", "2", *folder),
            (PYTHON, cache, "--gib", "0.1", "--batches", "20", *folder),
            30,
        ),
        Part(
            "precision",
            (PYTHON, precision, "--models", "ViT-B-16", *gpu_precision),
            (PYTHON, precision, "--models", "demo", *gpu_precision),
            60,
        ),
        Part(
            "saves",
            (PYTHON, saves, "--model", "ViT-L-14", "--batch", "64", "--rounds", "1", *folder),
            (PYTHON, saves, "--model", "ViT-tiny", "--rounds", "1", *folder),
            90,
        ),
        Part("loaders", (PYTHON, loaders, *folder), (PYTHON, loaders, "--help"), 60),
        sanitized("memcheck"),
        sanitized("racecheck"),
        Part(
            "study",
            (PYTHON, *study, "--minutes", "8", *folder),
            (PYTHON, *study, "--help"),
            540,
            REPOSITORY / "benchmarks",
        ),
    ]


def sanitizer() -> str:
    """CUDA's, or that of the package nvidia-cuda-sanitizer-api; its name where there is neither."""
    packaged = Path(sysconfig.get_path("platlib")).glob(f"nvidia/*/bin/{SANITIZER}")
    return shutil.which(SANITIZER) or next((str(path) for path in packaged), SANITIZER)


def run(part: Part, command: Sequence[str], seconds: float) -> dict[str, Any]:
    """How a part ended, after how many seconds, and the last that it said.

    It has ``passed``, ``failed``, is ``out of time``, or its program is ``not installed``.
    """
    begun = time.monotonic()
    if not shutil.which(command[0]):
        return {"part": part.name, "outcome": "not installed", "command": Path(command[0]).name}
    # FLYP as published fills an H100 to the brim, where scattered free pieces would be out of memory.
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "DIVE_TEST_GPU": "1"}
    if SANITIZER in command[0]:
        # Of memory that PyTorch keeps for itself no tool sees where a tensor ends.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "DIVE_TEST_GPU": "1"}
    process = subprocess.Popen(
        command,
        cwd=part.folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
        outcome = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        # Its ranks and workers too.
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        outcome = "out of time"
    taken = round(time.monotonic() - begun, 1)
    told = {"command": _without_paths(" ".join(command)), "end": _without_paths(said[-TAIL:])}
    return {"part": part.name, "outcome": outcome, "seconds": taken, **told}


def _without_paths(text: str) -> str:
    """Results are committed: where this machine has the repository and Python is nobody's business."""
    for path in (REPOSITORY, Path(sys.executable).parent):
        text = text.replace(f"{path}/", "")
    return text


def step_ratios(file: Path) -> dict[str, dict[str, float]]:
    """DiVE in this engine against FLYP, by model, at the largest batch where both were measured.

    Args:
        file: what ``steps.py`` wrote.

    Returns:
        ``dive_over_flyp_peer_time``: over FLYP as published. ``dive_over_flyp_memory``: over this engine's FLYP.
    """
    if not file.exists():
        return {}
    cases = [case for case in json.loads(file.read_text())["cases"] if case["outcome"] == "measured"]
    found: dict[str, dict[str, float]] = {}
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
            found[case["model"]] = {"batch": case["batch"]} | ratios
    return found


def main() -> int:
    """Runs what time allows; 1 where a part that was begun has not passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=9, help="with less than 30 s left no part is begun; the last is cut off"
    )
    names = [part.name for part in parts(Path())]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--rehearse", action="store_true", help="every part as small as it goes, on a CPU too")
    options = parser.parse_args()
    if DEVICE.type != "cuda" and not options.rehearse:
        parser.error("no GPU here; --rehearse does without")
    results = REPOSITORY / ("build/rehearsal" if options.rehearse else "benchmarks/results")
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{slug(device_name())}-gpu-check.json"
    outcomes = {name: {"part": name, "outcome": "not reached"} for name in names}
    if path.exists():
        outcomes |= {found["part"]: found for found in json.loads(path.read_text())["parts"]}
    ends, failed = time.monotonic() + 60 * options.minutes, False
    for part in parts(results):
        left = ends - time.monotonic()
        if part.name not in options.only or left < min(part.seconds, SHORTEST):
            continue
        command = part.rehearsal if options.rehearse else part.command
        found = run(part, command, left if options.rehearse else min(left, part.seconds))
        if found["outcome"] != "out of time" or outcomes[part.name]["outcome"] != "passed":
            outcomes[part.name] = found | {"commit": commit()}
        failed |= found["outcome"] != "passed"
        print(f"{part.name:<12} {found['outcome']:<14} {found.get('seconds', 0):6.1f} s", flush=True)
        write_json(
            path,
            {
                "device": device_name(),
                "versions": {name: version(name) for name in ("torch", "triton", "deepspeed", "open_clip_torch")},
                "step": step_ratios(results / f"{slug(device_name())}-steps.json"),
                "parts": [outcomes[name] for name in names],
            },
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
