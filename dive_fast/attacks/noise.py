"""Random numbers of attacks as pure functions of a seed, a step, a sample and a pixel, on the images' device."""

from dive_fast.kernels.naive_attacks import philox, uniform

__all__ = ["philox", "uniform"]
