"""Eager calls are told from traced ones, and their gradients are those of the function given."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dive_fast.kernels.direct import differentiable, first_order, is_eager


class PassThrough(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


class Subclass(torch.Tensor):
    pass


def observed(transform):
    """The value of :func:`is_eager` inside of a transform of ``torch.func``."""
    values = []

    def function(x):
        values.append(is_eager(x))
        return (x * x).sum()

    transform(function)(torch.ones(3))
    return values


def test_is_eager_for_plain_tensors_and_parameters():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert is_eager()
    assert is_eager(torch.ones(2), parameter, parameter.exp())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert is_eager(parameter)


def test_is_not_eager_under_dispatch_modes():
    with PassThrough():
        assert not is_eager(torch.ones(2))
    with FakeTensorMode():
        assert not is_eager()
    assert is_eager(torch.ones(2))


def test_is_not_eager_for_subclasses():
    fake = FakeTensorMode().from_tensor(torch.ones(2))
    assert not is_eager(torch.ones(2), fake)
    assert not is_eager(torch.ones(2).as_subclass(Subclass))


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        torch.vmap,
        torch.func.functionalize,
        lambda function: lambda x: torch.func.jvp(function, (x,), (x,)),
    ],
    ids=["grad", "vmap", "functionalize", "jvp"],
)
def test_is_not_eager_under_transforms(transform):
    assert observed(transform) == [False]


def test_is_not_eager_while_compiling():
    @torch.compile(fullgraph=True, backend="eager")
    def function(x):
        return x + 1 if is_eager(x) else x + 2

    assert function(torch.zeros(())) == 2


def cube():
    """``x^3 * factor``, in NumPy-like operations that autograd does not see."""

    def forward(x, factor):
        return x.detach() ** 3 * factor, x.detach().clone()

    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0])

    def backward(ctx, gradient, _):
        (x,) = ctx.saved_tensors
        return None if gradient is None else 3 * x**2 * ctx.factor * gradient, None

    return differentiable(forward, backward, setup_context)


def test_differentiable_has_the_gradient_of_backward():
    x = torch.rand(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cube()(x, 2.0)[0], (x,))
    value, copy = cube()(x, 2.0)
    assert not copy.requires_grad
    torch.testing.assert_close(value, 2 * x**3)
    with torch.no_grad():
        assert not cube()(x, 2.0)[0].requires_grad


def test_first_order_is_the_launch_in_eager_backwards_only():
    with torch.no_grad():
        assert first_order("launch", "operator", torch.ones(2)) == "launch"
        with PassThrough():
            assert first_order("launch", "operator", torch.ones(2)) == "operator"
    assert first_order("launch", "operator", torch.ones(2)) == "operator"
