"""The parameters that a run trains: those of its method, or adapters or prompts instead, without frozen ones."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from dive_fast.config.schema import LoraConfig, ModelConfig, TrainConfig
from dive_fast.engine.feature_consistency import FeatureConsistency
from dive_fast.errors import ConfigError, warn_on_main_rank
from dive_fast.methods.method import Method
from dive_fast.model import adapters
from dive_fast.model.freezing import frozen_names, layer_factors
from dive_fast.model.learned_prompts import check_text_tower
from dive_fast.model.towers import HEAD, PROMPTS, Towers


def check(model: ModelConfig, train: TrainConfig, towers: Towers, method: Method) -> None:
    """Validates adapters, prompts, frozen parameters and learning rates, before anything is embedded.

    Raises:
        ConfigError: as :func:`adapt`, :func:`freeze_untrained` and
            :func:`~dive_fast.model.freezing.layer_factors`, as far as they depend on names.
    """
    if method.needs.prompts:
        check_text_tower(towers)
    if train.layer_decay is not None:
        layer_factors(towers, train.layer_decay)
    if method.needs.adapters and (model.lora is None or "image" not in model.lora.towers):
        raise ConfigError(
            "model.lora: this method trains adapters of the image tower; set for example model.lora.rank=64"
        )
    adapted = None if model.lora is None else adapters.check(towers, _adapted(model.lora, method))
    # A head does not exist yet, and neither do the factors of adapters and prompts.
    later = [pattern for pattern in model.freeze if HEAD in pattern or ".lora_" in pattern or PROMPTS in pattern]
    frozen = frozen_names(towers, [pattern for pattern in model.freeze if pattern not in later])
    is_complete = not (later or method.needs.head or method.needs.prompts)
    if is_complete and frozen >= {name for name, _ in towers.named_parameters()}:
        raise _all_frozen()
    _warn_of_constant_penalty(towers, method, frozen, adapted)


def consistency_of(model: ModelConfig, towers: Towers) -> FeatureConsistency:
    """The consistency of the features once ``model.lora`` is applied to these towers."""
    measured: FeatureConsistency = towers.feature_consistency or FeatureConsistency()
    if model.lora is None or model.lora.dropout == 0:
        return measured
    reason = f"drops features at random (model.lora.dropout = {model.lora.dropout:g})"
    return replace(measured, is_random=True, matches_evaluation=False, reason=reason)


def adapt(model: ModelConfig, towers: Towers, method: Method, seed: int) -> str:
    """Applies ``model.lora`` to the pre-trained towers, in place, or adds the prompts that the method trains.

    A text tower that the method does not run is not adapted.

    Args:
        method: after its ``start``.
        seed: ``train.seed``.

    Returns:
        A line about it, empty without adapters and prompts.

    Raises:
        ConfigError: as :func:`dive_fast.model.adapters.apply` and
            :meth:`~dive_fast.methods.method.TargetLoss.learned_prompts`.
    """
    if method.needs.prompts:
        prompts: Any = method.target_loss.learned_prompts(towers)
        towers.prompts = prompts
        trained = sum(parameter.numel() for parameter in prompts.parameters())
        return (
            f"prompts: {prompts.context.shape[0]} context vectors of width {prompts.context.shape[1]}, "
            f"{trained:,} parameters, {len(method.target_loss.classes.tokens):,} classes; the towers are frozen"
        )
    if model.lora is None:
        return ""
    lora = _adapted(model.lora, method)
    record = adapters.apply(towers, lora, seed)
    if lora.dropout > 0:
        towers.feature_consistency = consistency_of(model, towers)
    factors = sum(p.numel() for name, p in towers.named_parameters() if adapters.is_factor(name))
    skipped = "" if lora.towers == model.lora.towers else "; the method does not train the text tower"
    return (
        f"model.lora: {len(record.layers)} layers of the {' and '.join(lora.towers)} "
        f"tower{'s' * (len(lora.towers) > 1)} adapted, rank {lora.rank}, {factors:,} parameters{skipped}"
    )


def freeze_untrained(model: ModelConfig, towers: Towers, method: Method) -> None:
    """Freezes the parameters that the method or ``model.freeze`` does not train.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    assert (model.lora is None) == (towers.adapters is None), "adapters are applied before the engine is built"
    if not method.needs.texts:
        towers.text.requires_grad_(False)
        towers.logit_scale.requires_grad_(False)
    frozen = frozen_names(towers, model.freeze)
    for name, parameter in towers.named_parameters():
        if name in frozen or not method.tunes(name):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in towers.parameters()):
        raise _all_frozen()


def _all_frozen() -> ConfigError:
    return ConfigError("model.freeze: every parameter is frozen, so nothing is trained; remove a pattern")


def _adapted(lora: LoraConfig, method: Method) -> LoraConfig:
    """The adapters of the towers that a method trains.

    Raises:
        ConfigError: there are none.
    """
    if method.needs.texts or "text" not in lora.towers:
        return lora
    if lora.towers == ["text"]:
        raise ConfigError("model.lora.towers: this method trains no text tower; name image")
    return lora.model_copy(update={"towers": ["image"]})


def _warn_of_constant_penalty(
    towers: Towers, method: Method, frozen: Collection[str], adapted: Collection[str] | None
) -> None:
    """Warns of a penalty on parameters none of which is trained.

    Args:
        frozen: names of frozen parameters.
        adapted: names of the layers that have adapters; None: all parameters but the frozen ones are trained.
    """
    if (penalty := method.penalty(towers)) is None:
        return
    names, parameters = zip(*((n, p) for n, p in towers.named_parameters() if p.requires_grad), strict=True)
    gradients = torch.autograd.grad(penalty.loss, parameters, allow_unused=True)
    penalized = [name for name, gradient in zip(names, gradients, strict=True) if gradient is not None]
    trained = [
        name
        for name in penalized
        if name not in frozen and (adapted is None or name.rpartition(".")[0] in adapted)
    ]
    if penalized and not trained:
        key = "model.freeze" if adapted is None else "model.lora"
        warn_on_main_rank(
            f"the objective's penalty on {' and '.join(penalized)} has no effect, since {key} leaves these "
            "as they are; set the weight of the penalty to 0"
        )
