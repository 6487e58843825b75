"""Normalisation of 8-bit images in Triton: one launch from the bytes of a decoder to the input of a model.

::

    y = (x / 255 - mean_c) / std_c          computed in fp32, rounded once to the dtype of y

Both divisions are rounded as IEEE 754 says, so that the values equal those of torchvision's ``to_tensor`` and
``normalize`` bit for bit. A program reads a block of pixels of one image, three bytes each, and writes their three
channels: 3 bytes are read and 6 or 12 are written for each pixel.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels import direct, primitives

_NUM_WARPS = 4
# Pixels of a program. Images of 224 x 224 pixels are a multiple of it.
_PIXELS = 1024


@triton.jit(do_not_specialize=["size", "blocks"])
def normalise_kernel(
    pixels,  # (B, H, W, 3) uint8
    images,  # (B, 3, H, W), in planes or channels last
    size,  # H W
    blocks,  # programs of an image
    mean_red,
    mean_green,
    mean_blue,
    std_red,
    std_green,
    std_blue,
    CHANNELS_LAST: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """``y = (x / 255 - mean_c) / std_c`` of a block of pixels."""
    pid = tl.program_id(0)
    first = (pid // blocks).to(tl.int64) * size * 3
    o_pixel = pid % blocks * PIXELS + tl.arange(0, PIXELS)
    m_pixel = o_pixel < size
    means = (mean_red, mean_green, mean_blue)
    stds = (std_red, std_green, std_blue)
    for channel in tl.static_range(3):
        b_x = tl.load(pixels + first + o_pixel * 3 + channel, mask=m_pixel, other=0).to(tl.float32)
        b_y = primitives.divide(b_x, tl.full(b_x.shape, 255.0, tl.float32)) - means[channel]
        b_y = primitives.divide(b_y, tl.full(b_x.shape, 1.0, tl.float32) * stds[channel])
        o_image = o_pixel * 3 + channel if CHANNELS_LAST else channel * size + o_pixel
        tl.store(images + first + o_image, primitives.round_to(b_y, images.dtype.element_ty), mask=m_pixel)


# Host


def launch_forward(
    pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """The normalised images, ``(B, 3, H, W)``, in one launch."""
    count, height, width, _ = pixels.shape
    images = _empty(pixels, dtype, channels_last)
    if pixels.numel():
        blocks = primitives.divide_up(height * width, _PIXELS)
        primitives.launch(
            normalise_kernel,
            count * blocks,
            *(pixels.contiguous(), images, height * width, blocks, *map(float, mean), *map(float, std)),
            CHANNELS_LAST=channels_last,
            PIXELS=_PIXELS,
            num_warps=_NUM_WARPS,
        )
    return images


def _empty(pixels: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    count, height, width, channels = pixels.shape
    if channels_last:
        shape = count, height, width, channels
        return primitives.empty(*shape, dtype=dtype, device=pixels.device).permute(0, 3, 1, 2)
    return primitives.empty(count, channels, height, width, dtype=dtype, device=pixels.device)


forward = torch.library.custom_op("dive_fast::normalise_images", launch_forward, mutates_args=())


@forward.register_fake
def _(
    pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    return _empty(pixels, dtype, channels_last)


def normalise_images(
    pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """``(x / 255 - mean) / std``; arguments are checked by the caller."""
    run = launch_forward if direct.is_eager(pixels) else forward
    return run(pixels, mean, std, dtype, channels_last)
