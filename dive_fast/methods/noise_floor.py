"""The noise floor of difference vectors: their length before the first update, which is rounding alone."""

from collections.abc import Mapping

from dive_fast.errors import ConfigError
from dive_fast.methods.method import FirstStep

NOISE_FLOOR = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}
"""Largest mean |u| and |v| allowed at the first step, by precision. The tuned model still equals the frozen
one, so that rounding of the forward is the only difference (measured in docs/precision.md). Larger values mean a
wrong cache."""


def check_noise_floor(first: FirstStep, norms: Mapping[str, str]) -> None:
    """Validates mean lengths of difference vectors at the first step against the noise floor.

    Args:
        norms: names of the metrics and their symbols.

    Raises:
        ConfigError: a length exceeds the rounding of the precision.
    """
    bound, tolerance = NOISE_FLOOR[first.precision], first.cache_tolerance
    is_fp32 = first.precision == "fp32"
    if tolerance is None:
        # The teacher is a copy of this model with deterministic features: rounding is the only difference.
        cause = "it is rounding alone, which hides difference vectors"
        remedy = "" if is_fp32 else "; take train.precision = fp32"
    else:
        # Adds differences that the audit allows.
        bound = max(bound, tolerance)
        cause = "the teacher's embeddings are not this model's; remove the teacher cache to write it again"
        remedy = "" if is_fp32 else ", or take train.precision = fp32 if rounding is that large"
    for name, symbol in norms.items():
        if name in first.metrics and (length := float(first.metrics[name])) > bound:
            raise ConfigError(
                f"mean {symbol} before the first update is {length:.2e}, above {bound:.0e} for "
                f"{first.precision}: {cause}{remedy}"
            )
