"""Checks all claims about GPUs on a GPU, in calls of nine minutes: ``make gpu-check CALL=1``, then 2 and 3.

Parts run one after another, each in its own process with its own time limit, the most informative first. Each has
a question and a predicted answer, which is printed next to what was measured. results/<device>-gpu-check.json is
written after each part, and keeps outcomes of earlier calls. ``--call`` selects the parts of a call, ``--only``
single parts. Calls 4 and 5 are less urgent; call 4 has what needs two GPUs. ``--rehearse`` runs every part at its
smallest size, without a GPU, and writes to ``build``.
"""

import argparse
import json
import os
import re
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
from step_report import step_ratios

PYTHON = sys.executable
# Not `python -m pytest`: the folder `kernels` of the working directory would hide Hugging Face's package.
PYTEST = (str(Path(sys.executable).with_name("pytest")), "-p", "no:cacheprovider")
MEASURED = "measured: "
"""Beginning of the line in which a benchmark sums up its figures."""
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
    question: str
    prediction: str
    """The answer that is predicted for an H200, written down before any run on a GPU."""
    command: Sequence[str]
    rehearsal: Sequence[str]
    """The command at its smallest size, on a CPU."""
    seconds: int
    """Time limit on a GPU."""
    call: int
    """Number of the call that runs it; all parts of a call fit in nine minutes."""
    folder: Path = REPOSITORY
    """Working directory."""


def parts(results: Path) -> list[Part]:
    """All parts, the most informative first; each writes its figures to ``results``."""
    folder = ("--results", str(results))
    kernels, engine = "tests/kernels", "tests/engine/test_step.py"
    interpreted = "tests/kernels/test_triton.py"
    losses, two_gpus = "benchmarks/test_losses.py", "tests/launch/test_two_gpus.py"
    steps_file = results / f"{slug(device_name())}-steps.json"
    study = ("-m", "study", "run", "--size", "full", "--settings", "small")
    gpu_precision = ("--results", str(results / f"{slug(device_name())}-precision.json"))

    def script(name: str, *options: str) -> tuple[str, ...]:
        return (PYTHON, f"benchmarks/{name}.py", *options, *folder)

    def sanitized(tool: str, question: str, tests: str, seconds: int) -> Part:
        """Checks kernels with a tool of compute-sanitizer."""
        selected = (*PYTEST, kernels, "-k", tests)
        command = (sanitizer(), "--tool", tool, "--target-processes", "all", "--error-exitcode", "9", *selected)
        return Part(tool, question, "no", command, (*selected, "--collect-only"), seconds, 3)

    never_waits = (*PYTEST, engine, "-k", "never_waits")
    return [
        Part(
            "device",
            "Which precision switches are on, and what are the peak rates?",
            "none; 740 to 790 TFLOP/s, 4.2 TB/s",
            script("device"),
            script("device"),
            40,
            1,
        ),
        Part(
            "kernels",
            "Are the results of all kernels right, in fp32 too?",
            "yes",
            (*PYTEST, kernels, "tests/data/loaders/test_gpu_batches.py", "-n", "8"),
            (*PYTEST, interpreted, "-k", "upstream_gradient"),
            170,
            1,
        ),
        Part("no waiting", "Does a steady step wait for the device?", "no", never_waits, never_waits, 60, 1),
        Part(
            "profile",
            "How long do the kernels of a step at 512 + 512 pairs take?",
            "206 ms, of them products 139; plain blocks 409, compiled 256",
            script("profile_steps"),
            script("profile_steps"),
            130,
            1,
        ),
        Part(
            "layers",
            "How long do the layers of a block and a block take, 512 images?",
            "activation 0.76 ms, layer norm 0.30, packed QKV 0.23; a block 8.5, plain 15.6, compiled 9.6",
            script("blocks"),
            script("blocks"),
            70,
            1,
        ),
        Part(
            "attention",
            "Which backends stall at a new shape of text? Which is best for images?",
            "cuDNN alone, 0.4 s or more a shape; images by flash 1.0 ms, by cuDNN 0.8",
            script("attention"),
            script("attention"),
            60,
            1,
        ),
        Part(
            "steps",
            "What is the time of DiVE's step over FLYP as published?",
            "0.14; with plain blocks 0.27, compiled 0.17",
            script("steps", "--minutes", "3.5"),
            script("steps"),
            240,
            2,
        ),
        Part(
            "losses",
            "What is the time of the joint loss over eager PyTorch's, fp16?",
            "B = 512: 0.3; 32768 x 768: 0.65; memory 0.016",
            (*PYTEST, losses, *folder),
            (*PYTEST, losses, "-k", "naive", *folder),
            140,
            2,
        ),
        Part(
            "tiles",
            "Are other tiles, splits, chunks or paths of the contrastive loss faster?",
            "none by more than 10 %; fused up to 1,024 pairs at D = 512, chunked above",
            script("tiles"),
            (shutil.which("env") or "env", "TRITON_INTERPRET=1", *script("tiles")),
            80,
            2,
        ),
        Part(
            "ZeRO",
            "What do ZeRO's stages and alignment cost on one rank?",
            "1.02 for stages 1 and 2, 1.05 for 3; without alignment 0.03 to 0.07 more",
            script("zero", "--model", "ViT-B-16", "--batch", "256"),
            script("zero", "--model", "ViT-tiny", "--rounds", "2"),
            80,
            2,
        ),
        Part(
            "switches",
            "What do fp16 partial sums, TF32 and cuDNN's attention change?",
            "noise of images 1.5e-3 in fp16, in fp32 below 1e-5 and with TF32 5e-4; time within 2 %",
            script("switches"),
            script("switches"),
            50,
            3,
        ),
        Part(
            "training",
            "Do real runs agree with the CPU's, with DALI's and after a kill?",
            "losses differ by less than 1e-3; after a kill not at all",
            script("training"),
            script("training"),
            110,
            3,
        ),
        Part(
            "projections",
            "How long do methods in weight space take besides AdamW, ViT-B/16?",
            "AdamW 1.2 ms; L2-SP 0.6 more, SPD 1.3, FTP 1.6, DiGraP 1.5, with the current deviations 1.2",
            script("projections", "--no-plan"),
            script("projections", "--no-plan", "--model", "ViT-tiny", "--rounds", "1"),
            30,
            3,
        ),
        sanitized("racecheck", "Do threads of a kernel race?", "two_runs", 60),
        sanitized("memcheck", "Does a kernel read or write outside of its tensors?", SANITIZED, 70),
        Part(
            "saves",
            "How long does a checkpoint block the loop?",
            "ViT-L/14: 1 to 2 s for the first, 0.3 s for later ones",
            script("saves", "--model", "ViT-L-14", "--batch", "64", "--rounds", "1"),
            script("saves", "--model", "ViT-tiny", "--rounds", "1"),
            70,
            3,
        ),
        Part(
            "loaded steps",
            "How much longer does a step of 1,024 images take next to a loader, on 16 cores?",
            "ImageNet's bytes: flyp 1.7, plain 1.05, dali 1.10, ffcv 1.02; 288 px: 1.3, 1.02, 1.05, 1.02",
            script("loaded_steps"),
            script("loaded_steps"),
            130,
            3,
        ),
        Part(
            "attack kernels",
            "What is the time of the attack's kernels over plain PyTorch's?",
            "volume 0.1, PGD step 0.24, PGD start 0.02",
            script("attack_kernels"),
            script("attack_kernels"),
            20,
            3,
        ),
        Part(
            "precision",
            "Does the gradient of difference vectors survive fp16?",
            "cosine to fp32 at a difference of 3e-3: 0.97; bf16 0.45",
            (PYTHON, "benchmarks/precision.py", "--models", "ViT-B-16", *gpu_precision),
            (PYTHON, "benchmarks/precision.py", "--models", "demo", *gpu_precision),
            60,
            4,
        ),
        Part(
            "loaders",
            "How many images a second does each loader deliver?",
            "DALI on the GPU at least the 4,970 that a step of ViT-B/16 takes",
            script("loaders", "--rounds", "1", "--batches", "8", "--images", "128"),
            (PYTHON, "benchmarks/loaders.py", "--help"),
            60,
            4,
        ),
        Part(
            "cache",
            "How long does a batch of the teacher's rows take?",
            "0.6 to 0.8 ms from memory",
            script("cache", "--gib", "2"),
            script("cache", "--gib", "0.1", "--batches", "20"),
            30,
            4,
        ),
        Part(
            "plan",
            "What are memory and time of measured steps over their plans?",
            "memory 1.00 to 1.05; time 0.9 to 1.2",
            (PYTHON, "benchmarks/planned.py", "--against", str(steps_file)),
            (PYTHON, "benchmarks/planned.py", "--against", str(steps_file)),
            60,
            4,
        ),
        Part(
            "two GPUs",
            "Do ZeRO's stages, resuming and evaluating work over NCCL, and does a rank leave a killed one?",
            "yes, within a minute; on one GPU skipped",
            (*PYTEST, two_gpus, "-m", "two_gpus"),
            (*PYTEST, two_gpus, "-m", "slow", "--collect-only"),
            300,
            4,
        ),
        Part(
            "study",
            "Do DiVE's gains hold for small CLIPs that a GPU trains?",
            "docs/study.md",
            (PYTHON, *study, "--minutes", "8", *folder),
            (PYTHON, *study, "--help"),
            540,
            5,
            REPOSITORY / "benchmarks",
        ),
    ]


def sanitizer() -> str:
    """Path of compute-sanitizer, of CUDA or the package nvidia-cuda-sanitizer-api; its name if not installed."""
    packaged = Path(sysconfig.get_path("platlib")).glob(f"nvidia/*/bin/{SANITIZER}")
    return shutil.which(SANITIZER) or next((str(path) for path in packaged), SANITIZER)


def run(part: Part, command: Sequence[str], seconds: float) -> dict[str, Any]:
    """Runs a part; returns its outcome, its seconds and the end of its output.

    The outcome is ``passed``, ``failed``, ``out of time``, ``skipped`` if that is what all of its tests were, or
    ``not installed`` if its program is missing.
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
    if outcome == "passed" and re.match(r"\d+ skipped", measured(output)):
        outcome = "skipped"
    result = {"part": part.name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
    result |= {"question": part.question, "predicted": part.prediction, "measured": measured(output)}
    return result | {"command": _without_paths(" ".join(command)), "end": _without_paths(output[-TAIL:])}


def measured(output: str) -> str:
    """The last line of figures in an output; without any its last line, such as pytest's summary."""
    lines = [line.strip(" =") for line in output.splitlines() if line.strip(" =")]
    figures = [line.removeprefix(MEASURED) for line in lines if line.startswith(MEASURED)]
    return _without_paths(next(reversed(figures or lines), ""))


def _without_paths(text: str) -> str:
    """Removes this machine's paths of the repository and of Python, since results are committed."""
    for path in (REPOSITORY, Path(sys.executable).parent):
        text = text.replace(f"{path}/", "")
    return text


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
    calls = sorted({part.call for part in parts(Path())})
    parser.add_argument("--call", type=int, choices=calls, help="only the parts of this call")
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
        is_selected = part.name in options.only and options.call in (None, part.call)
        if not is_selected or left < min(part.seconds, SHORTEST):
            continue
        command = part.rehearsal if options.rehearse else part.command
        result = run(part, command, left if options.rehearse else min(left, part.seconds))
        if result["outcome"] not in ("out of time", "skipped") or outcomes[part.name]["outcome"] != "passed":
            outcomes[part.name] = result | {"commit": commit()}
        failed |= result["outcome"] not in ("passed", "skipped")
        print(f"{part.name:<12} {result['outcome']:<14} {result.get('seconds', 0):6.1f} s", flush=True)
        print(f"  {part.question}\n  predicted: {part.prediction}", flush=True)
        print(f"  measured:  {result.get('measured', '')}", flush=True)
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
