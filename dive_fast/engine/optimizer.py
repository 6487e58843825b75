"""The optimizer and the learning-rate schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dive_fast.config.schema import TrainConfig
from dive_fast.model.freezing import layer_factors
from dive_fast.model.towers import Towers

MOMENTUM = "momentum_buffer"
"""Key of SGD's state of a parameter."""


def make_optimizer(train: TrainConfig, towers: Towers, on_cpu: bool) -> torch.optim.Optimizer:
    """Creates the optimizer of ``train.optimizer`` on the parameters that require gradient.

    Args:
        on_cpu: whether DeepSpeed offloads the optimizer, which then is its CPU Adam.

    Raises:
        ConfigError: as :func:`dive_fast.model.freezing.layer_factors`.
    """
    groups = _groups(train, towers)
    if train.optimizer == "sgd":
        return _sgd(groups, train)
    options: dict[str, Any] = {"lr": train.learning_rate, "betas": train.betas, "eps": train.epsilon}
    if on_cpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)  # type: ignore[no-any-return]
    return torch.optim.AdamW(groups, fused=True, **options)


def _sgd(groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    """SGD whose momentum starts at zero: torch leaves it uninitialised where the first update is skipped."""
    optimizer = torch.optim.SGD(groups, lr=train.learning_rate, momentum=train.momentum, fused=True)
    for group in groups:
        for parameter in group["params"]:
            optimizer.state[parameter][MOMENTUM] = torch.zeros_like(parameter, requires_grad=False)
    return optimizer


def _groups(train: TrainConfig, towers: Towers) -> list[dict[str, Any]]:
    """The tuned parameters by their factor on the learning rate, largest first, and by their weight decay."""
    factors = {} if train.layer_decay is None else layer_factors(towers, train.layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in towers.named_parameters():
        if parameter.requires_grad:
            is_decayed = train.decay_all_parameters or parameter.ndim > 1
            groups.setdefault((factors.get(name, 1.0), is_decayed), []).append(parameter)
    return [
        {
            "params": groups[factor, is_decayed],
            "weight_decay": train.weight_decay if is_decayed else 0.0,
            "lr": train.learning_rate * factor,
            "factor": factor,
        }
        for factor, is_decayed in sorted(groups, reverse=True)
    ]


def schedule_of(train: TrainConfig, total_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Factor on the peak learning rate at each step of a run."""
    return learning_rate_schedule(
        train.warmup_steps,
        total_steps,
        warmup_factor=None if train.warmup_rate is None else train.warmup_rate / train.learning_rate,
        steps_per_epoch=steps_per_epoch if train.cosine_every == "epoch" else None,
    )


def learning_rate_schedule(
    warmup_steps: int, total_steps: int, *, warmup_factor: float | None = None, steps_per_epoch: int | None = None
) -> Callable[[int], float]:
    """Factor on the peak learning rate at each step: linear warm-up, then cosine to 0, as in open_clip.

    Args:
        warmup_factor: factor during the complete warm-up, instead of the linear one.
        steps_per_epoch: the cosine falls once in so many steps, as in CoOp's code: it has as many values as the
            run has epochs, those of the warm-up included, and begins with the first one after the warm-up.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps if warmup_factor is None else warmup_factor
        if steps_per_epoch is None:
            progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        else:
            progress = (step - warmup_steps) // steps_per_epoch / math.ceil(total_steps / steps_per_epoch)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
