"""Whether the towers are the same function each time, measured before anything is embedded.

DiVE compares a tuned model with a frozen copy of it, and micro-batches run each tower in pieces and twice. Both
need features that depend on weights and sample alone: not on chance (drop path, dropout), and not on the other
samples of a batch (BatchNorm with the batch's statistics).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dive_fast.config.schema import Config
from dive_fast.distributed import Ranks
from dive_fast.errors import ConfigError
from dive_fast.methods import registry
from dive_fast.model.model_files import warn_on_main_rank
from dive_fast.model.towers import Towers
from dive_fast.model.transformer_blocks import check_blocks

SAME = 1e-5
"""Largest relative difference of features that counts as none: of one batch embedded again."""
SAME_IN_PIECES = 1e-3
"""The same for a batch in pieces, which other kernels may multiply in another order."""
DROP_PATH = ("DropPath", "StochasticDepth", "DropBlock2d")
RATES = ("drop_prob", "drop_path", "drop_path_rate", "p")
"""What such modules, and those that drop by a function, call their rate."""


@dataclass(frozen=True)
class FeatureConsistency:
    """What was found of a model in training."""

    is_random: bool = False
    """Whether the same weights make other features of the same batch each time."""
    is_per_sample: bool = True
    """Whether the features of a sample are the same whatever else is in its batch."""
    is_as_evaluated: bool = True
    """Whether features in training are those in evaluation, which the teacher's are."""
    reason: str = ""
    """What makes it so."""


def prepare(config: Config, towers: Towers, ranks: Ranks) -> None:
    """Makes the towers steady where it can, measures them, and refuses what they cannot do.

    Leaves what was found in ``towers.feature_consistency``. The towers end on the device of ``ranks``.

    Raises:
        ConfigError: the config asks for what these towers cannot do; says which key, and why.
    """
    needs, train = registry.needs(config.objective), config.train
    uses_text = needs.texts
    if changed := settle(towers):
        warn_on_main_rank(
            f"{config.model.name}: in training, {' and '.join(changed)}: the same features as in evaluation"
        )
    check_blocks(towers, train.activation_checkpointing, train.compile)
    found = towers.feature_consistency = measure(towers.to(ranks.device), uses_text)
    check(config, found)
    if found.is_random and needs.reference_teacher:
        warn_on_main_rank(
            f"{config.model.name} {found.reason}: no noise floor is measured, and |u|, |v| have that noise too"
        )


def check(config: Config, found: FeatureConsistency) -> None:
    """Refuses what towers cannot do.

    Raises:
        ConfigError: names the key, and why.
    """
    if config.train.micro_batch_size is not None and (found.is_random or not found.is_per_sample):
        raise ConfigError(
            f"train.micro_batch_size: {config.model.name} {found.reason}, so a batch in pieces has other "
            "gradients than the whole; remove it"
        )
    if registry.needs(config.objective).reference_teacher and not (found.is_random or found.is_as_evaluated):
        raise ConfigError(
            f"model.name: {config.model.name} {found.reason}; objective.name = {config.objective.name} compares "
            "both, so take another model, or an objective without a teacher"
        )


def settle(towers: nn.Module) -> list[str]:
    """Turns drop path off, and counts the BatchNorms that :meth:`Towers.train` keeps in evaluation mode.

    Returns:
        What was changed, in words; nothing the second time.
    """
    rates = []
    for module in towers.modules():
        names = RATES if type(module).__name__ in DROP_PATH else ("drop_path", "drop_path_rate")
        for name in names:
            rate = getattr(module, name, None)
            if isinstance(rate, float) and rate > 0:
                setattr(module, name, 0.0)
                rates.append(rate)
    changed = [f"drop path is 0 instead of {max(rates):.3g}"] if rates else []
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in towers.modules())
    is_new = norms > 0 and not getattr(towers, "drop_path_disabled", False)
    if isinstance(towers, Towers):
        towers.drop_path_disabled = True
    return changed + ([f"{norms} BatchNorms keep the statistics of pre-training"] if is_new else [])


def by_modules(towers: nn.Module) -> FeatureConsistency:
    """What is known of the towers by their modules, where nothing can be run."""
    dropping = Counter(filter(None, map(_drops, towers.modules())))
    if not dropping:
        return FeatureConsistency()
    kinds = ", ".join(f"{kind} in {count} module{'s' * (count > 1)}" for kind, count in dropping.most_common(3))
    return FeatureConsistency(is_random=True, reason=f"drops features at random ({kinds})")


@torch.no_grad()
def measure(towers: Towers, uses_text: bool = True) -> FeatureConsistency:
    """Embeds two random images and texts in training mode, again, one by one, and in evaluation mode.

    Args:
        uses_text: whether the text tower counts.

    Raises:
        ConfigError: features are not finite: the weights are broken.
    """
    device, was_training = towers.logit_scale.device, towers.training
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *towers.preprocess.size, generator=generator).to(device)
    context = int(getattr(towers.text, "context_length", 77))
    tokens = torch.randint(0, 8, (2, context), generator=generator).to(device)
    autocast, towers.autocast = towers.autocast, None
    found = FeatureConsistency()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            found = _of_tower(towers, "image", towers.visual, towers.encode_image, images)
            if uses_text:
                text = _of_tower(towers, "text", towers.text, towers.encode_text, tokens)
                found = _both(found, text)
    finally:
        towers.train(was_training)
        towers.autocast = autocast
    return found


def _of_tower(
    towers: Towers, name: str, tower: nn.Module, encode: Callable[[Tensor], Tensor], rows: Tensor
) -> FeatureConsistency:
    towers.train()
    whole, again = encode(rows), encode(rows)
    pieces = torch.cat([encode(row) for row in rows.split(1)])
    towers.eval()
    evaluated = encode(rows)
    if not bool(torch.isfinite(evaluated).all()):
        raise ConfigError(f"model: the {name} tower's features are not finite: its weights are broken")
    known = by_modules(tower)
    if known.is_random or not _same(whole, again, SAME):
        kind = type(tower).__name__
        reason = known.reason or f"makes other {name} features of the same batch each time ({kind})"
        return FeatureConsistency(True, False, False, reason)
    is_per_sample, is_as_evaluated = _same(pieces, whole, SAME_IN_PIECES), _same(whole, evaluated, SAME)
    reason = ""
    if not is_per_sample:
        reason = f"makes {name} features of a sample that depend on the other samples of its batch"
    elif not is_as_evaluated:
        reason = f"makes other {name} features in training than in evaluation"
    return FeatureConsistency(False, is_per_sample, is_as_evaluated, reason)


def _both(image: FeatureConsistency, text: FeatureConsistency) -> FeatureConsistency:
    return FeatureConsistency(
        image.is_random or text.is_random,
        image.is_per_sample and text.is_per_sample,
        image.is_as_evaluated and text.is_as_evaluated,
        " and ".join(dict.fromkeys(filter(None, (image.reason, text.reason)))),
    )


def _same(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one - other).norm(dim=1).max() <= tolerance * other.norm(dim=1).max())


def _drops(module: nn.Module) -> str | None:
    """How a module drops features at random; None if it does not."""
    kind = type(module).__name__
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
        return f"dropout {module.p:.3g}"
    if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
        return f"dropout {module.dropout:.3g}"
    for name in ("prob", *RATES):
        rate = getattr(module, name, None)
        if (kind.startswith("PatchDropout") or kind in DROP_PATH) and isinstance(rate, float) and rate > 0:
            return f"{kind} {rate:.3g}"
    return None
