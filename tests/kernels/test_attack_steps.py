"""Steps and starts of PGD: bits of plain PyTorch, random numbers, memory bounds."""

import numpy as np
import pytest
import torch
from layer_cases import DEVICE
from test_triton import checked_addresses, count_launches, shuffle_programs

import dive_fast.kernels as kernels
from dive_fast.kernels import attack_steps, naive_attacks, primitives

SHAPES = ((1, 3, 1, 1), (2, 3, 7, 9), (3, 3, 20, 17), (4, 3, 16, 16), (0, 3, 4, 4))
"""One value of each channel, blocks that end within an image, several blocks, exact blocks, and no image."""
EPS = 4 / 255
SEEDS = (0, 1, 2**31, 2**32 - 1, 2**63 + 12345, 2**64 - 1)
TRITON = pytest.mark.skipif(
    DEVICE == "cpu" and not primitives.INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1 before the start"
)


def images_of(shape, seed=0):
    """Present images, clean ones and a gradient, in which zeros, NaN and infinity are."""
    random = np.random.default_rng([seed, *shape])
    clean = torch.tensor(random.uniform(-0.1, 1.1, shape), dtype=torch.float32).clamp(0, 1)
    change = torch.tensor(random.uniform(-2 * EPS, 2 * EPS, shape), dtype=torch.float32)
    gradient = torch.tensor(random.standard_normal(shape), dtype=torch.float32)
    for index, value in enumerate((0.0, -0.0, float("nan"), float("inf"), 1e-42)):
        gradient.view(-1)[index::11] = value
    return tuple(tensor.to(DEVICE) for tensor in (clean + change, clean, gradient))


def samples_of(count):
    """Numbers of samples, the largest possible one among them."""
    return torch.tensor([2**32 - 1, 0, 1_281_166, 2**31][:count], dtype=torch.int64, device=DEVICE)


# Plain PyTorch


def test_step_in_float64():
    """Each value by the equation, one at a time."""
    images, clean, gradient = images_of((2, 3, 7, 9))
    sizes = torch.tensor([1 / 255, 3 / 255])
    for size in (1 / 255, sizes.to(DEVICE)):
        actual = kernels.pgd_step(images, clean, gradient, size, EPS, "torch").flatten(1).cpu().double().numpy()
        for index in range(2):
            a = float(sizes[index]) if isinstance(size, torch.Tensor) else size
            for z, x, g, y in zip(
                *(t[index].flatten().tolist() for t in (images, clean, gradient)), actual[index]
            ):
                sign = (g > 0) - (g < 0)
                assert y == pytest.approx(min(max(x + min(max(z + a * sign - x, -EPS), EPS), 0), 1), abs=1e-6)


def test_centres_are_exact_and_inside():
    bits = torch.tensor([0, 255, 256, 2**31, 2**32 - 1])
    expected = [-1 + 2**-24, -1 + 2**-24, -1 + 3 * 2**-24, 2**-24, 1 - 2**-24]
    assert naive_attacks.centres(bits).double().tolist() == expected


def test_start_is_in_the_ball_and_depends_on_the_sample_alone():
    _, clean, _ = images_of((4, 3, 16, 16))
    samples = samples_of(4)
    start = kernels.pgd_start(clean, samples, EPS, 7, 3, "torch")
    assert ((start - clean).abs() <= EPS * (1 + 1e-5)).all()
    assert ((start - clean).abs() > EPS / 2).float().mean() > 0.3
    order = [2, 0, 3]
    assert torch.equal(kernels.pgd_start(clean[order], samples[order], EPS, 7, 3, "torch"), start[order])
    for other in (8, 3), (7, 4):
        assert not torch.equal(kernels.pgd_start(clean, samples, EPS, *other, "torch"), start)


# Triton


@TRITON
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_of_a_step_are_those_of_plain_pytorch(shape):
    images, clean, gradient = images_of(shape)
    sizes = torch.linspace(0.5 / 255, 2 / 255, len(clean), device=DEVICE)
    for size in (1 / 255, 0.0, sizes):
        expected = kernels.pgd_step(images, clean, gradient, size, EPS, "torch")
        actual = kernels.pgd_step(images, clean, gradient, size, EPS, "triton")
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        assert actual.is_contiguous()


@TRITON
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("step", [0, 1, 2**32 - 1])
def test_bits_of_a_start_are_those_of_plain_pytorch(seed, step):
    for shape in SHAPES if step == 0 else SHAPES[1:2]:
        _, clean, _ = images_of(shape)
        arguments = clean, samples_of(len(clean)), EPS, seed, step
        actual = kernels.pgd_start(*arguments, "triton")
        torch.testing.assert_close(actual, kernels.pgd_start(*arguments, "torch"), rtol=0, atol=0)


def test_fp64_takes_plain_pytorch():
    images, clean, gradient = (tensor.double() for tensor in images_of((2, 3, 7, 9)))
    expected = naive_attacks.pgd_step(images, clean, gradient, 1 / 255, EPS)
    assert torch.equal(kernels.pgd_step(images, clean, gradient, 1 / 255, EPS), expected)
    with pytest.raises(ValueError, match=r'^backend: "triton" cannot run: images are fp64'):
        kernels.pgd_step(images, clean, gradient, 1 / 255, EPS, "triton")


@TRITON
def test_nonfinite_images_stay_nonfinite_as_in_plain_pytorch():
    images, clean, gradient = images_of((2, 3, 7, 9))
    images.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    clean.view(-1)[10] = float("nan")
    expected = kernels.pgd_step(images, clean, gradient, 1 / 255, EPS, "torch")
    actual = kernels.pgd_step(images, clean, gradient, 1 / 255, EPS, "triton")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert actual.isnan().sum() == 2


@TRITON
def test_memory_formats_and_views():
    images, clean, gradient = images_of((2, 3, 7, 9))
    sizes = torch.tensor([1 / 255, 2 / 255], device=DEVICE)
    expected = kernels.pgd_step(images, clean, gradient, sizes, EPS, "torch")
    last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (images, clean, gradient)]
    actual = kernels.pgd_step(*last, sizes, EPS, "triton")
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(actual, expected)
    shifted = torch.cat([images.new_zeros(1), images.flatten()])[1:].view(images.shape)
    strided = clean.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(kernels.pgd_step(shifted, strided, last[2], sizes, EPS, "triton"), expected)
    start = kernels.pgd_start(clean, samples_of(2), EPS, 7)
    assert torch.equal(kernels.pgd_start(last[1], samples_of(2), EPS, 7, backend="triton"), start)


@TRITON
def test_nothing_is_written_beyond_the_images(monkeypatch):
    """Inputs and outputs lie between bands of NaN, which stay."""
    band, bands = 2048, []

    def empty(*shape, dtype, device):
        count = int(np.prod(shape))
        memory = torch.full((count + 2 * band,), float("nan"), dtype=dtype, device=device)
        bands.append((memory, count))
        return memory[band : band + count].view(shape)

    def surround(tensor):
        return empty(*tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)

    images, clean, gradient = images_of((3, 3, 20, 17))
    expected = kernels.pgd_step(images, clean, gradient, 1 / 255, EPS, "torch")
    start = kernels.pgd_start(clean, samples_of(3), EPS, 7, 3, "torch")
    monkeypatch.setattr(primitives, "empty", empty)
    images, clean, gradient = map(surround, (images, clean, gradient))
    assert torch.equal(kernels.pgd_step(images, clean, gradient, 1 / 255, EPS, "triton"), expected)
    assert torch.equal(kernels.pgd_start(clean, samples_of(3), EPS, 7, 3, "triton"), start)
    assert len(bands) == 5
    for memory, count in bands:
        assert memory[:band].isnan().all()
        assert memory[band + count :].isnan().all()


@pytest.mark.skipif(not primitives.INTERPRETED, reason="only the interpreter exposes addresses and the order")
def test_order_of_programs_does_not_matter(monkeypatch):
    """Nor does any program read or write outside of the launch's tensors."""
    images, clean, gradient = images_of((3, 3, 20, 17))
    sizes = torch.linspace(0.5 / 255, 2 / 255, 3)
    expected = kernels.pgd_step(images, clean, gradient, sizes, EPS, "torch")
    start = kernels.pgd_start(clean, samples_of(3), EPS, 7, 3, "torch")
    shuffle_programs(monkeypatch)
    with checked_addresses():
        assert torch.equal(kernels.pgd_step(images, clean, gradient, sizes, EPS, "triton"), expected)
        assert torch.equal(kernels.pgd_start(clean, samples_of(3), EPS, 7, 3, "triton"), start)


@TRITON
def test_one_launch_each(monkeypatch):
    images, clean, gradient = images_of((2, 3, 7, 9))
    samples = samples_of(2)
    for call, name in (
        (lambda: kernels.pgd_step(images, clean, gradient, 1 / 255, EPS, "triton"), "pgd_step"),
        (lambda: kernels.pgd_start(clean, samples, EPS, 7, 3, "triton"), "pgd_start"),
    ):
        launches, operations, _ = count_launches(monkeypatch, call)
        assert (launches, operations) == (1, [f"dive_fast.{name}.default"])


@TRITON
def test_operators_for_the_compiler():
    images, clean, gradient = images_of((2, 3, 7, 9))
    sizes = torch.tensor([1 / 255, 2 / 255], device=DEVICE)
    torch.library.opcheck(attack_steps.step, (images, clean, gradient, 1 / 255, None, EPS))
    torch.library.opcheck(attack_steps.step, (images, clean, gradient, 0.0, sizes, EPS))
    torch.library.opcheck(attack_steps.start, (clean, samples_of(2), EPS, 7, -1, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean": torch.zeros(3, 4, 4)}, r"clean: expected shape \(B, 3, H, W\), got \(3, 4, 4\)"),
        (
            {"clean": torch.zeros(2, 3, 4, 4).half()},
            "clean: expected dtype torch.float32 or torch.float64, got torch.float16",
        ),
        ({"images": torch.zeros(2, 3, 4, 5)}, r"images: expected shape \(2, 3, 4, 4\) as clean has"),
        ({"gradient": torch.zeros(2, 3, 4, 4).double()}, "gradient: expected dtype torch.float32"),
        (
            {"gradient": torch.zeros(2, 3, 4, 4, device="meta")},
            "gradient: expected device cpu as clean has, got meta",
        ),
        ({"step_size": torch.zeros(3)}, r"step_size: expected shape \(2,\), got \(3,\)"),
        ({"step_size": torch.zeros(2).double()}, "step_size: expected dtype torch.float32 as clean has"),
        ({"eps": -1.0}, "eps: expected a number that is not negative, got -1.0"),
    ],
)
def test_bad_arguments_of_a_step_are_refused(change, message):
    images = torch.zeros(2, 3, 4, 4)
    arguments = {"images": images, "clean": images, "gradient": images, "step_size": 0.1, "eps": 0.1} | change
    with pytest.raises(ValueError, match=f"^{message}"):
        kernels.pgd_step(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": torch.zeros(3, dtype=torch.int64)}, r"samples: expected shape \(2,\), got \(3,\)"),
        ({"samples": torch.zeros(2, dtype=torch.int32)}, "samples: expected dtype torch.int64, got torch.int32"),
        ({"seed": 2**64}, r"seed: expected a number from 0 to 2\^64 - 1, got 18446744073709551616"),
        ({"step": -1}, r"step: expected a number from 0 to 2\^32 - 1, got -1"),
    ],
)
def test_bad_arguments_of_a_start_are_refused(change, message):
    arguments = {"clean": torch.zeros(2, 3, 4, 4), "samples": torch.arange(2), "eps": 0.1, "seed": 0} | change
    with pytest.raises(ValueError, match=f"^{message}"):
        kernels.pgd_start(**arguments)
