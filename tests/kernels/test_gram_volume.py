"""The volume of three vectors in Triton: against float64, memory, order of programs, PyTorch's compiler."""

import itertools

import numpy as np
import numpy_reference
import pytest
import torch
from inputs import (
    KINDS,
    TRIPLE,
    confident_pairs,
    drifted_pairs,
    evaluate,
    make_triple,
    random_pairs,
    to_tensors,
    vanishing_pairs,
)
from test_triton import (
    DEVICE,
    DTYPES,
    SLOW,
    GuardedBuffers,
    checked_addresses,
    count_launches,
    mostly_slow_product,
    shuffle_programs,
)

import dive_fast.kernels as kernels
from dive_fast.kernels import naive, primitives, volume

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not primitives.INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1 before the start"
)
# One row, a block of rows less one, and plus one; widths up to more than one block of columns.
SHAPES = ((1, 1), (1, 16), (3, 17), (5, 130), (70, 48))


def tensors_of(kind, rows, width, dtype, seed=0):
    """Leaf tensors on the device."""
    limit = torch.finfo(dtype).max / 2
    inputs = {key: np.clip(array, -limit, limit) for key, array in make_triple(kind, rows, width, seed).items()}
    return {key: leaf.detach().to(DEVICE).requires_grad_() for key, leaf in to_tensors(inputs, dtype).items()}


def close_triple(rows, width, distance, seed=0):
    """Unit rows whose second and third vectors are ``distance`` away from the first."""
    random = np.random.default_rng([seed, rows, width])
    first, second, third = random.standard_normal((3, rows, width))
    first, second, third = map(numpy_reference.unit, (first, second, third))
    return dict(zip(TRIPLE, (first, first + distance * second, first + distance * third)))


def run(tensors, backend="triton"):
    """The volume and its gradients by name, on the CPU; the leaves stay unchanged."""
    leaves = {key: tensor.detach().clone().requires_grad_() for key, tensor in tensors.items()}
    values, gradients = evaluate(kernels.gram_volume, leaves, backend=backend)
    return {key: tensor.cpu() for key, tensor in (values | gradients).items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], rtol=0, atol=0, equal_nan=True, msg=key)


def assert_at_most_twice_the_error(tensors):
    """The norm of each tensor's error is at most twice plain PyTorch's plus one rounding of each operation."""
    dtype = primitives.compute_dtype(tensors["first"].dtype)
    expected = numpy_reference.gram_volume(
        **{key: tensor.detach().double().cpu().numpy() for key, tensor in tensors.items()},
        rounding=torch.finfo(dtype).eps,
    )
    exact = expected.values | expected.gradients
    bounds = expected.value_bounds | expected.gradient_bounds
    actual, plain = run(tensors), run(tensors, "torch")
    assert actual.keys() == plain.keys()
    for key, tensor in actual.items():
        assert (tensor.dtype, tensor.shape) == (plain[key].dtype, plain[key].shape), key
        error, plain_error = (np.linalg.norm(x.double().numpy() - exact[key]) for x in (tensor, plain[key]))
        bound = np.linalg.norm(np.broadcast_to(bounds[key], exact[key].shape))
        assert error <= 2 * plain_error + bound, f"{key}: off by {error}, PyTorch by {plain_error}, {bound=}"


# Against float64


@pytest.mark.parametrize(("kind", "dtype"), mostly_slow_product([*KINDS, confident_pairs], DTYPES))
def test_error_at_most_twice_pytorchs(kind, dtype):
    if dtype == torch.float16 and kind == vanishing_pairs:
        pytest.skip(
            "in fp16 a row below the clamp is a row of zeros, and its gradient, dz / 1e-12, is out of range"
        )
    for rows, width in SHAPES:
        assert_at_most_twice_the_error(tensors_of(kind, rows, width, dtype))


@pytest.mark.parametrize("distance", [1.0, 0.1, 1e-2, 1e-3])
def test_error_of_close_vectors(distance):
    for dtype in DTYPES:
        inputs = to_tensors(close_triple(9, 64, distance), dtype)
        assert_at_most_twice_the_error({key: tensor.detach().to(DEVICE) for key, tensor in inputs.items()})


@pytest.mark.parametrize("width", [768, *(pytest.param(width, marks=SLOW) for width in (512, 1023, 1280))])
def test_error_at_widths_of_real_models(width):
    assert_at_most_twice_the_error(tensors_of(drifted_pairs, 5, width, torch.float16))


def test_bits_are_those_of_plain_pytorch_where_vectors_are_equal():
    """The determinant is exactly 0, and so is the gradient: products are not fused with sums."""
    first, second, _ = (tensor.detach() for tensor in tensors_of(random_pairs, 9, 64, torch.float32).values())
    for triple in itertools.product((first, second), repeat=3):
        results = run(dict(zip(TRIPLE, triple)))
        if triple[1] is triple[2] or triple[0] is triple[1]:
            assert results["loss"].item() == pytest.approx(naive.VOLUME_EPS, rel=1e-6)
            assert not any(results[key].any() for key in TRIPLE)


def test_volume_of_known_cosines():
    x, y, z = torch.eye(5, device=DEVICE)[:3, None].unbind()
    for triple, volume_of_it in (((x, y, z), 1.0), ((x, 2 * y, x + y), 0.0), ((x, x + y, x + z), 0.5)):
        assert kernels.gram_volume(*triple, backend="triton").item() == pytest.approx(volume_of_it, abs=1e-3)


@pytest.mark.skipif(not primitives.INTERPRETED, reason="fp64 runs under the interpreter only")
@pytest.mark.parametrize(("rows", "width"), [(3, 4), (1, 3)])
def test_gradcheck(rows, width):
    tensors = tensors_of(random_pairs, rows, width, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *features: kernels.gram_volume(*features, backend="triton"), list(tensors.values())
    )


def test_upstream_gradient_is_applied_before_rounding():
    """The gradient of many long rows is below fp16's smallest number unless the loss scale comes first."""
    tensors = {key: (2e4 * tensor).half() for key, tensor in to_tensors(close_triple(64, 64, 0.1)).items()}
    leaves = [tensor.detach().to(DEVICE).requires_grad_() for tensor in tensors.values()]
    loss = kernels.gram_volume(*leaves, backend="triton")
    (scaled,) = torch.autograd.grad(loss * 2.0**16, leaves[1], retain_graph=True)
    (plain,) = torch.autograd.grad(loss, leaves[1])
    assert (plain == 0).float().mean() > 0.5
    assert (scaled == 0).float().mean() < 0.02


# Memory, order of programs, launches


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 130), (65, 70)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_no_access_outside_of_buffers(rows, width, dtype, monkeypatch):
    """Memory full of NaN gives the same bits, and what surrounds it does not change."""
    tensors = tensors_of(drifted_pairs, rows, width, dtype)
    expected = run(tensors)
    guard = GuardedBuffers()
    monkeypatch.setattr(primitives, "empty", guard)
    guarded = {key: guard.surround(tensor.detach()).requires_grad_() for key, tensor in tensors.items()}
    values, gradients = evaluate(kernels.gram_volume, guarded, backend="triton")
    guard.assert_intact()
    assert_equal({key: tensor.cpu() for key, tensor in (values | gradients).items()}, expected)


@pytest.mark.skipif(not primitives.INTERPRETED, reason="only the interpreter exposes addresses and the order")
def test_order_of_programs_does_not_matter(monkeypatch):
    """Nor does any program read or write outside of the launch's tensors, even for values that it does not use."""
    tensors = tensors_of(drifted_pairs, 70, 16, torch.float16)
    expected = run(tensors)
    orders = shuffle_programs(monkeypatch)
    with checked_addresses():
        actual = run(tensors)
    assert any(list(order) != sorted(order) for order in orders.values())
    assert_equal(actual, expected)


def test_many_sums_are_added_in_pieces(monkeypatch):
    tensors = tensors_of(drifted_pairs, 70, 16, torch.float32)
    expected = run(tensors)
    monkeypatch.setattr(volume, "_SUMS", 4)
    actual = run(tensors)
    assert actual["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)


def test_two_runs_are_bit_identical_and_layout_does_not_matter():
    tensors = tensors_of(drifted_pairs, 9, 33, torch.float16)
    expected = run(tensors)
    assert_equal(run(tensors), expected)
    layouts = {
        "first": tensors["first"].detach().T.contiguous().T,
        "second": tensors["second"].detach().repeat_interleave(2, dim=1)[:, ::2],
        "third": torch.cat([tensors["third"].detach().new_zeros(1), tensors["third"].detach().flatten()])[1:].view(
            9, 33
        ),
    }
    leaves = {key: tensor.requires_grad_() for key, tensor in layouts.items()}
    values, gradients = evaluate(kernels.gram_volume, leaves, backend="triton")
    assert_equal({key: tensor.cpu() for key, tensor in (values | gradients).items()}, expected)


def test_two_launches_forward_and_one_backward(monkeypatch):
    features = [tensor.detach() for tensor in tensors_of(drifted_pairs, 20, 48, torch.float16).values()]
    launches, operations, _ = count_launches(monkeypatch, lambda: volume.launch_forward(*features))
    assert (launches, operations) == (2, [])
    upstream = torch.ones((), device=DEVICE)
    launches, operations, _ = count_launches(monkeypatch, lambda: volume.launch_backward(upstream, *features))
    assert (launches, operations) == (1, [])


def test_programs_write_little_beside_the_gradients(monkeypatch):
    """The forward writes one number for each block of rows; the backward writes the gradients alone."""
    allocated = []
    empty = primitives.empty

    def counted(*shape, **kind):
        allocated.append(empty(*shape, **kind))
        return allocated[-1]

    monkeypatch.setattr(primitives, "empty", counted)
    features = torch.empty(512, 768, dtype=torch.float16, device="meta")
    monkeypatch.setattr(primitives, "launch", lambda *_, **__: None)
    loss = volume.launch_forward(features, features, features)
    assert sum(tensor.nbytes for tensor in allocated) == 4 * (512 // 2 + 1)
    allocated.clear()
    volume.launch_backward(loss, features, features, features)
    assert sum(tensor.nbytes for tensor in allocated) == 3 * features.nbytes


# Not a number


@pytest.mark.parametrize("argument", TRIPLE)
@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float16, float("inf")), (torch.float32, float("nan"))], ids=str
)
def test_nonfinite_feature_reaches_loss_and_gradients(argument, dtype, value):
    """Steps are skipped because of their gradients; other rows keep theirs."""
    tensors = tensors_of(random_pairs, 9, 20, dtype)
    expected = run(tensors)
    tensors[argument].detach()[2, 7] = value
    results, plain = run(tensors), run(tensors, "torch")
    assert results["loss"].isnan()
    assert plain["loss"].isnan()
    rest = torch.arange(9) != 2
    for key in TRIPLE:
        assert not results[key][2].isfinite().any(), key
        assert not plain[key][2].isfinite().any(), key
        assert torch.equal(results[key][rest], expected[key][rest]), key


# PyTorch's compiler


def test_operators_for_the_compiler():
    tensors = list(tensors_of(drifted_pairs, 5, 16, torch.float32).values())
    torch.library.opcheck(volume.forward, tensors)
    upstream, features = torch.ones((), device=DEVICE), [tensor.detach() for tensor in tensors]
    torch.library.opcheck(volume.backward, (upstream, *features))


def test_compiled_and_direct_calls_have_the_same_bits():
    tensors = tensors_of(drifted_pairs, 9, 33, torch.float32)
    expected = run(tensors)
    compiled = torch.compile(lambda *features: kernels.gram_volume(*features, backend="triton"), fullgraph=True)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors.values()]
    loss = compiled(*leaves)
    gradients = torch.autograd.grad(loss, leaves)
    assert_equal({"loss": loss.detach().cpu()} | dict(zip(TRIPLE, (g.cpu() for g in gradients))), expected)


def test_second_derivative_is_an_error_and_not_a_constant():
    for index in range(3):
        features = [tensor.detach() for tensor in tensors_of(random_pairs, 3, 16, torch.float32).values()]
        features[index].requires_grad_()
        loss = kernels.gram_volume(*features, backend="triton")
        (gradient,) = torch.autograd.grad(loss, features[index], create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            (loss + gradient.square().sum()).backward()


def test_a_wide_matrix_takes_plain_pytorch():
    wide = [torch.randn(2, primitives.MAX_WIDTH + 1, device=DEVICE) for _ in range(3)]
    assert torch.equal(kernels.gram_volume(*wide), naive.gram_volume(*wide))
    with pytest.raises(ValueError, match=r'^backend: "triton" cannot run'):
        kernels.gram_volume(*wide, backend="triton")
