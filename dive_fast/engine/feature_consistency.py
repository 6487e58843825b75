"""Checks that features depend on weights and sample alone, before any data is embedded.

DiVE compares a tuned model with a frozen copy of it, and micro-batches run each tower in pieces and twice. Both
need features that depend neither on chance (drop path, dropout) nor on the other samples of a batch (BatchNorm
with batch statistics).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dive_fast.config.schema import Config
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError, warn_on_main_rank
from dive_fast.methods import registry
from dive_fast.model.towers import Towers
from dive_fast.model.transformer_blocks import check_blocks

MAX_REPEAT_ERROR = 1e-5
"""Largest relative difference between features of one batch that is embedded twice."""
MAX_SPLIT_ERROR = 1e-3
"""Largest relative difference between features of a batch and of its pieces, which other kernels may multiply in
another order."""
DROP_PATH_CLASSES = ("DropPath", "StochasticDepth", "DropBlock2d")
DROP_RATE_NAMES = ("drop_prob", "drop_path", "drop_path_rate", "p")
"""Attributes that hold the rate, in modules of these classes and in those that call a drop-path function."""


@dataclass(frozen=True)
class FeatureConsistency:
    """Properties of a model's features in training mode."""

    is_random: bool = False
    """Whether features of one batch by the same weights differ from call to call."""
    is_per_sample: bool = True
    """Whether the features of a sample are independent of the rest of its batch."""
    matches_evaluation: bool = True
    """Whether features in training mode equal those in evaluation mode, which the teacher computes."""
    reason: str = ""
    """The cause of an inconsistency, in words; empty if there is none."""


def prepare(config: Config, towers: Towers, ranks: Ranks) -> None:
    """Makes the towers consistent where possible, measures them, and refuses options that they do not support.

    Stores the measurement in ``towers.feature_consistency``. Moves the towers to the device of ``ranks``.

    Raises:
        ConfigError: an option needs consistent features; names the key and the cause.
    """
    needs, train, name = registry.needs(config.objective), config.train, config.model.name
    if changes := make_consistent(towers):
        warn_on_main_rank(f"{name}: in training, {' and '.join(changes)}: the same features as in evaluation")
    check_blocks(towers, train.activation_checkpointing, train.compile)
    consistency = towers.feature_consistency = measure(towers.to(ranks.device), needs.texts)
    check_config(config, consistency)
    if consistency.is_random and needs.reference_teacher:
        warn_on_main_rank(
            f"{name} {consistency.reason}: no noise floor is measured, and |u|, |v| have that noise too"
        )


def check_config(config: Config, consistency: FeatureConsistency) -> None:
    """Validates options against the consistency of the features.

    Raises:
        ConfigError: an option needs consistent features; names the key and the cause.
    """
    name, reason = config.model.name, consistency.reason
    if config.train.micro_batch_size is not None and (consistency.is_random or not consistency.is_per_sample):
        raise ConfigError(
            f"train.micro_batch_size: {name} {reason}, so a batch in pieces has other gradients than the complete "
            "batch; remove it"
        )
    needs, objective = registry.needs(config.objective), config.objective.name
    method = "this objective" if objective is None else f"objective.name = {objective}"
    if needs.views and consistency.is_random:
        has_dropout = config.model.lora is not None and config.model.lora.dropout > 0
        key, remedy = ("model.lora.dropout", "set it to 0") if has_dropout else ("model.name", "use another model")
        raise ConfigError(
            f"{key}: {method} encodes views of images twice, to equal features, but {name} {reason}; {remedy} or "
            "take another method"
        )
    needs_teacher = needs.reference_teacher
    if needs_teacher and not (consistency.is_random or consistency.matches_evaluation):
        raise ConfigError(
            f"model.name: {name} {reason}; {method} compares both, so use another model, or a method without a "
            "teacher"
        )


def make_consistent(towers: nn.Module) -> list[str]:
    """Disables drop path, and counts the BatchNorms that :meth:`Towers.train` keeps in evaluation mode.

    Returns:
        The changes, in words; empty at the second call.
    """
    rates = []
    for module in towers.modules():
        is_drop_path = type(module).__name__ in DROP_PATH_CLASSES
        for name in DROP_RATE_NAMES if is_drop_path else ("drop_path", "drop_path_rate"):
            rate = getattr(module, name, None)
            if isinstance(rate, float) and rate > 0:
                setattr(module, name, 0.0)
                rates.append(rate)
    changes = [f"drop path is 0 instead of {max(rates):.3g}"] if rates else []
    num_norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in towers.modules())
    is_first_call = not getattr(towers, "is_made_consistent", False)
    if isinstance(towers, Towers):
        towers.is_made_consistent = True
    if num_norms > 0 and is_first_call:
        changes.append(f"{num_norms} BatchNorms keep the statistics of pre-training")
    return changes


def inspect_modules(towers: nn.Module) -> FeatureConsistency:
    """Consistency as far as the module classes show it; for towers that cannot be run."""
    dropouts = Counter(filter(None, map(_describe_dropout, towers.modules())))
    if not dropouts:
        return FeatureConsistency()
    counts = ", ".join(f"{kind} in {count} module{'s' * (count > 1)}" for kind, count in dropouts.most_common(3))
    return FeatureConsistency(is_random=True, reason=f"drops features at random ({counts})")


@torch.no_grad()
def measure(towers: Towers, uses_text: bool = True) -> FeatureConsistency:
    """Measures consistency on two random images and texts.

    Embeds them twice in training mode, then one by one, then in evaluation mode.

    Args:
        uses_text: whether to measure the text tower too.

    Raises:
        ConfigError: features are not finite; the weights are broken.
    """
    device, was_training = towers.logit_scale.device, towers.training
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *towers.preprocess.size, generator=generator).to(device)
    context = int(getattr(towers.text, "context_length", 77))
    tokens = torch.randint(0, 8, (2, context), generator=generator).to(device)
    autocast, towers.autocast = towers.autocast, None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            consistency = _measure_tower(towers, "image", towers.visual, towers.encode_image, images)
            if uses_text:
                text = _measure_tower(towers, "text", towers.text, towers.encode_text, tokens)
                consistency = _combine(consistency, text)
    finally:
        towers.train(was_training)
        towers.autocast = autocast
    return consistency


def _measure_tower(
    towers: Towers, name: str, tower: nn.Module, encode: Callable[[Tensor], Tensor], rows: Tensor
) -> FeatureConsistency:
    towers.train()
    features, repeated = encode(rows), encode(rows)
    one_by_one = torch.cat([encode(row) for row in rows.split(1)])
    towers.eval()
    evaluated = encode(rows)
    if not bool(torch.isfinite(evaluated).all()):
        raise ConfigError(f"model: the {name} tower's features are not finite: its weights are broken")
    inspected = inspect_modules(tower)
    if inspected.is_random or not _is_close(features, repeated, MAX_REPEAT_ERROR):
        kind = type(tower).__name__
        reason = inspected.reason or f"computes different {name} features of one batch at each call ({kind})"
        return FeatureConsistency(True, False, False, reason)
    is_per_sample = _is_close(one_by_one, features, MAX_SPLIT_ERROR)
    matches_evaluation = _is_close(features, evaluated, MAX_REPEAT_ERROR)
    reason = ""
    if not is_per_sample:
        reason = f"computes {name} features of a sample that depend on the other samples of its batch"
    elif not matches_evaluation:
        reason = f"computes other {name} features in training than in evaluation"
    return FeatureConsistency(False, is_per_sample, matches_evaluation, reason)


def _combine(image: FeatureConsistency, text: FeatureConsistency) -> FeatureConsistency:
    return FeatureConsistency(
        image.is_random or text.is_random,
        image.is_per_sample and text.is_per_sample,
        image.matches_evaluation and text.matches_evaluation,
        " and ".join(dict.fromkeys(filter(None, (image.reason, text.reason)))),
    )


def _is_close(features: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((features - expected).norm(dim=1).max() <= tolerance * expected.norm(dim=1).max())


def _describe_dropout(module: nn.Module) -> str | None:
    """Kind and rate of a module that drops features at random; None for any other."""
    kind = type(module).__name__
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
        return f"dropout {module.p:.3g}"
    if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
        return f"dropout {module.dropout:.3g}"
    for name in ("prob", *DROP_RATE_NAMES):
        rate = getattr(module, name, None)
        if (kind.startswith("PatchDropout") or kind in DROP_PATH_CLASSES) and isinstance(rate, float) and rate > 0:
            return f"{kind} {rate:.3g}"
    return None
