"""Compares complete fine-tuning runs in different precisions: ``python benchmarks/precision_training.py``.

Runs DiVE from the same weights on the same batches in each precision of the towers and for each lambda, and
reports difference vectors, accuracies and RSA at the end. Uses the demo, or a small CLIP on real pictures
(``--world cifar``).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from loss_report import REPOSITORY, commit, device_name, slug, write_json
from rounding import products
from study import runs

from dive_fast.data.demo import splits
from dive_fast.demo import comparison as report
from dive_fast.distributed import join
from dive_fast.methods.run_config import load_run_config
from dive_fast.training.loop import train

CONFIGS = REPOSITORY / "launch/configs"
STUDY = REPOSITORY / "build/study"


def demo(_: argparse.Namespace) -> tuple[str, str]:
    """The demo's config, and the pairs for its geometry."""
    splits.prepare()
    return "demo.json", "demo:reference_heldout"


def cifar(options: argparse.Namespace) -> tuple[str, str]:
    """A config on a fifth of CIFAR-10, and its pairs; pre-trains the small CLIP if it is missing."""
    config = runs.prepare(STUDY, epochs=options.pretraining_epochs, target=10_000, tested=2_000)
    return str(config), str(STUDY / "data" / runs.HELDOUT)


WORLDS = {"demo": demo, "cifar": cifar}


def main() -> None:
    """Trains and compares all runs, prints a table and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=WORLDS, default="demo")
    parser.add_argument("--pretraining-epochs", type=int, default=12, help="epochs of the small CLIP on CIFAR-100")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16", "bf16"])
    parser.add_argument("--weights", nargs="+", type=float, default=[0.1, 10.0, 1000.0], help="lambda")
    parser.add_argument("--learning-rate", type=float, help="default: the config's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, default=REPOSITORY / "build/precision", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks/results")
    options = parser.parse_args()
    ranks = join()
    config_path, heldout = WORLDS[options.world](options)
    models: dict[str, Path | None] = {"pretrained": None}
    rows: dict[str, dict[str, Any]] = {}
    for seed in options.seeds:
        for weight in options.weights:
            for precision in options.precisions:
                name = f"{precision}, lambda {weight:g}, seed {seed}"
                folder = options.output / options.world / name
                overrides = [f"objective.weight={weight}", f"train.precision={precision}", f"train.seed={seed}"]
                overrides.append("evaluate.probe=0")
                if options.learning_rate is not None:
                    overrides.append(f"train.learning_rate={options.learning_rate}")
                config = load_run_config(config_path, overrides, CONFIGS)
                with products(precision, ranks.device):
                    train(config, folder, ranks)
                lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                lines = [line for line in lines if "image_norm" in line]
                models[name] = folder / "model.safetensors"
                figures = {"precision": precision, "weight": weight, "seed": seed}
                rows[name] = figures | {"floor": lines[0]["image_norm"], "u": lines[-1]["image_norm"]}
    measured = report.compare(load_run_config(config_path, [], CONFIGS), models, heldout)
    for name, row in rows.items():
        row |= {key: measured[name][key] for key in report.MEASURES}
    device, ending = device_name(), "" if options.world == "demo" else f"-{options.world}"
    path = options.results / f"{slug(device)}-precision-training{ending}.json"
    write_json(
        path, {"device": device, "torch": torch.__version__, "commit": commit(), "runs": list(rows.values())}
    )
    print("| lambda | precision | seed | floor | mean u | ID | OOD | ZS | RSA |\n" + "|---" * 9 + "|")
    for row in rows.values():
        figures = " | ".join(f"{100 * row[key]:.1f}" for key in ("id", "ood", "zs"))
        norms = f"{row['floor']:.1e} | {row['u']:.1e}"
        print(
            f"| {row['weight']:g} | {row['precision']} | {row['seed']} | {norms} | {figures} | {row['rsa']:.3f} |"
        )
    print(path)


if __name__ == "__main__":
    main()
