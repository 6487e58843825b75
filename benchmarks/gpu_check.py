"""Checks all claims about GPUs on a GPU in nine minutes: ``make gpu-check``.

Parts run one after another, each in its own process with its own time limit, the most informative first.
results/<device>-gpu-check.json is written after each part, and keeps outcomes of earlier calls for parts that are
not reached. ``--only`` selects parts. ``--rehearse`` runs every part at its smallest size, without a GPU, and
writes to ``build``.
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
"""Number of last characters of a part's output that are kept."""
SHORTEST = 30
"""Seconds that must be left to start a part, unless its own limit is shorter."""
SANITIZER = "compute-sanitizer"
SANITIZED = "other_gradient_paths or two_runs"
"""Small tests that launch all kernels."""


class Part(NamedTuple):
    """One check with its command."""

    name: str
    command: Sequence[str]
    rehearsal: Sequence[str]
    """The command at its smallest size, on a CPU."""
    seconds: int
    """Time limit on a GPU."""
    folder: Path = REPOSITORY
    """Working directory."""


def parts(results: Path) -> list[Part]:
    """All parts, the most informative first; each writes its figures to ``results``."""
    folder = ("--results", str(results))
    kernels, engine = "tests/kernels/test_triton.py", "tests/engine/test_step.py"
    steps, precision = "benchmarks/steps.py", "benchmarks/precision.py"
    cache, loaders, losses = "benchmarks/cache.py", "benchmarks/loaders.py", "benchmarks/test_losses.py"
    saves, zero = "benchmarks/saves.py", "benchmarks/zero.py"
    study = ("-m", "study", "run", "--size", "full", "--settings", "small")
    gpu_precision = ("--results", str(results / f"{slug(device_name())}-precision.json"))

    def sanitized(tool: str) -> Part:
        """Checks kernels with a tool of compute-sanitizer: accesses out of bounds, or races in shared memory."""
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
    """Path of compute-sanitizer, of CUDA or the package nvidia-cuda-sanitizer-api; its name if not installed."""
    packaged = Path(sysconfig.get_path("platlib")).glob(f"nvidia/*/bin/{SANITIZER}")
    return shutil.which(SANITIZER) or next((str(path) for path in packaged), SANITIZER)


def run(part: Part, command: Sequence[str], seconds: float) -> dict[str, Any]:
    """Runs a part; returns its outcome, its seconds and the end of its output.

    The outcome is ``passed``, ``failed``, ``out of time``, or ``not installed`` if its program is missing.
    """
    start = time.monotonic()
    if not shutil.which(command[0]):
        return {"part": part.name, "outcome": "not installed", "command": Path(command[0]).name}
    # FLYP as published nearly fills an H100, where fragmentation would end in out of memory.
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "DIVE_TEST_GPU": "1"}
    if SANITIZER in command[0]:
        # Without the caching allocator, so that the tool sees the end of each tensor.
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
        output, _ = process.communicate(timeout=seconds)
        outcome = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        # Kills its ranks and workers as well.
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        outcome = "out of time"
    result = {"part": part.name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
    return result | {"command": _without_paths(" ".join(command)), "end": _without_paths(output[-TAIL:])}


def _without_paths(text: str) -> str:
    """Removes this machine's paths of the repository and of Python, since results are committed."""
    for path in (REPOSITORY, Path(sys.executable).parent):
        text = text.replace(f"{path}/", "")
    return text


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


def main() -> int:
    """Runs parts within the time limit; returns 1 if a started part has not passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes",
        type=float,
        default=9,
        help="time limit; no part starts in the last 30 s",
    )
    names = [part.name for part in parts(Path())]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument(
        "--rehearse", action="store_true", help="run every part at its smallest size, on a CPU too"
    )
    options = parser.parse_args()
    if DEVICE.type != "cuda" and not options.rehearse:
        parser.error("no GPU found; --rehearse runs without one")
    results = REPOSITORY / ("build/rehearsal" if options.rehearse else "benchmarks/results")
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{slug(device_name())}-gpu-check.json"
    outcomes = {name: {"part": name, "outcome": "not reached"} for name in names}
    if path.exists():
        outcomes |= {result["part"]: result for result in json.loads(path.read_text())["parts"]}
    ends, failed = time.monotonic() + 60 * options.minutes, False
    for part in parts(results):
        left = ends - time.monotonic()
        if part.name not in options.only or left < min(part.seconds, SHORTEST):
            continue
        command = part.rehearsal if options.rehearse else part.command
        result = run(part, command, left if options.rehearse else min(left, part.seconds))
        if result["outcome"] != "out of time" or outcomes[part.name]["outcome"] != "passed":
            outcomes[part.name] = result | {"commit": commit()}
        failed |= result["outcome"] != "passed"
        print(f"{part.name:<12} {result['outcome']:<14} {result.get('seconds', 0):6.1f} s", flush=True)
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
