"""The optimizer and the learning-rate schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch

from dive_fast.config.schema import TrainConfig
from dive_fast.model.towers import Towers


def make_optimizer(train: TrainConfig, towers: Towers, on_cpu: bool) -> torch.optim.Optimizer:
    """Creates AdamW on the parameters that require gradient.

    Args:
        on_cpu: whether DeepSpeed offloads the optimizer, which then is its CPU Adam.
    """
    tuned = [parameter for parameter in towers.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in tuned if train.decay_all_parameters or parameter.ndim > 1]
    undecayed = [parameter for parameter in tuned if not train.decay_all_parameters and parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    options: dict[str, Any] = {"lr": train.learning_rate, "betas": train.betas, "eps": train.epsilon}
    groups = [group for group in groups if group["params"]]
    if on_cpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)  # type: ignore[no-any-return]
    return torch.optim.AdamW(groups, fused=True, **options)


def learning_rate_schedule(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Factor on the peak learning rate at each step: linear warm-up, then cosine to 0, as in open_clip."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
