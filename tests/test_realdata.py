"""A run over real JPEGs: ImageNet photos as target, captioned COCO photos as reference."""

import io
import json
import os
import subprocess
import sys
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import run_ranks

from dive_fast.distributed import join
from dive_fast.methods.method import Part
from dive_fast.methods.noise_floor import NOISE_FLOOR
from dive_fast.methods.run_config import RunConfig
from dive_fast.training import loop as train


def run(tree: dict[str, Any], folder: Path) -> dict[str, float]:
    Part.backend = "torch"  # interpreted, the kernels would take most of the time
    return train.train(RunConfig.model_validate_json(json.dumps(tree)), folder, join())


@pytest.mark.realdata
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "fp16"])
def test_a_run_over_real_photos_stays_finite_and_starts_at_the_noise_floor(
    real_data: Path, tmp_path: Path, precision: str
) -> None:
    # ViT-B-16's shape, narrower and shallower, on smaller pictures.
    vision = {"image_size": 64, "layers": 3, "width": 96, "head_width": 32, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3}
    name = tiny.write_model(tmp_path / "model", {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text})
    workers = {"workers": 1}
    tree = {
        "model": {"name": name},
        "data": {
            "target": {
                "format": "webdataset",
                "path": str(real_data / "imagenet_samples/imagenet_samples.tar"),
                "class_names": "imagenet",
                "templates": "imagenet",
                "batch_size": 16,
                **workers,
            },
            "reference": {
                "format": "webdataset",
                "path": str(real_data / "captions/coco_captions_*.tar"),
                "batch_size": 16,
                **workers,
            },
        },
        "train": {
            "max_steps": 4,
            "warmup_steps": 2,
            "learning_rate": 1e-4,
            "precision": precision,
            "log_every": 1,
        },
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }
    run_ranks(2, run, tree, tmp_path / "run", init=False, timeout=240)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    # A step that overflows has no norm, is skipped, and is counted.
    unknown = [(line["step"], name) for line in lines for name, value in line.items() if value is None]
    skipped = [b["skipped_steps"] - a["skipped_steps"] for a, b in pairwise([{"skipped_steps": 0}, *lines])]
    assert unknown == [(line["step"], "gradient_norm") for line, more in zip(lines, skipped, strict=True) if more]
    assert all(abs(value) < float("inf") for line in lines for value in line.values() if value is not None)
    assert lines[0]["image_norm"] < NOISE_FLOOR[precision]
    assert lines[0]["text_norm"] < NOISE_FLOOR[precision]
    # fp16 may spend its first steps on finding a loss scale.
    if precision == "fp32":
        assert lines[-1]["image_norm"] > 10 * lines[0]["image_norm"]
    assert os.path.getsize(tmp_path / "run/model.safetensors") > 1e6


@pytest.mark.realdata
def test_the_benchmark_of_the_loaders_ends_in_tables(real_data: Path, tmp_path: Path) -> None:
    tar = real_data / "captions" / "coco_captions_train.tar"
    labelled = tmp_path / "labelled.tar"
    with tarfile.open(tar) as source, tarfile.open(labelled, "w") as target:
        for member in [member for member in source if member.name.endswith(".jpg")][:24]:
            target.addfile(member, source.extractfile(member))
            label = tarfile.TarInfo(member.name.replace(".jpg", ".cls"))
            label.size = 1
            target.addfile(label, io.BytesIO(b"0"))
    command = [sys.executable, "benchmarks/loaders.py", "--data", str(labelled), "--results", str(tmp_path)]
    command += ["--batch-size", "8", "--batches", "2", "--rounds", "1", "--workers", "1"]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "| ffcv's own decoder | " in run.stdout
    content = json.loads((tmp_path / "cpu-loaders.json").read_text())
    assert list(content["loaders"]) == ["photos", "512 px", "288 px"]
    for loaders in content["loaders"].values():
        assert list(loaders) == ["flyp", "plain", "dali", "ffcv"]
        assert all(measured["cpu_seconds"] > 0 for measured in loaders.values())
