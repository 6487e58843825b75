"""Normalisation of 8-bit images: bits of torchvision's operations, errors against float64, and memory bounds."""

import numpy as np
import pytest
import torch
from layer_cases import DEVICE
from test_triton import count_launches
from torchvision.transforms import functional

import dive_fast.kernels as kernels
from dive_fast.kernels import naive, primitives

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SHAPES = ((1, 1, 1), (3, 1, 1023), (2, 32, 32), (2, 25, 41), (1, 70, 130), (0, 5, 7))
"""Images without a pixel, of one, and of a block of pixels less one, exactly, and plus one."""

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not primitives.INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1 before the start"
)


def random_pixels(*shape):
    return torch.from_numpy(np.random.default_rng(shape).integers(0, 256, (*shape, 3), np.uint8)).to(DEVICE)


def layout_of(channels_last):
    return torch.channels_last if channels_last else torch.contiguous_format


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_bits_are_those_of_torchvision_and_of_plain_pytorch(dtype, channels_last):
    for shape in SHAPES:
        pixels = random_pixels(*shape)
        images = pixels.permute(0, 3, 1, 2).cpu()
        expected = functional.normalize(images.float().div(255), MEAN, STD).to(dtype).to(DEVICE)
        for backend in ("triton", "torch"):
            actual = kernels.normalise_images(pixels, MEAN, STD, dtype, channels_last, backend)
            assert (actual.shape, actual.dtype) == (expected.shape, dtype)
            assert torch.equal(actual, expected), (shape, backend)
            assert actual.is_contiguous(memory_format=layout_of(channels_last)), (shape, backend)


def test_every_value_is_within_three_roundings_of_float64():
    """Two divisions and a subtraction, whose operands are at most as large as the mean and 1."""
    pixels = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    exact = (pixels.cpu().double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    for backend in ("triton", "torch"):
        actual = kernels.normalise_images(pixels, MEAN, STD, backend=backend).permute(0, 2, 3, 1).cpu().double()
        bound = torch.finfo(torch.float32).eps * (exact.abs() + 1 / torch.tensor(STD).double())
        assert ((actual - exact).abs() <= bound).all()
        halves = kernels.normalise_images(pixels, MEAN, STD, torch.float16, backend=backend)
        assert torch.equal(halves, actual.permute(0, 3, 1, 2).to(torch.float16).to(DEVICE))


@pytest.mark.parametrize("channels_last", [False, True])
def test_nothing_is_read_or_written_beyond_the_images(channels_last, monkeypatch):
    """The pixels lie between bands of another value, and the output between bands of NaN that stay."""
    band, bands = 4096, []

    def empty(*shape, dtype, device):
        count = int(np.prod(shape))
        memory = torch.full((count + 2 * band,), float("nan"), dtype=dtype, device=device)
        bands.append((memory, count))
        return memory[band : band + count].view(shape)

    pixels = random_pixels(3, 25, 41)
    expected = naive.normalise_images(pixels, MEAN, STD)
    monkeypatch.setattr(primitives, "empty", empty)
    for filling in (0, 255):
        guarded = torch.full((pixels.numel() + 2 * band,), filling, dtype=torch.uint8, device=DEVICE)
        inside = guarded[band : band + pixels.numel()].view(pixels.shape)
        inside.copy_(pixels)
        actual = kernels.normalise_images(inside, MEAN, STD, torch.float32, channels_last, "triton")
        assert torch.equal(actual, expected)
        memory, count = bands[-1]
        assert memory[:band].isnan().all()
        assert memory[band + count :].isnan().all()


def test_views_are_copied_and_unaligned_bytes_read():
    pixels = random_pixels(2, 9, 14)
    expected = naive.normalise_images(pixels, MEAN, STD)
    strided = pixels.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    unaligned = torch.empty(pixels.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view(pixels.shape)
    unaligned.copy_(pixels)
    for view in (strided, unaligned):
        assert torch.equal(kernels.normalise_images(view, MEAN, STD, backend="triton"), expected)


def test_one_launch_and_the_same_bits_in_two_runs(monkeypatch):
    pixels = random_pixels(2, 25, 41)

    def run():
        return kernels.normalise_images(pixels, MEAN, STD, torch.float16, backend="triton")

    launches, operations, _ = count_launches(monkeypatch, run)
    assert launches == 1
    assert operations == ["dive_fast.normalise_images.default"]
    assert torch.equal(run(), run())


def test_fake_tensors_have_the_shape_and_layout():
    with torch._subclasses.FakeTensorMode():
        pixels = torch.empty(2, 9, 14, 3, dtype=torch.uint8)
        for channels_last in (False, True):
            images = kernels.normalise_images(pixels, MEAN, STD, torch.float16, channels_last, "triton")
            assert (images.shape, images.dtype) == ((2, 3, 9, 14), torch.float16)
            assert images.is_contiguous(memory_format=layout_of(channels_last))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 4, 4, dtype=torch.uint8), MEAN, STD), r"pixels: expected shape \(B, H, W, 3\), got"),
        ((torch.zeros(2, 4, 4, 3), MEAN, STD), "pixels: expected dtype torch.uint8, got torch.float32"),
        ((torch.zeros(2, 4, 4, 3, dtype=torch.uint8), MEAN[:2], STD), "mean: expected 3 numbers, got 2"),
        (
            (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), MEAN, STD, torch.int8),
            "dtype: expected float16, bfloat16 or float32",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    for function in (kernels.normalise_images, naive.normalise_images):
        with pytest.raises(ValueError, match=message):
            function(*arguments)
