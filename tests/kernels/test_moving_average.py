"""Moving averages of many tensors: errors against float64 next to plain PyTorch's, memory, order, and launches."""

import numpy as np
import pytest
import torch
from layer_cases import DEVICE
from test_triton import count_launches, shuffle_programs
from torch._subclasses.fake_tensor import FakeTensorMode

from dive_fast.kernels import MovingAverage, backend, moving_average, primitives

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not primitives.INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1 before the start"
)

PIECE = moving_average._PIECE
SHAPES = ((), (1,), (3, 5, 7), (0, 4), (PIECE - 1,), (PIECE,), (2, PIECE // 2 + 1))
RATES = (2.9e-3, 5.1e-5, 0.6, 1.0)


def pairs(shapes=SHAPES):
    """Weights of a teacher, and of a student that has moved a little away from it."""
    random = np.random.default_rng(0)
    averages = [random.standard_normal(shape) for shape in shapes]
    values = [average + 1e-3 * random.standard_normal(average.shape) for average in averages]
    return [
        [torch.tensor(array, dtype=torch.float32, device=DEVICE) for array in part] for part in (averages, values)
    ]


def rate_of(value):
    return torch.tensor(value, device=DEVICE)


def moved(averages, values, rate, backend):
    copies = [average.clone() for average in averages]
    MovingAverage(copies, values, backend).move(rate_of(rate))
    return copies


def assert_equal(tensors, others):
    for one, other in zip(tensors, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rate", RATES)
def test_error_at_most_twice_pytorchs(rate):
    averages, values = pairs()
    triton, torch_ = (moved(averages, values, rate, name) for name in ("triton", "torch"))
    rounded = float(np.float32(rate))
    for average, value, actual, plain in zip(averages, values, triton, torch_, strict=True):
        psi, theta = average.double(), value.double()
        exact = psi + rounded * (theta - psi)
        error, plain_error = (
            (tensor.double() - exact).abs().max() if exact.numel() else 0 for tensor in (actual, plain)
        )
        assert error <= 2 * plain_error + 2**-24 * 4
        assert actual.shape == average.shape


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rate_of_zero_keeps_the_bits(backend):
    averages, values = pairs()
    averages[2].view(-1)[:2] = torch.tensor([-0.0, float("nan")])
    values[2].fill_(float("inf"))
    values[4].fill_(float("nan"))
    kept = moved(averages, values, 0.0, backend)
    for before, after in zip(averages, kept, strict=True):
        assert torch.equal(before.view(torch.int32), after.view(torch.int32))


def test_many_moves_follow_a_running_mean():
    """Rates of 1 / (k + 1): the average of all values, the start included."""
    averages, _ = pairs(((PIECE + 3,),))
    start, values = averages[0].double(), [torch.zeros_like(averages[0])]
    mover = MovingAverage(averages, values, "triton")
    for step in range(1, 21):
        values[0].copy_((start * (1 + step / 10)).float())
        mover.move(rate_of(1 / (step + 1)))
    torch.testing.assert_close(averages[0].double(), start * 2, rtol=1e-6, atol=1e-6)


def test_no_access_outside_of_buffers():
    averages, values = pairs()
    expected = moved(averages, values, 0.3, "triton")

    def between_bands(tensors, band):
        """Copies inside of buffers, and the buffers; elements of bands would move towards each other."""
        buffers = [torch.full((tensor.numel() + 32,), band, device=DEVICE) for tensor in tensors]
        copies = [buffer[16:-16].view(t.shape) for buffer, t in zip(buffers, tensors, strict=True)]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor)
        return copies, buffers

    guarded, buffers = between_bands(averages, 7.0)
    MovingAverage(guarded, between_bands(values, 9.0)[0], "triton").move(rate_of(0.3))
    assert_equal(guarded, expected)
    for buffer in buffers:
        assert (buffer[:16] == 7.0).all()
        assert (buffer[-16:] == 7.0).all()


def test_unaligned_views_give_the_same_bits():
    averages, values = pairs()
    expected = moved(averages, values, 0.3, "triton")

    def unaligned(tensor):
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    for shifts in (True, False), (False, True), (True, True):
        parts = [
            [unaligned(t) if shift else t.clone() for t in part]
            for part, shift in zip((averages, values), shifts, strict=True)
        ]
        assert not moving_average.Table(*parts).is_aligned
        MovingAverage(*parts, "triton").move(rate_of(0.3))
        assert_equal(parts[0], expected)
    assert moving_average.Table(averages, values).is_aligned


@pytest.mark.skipif(not primitives.INTERPRETED, reason="a GPU chooses the order itself")
def test_order_of_programs_does_not_matter(monkeypatch):
    averages, values = pairs()
    expected = moved(averages, values, 0.3, "triton")
    orders = shuffle_programs(monkeypatch)
    assert_equal(moved(averages, values, 0.3, "triton"), expected)
    assert any(list(order) != sorted(order) for order in orders.values())


def test_tensors_that_move_are_found_again():
    """ZeRO points parameters to another buffer by ``.data``."""
    averages, values = pairs(((3,), (5, 2)))
    expected = moved(moved(averages, values, 0.3, "torch"), values, 0.3, "torch")
    parameters = [torch.nn.Parameter(value) for value in values]
    mover = MovingAverage(averages, parameters, "triton")
    mover.move(rate_of(0.3))
    table = mover._table
    mover.move(rate_of(0.0))
    assert mover._table is table
    flat = torch.cat([value.flatten() for value in values])
    for value in values:
        value.fill_(float("nan"))
    parameters[0].data, parameters[1].data = flat[:3], flat[3:].view(5, 2)
    mover.move(rate_of(0.3))
    assert mover._table is not table
    for average, exact in zip(averages, expected, strict=True):
        torch.testing.assert_close(average, exact, rtol=0, atol=2**-22)


def test_one_launch_and_no_operator(monkeypatch):
    averages, values = pairs()
    mover, rate = MovingAverage(averages, values, "triton"), rate_of(0.3)
    launches, operations, _ = count_launches(monkeypatch, lambda: mover.move(rate))
    assert (launches, operations) == (1, ["dive_fast.move_averages.default"])
    launches = []
    monkeypatch.setattr(primitives, "launch", lambda *arguments, **_: launches.append(arguments))
    mover.move(rate)
    ((_, programs, table, _),) = launches
    assert programs == sum(-(-tensor.numel() // PIECE) for tensor in averages) == len(table)


def test_auto_is_triton_where_it_runs(monkeypatch):
    launches = []
    monkeypatch.setattr(primitives, "launch", lambda *_, **__: launches.append(1))
    averages, values = pairs(((6, 4),))
    MovingAverage(averages, values).move(rate_of(0.3))
    MovingAverage(averages, [values[0].t().contiguous().t()]).move(rate_of(0.3))
    monkeypatch.setattr(backend, "primitives", None)
    MovingAverage(averages, values).move(rate_of(0.3))
    assert len(launches) == 1
    MovingAverage([], []).move(rate_of(0.3))


def test_opcheck():
    averages, values = pairs(((6,), (2, 3)))
    torch.library.opcheck(moving_average.operator, (averages, values, rate_of(0.3)))


def test_fake_tensors_move():
    with FakeTensorMode():
        averages, values = ([torch.empty(7, 3)] for _ in range(2))
        MovingAverage(averages, values, "triton").move(torch.ones(()))


@pytest.mark.parametrize(
    ("averages", "values", "rate", "message"),
    [
        ([torch.ones(2)], [], torch.ones(()), "values: expected 1 tensors as averages has, got 0"),
        ([torch.ones(2)], [torch.ones(3)], torch.ones(()), r"values\[0\]: expected shape \(2,\)"),
        ([torch.ones(2).half()], [torch.ones(2)], torch.ones(()), r"averages\[0\]: expected fp32, got .*16"),
        ([torch.ones(2)], [torch.ones(2).bfloat16()], torch.ones(()), r"values\[0\]: expected fp32"),
        ([torch.ones(2)], [torch.ones(2, device="meta")], torch.ones(()), r"values\[0\]: expected device"),
        ([torch.ones(2)], [torch.ones(2)], torch.ones(2), r"rate: expected shape \(\) or \(1,\), got \(2,\)"),
        ([torch.ones(2)], [torch.ones(2)], torch.ones(()).double(), "rate: expected fp32, got torch.float64"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_bad_arguments_are_refused(averages, values, rate, message, backend):
    with pytest.raises(ValueError, match=message):
        MovingAverage(averages, values, backend).move(rate)


def test_triton_refuses_tensors_with_gaps():
    averages, values = pairs(((6, 4),))
    with pytest.raises(ValueError, match='"triton" needs contiguous tensors'):
        MovingAverage(averages, [values[0].t().contiguous().t()], "triton")
