"""The layers around the matrix products of a tower: normalisation and attacks of its images, layers of its blocks.

The layers between two matrix products of a block take one pass each way.

``x`` is the residual stream, ``(B, N, D)``. One block is::

    sum, y = add_layer_norm(x, branch, branch_bias, ...)      branch: the product before, without its bias
    q, k, v = split_qkv(y @ W_qkv.T + b_qkv, b_qkv, heads)
    sum, y = add_layer_norm(sum, attention(q, k, v) @ W_o.T, b_o, ...)
    branch = biased_activation(y @ W_1.T, b_1, kind) @ W_2.T

Gradients of biases are sums over all rows in a fixed order, from the gradients that the same pass computes. No
function here is affected by autocast.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dive_fast.kernels import backend as backends
from dive_fast.kernels import checks, naive, naive_attacks
from dive_fast.kernels.backend import Backend
from dive_fast.kernels.checks import Activation

if backends.primitives is not None:
    # The import registers the custom ops, which must happen before anything is traced.
    from dive_fast.kernels import activation, attack_steps, layer_norm, normalise, packed_qkv


def biased_activation(x: Tensor, bias: Tensor | None, kind: Activation, backend: Backend = "auto") -> Tensor:
    """``act(x + bias)`` in the dtype of ``x``, computed in fp32 (fp64 for fp64 inputs) and rounded once.

    ::

        quick_gelu(z) = z sigmoid(1.702 z)
        gelu(z)       = z (1 + erf(z / sqrt 2)) / 2
        gelu_tanh(z)  = z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2

    The Triton kernels save only the arguments for the backward.

    Args:
        x: ``(..., W)``, fp16, bf16 or fp32, contiguous (otherwise copied); may have no rows.
        bias: ``(W,)`` of any floating-point dtype, or None.
        backend: "triton", "torch", or "auto": triton where it can run (see :mod:`dive_fast.kernels.backend`).

    Returns:
        A tensor like ``x``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend cannot run.
    """
    checks.check_activation(x, bias, kind)
    if not backends.uses_triton(backend, x, any_width=True):
        return naive.biased_activation(x, bias, kind)
    return activation.biased_activation(x, bias, kind)


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Residual addition and layer norm, computed in fp32 (fp64 for fp64 inputs).

    ::

        sum = x + branch + branch_bias                                  rounded once to the dtype of x
        normed = (sum - mean) / sqrt(mean((sum - mean)^2) + eps) * weight + bias      rounded to ``dtype``

    Args:
        x: ``(..., D)``, fp16, bf16 or fp32, contiguous (otherwise copied); may have no rows.
        branch: like ``x``, or None, for which the sum is ``x`` itself, or a view of it; its dtype may differ.
        branch_bias: ``(D,)`` of any floating-point dtype, or None.
        weight, bias: ``(D,)`` of any floating-point dtype.
        backend: as for :func:`biased_activation`.

    Returns:
        ``sum`` in the dtype of ``x`` and ``normed`` in ``dtype``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend cannot run.
    """
    checks.check_layer_norm(x, branch, branch_bias, weight, bias, dtype)
    if not backends.uses_triton(backend, x):
        return naive.add_layer_norm(x, branch, branch_bias, weight, bias, eps, dtype)
    return layer_norm.add_layer_norm(x, branch, branch_bias, weight, bias, eps, dtype)


def split_qkv(
    qkv: Tensor, bias: Tensor | None, heads: int, backend: Backend = "auto", *, parts: int = 3
) -> tuple[Tensor, ...]:
    """Views of queries, keys and values, ``(B, N, 3 H d) -> (B, H, N, d)`` each.

    The backward writes the three gradients, of any strides, into one packed gradient.

    Args:
        qkv: the packed product, contiguous (otherwise copied), to which ``bias.detach()`` has been added already.
        bias: ``(3 H d,)``, receives the column sums of the gradient of ``qkv``; None: no sums.
        heads: H.
        backend: as for :func:`biased_activation`.
        parts: 2 for keys and values alone, ``(B, N, 2 H d)``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend cannot run.
    """
    checks.check_packed(qkv, bias, heads, parts)
    if not backends.uses_triton(backend, qkv, any_width=True):
        return naive.split_qkv(qkv, bias, heads, parts=parts)
    return packed_qkv.split_qkv(qkv, bias, heads, parts)


def normalise_images(
    pixels: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """``(x / 255 - mean_c) / std_c`` of 8-bit images, computed in fp32 and rounded once to ``dtype``.

    The values are those of torchvision's ``to_tensor`` and ``normalize``, bit for bit in fp32; without gradients.

    Args:
        pixels: ``(B, H, W, 3)`` uint8, contiguous (otherwise copied).
        mean, std: one number for each channel.
        dtype: fp16, bf16 or fp32.
        channels_last: memory format of the result.
        backend: as for :func:`biased_activation`.

    Returns:
        ``(B, 3, H, W)``.

    Raises:
        ValueError: an argument has the wrong shape or dtype, or the backend cannot run.
    """
    checks.check_pixels(pixels, mean, std, dtype)
    if not backends.uses_triton(backend, pixels, any_width=True):
        return naive.normalise_images(pixels, mean, std, dtype, channels_last)
    return normalise.normalise_images(pixels, mean, std, dtype, channels_last)


@torch.no_grad()
def pgd_step(
    images: Tensor,
    clean: Tensor,
    gradient: Tensor,
    step_size: float | Tensor,
    eps: float,
    backend: Backend = "auto",
) -> Tensor:
    """One step of projected gradient descent in L-infinity, with the same bits on each backend; no gradient.

    ::

        y = clip01( clean + clip( images + step_size sign(gradient) - clean, -eps, eps) )

    Args:
        images, clean, gradient: ``(B, 3, H, W)`` fp32; those in another memory format than ``images`` are copied.
            fp64 takes plain PyTorch.
        step_size: a number, or ``(B,)``, one for each image, on the scale of images in [0, 1].
        eps: largest change of a value.
        backend: as for :func:`biased_activation`.

    Returns:
        The images after the step, in the memory format of ``images``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend cannot run.
    """
    checks.check_attacked(clean, eps, images, gradient)
    if isinstance(step_size, Tensor):
        checks.check_step_sizes(step_size, clean)
    if not _attacks_in_triton(backend, clean):
        return naive_attacks.pgd_step(images, clean, gradient, step_size, eps)
    return attack_steps.pgd_step(images, clean, gradient, step_size, eps)


@torch.no_grad()
def pgd_start(
    clean: Tensor, samples: Tensor, eps: float, seed: int, step: int = 0, backend: Backend = "auto"
) -> Tensor:
    """Random images to start PGD from, uniform in the L-infinity ball, with the same bits on each backend.

    ::

        y = clip01( clean + clip( clean + eps U - clean, -eps, eps) ),   U uniform in (-1, 1)

    Args:
        clean: ``(B, 3, H, W)`` fp32, contiguous (otherwise copied). fp64 takes plain PyTorch.
        samples: ``(B,)`` int64: numbers of the samples in their set, below 2^32; they determine U of each image,
            whatever its batch and rank.
        eps: largest change of a value.
        seed: below 2^64.
        step: of the run; below 2^32.
        backend: as for :func:`biased_activation`.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend cannot run.
    """
    checks.check_attacked(clean, eps)
    checks.check_samples(samples, clean, seed, step)
    if not _attacks_in_triton(backend, clean):
        return naive_attacks.pgd_start(clean, samples, eps, seed, step)
    return attack_steps.pgd_start(clean, samples, eps, seed, step)


def _attacks_in_triton(backend: Backend, clean: Tensor) -> bool:
    is_single = clean.dtype == torch.float32
    if backend == "triton" and not is_single:
        raise ValueError('backend: "triton" cannot run: images are fp64; use "auto" or "torch"')
    return backends.uses_triton(backend, clean, any_width=True) and is_single
