"""A small model and configs over it, for plans."""

import json
from pathlib import Path
from typing import Any

from dive_fast.config.schema import Config
from dive_fast.methods.run_config import RunConfig

TARGET, REFERENCE, CONTEXT, WIDTH = 16, 12, 40, 64


SMALL = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 128, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 500, "width": 128, "heads": 2, "layers": 2},
}


def small_config(folder: Path, **overrides: Any) -> Config:
    """A config over the small model; ``zero`` is the stage, whose buckets are as small as the model."""
    zero = {"stage": overrides.pop("zero", 2), "reduce_bucket_size": 50000}
    data = {"format": "webdataset", "path": "-"}
    tree: dict[str, Any] = {
        "model": {"name": f"local-dir:{folder}"},
        "data": {
            "target": data | {"batch_size": TARGET, "class_names": "-"},
            "reference": data | {"batch_size": REFERENCE},
        },
        "objective": {},
        "teacher": {},
        "train": {"precision": "fp32"},
        "deepspeed": {"zero_optimization": zero},
    }
    for place, value in overrides.items():
        *sections, key = place.split(".")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    return RunConfig.model_validate_json(json.dumps(tree))
