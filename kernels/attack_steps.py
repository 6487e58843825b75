"""Steps of PGD in L-infinity in Triton, one launch each, with the bits of plain PyTorch.

::

    start:  y = clip01( x + clip( x + eps U - x, -eps, eps) )
    step:   y = clip01( x + clip( z + a sign(g) - x, -eps, eps) )

A step reads present images z, clean images x and the gradient g once and writes y, 16 bytes for each value; a
start reads x and writes y, 8 bytes. U is :func:`dive_fast.kernels.naive_attacks.uniform`, computed in registers.

Products are rounded before they are added, as separate operations do: nothing here is fused by the compiler.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels import direct, primitives

_NUM_WARPS = 4
# Values of a program, and Philox's counters, of four values each.
_VALUES = 1024
_COUNTERS = 256
_FUSION = {"enable_fp_fusion": False}


@triton.jit
def _clip(b_x, low, high):
    """``x`` limited to a range; unlike ``tl.clamp`` it propagates NaN on every device."""
    return tl.where(b_x < low, low, tl.where(b_x > high, high, b_x))


@triton.jit
def _project(b_images, b_clean, eps):
    """``clip01(clean + clip(images - clean, -eps, eps))``."""
    return _clip(b_clean + _clip(b_images - b_clean, -eps, eps), 0.0, 1.0)


@triton.jit
def pgd_step_kernel(
    images,  # (total,): present images
    clean,
    gradient,
    stepped,
    step_size,  # a number, or (B,)
    eps,
    size,  # values of an image
    total,  # values of all images
    PER_IMAGE: tl.constexpr,
    VALUES: tl.constexpr,
):
    """``z, x, g -> y`` of a block of values."""
    o_value = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    m_value = o_value < total
    b_gradient = tl.load(gradient + o_value, mask=m_value, other=0.0)
    b_clean = tl.load(clean + o_value, mask=m_value, other=0.0)
    b_images = tl.load(images + o_value, mask=m_value, other=0.0)
    if PER_IMAGE:
        b_size = tl.load(step_size + o_value // size, mask=m_value, other=0.0)
    else:
        b_size = tl.full([VALUES], 1.0, tl.float32) * step_size
    b_step = tl.where(b_gradient > 0, b_size, tl.where(b_gradient < 0, -b_size, 0.0))
    tl.store(stepped + o_value, _project(b_images + b_step, b_clean, eps), mask=m_value)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "blocks"])
def pgd_start_kernel(
    clean,  # (B, size)
    samples,  # (B,) int64
    started,
    eps,
    seed_low,
    seed_high,
    step,
    size,
    blocks,  # programs of an image
    COUNTERS: tl.constexpr,
):
    """``x -> y`` of a block of values of one image."""
    pid = tl.program_id(0)
    image = pid // blocks
    o_counter = pid % blocks * COUNTERS + tl.arange(0, COUNTERS)
    b_zero = tl.zeros([COUNTERS], tl.uint32)
    b_first, b_second, b_third, b_fourth = tl.philox_impl(
        o_counter.to(tl.uint32),
        b_zero + tl.load(samples + image).to(tl.uint32),
        b_zero + step.to(tl.uint32, bitcast=True),
        b_zero,
        b_zero + seed_low.to(tl.uint32, bitcast=True),
        b_zero + seed_high.to(tl.uint32, bitcast=True),
    )
    # The four words of a counter are neighbours.
    b_bits = tl.interleave(tl.interleave(b_first, b_third), tl.interleave(b_second, b_fourth))
    b_noise = ((b_bits >> 8).to(tl.int32) * 2 - 16777215).to(tl.float32) * 5.9604644775390625e-08
    o_value = pid % blocks * (4 * COUNTERS) + tl.arange(0, 4 * COUNTERS)
    m_value = o_value < size
    o_image = image.to(tl.int64) * size + o_value
    b_clean = tl.load(clean + o_image, mask=m_value, other=0.0)
    tl.store(started + o_image, _project(b_clean + b_noise * eps, b_clean, eps), mask=m_value)


# Host


def launch_step(
    images: Tensor, clean: Tensor, gradient: Tensor, step_size: float, step_sizes: Tensor | None, eps: float
) -> Tensor:
    """The images after the step, in one launch; ``step_sizes``, ``(B,)``, contiguous, replace ``step_size``."""
    stepped = _empty(images)
    if images.numel():
        layout = _layout(images)
        primitives.launch(
            pgd_step_kernel,
            primitives.divide_up(images.numel(), _VALUES),
            *(tensor.contiguous(memory_format=layout) for tensor in (images, clean, gradient)),
            *(stepped, step_size if step_sizes is None else step_sizes, eps),
            *(images[0].numel(), images.numel()),
            PER_IMAGE=step_sizes is not None,
            VALUES=_VALUES,
            num_warps=_NUM_WARPS,
            **_FUSION,
        )
    return stepped


def _layout(images: Tensor) -> torch.memory_format:
    is_last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def _empty(images: Tensor) -> Tensor:
    """Uninitialized images in the memory format of others."""
    if _layout(images) == torch.channels_last:
        shape = images.permute(0, 2, 3, 1).shape
        return primitives.empty(*shape, dtype=images.dtype, device=images.device).permute(0, 3, 1, 2)
    return primitives.empty(*images.shape, dtype=images.dtype, device=images.device)


step = torch.library.custom_op("dive_fast::pgd_step", launch_step, mutates_args=())


@step.register_fake
def _(images: Tensor, *_: object) -> Tensor:
    return _empty(images)


def launch_start(clean: Tensor, samples: Tensor, eps: float, seed_low: int, seed_high: int, step: int) -> Tensor:
    """The random images, contiguous, in one launch; the seed and the step are those of :func:`signed`."""
    started = primitives.empty(*clean.shape, dtype=clean.dtype, device=clean.device)
    if clean.numel():
        size = clean[0].numel()
        blocks = primitives.divide_up(size, 4 * _COUNTERS)
        primitives.launch(
            pgd_start_kernel,
            len(clean) * blocks,
            *(clean.contiguous(), samples.contiguous(), started, eps, seed_low, seed_high, step, size, blocks),
            COUNTERS=_COUNTERS,
            num_warps=_NUM_WARPS,
            **_FUSION,
        )
    return started


start = torch.library.custom_op("dive_fast::pgd_start", launch_start, mutates_args=())


@start.register_fake
def _(clean: Tensor, *_: object) -> Tensor:
    return primitives.empty(*clean.shape, dtype=clean.dtype, device=clean.device)


def signed(number: int) -> int:
    """The int32 with the low 32 bits of a number: whatever the number is, the kernel's argument has one type."""
    return (number + 2**31) % 2**32 - 2**31


def pgd_step(images: Tensor, clean: Tensor, gradient: Tensor, step_size: float | Tensor, eps: float) -> Tensor:
    """One step; arguments are checked by the caller."""
    sizes = step_size.contiguous() if isinstance(step_size, Tensor) else None
    number = 0.0 if isinstance(step_size, Tensor) else float(step_size)
    tensors = [images, clean, gradient] if sizes is None else [images, clean, gradient, sizes]
    run = launch_step if direct.is_eager(*tensors) else step
    return run(images, clean, gradient, number, sizes, eps)


def pgd_start(clean: Tensor, samples: Tensor, eps: float, seed: int, step: int) -> Tensor:
    """Random images to start from; arguments are checked by the caller."""
    run = launch_start if direct.is_eager(clean, samples) else start
    return run(clean, samples, eps, signed(seed), signed(seed >> 32), signed(step))
