"""The Triton kernels against float64: their error is at most twice that of plain PyTorch.

Without a GPU they run under Triton's interpreter. It detects neither accesses out of bounds nor programs that
depend on one another, so the tests put NaN around every buffer, fill scratch memory with NaN, and run programs in
random order.
"""

import contextlib
import itertools
import unittest.mock

import numpy as np
import numpy_reference
import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from distributed import run_ranks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import (
    CONTRASTIVE,
    DIFFERENCE,
    DISTILLATION,
    KINDS,
    confident_pairs,
    drifted_pairs,
    evaluate,
    make_dive_inputs,
    make_inputs,
    opposed_pairs,
    outlying_pairs,
    random_pairs,
    select,
    to_tensors,
    vanishing_pairs,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dive_fast.kernels as kernels
from dive_fast.kernels import backend, contrastive, difference, joint_step, naive, primitives

DIVE = (*CONTRASTIVE, "reference_image_features", "reference_text_features", *DIFFERENCE[2:])
LOSSES = ("contrastive_loss", "difference_loss", "dive_loss")
ARGUMENTS = {"contrastive_loss": CONTRASTIVE, "difference_loss": DIFFERENCE, "distillation_loss": DISTILLATION}
SLOW = pytest.mark.slow
# Only the interpreter computes in fp64.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, *([torch.float64] if primitives.INTERPRETED else []))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not primitives.INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1 before the start"
)


PATHS = [("contrastive_loss", path) for path in ("fused", "serial", "chunked")] + [("difference_loss", None)]
PATHS += [("dive_loss", path) for path in ("fused", "chunked")]


@pytest.fixture(params=PATHS, ids=lambda case: "-".join(filter(None, case)))
def name(request, monkeypatch):
    """Each loss, with every path of the contrastive gradient."""
    name, path = request.param
    force_path(path, monkeypatch.setattr)
    return name


def force_path(path, setattr=setattr):
    """Chooses what otherwise depends on the size: the gradient path, and the amount of work of one program."""
    settings = contrastive.Settings()
    if path == "chunked":
        settings = settings._replace(gradient="chunked", chunk_logits=0, chunk_rows=contrastive.PAD_ROWS)
    elif path is not None:
        # With one processor, a program iterates over all columns of its rows, in wider slices of the gradient.
        settings = settings._replace(gradient="fused", processors=1 if path == "serial" else settings.processors)
    setattr(contrastive, "SETTINGS", settings)


# Inputs and comparison


def inputs_of(name, kind, pairs, width, seed=0, scale=1 / 0.07):
    """Arguments of the loss of this name; the reference batch of the joint loss has another size."""
    if name == "dive_loss":
        inputs = make_dive_inputs(kind, pairs, pairs // 2 + 1, width, seed)
    else:
        inputs = make_inputs(kind, pairs, width, seed)
        inputs = select(inputs, ARGUMENTS[name])
    return inputs | {"logit_scale": np.array(scale)} if "logit_scale" in inputs else inputs


def tensors_of(inputs, dtype):
    """Leaf tensors on the device; teachers, average vector and scale in the dtype of the losses."""
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    limit = torch.finfo(dtype).max / 2
    inputs = {key: np.clip(array, -limit, limit) for key, array in inputs.items()}
    dtypes = {key: compute_dtype for key in inputs if not key.endswith("features")}
    tensors = to_tensors(inputs, dtype, dtypes)
    tensors = {key: tensor.detach().to(DEVICE) for key, tensor in tensors.items()}
    return {
        key: tensor.requires_grad_(key in dtypes.keys() & {"logit_scale"} or key not in dtypes)
        for key, tensor in tensors.items()
    }


def run(name, tensors, **options):
    """Values and gradients on the CPU; the leaves stay unchanged."""
    leaves = {key: tensor.detach().clone().requires_grad_(tensor.requires_grad) for key, tensor in tensors.items()}
    values, gradients = evaluate(getattr(kernels, name), leaves, **options)
    gradients = {key: gradients[key] for key, tensor in tensors.items() if tensor.requires_grad}
    return {key: v.cpu() for key, v in values.items()}, {key: g.cpu() for key, g in gradients.items()}


def assert_at_most_twice_the_error(name, inputs, dtype, **options):
    """The norm of each tensor's error is at most twice plain PyTorch's plus one rounding of each operation."""
    tensors = tensors_of(inputs, dtype)
    rounding = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    expected = getattr(numpy_reference, name)(
        **{key: tensor.detach().double().cpu().numpy() for key, tensor in tensors.items()},
        **options,
        rounding=rounding,
    )
    triton_results, torch_results = (
        run(name, tensors, **options, backend=backend) for backend in ("triton", "torch")
    )
    exact_results = expected.values, expected.gradients
    exact_bounds = expected.value_bounds, expected.gradient_bounds
    for actual, plain, exact, bounds in zip(triton_results, torch_results, exact_results, exact_bounds):
        assert actual.keys() == plain.keys()
        for key, value in actual.items():
            assert value.dtype == plain[key].dtype, key
            assert value.shape == plain[key].shape, key
            error, plain_error = (_norm(x.double().numpy() - exact[key]) for x in (value, plain[key]))
            bound = _norm(np.broadcast_to(bounds[key], exact[key].shape))
            assert error <= 2 * plain_error + bound, f"{key}: off by {error}, PyTorch by {plain_error}, {bound=}"


def _norm(array):
    return np.linalg.norm(np.ravel(array))


# Against float64


def mostly_slow_product(*axes):
    """All combinations, most marked slow: `make test` runs each pair of the first two with one of the third."""
    for indices in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[index] for axis, index in zip(axes, indices)]
        name = "-".join(getattr(value, "__name__", str(value)) for value in values)
        yield pytest.param(*values, id=name, marks=[SLOW] if sum(indices) % len(axes[-1]) else [])


OPTIONS = {
    "contrastive_loss": [{}],
    "difference_loss": [{}, {"decay": 0.5, "average_weight": 0.3, "pairwise_weight": 2.5, "mean_gradient": False}],
    "dive_loss": [{"decay": 0.9}, {"weight": 2.5, "average_weight": 0.0, "mean_gradient": False}],
}


@pytest.mark.parametrize(("name", "kind", "dtype"), mostly_slow_product(LOSSES, [*KINDS, confident_pairs], DTYPES))
def test_error_at_most_twice_pytorchs(name, kind, dtype):
    if dtype == torch.float16 and kind == vanishing_pairs:
        pytest.skip(
            "in fp16 a row below the clamp is a row of zeros, and its gradient, dz / 1e-12, is out of range"
        )
    for (pairs, width), scale, options in zip(
        [(1, 16), (2, 17), (70, 130)],
        itertools.cycle([1 / 0.07, 100.0]),
        itertools.cycle(OPTIONS[name]),
    ):
        assert_at_most_twice_the_error(name, inputs_of(name, kind, pairs, width, scale=scale), dtype, **options)


@pytest.mark.parametrize(
    ("path", "kind", "dtype"),
    mostly_slow_product(
        ["serial", "chunked"], [drifted_pairs, outlying_pairs, opposed_pairs, confident_pairs], DTYPES
    ),
)
def test_error_of_other_gradient_paths(path, kind, dtype, monkeypatch):
    force_path(path, monkeypatch.setattr)
    for (pairs, width), scale in zip([(1, 16), (150, 130)], (1 / 0.07, 100.0)):
        inputs = inputs_of("contrastive_loss", kind, pairs, width, scale=scale)
        assert_at_most_twice_the_error("contrastive_loss", inputs, dtype)
    assert_at_most_twice_the_error("dive_loss", inputs_of("dive_loss", kind, 70, 48), dtype)


@pytest.mark.parametrize("width", [512, pytest.param(640, marks=SLOW), 768, 1023, pytest.param(1280, marks=SLOW)])
def test_error_at_widths_of_real_models(width):
    for name, dtype in zip(LOSSES, (torch.float16, torch.float32, torch.bfloat16)):
        assert_at_most_twice_the_error(name, inputs_of(name, drifted_pairs, 40, width), dtype)


def test_error_with_many_splits():
    """More splits of the columns than the last one of them merges at a time."""
    inputs = inputs_of("contrastive_loss", drifted_pairs, 290, 16, scale=100.0)
    shape = contrastive.shape_of(torch.empty(290, 16), "")
    assert contrastive.geometry(shape, contrastive.SETTINGS).num_splits > 8
    assert_at_most_twice_the_error("contrastive_loss", inputs, torch.float32)


@contextlib.contextmanager
def tensor_core_sums():
    """Makes the interpreter sum products as tensor cores do: truncated after the depth of each instruction.

    An instruction sums 16 products of 16 bits or 8 of tf32; tf32x3 computes high @ high and both mixed products of
    fp32.
    """
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    def truncate(x):
        near = x.astype(np.float32)
        return np.where(np.abs(near) > np.abs(x), np.nextafter(near, np.float32(0)), near)

    def summed(left, right, total, depth):
        for k in range(0, left.shape[1], depth):
            product = left[:, k : k + depth].astype(np.float64) @ right[k : k + depth].astype(np.float64)
            total = truncate(total + product)
        return total

    def high(x):
        """Rounded to tf32's 10 bits of mantissa."""
        bits = x.astype(np.float32).view(np.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(np.float32)

    def create_dot(left, right, total, *_):
        a, b, accumulator = left.data, right.data, total.data
        if all(operand.dtype.primitive_bitwidth == 16 or is_bf16(operand.data) for operand in (left, right)):
            return TensorHandle(summed(a, b, accumulator, 16), total.dtype.scalar)
        a_high, b_high = high(a), high(b)
        mixed = summed(high(a - a_high), b_high, np.zeros_like(accumulator), 8)
        mixed = summed(a_high, high(b - b_high), mixed, 8)
        return TensorHandle(summed(a_high, b_high, truncate(accumulator + mixed), 8), total.dtype.scalar)

    def is_bf16(x):
        """Whether all values are bf16's, which the interpreter receives as fp32."""
        return not (x.view(np.int32) & 0xFFFF).any()

    with unittest.mock.patch.object(interpreter_builder, "create_dot", create_dot):
        yield


@pytest.mark.skipif(not primitives.INTERPRETED, reason="a GPU has tensor cores")
@pytest.mark.parametrize(
    ("path", "dtype"),
    [
        ("fused", torch.float32),
        ("serial", torch.float32),
        ("chunked", torch.float32),
        ("fused", torch.float16),
        ("chunked", torch.bfloat16),
    ],
)
def test_truncated_sums_leave_no_bias_at_the_label(path, dtype, monkeypatch):
    """The bounds are those of rounded sums; a label summed elsewhere is off by the bias of all truncated sums."""
    force_path(path, monkeypatch.setattr)
    for kind, pairs in (opposed_pairs, 20), (opposed_pairs, 70), (confident_pairs, 40):
        inputs = inputs_of("contrastive_loss", kind, pairs, 256, scale=100.0)
        with tensor_core_sums():
            assert_at_most_twice_the_error("contrastive_loss", inputs, dtype)


@given(
    name=st.sampled_from(LOSSES),
    pairs=st.integers(1, 140),
    width=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([drifted_pairs, outlying_pairs, confident_pairs]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_error_at_any_shape(name, pairs, width, dtype, kind, seed):
    assert_at_most_twice_the_error(name, inputs_of(name, kind, pairs, width, seed), dtype)


@pytest.mark.parametrize("path", ["fused", "serial", "chunked"])
def test_scale_100_with_cosines_from_minus_1_to_1_is_finite(path, monkeypatch):
    force_path(path, monkeypatch.setattr)
    values, gradients = run(
        "contrastive_loss",
        tensors_of(inputs_of("contrastive_loss", opposed_pairs, 70, 16, scale=100.0), torch.float16),
        backend="triton",
    )
    assert values["loss"] > 5
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_cuda_graph_replays_on_new_inputs(name):
    """Forward and backward never synchronize: CUDA captures them in a graph, which replays the same bits."""
    first, second = (tensors_of(inputs_of(name, random_pairs, 130, 64, seed), torch.float16) for seed in (1, 2))
    leaves = {key: tensor.detach().clone().requires_grad_(tensor.requires_grad) for key, tensor in first.items()}
    differentiable = [tensor for tensor in leaves.values() if tensor.requires_grad]

    def step():
        result = getattr(kernels, name)(**leaves, backend="triton")
        return torch.autograd.grad(result if isinstance(result, torch.Tensor) else result.loss, differentiable)

    warmup_stream = torch.cuda.Stream()
    warmup_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warmup_stream):
        step()
    torch.cuda.current_stream().wait_stream(warmup_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for inputs in (second, first):
        with torch.no_grad():
            for key, leaf in leaves.items():
                leaf.copy_(inputs[key])
        graph.replay()
        replayed = [gradient.clone() for gradient in captured]
        assert all(torch.equal(one, other) for one, other in zip(replayed, step(), strict=True))


@pytest.mark.parametrize("feature", ["image_features", "text_features"])
@pytest.mark.parametrize("name", LOSSES)
def test_second_derivative_is_an_error_and_not_a_constant(name, feature):
    # All else is constant, so that the features alone can tie the gradient to its graph.
    tensors = {
        key: tensor.detach().requires_grad_(key == feature)
        for key, tensor in tensors_of(inputs_of(name, random_pairs, 3, 16), torch.float32).items()
    }
    result = getattr(kernels, name)(**tensors, backend="triton")
    loss = result if isinstance(result, torch.Tensor) else result.loss
    (gradient,) = torch.autograd.grad(loss, tensors[feature], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (loss + gradient.square().sum()).backward()


@pytest.mark.skipif(not primitives.INTERPRETED, reason="fp64 runs under the interpreter only")
@pytest.mark.parametrize("name", [*LOSSES[:2], pytest.param(LOSSES[2], marks=SLOW)])
def test_gradcheck(name):
    tensors = tensors_of(inputs_of(name, random_pairs, 3, 3, scale=3.0), torch.float64)
    leaves = [key for key, tensor in tensors.items() if tensor.requires_grad]
    options = {} if name == "contrastive_loss" else {"decay": 0.5}

    def loss(*arguments):
        result = getattr(kernels, name)(**tensors | dict(zip(leaves, arguments)), **options, backend="triton")
        return result if name == "contrastive_loss" else result.loss

    assert torch.autograd.gradcheck(loss, [tensors[key] for key in leaves])
    if name == "difference_loss":
        # With decay 1 the average vector equals the argument: a constant, as this gradient assumes.
        tensors["average_vector"] = naive.difference_loss(**tensors, **options).average_vector
        options |= {"decay": 1.0, "mean_gradient": False}
        assert torch.autograd.gradcheck(loss, [tensors[key] for key in leaves])


def test_upstream_gradient_is_applied_before_rounding():
    """At |u| = 3e-3 a quarter of the gradients underflow in fp16 unless the loss scale is applied first."""
    tensors = tensors_of(inputs_of("difference_loss", drifted_pairs, 512, 512), torch.float16)
    tensors["image_features"], tensors["text_features"] = (
        (10 * tensors[f"{half}_teacher"] + 0.03 * torch.randn(512, 512, device=DEVICE) / 512**0.5)
        .half()
        .requires_grad_()
        for half in ("image", "text")
    )
    tensors["average_vector"].zero_()
    result = kernels.difference_loss(**tensors, backend="triton")
    (scaled,) = torch.autograd.grad(result.loss * 2.0**16, tensors["image_features"], retain_graph=True)
    (plain,) = torch.autograd.grad(result.loss, tensors["image_features"])
    assert (plain == 0).float().mean() > 0.2
    assert (scaled == 0).float().mean() < 0.01


# Memory


class GuardedBuffers:
    """Replacement of ``primitives.empty``: buffers full of NaN, between bands of NaN that must stay unchanged."""

    BAND = 512  # elements; a multiple of 16 bytes

    def __init__(self):
        self.buffers = []

    def __call__(self, *shape, dtype, device):
        count = int(np.prod(shape))
        poison = 0x7F7F7F7F if dtype == torch.int32 else float("nan")
        buffer = torch.full((count + 2 * self.BAND,), poison, dtype=dtype, device=device)
        self.buffers.append((buffer, count))
        return buffer[self.BAND : self.BAND + count].view(shape)

    def surround(self, tensor):
        """A copy of an input between bands."""
        copy = self(*tensor.shape, dtype=tensor.dtype, device=tensor.device)
        copy.copy_(tensor)
        return copy

    def assert_intact(self):
        """No band has changed, also none of those that end the buffers inside of a state."""
        for buffer, count in self.buffers:
            for band in buffer[: self.BAND], buffer[self.BAND + count :]:
                assert (band == 0x7F7F7F7F).all() if buffer.dtype == torch.int32 else band.isnan().all()


@pytest.mark.parametrize(
    ("pairs", "width", "dtype"),
    [
        (1, 1, torch.float32),
        pytest.param(64, 64, torch.float16, marks=SLOW),
        (65, 130, torch.float16),
        (129, 63, torch.float32),
    ],
)
def test_no_access_outside_of_buffers(name, pairs, width, dtype, monkeypatch):
    tensors = tensors_of(inputs_of(name, drifted_pairs, pairs, width), dtype)
    expected = run(name, tensors, backend="triton")
    guard = GuardedBuffers()
    monkeypatch.setattr(primitives, "empty", guard)
    guarded = {
        key: guard.surround(tensor.detach()).requires_grad_(tensor.requires_grad)
        for key, tensor in tensors.items()
    }
    with bands_inside_of_states():
        values, gradients = evaluate(getattr(kernels, name), guarded, backend="triton")
        sizes = state_sizes(name, tensors)
    guard.assert_intact()
    (state,) = (buffer for buffer, count in guard.buffers if count == sum(sizes))
    for end in itertools.accumulate(sizes, initial=guard.BAND):
        assert state[end - BAND : end].isnan().all()
    for key, value in expected[0].items():
        assert torch.equal(values[key].cpu(), value), key
    for key, gradient in expected[1].items():
        assert torch.equal(gradients[key].cpu(), gradient), key


BAND = 64  # elements at the end of each buffer of a state


@contextlib.contextmanager
def bands_inside_of_states():
    """Separates the small buffers that lie in one tensor by bands."""
    geometries = contrastive.geometry, difference.geometry
    aligned = primitives.aligned

    def with_bands(sizes):
        return tuple(size + BAND for size in aligned(sizes))

    try:
        with unittest.mock.patch.object(primitives, "aligned", with_bands):
            for geometry in geometries:
                geometry.cache_clear()
            yield
    finally:
        for geometry in geometries:
            geometry.cache_clear()


def state_sizes(name, tensors):
    """Sizes of the buffers in the state of a loss."""
    reference = "reference_image_features" if name == "dive_loss" else "image_features"
    target = contrastive.geometry(contrastive.shape_of(tensors["image_features"], ""), contrastive.SETTINGS)
    difference_sizes = difference.geometry(difference.shape_of(tensors[reference], "")).state_sizes
    return {
        "contrastive_loss": target.state_sizes,
        "difference_loss": difference_sizes,
        "dive_loss": target.state_sizes + difference_sizes,
    }[name]


@contextlib.contextmanager
def checked_addresses():
    """Makes the interpreter fail at a load or store outside of the launch's tensors, even of unused values."""
    from triton.runtime.interpreter import interpreter_builder as builder

    ranges, launch = [], primitives.launch
    load, store = builder.create_masked_load, builder.create_masked_store

    def recorded(kernel, programs, *arguments, **options):
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
        ranges[:] = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
        launch(kernel, programs, *arguments, **options)

    def check(pointers, mask):
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
        known = np.zeros(addresses.shape, bool)
        for begin, end in ranges:
            known |= (addresses >= begin) & (addresses < end)
        assert known.all(), "an address outside of all tensors of the launch"

    def checked_load(pointers, mask, *rest):
        check(pointers, mask)
        return load(pointers, mask, *rest)

    def checked_store(pointers, value, mask, *rest):
        check(pointers, mask)
        return store(pointers, value, mask, *rest)

    with (
        unittest.mock.patch.object(primitives, "launch", recorded),
        unittest.mock.patch.object(builder, "create_masked_load", checked_load),
        unittest.mock.patch.object(builder, "create_masked_store", checked_store),
    ):
        yield


@pytest.mark.skipif(not primitives.INTERPRETED, reason="only the interpreter exposes addresses")
@pytest.mark.parametrize(("pairs", "width"), [(1, 1), pytest.param(65, 130, marks=SLOW), (260, 16)])
def test_no_address_outside_of_tensors(name, pairs, width, monkeypatch):
    """Covers loads with unused values too; chunks have two tiles, the last one is partial."""
    settings = contrastive.SETTINGS._replace(chunk_rows=2 * contrastive.PAD_ROWS)
    monkeypatch.setattr(contrastive, "SETTINGS", settings)
    with checked_addresses():
        run(name, tensors_of(inputs_of(name, drifted_pairs, pairs, width), torch.float16), backend="triton")


def test_layout_of_inputs_does_not_matter():
    tensors = tensors_of(inputs_of("dive_loss", drifted_pairs, 20, 33), torch.float16)
    expected = run("dive_loss", tensors, backend="triton")
    rearranged = {}
    for position, (key, tensor) in enumerate(tensors.items()):
        if tensor.ndim == 2:
            # Column-major, every other column of a wider tensor, and one element after any alignment.
            layouts = (
                tensor.detach().T.contiguous().T,
                tensor.detach().repeat_interleave(2, dim=1)[:, ::2],
                torch.cat([tensor.new_zeros(1), tensor.detach().flatten()])[1:].view(tensor.shape),
            )
            rearranged[key] = layouts[position % 3].requires_grad_(tensor.requires_grad)
        else:
            rearranged[key] = tensor
    values, gradients = evaluate(kernels.dive_loss, rearranged, backend="triton")
    for key, value in expected[0].items():
        assert torch.equal(values[key].cpu(), value), key
    for key, gradient in expected[1].items():
        assert torch.equal(gradients[key].cpu(), gradient), key


# Determinism and launches


def test_two_runs_are_bit_identical(name):
    tensors = tensors_of(inputs_of(name, drifted_pairs, 150, 40), torch.float16)
    first, second = (run(name, tensors, backend="triton") for _ in range(2))
    for one, other in zip(first, second):
        for key in one:
            assert torch.equal(one[key], other[key]), key


def shuffle_programs(monkeypatch):
    """Makes the interpreter run the programs of a launch in random order; the result holds the latest one."""
    from triton.runtime.interpreter import interpreter_builder

    random = np.random.default_rng(0)
    set_grid_idx, orders = interpreter_builder.set_grid_idx, {}

    def shuffled(x, y, z):
        if x == 0:
            orders["current"] = random.permutation(interpreter_builder.grid_dim[0])
        set_grid_idx(int(orders["current"][x]), y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", shuffled)
    return orders


@pytest.mark.skipif(not primitives.INTERPRETED, reason="a GPU chooses the order itself")
def test_order_of_programs_does_not_matter(name, monkeypatch):
    """A program that reads another's result, or adds to it, gives another result when the order changes."""
    tensors = tensors_of(inputs_of(name, drifted_pairs, 150, 40), torch.float32)
    expected = run(name, tensors, backend="triton")
    orders = shuffle_programs(monkeypatch)
    actual = run(name, tensors, backend="triton")
    assert any(list(order) != sorted(order) for order in orders.values())
    for one, other in zip(expected, actual):
        for key in one:
            assert torch.equal(one[key], other[key]), key


class _Operations(TorchDispatchMode):
    """Collects operators that may launch a kernel: all except views and allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if not function.is_view and "empty" not in str(function) and "detach" not in str(function):
            self.names.append(str(function))
        return result


def count_launches(monkeypatch, call):
    """Number of Triton launches, without executing them, PyTorch operators that launch, and the result."""
    launches = []
    with monkeypatch.context() as patch, _Operations() as operations:
        patch.setattr(primitives, "launch", lambda kernel, *_, **__: launches.append(kernel))
        result = call()
    return len(launches), operations.names, result


def test_number_of_launches(monkeypatch):
    """Each loss has two launches forward and one backward; so has the joint loss."""
    tensors = tensors_of(inputs_of("dive_loss", drifted_pairs, 20, 48), torch.float16)
    image, text, scale, *reference, average_vector = (tensors[key].detach() for key in DIVE)
    options, upstream = (0.99, 1.0, 1.0, True), torch.ones((), device=DEVICE)

    def check(expected, call):
        launches, operations, result = count_launches(monkeypatch, call)
        assert (launches, operations) == (expected, [])
        return result

    sizes = 20, 20, 0, 48
    _, *saved = check(2, lambda: contrastive.launch_forward(image, text, scale, ""))
    check(1, lambda: contrastive.launch_backward(upstream, scale, *saved, *sizes))
    _, _, state = check(2, lambda: difference.launch_forward(*reference, average_vector, *options, ""))
    check(1, lambda: difference.launch_backward(upstream, *reference, state, *options))
    _, _, *saved = check(
        2, lambda: joint_step.launch_forward(image, text, scale, *reference, average_vector, 1e3, *options, "")
    )
    check(1, lambda: joint_step.launch_backward(upstream, scale, *saved, *reference, *sizes, 1e3, *options))


def test_gradient_is_fused_until_chunks_are_predicted_faster():
    """In wider rows the fused gradient computes logits more often, so that chunks are faster from fewer pairs."""
    lines = []
    for width in (256, 512, 768, 1280):
        shapes = [contrastive.shape_of(torch.empty(64 * n, width).half(), "") for n in range(1, 65)]
        paths = [contrastive.gradient_path(shape, contrastive.Settings()) for shape in shapes]
        lines.append(paths.index("chunked"))
        assert paths == ["fused"] * lines[-1] + ["chunked"] * (len(paths) - lines[-1])
        for path in ("fused", "chunked"):
            assert {contrastive.gradient_path(shape, contrastive.Settings(path)) for shape in shapes} == {path}
    assert lines == sorted(lines, reverse=True)
    assert lines[0] > lines[-1] > 4


def test_host_path_is_short(monkeypatch):
    """A joint step allocates ten tensors; sizes are plain integers, and those of one shape are computed once."""
    tensors = tensors_of(inputs_of("dive_loss", drifted_pairs, 20, 48), torch.float16)
    allocations = []
    monkeypatch.setattr(primitives, "launch", lambda *_, **__: None)
    empty = primitives.empty

    def counted(*shape, **kind):
        allocations.append(shape)
        return empty(*shape, **kind)

    monkeypatch.setattr(primitives, "empty", counted)
    for function in ("cdiv", "next_power_of_2"):  # wrapped functions: microseconds of host time each
        monkeypatch.setattr(f"triton.{function}", None)
    caches = contrastive.geometry, contrastive.gradient_plan, difference.geometry
    for cache in caches:
        cache.cache_clear()
    for _ in range(3):
        kernels.dive_loss(**tensors, backend="triton").loss.backward()
    # The loss, its results, packed rows, the state and tickets; two gradients of each half, and the scale's.
    assert len(allocations) == 3 * 10
    assert [cache.cache_info().misses for cache in caches] == [1, 1, 1]


@pytest.mark.parametrize("path", ["eager", "observed"])
def test_custom_ops_are_called_where_a_mode_observes_them(path, monkeypatch):
    tensors = tensors_of(inputs_of("dive_loss", drifted_pairs, 20, 48), torch.float16)
    monkeypatch.setattr(primitives, "launch", lambda *_, **__: None)
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **kwargs or {})

    with torch.profiler.profile() if path == "eager" else Names() as profiler:
        kernels.dive_loss(**tensors, backend="triton").loss.backward()
    if path == "eager":
        names = [event.key for event in profiler.key_averages()]
    operators = {name for name in names if name.startswith("dive_fast::")}
    assert operators == (set() if path == "eager" else {"dive_fast::dive_loss", "dive_fast::dive_loss_backward"})


@pytest.mark.parametrize("name", LOSSES)
def test_no_grad_launches_the_forward_only(name, monkeypatch):
    tensors = tensors_of(inputs_of(name, drifted_pairs, 20, 48), torch.float16)
    with torch.no_grad():
        launches, _, result = count_launches(
            monkeypatch, lambda: getattr(kernels, name)(**tensors, backend="triton")
        )
    assert launches == 2
    loss = result if name == "contrastive_loss" else result.loss
    assert not loss.requires_grad


def test_second_backward_gives_the_same_gradient(name):
    tensors = tensors_of(inputs_of(name, drifted_pairs, 20, 48), torch.float32)
    result = getattr(kernels, name)(**tensors, backend="triton")
    loss = result if name == "contrastive_loss" else result.loss
    first, second = (
        torch.autograd.grad(loss, next(iter(tensors.values())), retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def record_allocations(monkeypatch):
    """Bytes of each allocation from now on, without launches: for host code on meta tensors."""
    allocated = []

    def empty(*shape, dtype, device):
        tensor = torch.empty(shape, dtype=dtype, device=device)
        allocated.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(primitives, "launch", lambda *_, **__: None)
    monkeypatch.setattr(primitives, "empty", empty)
    return allocated


@pytest.mark.parametrize("pairs", [2050, 8192, 65_536])
def test_extra_memory_is_linear_in_the_batch(pairs, monkeypatch):
    """Counts all allocations of a step on meta tensors, at sizes whose B x B matrix would fill a GPU."""
    allocated = record_allocations(monkeypatch)
    features = torch.empty(pairs, 768, dtype=torch.float16, device="meta")
    scale = torch.empty((), device="meta")
    _, *saved = contrastive.launch_forward(features, features, scale, "")
    forward_bytes = sum(allocated)
    contrastive.launch_backward(scale, scale, *saved, pairs, pairs, 0, 768)
    # Packed rows and gradients, the chunk of weights with its sums, and vectors: all grow at most linearly with B.
    shape = contrastive.shape_of(features, "")
    scratch = contrastive.scratch_bytes(shape)
    assert sum(allocated) < 4.3 * features.nbytes + scratch + 256 * pairs
    assert sum(allocated) - forward_bytes == 2 * features.nbytes + scale.nbytes + scratch
    chunk, columns = contrastive.chunk_size(shape, contrastive.SETTINGS)
    assert chunk * columns <= max(contrastive.SETTINGS.chunk_logits, contrastive.SETTINGS.chunk_rows * columns)


@pytest.mark.parametrize("name", ["difference_loss", "dive_loss"])
def test_only_the_loss_carries_gradient(name):
    tensors = tensors_of(inputs_of(name, random_pairs, 3, 4), torch.float32)
    result = getattr(kernels, name)(**tensors, backend="triton")._asdict()
    assert [key for key, value in result.items() if value.requires_grad] == ["loss"]


# Not a number


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float16, float("inf")), (torch.bfloat16, float("-inf")), (torch.float32, float("nan"))],
    ids=str,
)
def test_nonfinite_feature_reaches_loss_and_gradients(name, dtype, value):
    """Steps are skipped because of their gradients, so a bad feature must reach the loss and the gradients."""
    for argument in [key for key in inputs_of(name, random_pairs, 2, 3) if key.endswith("features")]:
        tensors = tensors_of(inputs_of(name, random_pairs, 9, 20), dtype)
        tensors[argument].detach()[2, 7] = value
        values, gradients = run(name, tensors, backend="triton")
        assert not values["loss"].isfinite(), argument
        assert not gradients[argument].isfinite().all(), argument


@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
@pytest.mark.parametrize("kind", [confident_pairs, opposed_pairs])
def test_nonfinite_scale_reaches_loss_and_gradients(kind, scale):
    tensors = tensors_of(inputs_of("contrastive_loss", kind, 9, 20), torch.float32)
    tensors["logit_scale"].detach().fill_(scale)
    values, gradients = run("contrastive_loss", tensors, backend="triton")
    assert values["loss"].isnan()
    assert not any(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("path", ["fused", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_error_at_scale_10000(path, dtype, monkeypatch):
    force_path(path, monkeypatch.setattr)
    for kind in (opposed_pairs, confident_pairs, drifted_pairs):
        inputs = inputs_of("contrastive_loss", kind, 33, 70, scale=1e4)
        assert_at_most_twice_the_error("contrastive_loss", inputs, dtype)


# Ranks


RANK_CASES = [
    (name, path, drifted_pairs, pairs, width, dtype)
    for (name, path), (pairs, width), dtype in itertools.product(
        PATHS,
        [(1, 5), (5, 16), (70, 20)],  # pairs are those of one rank
        [torch.float64 if primitives.INTERPRETED else torch.float32, torch.float16],
    )
]
# The label of a row has another column on each rank; truncated sums show whether it is the right one.
RANK_CASES += [
    ("contrastive_loss", path, opposed_pairs, 5, 256, torch.float32)
    for path in ("fused", "serial", "chunked", "chunked")  # an even number: some runs use every second case
]
RANK_CASES += [
    ("distillation_loss", None, drifted_pairs, 33, 20, dtype) for dtype in (torch.float32, torch.float16)
]
RANK_OPTIONS = {"contrastive_loss": {}, "difference_loss": {"decay": 0.5}, "dive_loss": {"weight": 2.5}}
RANK_OPTIONS["distillation_loss"] = {
    "feature_weight": 20.0, "relational_weight": 1.0, "interactive_weight": 0.5, "cross_weight": 2.0
}  # fmt: skip
SHARED = ("logit_scale", "average_vector", "teacher_scale")


def rank_inputs(name, kind, pairs, width):
    """Arguments of all ranks; both batches have the same number of pairs, so that both can be split over ranks."""
    if name == "dive_loss":
        return make_dive_inputs(kind, pairs, pairs, width)
    return inputs_of(name, kind, pairs, width, scale=100.0 if kind == opposed_pairs else 1 / 0.07)


def evaluate_on_rank(cases):
    """Values and gradients of this rank, case by case."""
    results = []
    rank, world_size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    for name, path, kind, pairs, width, dtype in cases:
        force_path(path)
        inputs = rank_inputs(name, kind, world_size * pairs, width)
        for key in inputs.keys() - set(SHARED):
            inputs[key] = np.split(inputs[key], world_size)[rank]
        with contextlib.ExitStack() as stack:
            if primitives.INTERPRETED:
                stack.enter_context(checked_addresses())
                if name == "distillation_loss":  # fewer programs that handle rows: they run one after another
                    stack.enter_context(unittest.mock.patch.object(primitives, "_ELEMENTS", 2**15))
                if kind == opposed_pairs:
                    stack.enter_context(tensor_core_sums())
            results.append(
                run(name, tensors_of(inputs, dtype), group=group, backend="triton", **RANK_OPTIONS[name])
            )
    return results


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (2, RANK_CASES[::2]),
        (3, RANK_CASES[1::2]),
        *(pytest.param(size, RANK_CASES, marks=SLOW) for size in (1, 2, 3)),
    ],
    ids=["2-some", "3-others", "1", "2", "3"],
)
def test_ranks_give_the_result_of_one_process(world_size, cases):
    """Values are bit-identical on all ranks, and the average over ranks is the gradient of one process."""
    if DEVICE == "cuda" and world_size > torch.cuda.device_count():
        pytest.skip("needs a GPU per rank")
    on_ranks = run_ranks(world_size, evaluate_on_rank, cases, timeout=300.0)
    for case, (name, _, kind, pairs, width, dtype) in enumerate(cases):
        tensors = tensors_of(rank_inputs(name, kind, world_size * pairs, width), dtype)
        values, gradients = run(name, tensors, backend="torch", **RANK_OPTIONS[name])
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}[dtype]
        for key, value in values.items():
            first, *others = (results[case][0][key] for results in on_ranks)
            assert all(torch.equal(first, other) for other in others), key
            bound = 1e-7 + min(tolerance, 1e-5 if kind == drifted_pairs else 1e-6) * _norm(value)
            assert _norm(first - value) <= bound, (name, key, kind)
        for key, gradient in gradients.items():
            parts = [results[case][1][key].double() for results in on_ranks]
            actual = torch.stack(parts).mean(0) if key in SHARED else torch.cat(parts) / world_size
            # The rows of opposed pairs are parallel, so their gradients are the rounding of s.
            bound = tolerance * _norm(gradient) + (1e-7 if kind == drifted_pairs else 1e-6)
            assert _norm(actual - gradient) <= bound, (name, key, kind, pairs, width, dtype)


# PyTorch's compiler


def operators():
    """Every custom op by name, with arguments for it."""
    tensors = tensors_of(inputs_of("dive_loss", drifted_pairs, 5, 16), torch.float32)
    image, text, scale, *reference, average_vector = (tensors[key] for key in DIVE)
    options, upstream = (0.9, 1.0, 2.0, True), torch.tensor(3.0, device=DEVICE)
    with torch.no_grad():
        _, *saved = contrastive.launch_forward(image, text, scale, "")
        _, _, state = difference.launch_forward(*reference, average_vector, *options, "")
        joint = image, text, scale, *reference, average_vector, 10.0, *options, ""
        _, _, *saved_joint = joint_step.launch_forward(*joint)
    sizes = 5, 5, 0, 16
    frozen = [tensor.detach() for tensor in reference]
    return {
        "contrastive": (contrastive.forward, (image, text, scale, "")),
        "contrastive_backward": (contrastive.backward, (upstream, scale.detach(), *saved, *sizes)),
        "difference": (difference.forward, (*reference, average_vector, *options, "")),
        "difference_backward": (difference.backward, (upstream, *frozen, state, *options)),
        "dive": (joint_step.forward, joint),
        "dive_backward": (
            joint_step.backward,
            (upstream, scale.detach(), *saved_joint, *frozen, *sizes, 10.0, *options),
        ),
    }


@pytest.mark.parametrize(
    "name",
    ["contrastive", "contrastive_backward", "difference", "difference_backward", "dive", "dive_backward"],
)
def test_opcheck(name, monkeypatch):
    # It compares all results of two calls, also the elements between the state's buffers that nothing writes.
    monkeypatch.setattr(primitives, "empty", lambda *shape, **kind: torch.zeros(shape, **kind))
    operator, arguments = operators()[name]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_step_is_one_graph(compiler):
    """Towers, losses and the update of the average vector compile without a graph break, to the same result."""
    torch._dynamo.reset()
    tensors = tensors_of(inputs_of("dive_loss", drifted_pairs, 12, 16), torch.float32)
    tower = torch.nn.Linear(16, 16, device=DEVICE)

    def step(image_features, reference_image_features, average_vector, **others):
        result = kernels.dive_loss(
            image_features=tower(image_features),
            reference_image_features=tower(reference_image_features),
            average_vector=average_vector,
            **others,
            backend="triton",
        )
        separate = kernels.contrastive_loss(
            tower(image_features), others["text_features"], others["logit_scale"], backend="triton"
        )
        return result.loss + separate, result.average_vector * 1.0, result.image_norm

    expected = step(**tensors)
    expected_gradient = torch.autograd.grad(expected[0], tower.weight)[0]
    # Inductor's cache does not notice that an op returns other shapes after a change.
    with torch._inductor.config.patch(force_disable_caches=True):
        actual = torch.compile(step, fullgraph=True, backend=compiler)(**tensors)
    actual_gradient = torch.autograd.grad(actual[0], tower.weight)[0]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_gradient, expected_gradient)


@pytest.mark.parametrize("name", LOSSES)
def test_fake_tensors_have_the_real_shapes(name):
    """Fake tensors have the shapes and dtypes of real ones, as the prediction of peak memory needs them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = tensors_of(inputs_of(name, drifted_pairs, 5, 16), torch.float16)
    values, gradients = run(name, real, backend="triton")
    mode = FakeTensorMode()
    fake = {
        key: mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad) for key, tensor in real.items()
    }
    with mode:
        fake_values, fake_gradients = evaluate(getattr(kernels, name), fake, backend="triton")
    for one, other in (values, fake_values), (gradients, fake_gradients):
        for key, tensor in one.items():
            assert (tensor.shape, tensor.dtype) == (other[key].shape, other[key].dtype), key


# Backends and bad input


def test_auto_backend_is_triton_where_it_runs(monkeypatch):
    features = torch.ones(2, 3, device=DEVICE)
    assert backend.uses_triton("auto", features)
    assert not backend.uses_triton("torch", features)
    monkeypatch.setattr(primitives, "INTERPRETED", False)
    assert not backend.uses_triton("auto", features.cpu())


@pytest.mark.parametrize(
    ("obstacle", "message"),
    [
        ("no GPU", "features are on cpu, not on CUDA, and TRITON_INTERPRET=1 is not set"),
        ("no Triton", "the package triton is not installed"),
        ("width", "embeddings of 2049 elements are wider than 2048"),
        ("teacher", "text_teacher requires a gradient, which the kernels do not compute"),
    ],
)
def test_triton_backend_that_cannot_run(obstacle, message, monkeypatch):
    width = 2049 if obstacle == "width" else 4
    device = "cpu" if obstacle == "no GPU" else DEVICE
    arguments = {key: torch.ones(3, width, device=device) for key in DIFFERENCE[:4]}
    arguments["average_vector"] = torch.ones(width, device=device)
    if obstacle == "no GPU":
        monkeypatch.setattr(primitives, "INTERPRETED", False)
    elif obstacle == "no Triton":
        monkeypatch.setattr(backend, "primitives", None)
    elif obstacle == "teacher":
        arguments["text_teacher"].requires_grad_()
    with pytest.raises(ValueError, match=f'^backend: "triton" cannot run: {message}; use "auto" or "torch"$'):
        kernels.difference_loss(**arguments, backend="triton")
    expected = naive.difference_loss(**arguments)
    assert torch.equal(kernels.difference_loss(**arguments).loss, expected.loss)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"^backend: expected one of auto, triton, torch, got 'cuda'$"):
        kernels.contrastive_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(()), backend="cuda")
