"""The activation with its bias: errors against float64 next to plain PyTorch's, infinities, and launches."""

import layer_reference
import pytest
import torch
import torch.nn.functional as F
from layer_cases import (
    DEVICE,
    DTYPES,
    SHAPES,
    assert_at_most_twice_the_error,
    evaluate,
    normal,
    parameter_dtype,
    rows_of,
    upstream_of,
)
from test_triton import count_launches

import dive_fast.kernels as kernels
from dive_fast.kernels import activation, primitives

KINDS = ("quick_gelu", "gelu", "gelu_tanh")

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not primitives.INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1 before the start"
)


def apply(kind):
    return lambda x, bias=None, **options: kernels.biased_activation(x, bias, kind, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_error_at_most_twice_pytorchs(kind, dtype, has_bias, monkeypatch):
    for shape, programs in zip(SHAPES, (4096, 1, 2, 4096)):
        monkeypatch.setattr(activation, "_MAX_PROGRAMS", programs)
        tensors = {"x": normal(0, *shape, dtype=dtype, scale=4.0)}
        if has_bias:
            tensors["bias"] = normal(1, shape[-1], dtype=parameter_dtype(dtype))
        triton, torch_ = (evaluate(apply(kind), tensors, backend=backend) for backend in ("triton", "torch"))
        upstream = rows_of(upstream_of(triton[0][0], 0))
        bias = rows_of(tensors["bias"]) if has_bias else None
        exact = layer_reference.biased_activation(rows_of(tensors["x"]), bias, kind, upstream)
        rounding = torch.finfo(parameter_dtype(dtype)).eps
        assert_at_most_twice_the_error(triton[0][0], torch_[0][0], exact["output"], rounding, "output")
        for key, gradient in triton[1].items():
            assert_at_most_twice_the_error(gradient, torch_[1][key], exact[key], rounding, key)


@pytest.mark.parametrize("kind", KINDS)
def test_tails_are_as_accurate_as_the_dtype(kind):
    """Far from zero each element is as accurate as PyTorch's fp32 module, within one rounding."""
    x = torch.linspace(-30, 30, 601, device=DEVICE).requires_grad_()
    bias = torch.zeros(601, device=DEVICE)
    y = kernels.biased_activation(x, bias, kind, "triton")
    (dx,) = torch.autograd.grad(y.sum(), x)
    exact = layer_reference.biased_activation(rows_of(x)[None], None, kind, 1.0)
    for actual, values in (y, exact["output"]), (dx, exact["x"]):
        expected = torch.tensor(values[0]).to(DEVICE)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5 if kind == "gelu" else 5e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_infinities_and_largest_values_behave_as_in_pytorch(kind, dtype):
    largest = torch.finfo(dtype).max
    values = [float("inf"), float("-inf"), float("nan"), largest, -largest, 100.0, -100.0, 0.0]
    x = torch.tensor(values, dtype=dtype, device=DEVICE).requires_grad_()
    y = kernels.biased_activation(x, None, kind, "triton")
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    # PyTorch's fp32 gelu overflows at fp32's largest values, and its vectorized erf makes NaN of +inf.
    matches = torch.zeros(2, len(values), dtype=torch.bool, device=DEVICE)
    for precision in (torch.float32, torch.float64):
        z = x.detach().to(precision).requires_grad_()
        if kind == "quick_gelu":
            expected = z * torch.sigmoid(1.702 * z)
        else:
            expected = F.gelu(z, approximate="tanh" if kind == "gelu_tanh" else "none")
        (expected_dx,) = torch.autograd.grad(expected.sum(), z)
        matches[0] |= torch.isclose(y, expected.to(dtype), equal_nan=True)
        matches[1] |= torch.isclose(dx, expected_dx.to(dtype), equal_nan=True)
    assert matches.all()


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_nonfinite_values_reach_their_column_of_the_bias_gradient_alone(poison):
    x, bias = normal(0, 9, 20, dtype=torch.float16), normal(1, 20, dtype=torch.float32)
    x.detach()[4, 7] = -poison
    bias.detach()[11] = poison
    _, gradients = evaluate(apply("quick_gelu"), {"x": x, "bias": bias}, backend="triton")
    assert gradients["bias"].isnan().nonzero().flatten().tolist() == [7, 11]


@pytest.mark.skipif(not primitives.INTERPRETED, reason="fp64 runs under the interpreter only")
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    tensors = normal(0, 3, 5, dtype=torch.float64), normal(1, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, bias: apply(kind)(x, bias, backend="triton"), tensors)


def test_number_of_launches(monkeypatch):
    """One forward, one backward, and one for the sums of a bias that requires a gradient."""
    x, bias = normal(0, 9, 20, dtype=torch.float16), normal(1, 20, dtype=torch.float32)
    for tensors, expected in ((x, bias), 3), ((x, bias.detach()), 2), ((x, None), 2):
        leaves = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]

        def step(tensors=tensors, leaves=leaves):
            y = kernels.biased_activation(*tensors, "gelu", "triton")
            return torch.autograd.grad(y, leaves, x.detach())

        launches, operations, _ = count_launches(monkeypatch, step)
        assert launches == expected
        assert operations == [
            "dive_fast.biased_activation.default",
            "dive_fast.biased_activation_backward.default",
        ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(()), None, "gelu"), r"x: expected shape \(..., W\) with W > 0, got \(\)"),
        ((torch.ones(2, 3), torch.ones(2), "gelu"), r"bias: expected shape \(3,\), got \(2,\)"),
        ((torch.ones(2, 3), torch.ones(3).int(), "gelu"), "bias: expected a floating-point dtype"),
        ((torch.ones(2, 3).int(), None, "gelu"), "x: expected a floating-point dtype"),
        ((torch.ones(2, 3), None, "relu"), "kind: expected one of quick_gelu, gelu, gelu_tanh, got 'relu'"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_bad_arguments_are_refused(arguments, message, backend):
    with pytest.raises(ValueError, match=message):
        kernels.biased_activation(*arguments, backend)
