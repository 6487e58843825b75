"""Runs the demo: fine-tunes a small CLIP with FLYP and with DiVE on two CPU ranks, and compares them."""

import argparse
import subprocess
import time
from pathlib import Path

from dive_fast.commands import cli
from dive_fast.commands.launcher import launcher_command, launcher_environment
from dive_fast.config.shipped import CONFIGS
from dive_fast.data.demo import splits


@cli.guarded
def main(arguments: list[str] | None = None) -> int:
    """Trains twice under DeepSpeed's launcher, then compares the models; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="output folder; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of both runs; default: %(default)s")
    parser.add_argument("--steps", type=cli.count(1), help="steps of each run; default: as in demo.json")
    options = parser.parse_args(arguments)
    overrides = [f"train.seed={options.seed}"]
    overrides += [f"train.max_steps={options.steps}"] if options.steps else []
    started = time.perf_counter()

    from dive_fast.demo import comparison
    from dive_fast.methods.run_config import load_run_config

    print(f"world: {splits.prepare()}", flush=True)
    models: dict[str, Path | None] = {"pretrained": None}
    for method in ("flyp", "dive"):
        folder = options.output / method
        print(f"\n{method}: dive-fast train --config demo.json on 2 CPU ranks, ZeRO-2", flush=True)
        exit_code = _train(folder, f"objective.name={method}", *overrides)
        if exit_code:
            return exit_code
        models[method] = folder / "model.safetensors"
    report = comparison.compare(load_run_config("demo", folder=CONFIGS), models)
    comparison.write(report, options.output)
    print(f"\n{comparison.table(report)}\n\n{comparison.EVIDENCE}\n")
    print(f"{options.output}/report.json, {options.output}/report.png")
    print(f"{time.perf_counter() - started:.0f} s")
    return 0


def _train(folder: Path, *overrides: str) -> int:
    arguments = ["--config", "demo.json", f"train.output={folder}", "train.resume=never", *overrides]
    environment = launcher_environment() | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(launcher_command("train", arguments, 2), env=environment, check=False).returncode
