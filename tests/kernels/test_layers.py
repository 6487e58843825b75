"""What all layers of a transformer block have in common: memory, determinism, autocast and PyTorch's compiler."""

import itertools

import numpy as np
import pytest
import torch
from layer_cases import (
    DEVICE,
    LAYERS,
    assert_equal,
    evaluate,
    make_case,
    normal,
    parameter_dtype,
    rows_of,
    upstream_of,
)
from test_triton import GuardedBuffers, checked_addresses, shuffle_programs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from dive_fast.kernels import activation, backend, column_sums, direct, layer_norm, packed_qkv, primitives

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not primitives.INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1 before the start"
)


@pytest.fixture(params=["all", "few"])
def programs(request, monkeypatch):
    """As many programs as the sizes give, or few, which iterate over several blocks of rows each."""
    if request.param == "few":
        monkeypatch.setattr(activation, "_MAX_PROGRAMS", 2)
        monkeypatch.setattr(packed_qkv, "_MAX_PROGRAMS", 6)
        monkeypatch.setattr(layer_norm, "_FORWARD_PROGRAMS", 2)
        monkeypatch.setattr(layer_norm, "_BACKWARD_PROGRAMS", 2)


# Column sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_column_sums_of_many_programs(dtype):
    partials = normal(0, 300, 3, 33, dtype=torch.float32).detach()
    sums = column_sums.launch_column_sums(partials, [torch.float32, dtype, torch.float64])
    for index, (actual, expected) in enumerate(zip(sums, partials.double().sum(0))):
        tolerance = 2e-3 if actual.dtype == torch.float16 else 1e-5
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance, msg=str(index))
    assert [actual.dtype for actual in sums] == [torch.float32, dtype, torch.float64]


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 640, 100_864])
def test_rows_are_split_completely_and_evenly(rows):
    for block, most in itertools.product((1, 4, 8), (0, 1, 170, 1056)):
        split = column_sums.split_rows(rows, block, most)
        assert split.share % block == 0
        assert split.programs <= max(1, most)
        assert split.programs * split.share >= rows > (split.programs - 1) * split.share or rows == 0
        assert (split.programs == 0) == (rows == 0)
    assert column_sums.split_rows(640, 8, 512).programs == 80
    assert column_sums.split_rows(100_864, 2, 1056).programs > 1040


# Memory


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("shape", "dtype"), [((1, 1, 8), torch.float32), ((2, 7, 70), torch.float16)], ids=str)
def test_no_access_outside_of_buffers(name, shape, dtype, programs, monkeypatch):
    function, tensors = make_case(name, shape, dtype)
    expected = evaluate(function, tensors, backend="triton")
    guard = GuardedBuffers()
    monkeypatch.setattr(primitives, "empty", guard)
    guarded = {key: guard.surround(tensor.detach()).requires_grad_() for key, tensor in tensors.items()}
    assert_equal(evaluate(function, guarded, backend="triton"), expected)
    guard.assert_intact()


@pytest.mark.skipif(not primitives.INTERPRETED, reason="only the interpreter exposes addresses")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 130), (2, 8, 16)])
def test_no_address_outside_of_tensors(name, shape, programs):
    function, tensors = make_case(name, shape)
    with checked_addresses():
        evaluate(function, tensors, backend="triton")


@pytest.mark.parametrize("name", LAYERS)
def test_layout_of_inputs_and_gradients_does_not_matter(name):
    function, tensors = make_case(name, (4, 3, 33))
    expected = evaluate(function, tensors, backend="triton")
    rearranged = {}
    for key, tensor in tensors.items():
        # Every other element of a wider tensor, and one element after any alignment.
        detached = tensor.detach()
        layouts = (
            detached.repeat_interleave(2, dim=-1)[..., ::2],
            torch.cat([detached.new_zeros(1), detached.flatten()])[1:].view(detached.shape),
        )
        rearranged[key] = layouts[tensor.ndim % 2].requires_grad_()
    outputs = function(**rearranged, backend="triton")
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    upstream = [upstream_of(output, index) for index, output in enumerate(outputs)]
    upstream = [gradient.repeat_interleave(2, dim=-1)[..., ::2] for gradient in upstream]
    gradients = torch.autograd.grad(outputs, list(rearranged.values()), upstream)
    assert_equal((tuple(output.detach() for output in outputs), dict(zip(rearranged, gradients))), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_expanded_gradient(name):
    """The backward of a sum gives gradients without strides."""
    function, tensors = make_case(name, (4, 3, 32), torch.float32)
    results = []
    for choice in ("triton", "torch"):
        outputs = function(**tensors, backend=choice)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        results.append(torch.autograd.grad(sum(output.sum() for output in outputs), list(tensors.values())))
    for triton, plain in zip(*results):
        torch.testing.assert_close(triton, plain, rtol=1e-4, atol=1e-4)


# Determinism


@pytest.mark.parametrize("name", LAYERS)
def test_two_runs_are_bit_identical(name, programs):
    function, tensors = make_case(name, (5, 9, 40))
    assert_equal(*(evaluate(function, tensors, backend="triton") for _ in range(2)))


@pytest.mark.skipif(not primitives.INTERPRETED, reason="a GPU chooses the order itself")
@pytest.mark.parametrize("name", LAYERS)
def test_order_of_programs_does_not_matter(name, programs, monkeypatch):
    function, tensors = make_case(name, (5, 9, 40))
    expected = evaluate(function, tensors, backend="triton")
    shuffle_programs(monkeypatch)
    assert_equal(evaluate(function, tensors, backend="triton"), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_second_backward_gives_the_same_gradient(name):
    function, tensors = make_case(name, (4, 3, 32))
    output = function(**tensors, backend="triton")
    output = output if isinstance(output, torch.Tensor) else output[-1]
    leaves = list(tensors.values())
    first, second = (
        torch.autograd.grad(
            output, leaves, torch.ones_like(output), retain_graph=True, materialize_grads=True, allow_unused=True
        )
        for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second))


# Callers


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("choice", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_autocast_changes_nothing(name, choice, dtype):
    function, tensors = make_case(name, (2, 7, 40), dtype)
    expected = evaluate(function, tensors, backend=choice)
    for autocast in (torch.float16, torch.bfloat16):

        def call(autocast=autocast, **arguments):
            with torch.autocast(DEVICE, autocast):
                return function(**arguments)

        assert_equal(evaluate(call, tensors, backend=choice), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_checkpoint_recomputes_the_same_bits(name):
    function, tensors = make_case(name, (2, 7, 40))

    def recomputed(**tensors):
        return checkpoint(function, **tensors, backend="triton", use_reentrant=False)

    assert_equal(evaluate(recomputed, tensors), evaluate(function, tensors, backend="triton"))


@pytest.mark.parametrize("name", LAYERS)
def test_no_grad_gives_constants(name):
    function, tensors = make_case(name, (2, 7, 40))
    with torch.no_grad():
        outputs = function(**tensors, backend="triton")
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    # PyTorch itself lets a view of a leaf require a gradient there.
    new = [output for output in outputs if output.data_ptr() != tensors["x"].data_ptr() and output._base is None]
    assert len(new) == {"biased_activation": 1, "add_layer_norm": 2, "layer_norm": 1, "split_qkv": 0}[name]
    assert not any(output.requires_grad for output in new)


@pytest.mark.parametrize("name", LAYERS)
def test_eager_calls_have_the_bits_of_the_custom_ops(name, monkeypatch):
    function, tensors = make_case(name, (2, 7, 40), torch.float32, torch.float16)
    expected = evaluate(function, tensors, backend="triton")
    monkeypatch.setattr(direct, "is_eager", lambda *tensors: False)
    assert_equal(evaluate(function, tensors, backend="triton"), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_auto_is_triton_where_it_runs(name, monkeypatch):
    function, tensors = make_case(name, (2, 3, 20))
    launches, launch = [], primitives.launch
    monkeypatch.setattr(
        primitives, "launch", lambda *args, **kwargs: launches.append(1) or launch(*args, **kwargs)
    )
    evaluate(function, tensors)
    assert launches
    launches.clear()
    evaluate(function, tensors, backend="torch")
    monkeypatch.setattr(backend, "primitives", None)
    evaluate(function, tensors)
    assert not launches
    with pytest.raises(ValueError, match="the package triton is not installed"):
        function(**tensors, backend="triton")


# PyTorch's compiler


def operators():
    """Every custom op by name, with arguments for it."""
    tensors = make_case("add_layer_norm", (5, 16))[1]
    x, branch, vectors = tensors["x"], tensors["branch"], [tensors[k] for k in ("branch_bias", "weight", "bias")]
    frozen, weight = x.detach(), vectors[1].detach()
    statistics = torch.ones(5, device=DEVICE)
    sums = (torch.float32,) * 3
    gradients = [normal(k, 2, 3, 5, 4, dtype=torch.float16).detach() for k in range(3)]
    return {
        "activation": (activation.forward, (x, vectors[0], "gelu")),
        "activation_backward": (activation.backward, (frozen, frozen, vectors[0].detach(), "gelu", True)),
        "activation_without_bias": (activation.backward, (frozen, frozen, None, "gelu", False)),
        "add_layer_norm": (layer_norm.forward, (x, branch, *vectors, 1e-5, torch.float16)),
        "add_layer_norm_without_bias": (layer_norm.forward, (x, branch, None, *vectors[1:], 1e-5, torch.float32)),
        "layer_norm": (layer_norm.norm_forward, (frozen, weight, vectors[2].detach(), 1e-5, torch.float16)),
        "layer_norm_backward": (
            layer_norm.backward,
            (frozen, statistics, statistics, weight, frozen, frozen, torch.float32, *sums),
        ),
        "layer_norm_backward_without_sums": (
            layer_norm.backward,
            (frozen, statistics, statistics, weight, frozen, None, None, None, None, None),
        ),
        "split_qkv_backward": (packed_qkv.backward, (gradients, torch.float32)),
        "split_qkv_backward_without_bias": (packed_qkv.backward, (gradients[:2], None)),
    }


@pytest.mark.parametrize("name", list(operators()) if primitives.INTERPRETED or DEVICE == "cuda" else [])
def test_opcheck(name):
    operator, arguments = operators()[name]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_layer_is_one_graph(name, compiler):
    torch._dynamo.reset()
    function, tensors = make_case(name, (2, 6, 16), torch.float32)

    def call(**tensors):
        result = function(**{key: 2.0 * tensor for key, tensor in tensors.items()}, backend="triton")
        return result * 1.0 if isinstance(result, torch.Tensor) else tuple(output * 1.0 for output in result)

    expected = evaluate(call, tensors)
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    actual = evaluate(compiled, tensors)
    for one, other in zip((*actual[0], *actual[1].values()), (*expected[0], *expected[1].values()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("branch_dtype", [torch.float16, torch.float32])
def test_fake_tensors_have_the_real_shapes(name, branch_dtype):
    function, tensors = make_case(name, (2, 7, 40), torch.float16, branch_dtype)
    outputs, gradients = evaluate(function, tensors, backend="triton")
    mode = FakeTensorMode()
    fake = {key: mode.from_tensor(tensor.detach()).requires_grad_() for key, tensor in tensors.items()}
    with mode:
        fake_outputs, fake_gradients = evaluate(function, fake, backend="triton")
    for one, other in zip((*outputs, *gradients.values()), (*fake_outputs, *fake_gradients.values()), strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_bytes_of_saved_tensors():
    """The activation saves its arguments, the norm its sum and two numbers a row, and packed attention nothing."""
    for name in LAYERS:
        function, tensors = make_case(name, (4, 8, 64))
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(**tensors, backend="triton")
        rows, width = 32, 64
        assert (
            sum(saved.values())
            == {
                "biased_activation": rows * width * 2 + width * 4,
                "add_layer_norm": rows * (width * 2 + 8) + width * 4,
                "layer_norm": rows * (width * 2 + 8) + width * 4,
                "split_qkv": 0,
            }[name]
        ), name


def test_parameters_of_other_dtypes_get_gradients_of_their_own():
    for name in LAYERS:
        function, tensors = make_case(name, (4, 8, 64))
        expected = evaluate(function, tensors, backend="triton")[1]
        for key in tensors.keys() - {"x", "branch"}:
            tensors[key] = tensors[key].detach().half().requires_grad_()
        for key, gradient in evaluate(function, tensors, backend="triton")[1].items():
            assert gradient.dtype == tensors[key].dtype == torch.float16
            np.testing.assert_allclose(rows_of(gradient), rows_of(expected[key]), rtol=1e-2, atol=5e-2)
    assert parameter_dtype(torch.float16) == torch.float32
