"""Deviations from anchors: sums and changes against float64, memory, order, launches, and bytes."""

import numpy as np
import pytest
import torch
from layer_cases import DEVICE

from dive_fast.kernels import Deviations, Slots, naive_deviations

BACKENDS = ("triton", "torch")
PRODUCTS = ("gd", "dd", "gg", "gp", "pp", "d1")
# (slot, start, length, elements) of pieces: rows cut at both ends; several pieces of a slot; one element; none.
PIECES = (
    (0, 3, 7, 29),
    (6, 0, 600, 431),
    (6, 431, 600, 100),
    (7, 2, 3, 1),
    (9, 5, 5, 0),
    (10, 4, 1, 9),
    (20, 0, 40, 200),
)
COUNT = 26


def slots_of(pieces=PIECES, count=COUNT):
    first, start, length, _ = zip(*pieces, strict=True) if pieces else ((),) * 4
    return Slots(count, first, start, length)


def indices(slots, sizes):
    """The slot of each element of all pieces, by its definition."""
    return [
        np.array([slots.first[k] + (slots.start[k] + i) // slots.length[k] for i in range(size)], dtype=int)
        for k, size in enumerate(sizes)
    ]


class Inputs:
    """Pieces of weights, anchors, gradients and previous deviations, and the slots of their elements."""

    def __init__(self, pieces=PIECES, count=COUNT):
        random = np.random.default_rng(0)
        self.slots, self.sizes = slots_of(pieces, count), [piece[-1] for piece in pieces]
        anchors = [random.standard_normal(size) for size in self.sizes]
        self.anchors = [self.tensor(anchor) for anchor in anchors]
        self.weights = [self.tensor(anchor + 1e-3 * random.standard_normal(anchor.shape)) for anchor in anchors]
        self.gradients = [self.tensor(random.standard_normal(size)) for size in self.sizes]
        self.previous = [self.tensor(1e-3 * random.standard_normal(size)) for size in self.sizes]
        self.coefficients = torch.tensor(random.standard_normal(count), device=DEVICE)
        self.coefficients[::3] = 0.0

    @staticmethod
    def tensor(array):
        return torch.tensor(array, dtype=torch.float32, device=DEVICE)

    def deviations(self, backend, with_previous=True):
        previous = self.previous if with_previous else None
        return Deviations(self.weights, self.anchors, self.slots, previous, backend)

    def arrays(self):
        """Deviations (rounded to fp32), gradients and previous deviations in float64."""
        differences = [
            (weight.cpu().numpy() - anchor.cpu().numpy()).astype(np.float64)
            for weight, anchor in zip(self.weights, self.anchors, strict=True)
        ]
        gradients = [np.zeros(size) if g is None else exact(g) for g, size in zip(self.gradients, self.sizes)]
        return differences, gradients, [exact(tensor) for tensor in self.previous]

    def sums(self):
        """All products by slot, in the order of PRODUCTS, with NumPy in float64."""
        result = np.zeros((self.slots.count, len(PRODUCTS)))
        for slot, d, g, p in zip(indices(self.slots, self.sizes), *self.arrays(), strict=True):
            for column, terms in enumerate((g * d, d * d, g * g, g * p, p * p, np.abs(d))):
                np.add.at(result[:, column], slot, terms)
        return result

    def changed(self, targets):
        """``target + c d`` with NumPy in float64."""
        slot, (d, _, _) = indices(self.slots, self.sizes), self.arrays()
        c = exact(self.coefficients)
        return [exact(targets[k]) + c[slot[k]] * d[k] for k in range(len(targets))]


def exact(tensor):
    return tensor.double().cpu().numpy()


def bits(tensors):
    return [None if tensor is None else tensor.cpu().view(torch.int32).clone() for tensor in tensors]


def assert_same_bits(tensors, expected):
    for one, other in zip(tensors, expected, strict=True):
        assert torch.equal(one, other)


def assert_close(actual, expected, ulp=2**-24):
    """Each element is within one rounding to fp32 of the exact one."""
    for one, other in zip(actual, expected, strict=True):
        assert (abs(exact(one) - other) <= ulp * abs(other) + 1e-45).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_products(backend):
    inputs = Inputs()
    sums = inputs.deviations(backend).sums(PRODUCTS, inputs.gradients)
    assert (sums.dtype, sums.shape) == (torch.float64, (COUNT, len(PRODUCTS)))
    np.testing.assert_allclose(exact(sums), inputs.sums(), rtol=1e-13, atol=1e-15)
    assert (sums[8] == 0).all()
    order = ("d1", "gd")
    chosen = inputs.deviations(backend, with_previous=False).sums(order, inputs.gradients)
    assert torch.equal(chosen, sums[:, [5, 0]])
    without_gradients = inputs.deviations(backend).sums(PRODUCTS)
    assert torch.equal(without_gradients[:, [1, 4, 5]], sums[:, [1, 4, 5]])
    assert (without_gradients[:, [0, 2, 3]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_addition_to_gradients(backend, dtype):
    inputs = Inputs()
    inputs.coefficients = inputs.coefficients.to(dtype)
    before, weights = bits(inputs.gradients), bits(inputs.weights)
    expected, differences = inputs.changed(inputs.gradients), inputs.arrays()[0]
    squares = inputs.deviations(backend).add_to_gradients(inputs.coefficients, inputs.gradients, with_squares=True)
    assert_close(inputs.gradients, expected)
    assert_same_bits(bits(inputs.weights), weights)
    for previous, difference in zip(inputs.previous, differences, strict=True):
        assert (exact(previous) == difference).all()
    np.testing.assert_allclose(exact(squares), inputs.sums()[:, 1], rtol=1e-13, atol=0)
    for k, slot in enumerate(indices(inputs.slots, inputs.sizes)):
        is_kept = torch.tensor(exact(inputs.coefficients)[slot] == 0, dtype=torch.bool)
        assert torch.equal(bits(inputs.gradients)[k][is_kept], before[k][is_kept])


@pytest.mark.parametrize("backend", BACKENDS)
def test_addition_to_weights(backend):
    inputs = Inputs()
    expected, (differences, _, _) = inputs.changed(inputs.weights), inputs.arrays()
    squares = inputs.sums()[:, 1]
    actual = inputs.deviations(backend).add_to_weights(inputs.coefficients, with_squares=True)
    assert_close(inputs.weights, expected)
    np.testing.assert_allclose(exact(actual), squares, rtol=1e-13, atol=0)
    for previous, difference in zip(inputs.previous, differences, strict=True):
        assert (exact(previous) == difference).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_coefficient_of_minus_one_restores_anchors(backend):
    inputs = Inputs()
    inputs.deviations(backend, with_previous=False).add_to_weights(torch.full_like(inputs.coefficients, -1.0))
    assert_same_bits(bits(inputs.weights), bits(inputs.anchors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_coefficient_of_zero_keeps_the_bits(backend):
    """Also of gradients and deviations that are not finite, and of a negative zero."""
    inputs = Inputs()
    inputs.coefficients.zero_()
    inputs.gradients[0][:3] = torch.tensor([float("inf"), float("nan"), -0.0])
    inputs.gradients[1].view(torch.int32)[5] = 0x7F800001  # a signalling NaN
    inputs.weights[0].fill_(float("inf"))
    inputs.weights[1].fill_(float("nan"))
    inputs.weights[5].view(torch.int32)[0] = 0x7F800001
    gradients, weights = bits(inputs.gradients), bits(inputs.weights)
    deviations = inputs.deviations(backend, with_previous=False)
    deviations.add_to_gradients(inputs.coefficients, inputs.gradients)
    deviations.add_to_weights(inputs.coefficients)
    assert_same_bits(bits(inputs.gradients), gradients)
    assert_same_bits(bits(inputs.weights), weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize("target", ["gradients", "weights"])
def test_skipped_step_keeps_previous_deviations(backend, dtype, target):
    inputs = Inputs()
    previous, (differences, _, _) = bits(inputs.previous), inputs.arrays()
    deviations = inputs.deviations(backend)
    for skipped in (True, False):
        flag = torch.tensor(skipped, device=DEVICE).to(dtype)
        arguments = (torch.zeros_like(inputs.coefficients), *([inputs.gradients] if target == "gradients" else []))
        getattr(deviations, f"add_to_{target}")(*arguments, skipped=flag)
        if skipped:
            assert_same_bits(bits(inputs.previous), previous)
    for tensor, difference in zip(inputs.previous, differences, strict=True):
        assert (exact(tensor) == difference).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_absent_gradients_add_nothing(backend):
    inputs = Inputs()
    inputs.gradients[1] = inputs.gradients[5] = None
    sums = inputs.deviations(backend).sums(PRODUCTS, inputs.gradients)
    np.testing.assert_allclose(exact(sums), inputs.sums(), rtol=1e-13, atol=1e-15)
    (differences, _, _) = inputs.arrays()
    inputs.deviations(backend).add_to_gradients(inputs.coefficients, inputs.gradients)
    assert inputs.gradients[1] is None
    for tensor, difference in zip(inputs.previous, differences, strict=True):
        assert (exact(tensor) == difference).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_pieces(backend):
    deviations = Deviations([], [], Slots(5, (), (), ()), [], backend)
    coefficients = torch.ones(5, dtype=torch.float64)
    assert torch.equal(deviations.sums(("gd", "dd"), []), torch.zeros(5, 2, dtype=torch.float64))
    assert deviations.add_to_gradients(coefficients, []) is None
    assert torch.equal(
        deviations.add_to_weights(coefficients, with_squares=True), torch.zeros(5, dtype=torch.float64)
    )


@pytest.mark.parametrize("elements", [1, 6, 7, 20, 64, 1000])
def test_blocks_cover_each_element_in_its_slot(elements):
    slots, sizes = slots_of(), [piece[-1] for piece in PIECES]
    for piece, expected in enumerate(indices(slots, sizes)):
        covered = []
        for block in slots.blocks(piece, sizes[piece], elements):
            assert block.offset == len(covered)
            assert 0 < block.rows * block.columns <= elements
            covered += np.repeat(np.arange(block.slot, block.slot + block.rows), block.columns).tolist()
        assert covered == expected.tolist()


def test_size_of_blocks_does_not_matter(monkeypatch):
    inputs = Inputs()
    expected = inputs.deviations("torch").sums(PRODUCTS, inputs.gradients)
    monkeypatch.setattr(naive_deviations, "_CPU_BLOCK", 10)
    monkeypatch.setattr(naive_deviations, "_DEVICE_BLOCK", 10)
    torch.testing.assert_close(inputs.deviations("torch").sums(PRODUCTS, inputs.gradients), expected)
    before = inputs.changed(inputs.gradients)
    inputs.deviations("torch").add_to_gradients(inputs.coefficients, inputs.gradients)
    assert_close(inputs.gradients, before)


ONE = torch.ones(2)
TWO = Slots(1, (0,), (0,), (2,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([ONE], [], TWO), "anchors: expected 1 tensors as weights has, got 0"),
        (([ONE], [torch.ones(3)], TWO), r"anchors\[0\]: expected shape \(2,\) as weights has, got \(3,\)"),
        (([ONE], [ONE.half()], TWO), r"anchors\[0\]: expected fp32, got torch.float16"),
        (([ONE.double()], [ONE], TWO), r"weights\[0\]: expected fp32, got torch.float64"),
        (([ONE], [ONE.to("meta")], TWO), r"anchors\[0\]: expected device cpu as weights\[0\] has, got meta"),
        (([torch.ones(1, 2)], [ONE], TWO), r"weights\[0\]: expected one dimension, got \(1, 2\)"),
        (([torch.ones(4)[::2]], [ONE], TWO), r"weights\[0\]: expected a contiguous tensor, got stride 2"),
        (([ONE], [ONE], TWO, [ONE, ONE]), "previous: expected 1 tensors as weights has, got 2"),
        (([ONE], [ONE], TWO, [torch.ones(1)]), r"previous\[0\]: expected shape \(2,\)"),
        (([ONE], [ONE], Slots(1, (0,), (0,), ())), r"slots.length: expected 1 numbers, one for each piece, got 0"),
        (([ONE], [ONE], Slots(1, (0,), (0,), (0,))), r"slots.length\[0\]: expected at least 1, got 0"),
        (([ONE], [ONE], Slots(1, (0,), (1,), (2,))), "slots: piece 0 has elements outside of the 1 slots"),
        (([ONE], [ONE], Slots(9, (-1,), (1,), (1,))), "slots: piece 0 has elements outside of the 9 slots"),
    ],
)
def test_bad_tensors_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Deviations(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.sums(("gd", "xy"), [ONE]), "products: expected names among gd, .*, got 'xy'"),
        (lambda d: d.sums(("gp",), [ONE]), "products: 'gp' needs previous deviations, but previous is None"),
        (lambda d: d.sums(("gd",), []), "gradients: expected 1 tensors as weights has, got 0"),
        (lambda d: d.sums(("gd",), [torch.ones(3)]), r"gradients\[0\]: expected shape \(2,\)"),
        (lambda d: d.sums(("gd",), [ONE.double()]), r"gradients\[0\]: expected fp32, got torch.float64"),
        (lambda d: d.sums(("gd",), [ONE.to("meta")]), r"gradients\[0\]: expected device cpu"),
        (lambda d: d.add_to_gradients(ONE, [ONE]), r"coefficients: expected shape \(1,\), got \(2,\)"),
        (lambda d: d.add_to_gradients(ONE[:1], [torch.ones(4)[::2]]), r"gradients\[0\]: expected a contiguous"),
        (lambda d: d.add_to_weights(ONE[:1].half()), "coefficients: expected fp64 or fp32, got torch.float16"),
        (lambda d: d.add_to_weights(ONE[:1].to("meta")), "coefficients: expected device cpu as weights have"),
        (lambda d: d.add_to_weights(ONE[:1], ONE), r"skipped: expected shape \(\) or \(1,\), got \(2,\)"),
        (lambda d: d.add_to_weights(ONE[:1], ONE[0].long()), "skipped: expected fp32 or bool, got torch.int64"),
        (lambda d: d.add_to_weights(ONE[:1], ONE[0].to("meta")), "skipped: expected device cpu"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_bad_arguments_are_refused(call, message, backend):
    with pytest.raises(ValueError, match=message):
        call(Deviations([ONE], [ONE], TWO, backend=backend))
