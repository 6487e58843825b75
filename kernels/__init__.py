"""Losses of fine-tuning, layers of towers, moving averages, and deviations of weights from their anchors.

The package imports torch and triton and nothing of the engine.

Shapes: ``B`` pairs on this rank, ``D`` embedding width. Every loss takes *un-normalized* features, normalizes them
in fp32 (fp64 stays fp64) and returns fp32 (fp64) scalars.

``naive`` has the same functions in plain PyTorch, the reference against which the Triton kernels are tested.
"""

from dive_fast.kernels import naive
from dive_fast.kernels.averages import MovingAverage
from dive_fast.kernels.layers import (
    add_layer_norm,
    biased_activation,
    normalise_images,
    pgd_start,
    pgd_step,
    split_qkv,
)
from dive_fast.kernels.losses import contrastive_loss, difference_loss, distillation_loss, dive_loss, gram_volume
from dive_fast.kernels.naive import DifferenceLoss, DistillationLoss, DiveLoss
from dive_fast.kernels.slots import Slots
from dive_fast.kernels.weight_deviations import Deviations

__all__ = [
    "Deviations",
    "DifferenceLoss",
    "DistillationLoss",
    "DiveLoss",
    "MovingAverage",
    "Slots",
    "add_layer_norm",
    "biased_activation",
    "contrastive_loss",
    "difference_loss",
    "distillation_loss",
    "dive_loss",
    "gram_volume",
    "naive",
    "normalise_images",
    "pgd_start",
    "pgd_step",
    "split_qkv",
]
