"""Inputs for the layers of a transformer block, and their evaluation with a backend, shared by the tests."""

import numpy as np
import torch

import dive_fast.kernels as kernels
from dive_fast.kernels import primitives

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Only the interpreter computes in fp64.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, *([torch.float64] if primitives.INTERPRETED else []))
LAYERS = ("biased_activation", "add_layer_norm", "layer_norm", "split_qkv")
SHAPES = ((1, 1, 8), (2, 7, 70), (3, 5, 130), (0, 5, 16))


def parameter_dtype(dtype):
    """Parameters stay fp32 next to 16-bit features."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normal(seed, *shape, dtype, scale=2.0):
    """Random numbers, rounded to ``dtype``, that require a gradient."""
    array = scale * np.random.default_rng([seed, *shape]).standard_normal(shape)
    return torch.tensor(array).to(dtype).to(DEVICE).requires_grad_()


def make_case(name, shape=(2, 7, 70), dtype=torch.float16, branch_dtype=None):
    """The function of a layer without its backend, and its tensors by name.

    ``shape`` is that of the residual stream; packed attention has three times as many columns, in two heads if
    possible.
    """
    *rows, width = shape
    columns = 3 * width if name == "split_qkv" else width
    x = normal(0, *rows, columns, dtype=dtype)
    bias = normal(1, columns, dtype=parameter_dtype(dtype))
    tensors = {"x": x, "bias": bias}
    if name == "biased_activation":
        return lambda x, bias, **options: kernels.biased_activation(x, bias, "quick_gelu", **options), tensors
    if name == "split_qkv":
        return lambda x, bias, **options: kernels.split_qkv(x, bias, 2 - width % 2, **options), tensors
    tensors["weight"] = normal(2, width, dtype=parameter_dtype(dtype))
    output_dtype = branch_dtype or dtype
    if name == "layer_norm":
        return (
            lambda x, bias, weight, **options: kernels.add_layer_norm(
                x, None, None, weight, bias, 1e-5, output_dtype, **options
            ),
            tensors,
        )
    tensors["branch"] = normal(3, *shape, dtype=output_dtype)
    tensors["branch_bias"] = normal(4, width, dtype=parameter_dtype(dtype))
    return (
        lambda x, bias, weight, branch, branch_bias, **options: kernels.add_layer_norm(
            x, branch, branch_bias, weight, bias, 1e-5, output_dtype, **options
        ),
        tensors,
    )


def upstream_of(output, index):
    """A gradient for output number ``index``."""
    return normal(10 + index, *output.shape, dtype=output.dtype, scale=1.0).detach()


def evaluate(function, tensors, **options):
    """Outputs and gradients by name; the leaves stay unchanged."""
    outputs = function(**tensors, **options)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    leaves = {key: tensor for key, tensor in tensors.items() if tensor.requires_grad}
    upstream = [upstream_of(output, index) for index, output in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return tuple(output.detach() for output in outputs), dict(zip(leaves, gradients))


def assert_equal(one, other):
    """All outputs and gradients have the same dtypes and bits."""
    for first, second in zip(one[0], other[0], strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    assert one[1].keys() == other[1].keys()
    for key, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][key], rtol=0, atol=0, equal_nan=True, msg=key)


def rows_of(tensor):
    """A float64 array, with all dimensions but the last one flattened."""
    array = tensor.detach().double().cpu().numpy()
    return array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array


def assert_at_most_twice_the_error(actual, plain, exact, rounding, name):
    """The norm of the error is at most twice plain PyTorch's plus four roundings of the computation."""
    assert (actual.shape, actual.dtype) == (plain.shape, plain.dtype), name
    error, plain_error = (np.linalg.norm(rows_of(tensor) - exact) for tensor in (actual, plain))
    bound = 2 * plain_error + 4 * rounding * np.linalg.norm(exact)
    assert error <= bound, f"{name}: off by {error}, PyTorch by {plain_error}, {bound=}"
