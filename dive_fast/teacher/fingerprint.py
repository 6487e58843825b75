"""What a teacher cache depends on: two runs may share one exactly when their fingerprints are equal."""

import hashlib
from importlib import metadata

from PIL import features

from dive_fast import identity
from dive_fast import numerics as precision
from dive_fast.data.loaders.loader import Options
from dive_fast.data.prompts import TOKENIZER_PROBES
from dive_fast.data.samples import ReferenceSamples
from dive_fast.identity import Identity
from dive_fast.model import model_identity
from dive_fast.model.towers import Towers

Fingerprint = Identity


def fingerprint(
    towers: Towers,
    samples: ReferenceSamples,
    text_length: int | None,
    options: Options,
    dtype: str = "float32",
) -> Fingerprint:
    """All that decides a cache's rows.

    Args:
        towers: the frozen model.
        text_length: context length of the captions; None where the model does not say its own.
        options: of the loader: loaders differ in the last bits of the pixels, and DALI between CPU and GPU.
        dtype: that the rows are stored in; they are computed in fp32.
    """
    switches = precision.state()
    return {
        **model_identity.model_identity(towers),
        "tokenizer": hashlib.sha256(samples.tokenizer(list(TOKENIZER_PROBES)).numpy().tobytes()).hexdigest(),
        "views": samples.num_views,
        "crops": None if samples.views == "eval" else samples.seed,
        "text_length": text_length,
        "loader": decoder(options),
        "dtype": dtype,
        "data": samples.source.digest(),
        "tf32": options.device.type == "cuda" and (switches["matmul_tf32"] or switches["cudnn_tf32"]),
    }


def differences(found: Fingerprint, wanted: Fingerprint) -> list[str]:
    """Every field that differs, with both values."""
    lines = []
    for difference in identity.differences(found, wanted):
        stored, current = difference.shown()
        lines.append(f"{difference.key}: the cache has {stored}, this run {current}")
    return lines


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
