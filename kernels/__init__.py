"""The losses of DiVE on tensors; the package imports torch and triton and nothing of the engine.

Shapes: ``B`` pairs on this rank, ``D`` embedding width. Every function takes *un-normalized* features,
normalizes them in fp32 (fp64 stays fp64) and returns fp32 (fp64) scalars.

``naive`` has the same functions in plain PyTorch, the reference against which the Triton kernels are tested.
"""

from dive_fast.kernels import naive
from dive_fast.kernels.losses import contrastive_loss, difference_loss, dive_loss
from dive_fast.kernels.naive import DifferenceLoss, DiveLoss

__all__ = ["DifferenceLoss", "DiveLoss", "contrastive_loss", "difference_loss", "dive_loss", "naive"]
