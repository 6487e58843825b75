"""The residual addition and layer norm: errors against float64 next to plain PyTorch's, and partial backwards."""

import functools
import itertools

import layer_reference
import numpy as np
import pytest
import torch
from layer_cases import (
    DEVICE,
    DTYPES,
    SHAPES,
    assert_at_most_twice_the_error,
    assert_equal,
    evaluate,
    make_case,
    normal,
    parameter_dtype,
    rows_of,
    upstream_of,
)
from test_triton import count_launches

import dive_fast.kernels as kernels
from dive_fast.kernels import layer_norm, naive, primitives

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not primitives.INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1 before the start"
)

# Dtypes of the residual stream and of the branch and the norm: equal, or as in the text tower under autocast.
STREAMS = [(dtype, dtype) for dtype in DTYPES] + [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]


def assert_error_at_most_twice_pytorchs(shape, stream, dtype, branch=True, change=lambda tensors: None):
    function, tensors = make_case("add_layer_norm" if branch else "layer_norm", shape, stream, dtype)
    with torch.no_grad():
        change(tensors)
    triton, plain = (evaluate(function, tensors, backend=backend) for backend in ("triton", "torch"))
    rounding = torch.finfo(parameter_dtype(stream)).eps
    if branch:
        total = sum(rows_of(tensors[key]) for key in ("x", "branch", "branch_bias"))
        assert_at_most_twice_the_error(triton[0][0], plain[0][0], total, rounding, "sum")
        # The norm is that of the rounded sum, which must be the same on both paths.
        torch.testing.assert_close(triton[0][0], plain[0][0], rtol=0, atol=0)
    upstream = [rows_of(upstream_of(output, index)) for index, output in enumerate(triton[0])]
    weight, bias = rows_of(tensors["weight"]), rows_of(tensors["bias"])
    exact = layer_reference.add_layer_norm(rows_of(triton[0][0]), weight, bias, 1e-5, *upstream)
    assert_at_most_twice_the_error(triton[0][1], plain[0][1], exact["normed"], rounding, "normed")
    for key, gradient in triton[1].items():
        assert_at_most_twice_the_error(gradient, plain[1][key], exact[key], rounding, key)


@pytest.mark.parametrize(("stream", "dtype"), STREAMS, ids=str)
def test_error_at_most_twice_pytorchs(stream, dtype, monkeypatch):
    for shape, programs, branch in zip(SHAPES, (1056, 1, 2, 4), itertools.cycle([True, True, True, False])):
        monkeypatch.setattr(layer_norm, "_FORWARD_PROGRAMS", programs)
        monkeypatch.setattr(layer_norm, "_BACKWARD_PROGRAMS", programs)
        assert_error_at_most_twice_pytorchs(shape, stream, dtype, branch)
    assert_error_at_most_twice_pytorchs((2, 3, 33), stream, dtype, branch=False)


@pytest.mark.parametrize("width", [1, 512, 768, 1025, 2048])
def test_error_at_other_widths(width):
    assert_error_at_most_twice_pytorchs((5, width), torch.float16, torch.float16)


def test_rows_with_a_large_mean_lose_no_digits():
    """The difference of mean square and squared mean would have none left in fp32."""

    def shift(tensors):
        tensors["x"] *= 1e-2
        tensors["x"] += 100.0

    assert_error_at_most_twice_pytorchs((9, 70), torch.float32, torch.float32, branch=False, change=shift)
    assert_error_at_most_twice_pytorchs((9, 70), torch.float32, torch.float16, change=shift)


def test_constant_rows_become_the_bias():
    x, bias = torch.full((3, 70), 7.0, device=DEVICE), normal(0, 70, dtype=torch.float32)
    _, normed = kernels.add_layer_norm(x, None, None, torch.ones_like(bias), bias, 1e-5, x.dtype, "triton")
    torch.testing.assert_close(normed, bias.expand(3, 70), rtol=0, atol=0)


def test_sum_without_a_branch_is_the_input_itself():
    x, vector = normal(0, 3, 20, dtype=torch.float16), normal(1, 20, dtype=torch.float32)
    for backend in ("triton", "torch"):
        total, _ = kernels.add_layer_norm(x, None, None, vector, vector, 1e-5, torch.float16, backend)
        assert total.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_nonfinite_values_fill_their_row_alone(poison):
    function, tensors = make_case("add_layer_norm", (9, 20))
    tensors["branch"].detach()[4, 7] = poison
    (total, normed), gradients = evaluate(function, tensors, backend="triton")
    assert total.isfinite().logical_not().nonzero().tolist() == [[4, 7]]
    assert normed.isnan().any(1).nonzero().flatten().tolist() == [4]
    assert gradients["x"].isnan().any(1).nonzero().flatten().tolist() == [4]
    assert gradients["weight"].isnan().all()
    assert gradients["branch_bias"].isnan().all()
    assert gradients["bias"].isfinite().all()


@pytest.mark.skipif(not primitives.INTERPRETED, reason="fp64 runs under the interpreter only")
@pytest.mark.parametrize("name", ["add_layer_norm", "layer_norm"])
def test_gradcheck(name):
    function, tensors = make_case(name, (3, 5), torch.float64)
    keys = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *values: function(**dict(zip(keys, values)), backend="triton"), tuple(tensors.values())
    )


@pytest.mark.parametrize("used", ["sum", "normed"])
@pytest.mark.parametrize("name", ["add_layer_norm", "layer_norm"])
@pytest.mark.parametrize("dtypes", [(torch.float16,) * 2, (torch.float32, torch.float16)], ids=str)
def test_backward_of_one_output_alone(name, used, dtypes):
    function, tensors = make_case(name, (4, 33), *dtypes)
    results = {}
    for backend in ("triton", "torch"):
        output = function(**tensors, backend=backend)[used == "normed"]
        results[backend] = torch.autograd.grad(
            output, list(tensors.values()), upstream_of(output, 1), allow_unused=True
        )
    for key, triton, plain in zip(tensors, results["triton"], results["torch"]):
        if plain is None or not plain.any():
            assert triton is None or not triton.any(), key
        else:
            assert triton.dtype == plain.dtype, key
            torch.testing.assert_close(triton, plain, rtol=2e-3, atol=2e-3, msg=key)


@pytest.mark.parametrize("frozen", ["x", "branch", "branch_bias", "weight", "bias", "parameters"])
def test_frozen_tensors_change_no_other_gradient(frozen, monkeypatch):
    names = ["branch_bias", "weight", "bias"] if frozen == "parameters" else [frozen]
    for dtypes in ((torch.float16, torch.float16), (torch.float32, torch.float16)):
        function, tensors = make_case("add_layer_norm", (4, 33), *dtypes)
        outputs, gradients = evaluate(function, tensors, backend="triton")
        for name in names:
            tensors[name] = tensors[name].detach()
            del gradients[name]
        assert_equal(evaluate(function, tensors, backend="triton"), (outputs, gradients))
        step = functools.partial(evaluate, function, tensors, backend="triton")
        launches, _, _ = count_launches(monkeypatch, step)
        assert launches == (2 if frozen == "parameters" else 3)


def test_gradients_of_equal_dtype_share_one_tensor():
    function, tensors = make_case("add_layer_norm", (4, 33))
    _, gradients = evaluate(function, tensors, backend="triton")
    assert gradients["x"].data_ptr() == gradients["branch"].data_ptr()


def test_rows_wider_than_registers_take_plain_pytorch():
    width = primitives.MAX_WIDTH + 1
    function, tensors = make_case("add_layer_norm", (2, width))
    assert_equal(evaluate(function, tensors), evaluate(function, tensors, backend="torch"))
    with pytest.raises(ValueError, match=f"of {width} elements are wider than {primitives.MAX_WIDTH}"):
        function(**tensors, backend="triton")


def test_plain_pytorch_is_the_layer_norm_of_pytorch():
    x, weight, bias = (
        normal(seed, *shape, dtype=torch.float64) for seed, shape in enumerate([(3, 5), (5,), (5,)])
    )
    total, normed = naive.add_layer_norm(x, x, bias, weight, bias, 1e-3, torch.float64)
    torch.testing.assert_close(total, 2 * x + bias)
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(total, (5,), weight, bias, 1e-3))


VECTOR, ROWS = torch.ones(3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROWS, ROWS[:1], None, VECTOR, VECTOR), r"branch: expected shape \(2, 3\) as x has, got \(1, 3\)"),
        ((ROWS, ROWS.int(), None, VECTOR, VECTOR), "branch: expected a floating-point dtype"),
        ((ROWS, None, VECTOR, VECTOR, VECTOR), "branch_bias: expected None because branch is None"),
        ((ROWS, ROWS, ROWS, VECTOR, VECTOR), r"branch_bias: expected shape \(3,\), got \(2, 3\)"),
        ((ROWS, None, None, VECTOR[:2], VECTOR), r"weight: expected shape \(3,\), got \(2,\)"),
        ((ROWS, None, None, VECTOR, VECTOR.to("meta")), "bias: expected device cpu as x has, got meta"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_bad_arguments_are_refused(arguments, message, backend):
    with pytest.raises(ValueError, match=message):
        kernels.add_layer_norm(*arguments, 1e-5, torch.float32, backend)
    with pytest.raises(ValueError, match="dtype: expected a floating-point dtype"):
        kernels.add_layer_norm(ROWS, None, None, VECTOR, VECTOR, 1e-5, torch.int32, backend)


def test_reference_gradients_match_differences():
    random = np.random.default_rng(0)
    total, upstream, dtotal = random.standard_normal((3, 4, 6))
    weight, bias = random.standard_normal((2, 6))

    def loss(total, weight, bias):
        normed = layer_reference.add_layer_norm(total, weight, bias, 1e-2, dtotal, upstream)["normed"]
        return (normed * upstream).sum() + (total * dtotal).sum()

    exact = layer_reference.add_layer_norm(total, weight, bias, 1e-2, dtotal, upstream)
    for key, position, index in (("x", 0, (1, 2)), ("weight", 1, 3), ("bias", 2, 4)):
        arguments = [total.copy(), weight.copy(), bias.copy()]
        values = []
        for step in (1e-6, -1e-6):
            arguments[position][index] += step
            values.append(loss(*arguments))
            arguments[position][index] -= step
        assert abs((values[0] - values[1]) / 2e-6 - exact[key][index]) < 1e-7
