"""Steps of an L-infinity attack and their random numbers in plain PyTorch, the reference of the Triton kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Philox 4x32 with 10 rounds (Salmon et al. 2011).
_ROUNDS = 10
_FACTORS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random 32-bit numbers for each counter, as int64.

    Args:
        counter: four int64 tensors of 32-bit numbers, which broadcast to one shape.
        key: two 32-bit numbers.
    """
    words, keys = list(torch.broadcast_tensors(*counter)), list(key)
    for _ in range(_ROUNDS):
        # int64 products wrap around at 64 bits, of which both halves are needed.
        first, second = words[0] * _FACTORS[0], words[2] * _FACTORS[1]
        words = [
            (second >> 32 & _LOW) ^ words[1] ^ keys[0],
            second & _LOW,
            (first >> 32 & _LOW) ^ words[3] ^ keys[1],
            first & _LOW,
        ]
        keys = [(each + step) & _LOW for each, step in zip(keys, _KEY_STEPS, strict=True)]
    return tuple(words)


def uniform(samples: Tensor, shape: Sequence[int], seed: int, step: int = 0, stream: int = 0) -> Tensor:
    """Uniform numbers in (-1, 1), ``(B, *shape)`` fp32; equal for a sample in every batch and on every rank.

    Number i of a sample is word i % 4 of Philox's counter (i // 4, sample, step, stream) with the seed as key.

    Args:
        samples: ``(B,)`` int64: numbers of the samples in their set, below 2^32.
        shape: of one sample.
        seed: below 2^64.
        step: of the run; below 2^32.
        stream: purpose of the numbers, below 2^32.
    """
    count = torch.Size(shape).numel()
    block = torch.arange(-(-count // 4), device=samples.device)
    fixed = [torch.tensor(value, device=samples.device) for value in (step, stream)]
    words = philox((block[None], samples[:, None], *fixed), (seed & _LOW, seed >> 32 & _LOW))
    bits = torch.stack(words, -1).flatten(1)[:, :count]
    return centres(bits).view(len(samples), *shape)


def centres(bits: Tensor) -> Tensor:
    """Centres of 2^24 equal parts of (-1, 1), by the high 24 of 32 bits; fp32 represents them exactly."""
    return (2 * (bits >> 8) + (1 - 2**24)).float() * 2.0**-24


def project(images: Tensor, clean: Tensor, eps: float) -> Tensor:
    """``clip(clean + clip(images - clean, -eps, eps), 0, 1)``."""
    return (clean + (images - clean).clamp(-eps, eps)).clamp(0.0, 1.0)


def pgd_step(images: Tensor, clean: Tensor, gradient: Tensor, step_size: float | Tensor, eps: float) -> Tensor:
    """One step of PGD; :func:`dive_fast.kernels.pgd_step` has arguments and result."""
    if isinstance(step_size, Tensor):
        step_size = step_size.view(-1, *[1] * (images.ndim - 1))
    return project(images + step_size * gradient.sign(), clean, eps)


def pgd_start(clean: Tensor, samples: Tensor, eps: float, seed: int, step: int = 0) -> Tensor:
    """Random images to start PGD from; :func:`dive_fast.kernels.pgd_start` has arguments and result."""
    return project(clean + eps * uniform(samples, clean.shape[1:], seed, step), clean, eps)
