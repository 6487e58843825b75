"""Fingerprint of a teacher cache: two runs may share a cache exactly if their fingerprints are equal."""

import hashlib
from importlib import metadata

from PIL import features

from dive_fast import identity, numerics
from dive_fast.data.loaders.loader import Options
from dive_fast.data.samples import ReferenceSamples
from dive_fast.data.text_tokenizer import TOKENIZER_PROBES
from dive_fast.identity import Identity
from dive_fast.model import model_identity
from dive_fast.model.towers import Towers
from dive_fast.teacher.cache_files import counts_digest

Fingerprint = Identity


def fingerprint(
    towers: Towers,
    samples: ReferenceSamples,
    text_length: int | None,
    options: Options,
    dtype: str = "float32",
) -> Fingerprint:
    """Everything that determines a cache's rows.

    Args:
        towers: the frozen model.
        text_length: context length of the captions; None if the model does not define one.
        options: loader options: loaders differ in the last bits of pixels, and DALI between CPU and GPU.
        dtype: dtype of the stored rows, which are computed in fp32.
    """
    switches, counts = numerics.state(), samples.caption_counts
    # Caches of sets with one caption per image have no such field.
    captions = {} if counts is None else {"captions": counts_digest(counts)}
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
        **captions,
    }


def differences(stored: Fingerprint, expected: Fingerprint) -> list[str]:
    """A line for every field that differs, with both values."""
    lines = []
    for difference in identity.differences(stored, expected):
        old, new = difference.shown()
        lines.append(f"{difference.key}: the cache has {old}, this run {new}")
    return lines


def decoder(options: Options) -> str:
    """Name of the loader with the versions of the libraries that decode and resize its images."""
    if options.loader == "plain":
        return f"plain, pillow {metadata.version('pillow')}, libjpeg-turbo {features.version('libjpeg_turbo')}"
    if options.loader == "ffcv":
        import cv2

        return f"ffcv, cv2 {cv2.__version__}"
    assert options.loader == "dali", options.loader
    import nvidia.dali

    return f"dali {nvidia.dali.__version__} on {options.device.type}"
