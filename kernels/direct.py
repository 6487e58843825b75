"""Eager calls of an op's launches, without the Python layers of a custom op.

``torch.library.custom_op`` shows kernels to ``torch.compile``, to fake tensors and to dispatch modes; its layers
take host time at every call. Where none of these observes the call, a plain ``torch.autograd.Function`` gives
the same result. An op that has both::

    apply = direct.differentiable(launch_forward, _backward, _setup_context)
    result = (apply if direct.is_eager(*tensors) else forward)(*arguments)

    def _backward(ctx, upstream):
        run = direct.first_order(launch_backward, backward, upstream)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


def is_eager(*tensors: Tensor) -> bool:
    """Whether nothing but autograd observes operations on these tensors.

    False while ``torch.compile`` or ``torch.export`` traces, under a ``TorchDispatchMode`` (``FakeTensorMode`` is
    one) or a transform of ``torch.func``, and for tensors of a subclass such as ``FakeTensor``.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and _PLAIN_TYPES.issuperset(map(type, tensors))
    )


def first_order(launch: Callable[..., Any], operator: Callable[..., Any], *tensors: Tensor) -> Callable[..., Any]:
    """The function that a backward calls: ``launch`` in eager mode, the custom op ``operator`` otherwise.

    With ``create_graph=True`` it is the custom op, which raises an error where autograd differentiates it again;
    the results of a launch would be constants without a word.
    """
    return launch if not torch.is_grad_enabled() and is_eager(*tensors) else operator


def differentiable(
    forward: Callable[..., Any],
    backward: Callable[..., tuple[Any, ...]],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
) -> Callable[..., Any]:
    """``forward`` with a gradient, for eager calls with positional arguments.

    ``backward(ctx, *gradients)`` and ``setup_context(ctx, inputs, output)`` are those that
    ``CustomOpDef.register_autograd`` takes.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output

    Direct.backward = staticmethod(backward)  # type: ignore[assignment]
    return Direct.apply  # type: ignore[no-any-return]
