"""Deviations from anchors: sums and changes against float64, memory, order, launches, and bytes."""

import contextlib

import numpy as np
import pytest
import torch
from layer_cases import DEVICE
from test_triton import count_launches, shuffle_programs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dive_fast.kernels import Deviations, Slots, backend, deviations, naive_deviations, primitives
from dive_fast.planner.memory_tracker import Tracker

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not primitives.INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1 before the start"
)

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
LONG, SHORT = deviations._LONG.elements, deviations._SHORT.elements
# Runs of both sizes, complete and not; a slot of more runs than a block of partial sums; one whose rows are split.
LONG_PIECES = ((0, 0, 2 * LONG + 5, 2 * LONG + 5), (1, 7, LONG, LONG - 7), (2, 0, LONG, LONG))
SHORT_PIECES = ((0, SHORT - 1, SHORT, 2 * SHORT + 1), (4, 0, 5 * SHORT + 3, 5 * SHORT + 3), (5, 0, 3, 2))


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


@pytest.mark.parametrize("name", BACKENDS)
def test_coefficients_may_have_any_strides(name):
    column, expanded = Inputs(), Inputs()
    column.coefficients = torch.stack([column.coefficients] * 3, 1)[:, 1]
    expanded.coefficients = torch.full((), 0.3, device=DEVICE).expand(COUNT)
    for inputs in (column, expanded):
        expected = inputs.changed(inputs.gradients)
        inputs.deviations(name).add_to_gradients(inputs.coefficients, inputs.gradients)
        assert_close(inputs.gradients, expected)


# Triton alone


@pytest.mark.parametrize(("pieces", "count", "elements"), [(LONG_PIECES, 3, LONG), (SHORT_PIECES, 7, SHORT)])
def test_runs_of_both_lengths(pieces, count, elements, monkeypatch):
    monkeypatch.setattr(deviations, "_MAX_FEW", 2)
    monkeypatch.setattr(deviations, "_FEW_SLOTS", deviations.SlotBlock(1, 2))
    inputs = Inputs(pieces, count)
    expected, gradients = inputs.sums(), inputs.changed(inputs.gradients)
    pairs = inputs.deviations("triton")
    np.testing.assert_allclose(exact(pairs.sums(PRODUCTS, inputs.gradients)), expected, rtol=1e-13, atol=1e-14)
    assert pairs._table.run_size.elements == elements
    assert pairs._table.block.SLOTS == 1
    squares = pairs.add_to_gradients(inputs.coefficients, inputs.gradients, with_squares=True)
    np.testing.assert_allclose(exact(squares), expected[:, 1], rtol=1e-13, atol=0)
    assert_close(inputs.gradients, gradients)
    before, differences = inputs.changed(inputs.weights), inputs.arrays()[0]
    pairs.add_to_weights(inputs.coefficients)
    assert_close(inputs.weights, before)
    for tensor, difference in zip(inputs.previous, differences, strict=True):
        assert (exact(tensor) == difference).all()


def test_runs_cover_each_element_once_in_the_order_of_slots():
    slots, sizes = slots_of(), [piece[-1] for piece in PIECES]
    for elements in (1, 6, 100, 1000):
        runs = deviations.find_runs(slots, sizes, elements)
        assert (np.diff(runs.slot) >= 0).all()
        assert runs.count.min() > 0
        assert runs.count.max() <= elements
        covered = [np.full(size, -1) for size in sizes]
        for offset, count, piece, slot in zip(*runs, strict=True):
            assert (covered[piece][offset : offset + count] == -1).all()
            covered[piece][offset : offset + count] = slot
        for one, other in zip(covered, indices(slots, sizes), strict=True):
            assert (one == other).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_values_that_are_not_finite():
    """They stay in their slots; an absent gradient adds nothing, also where deviations are infinite."""
    results = []
    for name in BACKENDS:
        inputs = Inputs()
        inputs.weights[1][0] = float("inf")
        inputs.weights[3][0] = float("nan")
        inputs.gradients[1] = inputs.gradients[2] = None
        inputs.gradients[0][4] = float("-inf")
        inputs.coefficients[7], inputs.coefficients[20] = 2.0, float("nan")
        pairs = inputs.deviations(name)
        sums = pairs.sums(PRODUCTS, inputs.gradients)
        pairs.add_to_gradients(inputs.coefficients, inputs.gradients)
        results.append([sums, *inputs.previous, *(g for g in inputs.gradients if g is not None)])
        assert torch.equal(sums[6, [0, 2, 3]], torch.zeros(3, dtype=torch.float64, device=DEVICE))
        assert sums[6, 1] == float("inf")
        assert sums[1, 2] == float("inf")
        assert sums.isnan().any(1).nonzero().view(-1).tolist() == [7]
        assert inputs.gradients[3].isnan().all()
        assert inputs.gradients[6].isnan().nonzero().view(-1).tolist() == list(range(40))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0, equal_nan=True)


def everything(inputs, name="triton"):
    """Sums and changed tensors of all methods."""
    pairs = inputs.deviations(name)
    sums = pairs.sums(PRODUCTS, inputs.gradients)
    squares = pairs.add_to_gradients(inputs.coefficients, inputs.gradients, with_squares=True)
    pairs.add_to_weights(inputs.coefficients)
    return [sums, squares, *inputs.gradients, *inputs.weights, *inputs.previous]


def test_two_runs_give_the_same_bits():
    for one, other in zip(everything(Inputs()), everything(Inputs()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(not primitives.INTERPRETED, reason="a GPU chooses the order itself")
def test_order_of_programs_does_not_matter(monkeypatch):
    expected = everything(Inputs())
    orders = shuffle_programs(monkeypatch)
    for one, other in zip(everything(Inputs()), expected, strict=True):
        assert torch.equal(one, other)
    assert any(list(order) != sorted(order) for order in orders.values())


def test_no_access_outside_of_buffers(monkeypatch):
    """Tensors lie between bands, and scratch memory and results begin with NaN."""
    expected = everything(Inputs())
    empty, buffers = primitives.empty, []

    def full_of_nan(*shape, dtype, device):
        buffers.append(empty(int(np.prod(shape)) + 32, dtype=dtype, device=device).fill_(float("nan")))
        return buffers[-1][16:-16].view(shape)

    monkeypatch.setattr(primitives, "empty", full_of_nan)
    inputs, bands = Inputs(), []
    for name in ("weights", "anchors", "gradients", "previous"):
        tensors = getattr(inputs, name)
        for k, tensor in enumerate(tensors):
            bands.append(tensor.new_full((len(tensor) + 32,), 7.0))
            tensors[k] = bands[-1][16:-16].copy_(tensor)
    for one, other in zip(everything(inputs), expected, strict=True):
        assert torch.equal(one, other)
    for band in bands:
        assert (torch.cat([band[:16], band[-16:]]) == 7.0).all()
    assert len(buffers) == 5
    for buffer in buffers:
        assert torch.cat([buffer[:16], buffer[-16:]]).isnan().all()


def test_unaligned_views_give_the_same_bits():
    pieces = ((0, 0, SHORT, 2 * SHORT), (2, 0, SHORT, SHORT))
    expected = everything(Inputs(pieces, 3))
    names = ("weights", "anchors", "gradients", "previous")
    for shifted in (*((name,) for name in names), names):
        inputs = Inputs(pieces, 3)
        for name in shifted:
            tensors = getattr(inputs, name)
            tensors[1] = torch.cat([tensors[1].new_zeros(1), tensors[1]])[1:]
        pairs = inputs.deviations("triton")
        pairs.sums(("gd",), inputs.gradients)
        assert pairs._table.is_aligned == (shifted == ("gradients",))
        assert pairs._addresses.is_aligned == ("gradients" not in shifted)
        for one, other in zip(everything(inputs), expected, strict=True):
            assert torch.equal(one, other)
    inputs = Inputs(((0, 1, SHORT, 2 * SHORT),), 3)
    pairs = inputs.deviations("triton")
    pairs.sums(("dd",))
    assert not pairs._table.is_aligned  # the second row begins at an element that is not a multiple of 4


def test_gradients_that_move_are_found_again():
    inputs = Inputs()
    pairs = inputs.deviations("triton")
    pairs.sums(("gd",), inputs.gradients)
    table, rows = pairs._table, pairs._addresses.rows
    pairs.sums(("gd",), inputs.gradients)
    assert pairs._addresses.rows is rows
    old, inputs.gradients = inputs.gradients, [2 * gradient for gradient in inputs.gradients]
    for gradient in old:
        gradient.fill_(float("nan"))
    inputs.gradients[2] = None
    np.testing.assert_allclose(
        exact(pairs.sums(PRODUCTS, inputs.gradients)), inputs.sums(), rtol=1e-13, atol=1e-15
    )
    assert pairs._addresses.rows is not rows
    assert pairs._table is table


def tensors_of_size(number, size=40):
    """Inputs with a slot for each of some tensors of equal size."""
    return Inputs(tuple((k, 0, size, size) for k in range(number)), number)


@pytest.mark.parametrize("number", [3, 30])
def test_number_of_launches_is_that_of_one_tensor(number, monkeypatch):
    inputs = tensors_of_size(number)
    pairs, c, g = inputs.deviations("triton"), inputs.coefficients, inputs.gradients
    for call, expected, name in (
        (lambda: pairs.sums(PRODUCTS, g), 2, "deviation_sums"),
        (lambda: pairs.add_to_gradients(c, g), 1, "add_deviations_to_gradients"),
        (lambda: pairs.add_to_gradients(c, g, with_squares=True), 2, "add_deviations_to_gradients"),
        (lambda: pairs.add_to_weights(c), 1, "add_deviations_to_weights"),
        (lambda: pairs.add_to_weights(c, with_squares=True), 2, "add_deviations_to_weights"),
    ):
        launches, operations, _ = count_launches(monkeypatch, call)
        assert (launches, operations) == (expected, [f"dive_fast.{name}.default"])
        eager = []
        with monkeypatch.context() as patch:
            patch.setattr(primitives, "launch", lambda *arguments, eager=eager, **_: eager.append(arguments[1]))
            call()
        assert len(eager) == expected
        assert eager[0] == number


@contextlib.contextmanager
def refusing_reads(monkeypatch):
    """A context in which the host cannot read a tensor; on CUDA, PyTorch checks it."""

    def refuse(*_):
        raise AssertionError("the host reads the device")

    with monkeypatch.context() as patch:
        for name in (
            "item",
            "tolist",
            "numpy",
            "cpu",
            "__bool__",
            "__int__",
            "__float__",
            "__index__",
            "__array__",
        ):
            patch.setattr(Tensor, name, refuse)
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", BACKENDS)
def test_host_never_waits(name, monkeypatch):
    inputs = Inputs()
    if DEVICE == "cpu":  # the interpreter reads
        monkeypatch.setattr(primitives, "launch", lambda *_, **__: None)
    flag = torch.zeros((), device=DEVICE)
    with refusing_reads(monkeypatch):
        pairs = inputs.deviations(name)
        for _ in range(2):
            pairs.sums(PRODUCTS, inputs.gradients)
            pairs.add_to_gradients(inputs.coefficients, inputs.gradients, flag, with_squares=True)
            pairs.add_to_weights(inputs.coefficients, flag)
            inputs.gradients = [gradient.clone() for gradient in inputs.gradients]
    _, operations, _ = count_launches(
        monkeypatch, lambda: inputs.deviations(name).add_to_gradients(inputs.coefficients, inputs.gradients, flag)
    )
    assert not {"aten._local_scalar_dense.default", "aten.nonzero.default"} & set(operations)


@pytest.mark.parametrize(
    ("call", "per_element", "per_slot"),
    [
        # L2-SP reads W, W0 and g, and writes g, with or without the squares.
        (lambda d, c, g: d(None).add_to_gradients(c, g), 16, 8),
        (lambda d, c, g: d(None).add_to_gradients(c, g, with_squares=True), 16, 16),
        # DiGraP reads W, W0, g and p; then W, W0 and g, and writes g and p. With the current deviations there is
        # no p.
        (lambda d, c, g: d("p").sums(("gd", "dd", "gg", "gp"), g), 16, 32),
        (lambda d, c, g: d("p").add_to_gradients(c, g), 20, 8),
        (lambda d, c, g: d(None).sums(("gd", "dd", "gg"), g), 12, 24),
        # SPD reads W, W0 and g before the step, W and W0 after it; then W and W0 again, and writes W.
        (lambda d, c, g: d(None).sums(("gd", "dd"), g), 12, 16),
        (lambda d, c, g: d(None).sums(("dd",)), 8, 8),
        (lambda d, c, g: d(None).add_to_weights(c), 12, 8),
        # FTP reads W, W0, g and p; then W and W0, and writes W and p.
        (lambda d, c, g: d("p").sums(("d1", "gp"), g), 16, 16),
        (lambda d, c, g: d("p").add_to_weights(c), 16, 8),
        # Only tensors that are used.
        (lambda d, c, g: d("p").sums(("gp",), g), 8, 8),
        (lambda d, c, g: d("p").sums(("pp", "dd"), g), 12, 16),
        (lambda d, c, g: d(None).sums(("gg",), [g[0], None, None]), 4 / 3, 8),
    ],
)
def test_bytes_of_each_step(call, per_element, per_slot):
    size, number = 600, 3
    with FakeTensorMode(), Tracker() as tracker:
        weights, anchors, previous, gradients = ([torch.empty(size) for _ in range(number)] for _ in range(4))
        slots = Slots(number, tuple(range(number)), (0,) * number, (size,) * number)
        coefficients = torch.empty(number, dtype=torch.float64)
        call(
            lambda p: Deviations(weights, anchors, slots, previous if p else None, "triton"),
            coefficients,
            gradients,
        )
    assert sum(operation.bytes for operation in tracker.operations.elements()) == (
        number * (size * per_element + per_slot)
    )
    assert len(list(tracker.operations.elements())) == 1


def test_auto_is_triton_where_it_runs(monkeypatch):
    launches = []
    monkeypatch.setattr(primitives, "launch", lambda *_, **__: launches.append(1))
    inputs = Inputs()
    inputs.deviations("auto").sums(PRODUCTS, inputs.gradients)
    assert len(launches) == 2
    monkeypatch.setattr(backend, "primitives", None)
    inputs.deviations("auto").sums(PRODUCTS, inputs.gradients)
    assert len(launches) == 2


def test_fake_tensors_give_shapes():
    with FakeTensorMode():
        weights, anchors, previous, gradients = ([torch.empty(7), torch.empty(3)] for _ in range(4))
        pairs = Deviations(weights, anchors, Slots(4, (0, 2), (0, 1), (4, 2)), previous, "triton")
        coefficients, flag = torch.ones(4), torch.ones((), dtype=torch.bool)
        assert pairs.sums(("gd", "dd"), [gradients[0], None]).shape == (4, 2)
        assert pairs.add_to_gradients(coefficients, [None, gradients[1]], flag, with_squares=True).shape == (4,)
        assert pairs.add_to_weights(coefficients, flag, with_squares=True).shape == (4,)
        assert pairs.add_to_weights(coefficients) is None


def test_opcheck():
    inputs = Inputs(((0, 1, 4, 7), (2, 0, 3, 3)), 3)
    w, w0, g, p, c = inputs.weights, inputs.anchors, inputs.gradients, inputs.previous, inputs.coefficients
    slots = 3, [0, 2], [1, 0], [4, 3]
    device = torch.device(DEVICE)
    torch.library.opcheck(deviations.sums, (w, w0, p, g, [0, 1], "gd dd d1 gp", *slots, [7, 3], device))
    torch.library.opcheck(deviations.add_to_gradients, (g[1:], [1], w, w0, p, c, None, True, *slots))
    torch.library.opcheck(deviations.add_to_weights, (w, w0, [], c, None, False, *slots))


# Arguments

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
        (lambda d: d.sums(()), r"products: expected at least one name and each once, got \(\)"),
        (lambda d: d.sums(("dd", "dd")), "products: expected at least one name and each once, got .'dd', 'dd'"),
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
