"""The losses of DiVE, on tensors alone: this package imports torch and nothing of the engine.

Shapes: ``B`` pairs on this rank, ``D`` embedding width. Every function takes *un-normalised* features,
normalises them itself in fp32 (fp64 stays fp64) and returns fp32 (fp64) scalars.
"""

from dive_fast.kernels import naive
from dive_fast.kernels.naive import DifferenceLoss, DiveLoss, contrastive_loss, difference_loss, dive_loss

__all__ = ["DifferenceLoss", "DiveLoss", "contrastive_loss", "difference_loss", "dive_loss", "naive"]
