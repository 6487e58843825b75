"""Computes towers in different precisions, and with remedies that keep a part of them in fp32.

fp16 and bf16 use the engine's autocast. PyTorch's fp16 products are very slow on the CPU, and tf32 exists only on
GPUs. So on the CPU both are computed as on tensor cores: factors are rounded, products and sums are in fp32, and
the result is rounded when it is stored.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dive_fast.model.towers import Towers

aten = torch.ops.aten
_PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward)
_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
AUTOCAST = {"fp32": None, "tf32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
REMEDIES = (
    "none",
    "head",
    "residual",
    "residual + head",
    "residual + last block",
    "text",
    "residual + head + text",
)
"""Parts in fp32: ``head``, the last norm and the projection; ``residual``, the image tower's sums of blocks, which
autocast rounds (the text tower's are already fp32); ``last block``, the last transformer block and the head;
``text``, the complete text tower."""


@contextlib.contextmanager
def computing(towers: Towers, precision: str, remedy: str = "none") -> Iterator[None]:
    """Computes the towers in this precision in the context, forward and backward."""
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, towers, "autocast", towers.autocast)
        towers.autocast = AUTOCAST[precision]
        for module, hook, before in _hooks(towers, remedy):
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(hook).remove)
        stack.enter_context(products(precision, next(towers.parameters()).device))
        yield


@contextlib.contextmanager
def products(precision: str, device: torch.device) -> Iterator[None]:
    """Computes products as on tensor cores in the context; autocast is left to the caller."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
                stack.callback(setattr, backend, "allow_tf32", backend.allow_tf32)
                backend.allow_tf32 = precision == "tf32"
        elif precision in ("fp16", "tf32"):
            stack.enter_context(_HalfProducts() if precision == "fp16" else _Tf32Products())
        yield


def _hooks(towers: Towers, remedy: str) -> Iterator[tuple[nn.Module, Callable[..., Any], bool]]:
    """Yields module, hook, and whether the hook runs before the module."""
    image, text = towers.visual, towers.text
    if "residual" in remedy:
        yield image.ln_pre, lambda _, inputs, output: output.float(), False
    starts: list[nn.Module] = []
    if "head" in remedy:
        starts += [image.ln_post, text.ln_final]
    if "last block" in remedy:
        starts += [image.transformer.resblocks[-1], text.transformer.resblocks[-1]]
    if "text" in remedy:
        starts.append(text)
    for module in starts:
        yield module, _leave_autocast, True


def _leave_autocast(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Disables autocast for the rest of the tower, whose own context restores it at its end."""
    torch.set_autocast_enabled(inputs[0].device.type, False)
    return (inputs[0].float() if inputs[0].is_floating_point() else inputs[0], *inputs[1:])


class _HalfProducts(TorchDispatchMode):
    """Computes fp16 products with fp32 sums."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        products = (*_PRODUCTS, _ATTENTION, _ATTENTION_BACKWARD)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if op.overloadpacket not in products or torch.float16 not in {tensor.dtype for tensor in tensors}:
            return op(*args, **kwargs or {})
        result = op(*tree_map_only(Tensor, _widened, args), **tree_map_only(Tensor, _widened, kwargs or {}))
        if op.overloadpacket is _ATTENTION:  # the second output, log-sum-exp, is fp32 on any device
            return result[0].half(), *result[1:]
        return tree_map_only(Tensor, Tensor.half, result)


class _Tf32Products(TorchDispatchMode):
    """Computes fp32 products of factors rounded to ten bits."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.overloadpacket not in _PRODUCTS:
            return op(*args, **kwargs or {})
        # A bias is added in fp32.
        factors = slice(1, None) if op.overloadpacket in (aten.addmm, aten.baddbmm) else slice(None)
        args = list(args)
        args[factors] = [rounded_to_tf32(arg) if isinstance(arg, Tensor) else arg for arg in args[factors]]
        return op(*args, **kwargs or {})


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def rounded_to_tf32(tensor: Tensor) -> Tensor:
    """Rounds to ten mantissa bits, ties away from zero, as the hardware does."""
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
