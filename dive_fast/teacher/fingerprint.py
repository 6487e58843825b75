"""What a teacher cache depends on: two runs may share one exactly when their fingerprints are equal."""

import hashlib
from importlib import metadata
from typing import Any

from PIL import features

from dive_fast.data.loader import Options
from dive_fast.data.prompts import TELLING
from dive_fast.data.samples import ReferenceSamples
from dive_fast.towers import Towers

Fingerprint = dict[str, Any]


def fingerprint(
    towers: Towers,
    model: dict[str, Any],
    samples: ReferenceSamples,
    text_length: int | None,
    options: Options,
    dtype: str = "float32",
) -> Fingerprint:
    """All that decides a cache's rows.

    Args:
        towers: the frozen model.
        model: the config's ``model`` section.
        text_length: context length of the captions, if not the model's.
        options: of the loader: loaders differ in the last bits of the pixels, and DALI between CPU and GPU.
        dtype: that the rows are stored in; they are computed in fp32.
    """
    return {
        "model": model,
        "weights": weights_digest(towers),
        "tokenizer": hashlib.sha256(samples.tokenizer(list(TELLING)).numpy().tobytes()).hexdigest(),
        "preprocess": repr(towers.preprocess),
        "views": samples.num_views,
        "crops": None if samples.views == "eval" else samples.seed,
        "text_length": text_length,
        "loader": decoder(options),
        "dtype": dtype,
        "data": samples.source.digest(),
    }


def differences(found: Fingerprint, wanted: Fingerprint) -> list[str]:
    """Every field that differs, with both values."""
    return [
        f"{name}: the cache has {found.get(name)!r}, this run {wanted.get(name)!r}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]


def weights_digest(towers: Towers) -> str:
    """A hash of all weights, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(towers.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def decoder(options: Options) -> str:
    """The loader, with the versions of what decodes and resizes its images."""
    if options.loader == "plain":
        return f"plain, pillow {metadata.version('pillow')}, libjpeg-turbo {features.version('libjpeg_turbo')}"
    if options.loader == "ffcv":
        import cv2

        return f"ffcv, cv2 {cv2.__version__}"
    assert options.loader == "dali", options.loader
    import nvidia.dali

    return f"dali {nvidia.dali.__version__} on {options.device.type}"
