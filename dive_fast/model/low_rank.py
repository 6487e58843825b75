"""Products of adapted layers without calling them: one matrix product forward, one for the gradient of the input.

::

    W = W0 + s B A       y = x W^T + b       A (r, n), B (m, r), W0 (m, n), x (..., n)
    dx = dy W            dA = (dy s B)^T x   dB = s dy^T (x A^T)

W is summed in fp32 and rounded once to the dtype of the product, like weights of an export and of full tuning. W0
needs no gradient, and those of A and B come from thin products of r columns. Several layers with one input are one
product.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = ("q_proj", "k_proj", "v_proj")
"""Layers of :class:`SplitAttention` in the order of the rows of the packed weight."""


class SplitAttention(nn.Module):
    """``nn.MultiheadAttention`` with a linear layer for each projection instead of one packed weight."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        """Copies the weights of ``attention``, which has packed ones with biases, no others and no dropout."""
        super().__init__()
        self.num_heads = attention.num_heads
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attention of ``query`` ``(B, N, D)`` to ``key`` and ``value`` ``(B, M, D)``.

        Args:
            attn_mask: added to the scores, ``(N, M)`` or ``(B H, N, M)``.

        Returns:
            ``(B, N, D)``, and None instead of the probabilities.
        """
        assert not need_weights, "probabilities are not computed"
        projected = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        queries, keys, values = (rows.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for rows in projected)
        if attn_mask is not None:
            attn_mask = attn_mask.unflatten(0, (len(query), -1)) if attn_mask.ndim == 3 else attn_mask
            attn_mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(queries.dtype)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=attn_mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer with copies of these parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
    return layer


def is_adapted(layer: nn.Module) -> bool:
    """Whether ``layer`` is one of peft with low-rank factors."""
    return hasattr(layer, "lora_A")


def find_obstacle(layer: Any) -> str | None:
    """The reason why :func:`product` would not equal a call of an adapted layer; None if it would."""
    if type(layer).__module__ != "peft.tuners.lora.layer" or type(layer).__name__ != "Linear":
        return "its adapters are not plain LoRA of peft"
    if any(not isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values()):
        return "its adapters have dropout"
    if layer.lora_variant or any(layer.lora_bias.values()) or layer.disable_adapters or layer.merged_adapters:
        return "its adapters are not plain LoRA of peft"
    if layer.base_layer.weight.requires_grad:
        return "it trains the weights below its adapters"
    return None


def product(x: Tensor, layers: Sequence[Any], bias: Tensor | None) -> Tensor:
    """``x W^T + b``, with the weights of ``layers`` on top of each other and their active adapters.

    Args:
        x: ``(..., n)``.
        layers: linear layers that read ``x``, adapted or not, or their weights, (m_i, n) each. Weights of adapted
            layers have no gradient, nor do others next to them.
        bias: ``(m,)``, m the sum of the m_i; None: no bias.

    Returns:
        ``(..., m)``, in autocast's dtype where that is on.
    """
    if not any(map(is_adapted, layers)):
        return F.linear(x, _stacked([_weight(layer) for layer in layers]), bias)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    factors = [_factors(layer) if is_adapted(layer) else None for layer in layers]
    x = x.to(dtype)
    y = F.linear(x, _merge(layers, factors, dtype), bias)
    if not torch.is_grad_enabled():
        return y
    sizes = [len(_weight(layer)) for layer in layers]
    starts = [sum(sizes[:i]) for i, pair in enumerate(factors) if pair is not None]
    tensors = [factor for pair in factors if pair is not None for factor in pair]
    result: Tensor = _FactorGradients.apply(y, x.detach(), starts, *tensors)  # type: ignore[no-untyped-call]
    return result


def weight_of(layer: Any) -> Tensor:
    """``W0 + s B A`` of an adapted layer, ``(m, n)``, with the gradients of its factors."""
    first, second = _factors(layer)
    weight: Tensor = layer.weight + second @ first
    return weight


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A and s B of the active adapters of a layer, ``(r, n)`` and ``(m, r)``, r the sum of their ranks."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    first = [layer.lora_A[name].weight for name in names]
    second = [_scaled(layer.lora_B[name].weight, layer.scaling[name]) for name in names]
    return (first[0], second[0]) if len(names) == 1 else (torch.cat(first), torch.cat(second, dim=1))


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer if isinstance(layer, Tensor) else layer.weight
    return weight


def _scaled(factor: Tensor, scaling: float) -> Tensor:
    return factor if scaling == 1 else scaling * factor


@torch.no_grad()
def _merge(layers: Sequence[Any], factors: Sequence[tuple[Tensor, Tensor] | None], dtype: torch.dtype) -> Tensor:
    """The weights of the layers with their adapters, on top of each other, ``(m, n)`` in ``dtype``."""
    weights = []
    for layer, pair in zip(layers, factors, strict=True):
        weight = _weight(layer)
        if pair is not None:
            with torch.autocast(weight.device.type, enabled=False):
                weight = torch.addmm(weight, pair[1], pair[0])
        weights.append(weight.to(dtype))
    return _stacked(weights)


class _FactorGradients(torch.autograd.Function):
    """The identity of y, with gradients of the factors in it: dA and d(s B) of the module's equations."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, starts: list[int], *factors: Tensor) -> Tensor:  # type: ignore[override]
        """Saves ``x`` and the factors.

        Args:
            starts: first row in the weight of each adapted layer.
            factors: A and s B of each adapted layer in turn.
        """
        ctx.starts = starts
        ctx.save_for_backward(x, *factors)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *factors = ctx.saved_tensors
        first, second = factors[::2], factors[1::2]
        rows, by_rows = x.flatten(0, -2), gradient.flatten(0, -2)
        dtype = rows.dtype
        needed = ctx.needs_input_grad[3:]
        reduced = rows @ _stacked(first).to(dtype).T if any(needed[1::2]) else None
        by_reduced, by_second, column = [], [], 0
        for start, b in zip(ctx.starts, second, strict=True):
            part = by_rows[:, start : start + len(b)]
            by_reduced.append(part @ b.to(dtype))
            if reduced is not None:
                by_second.append((part.T @ reduced[:, column : column + b.shape[1]]).to(b.dtype))
            column += b.shape[1]
        by_first: Sequence[Tensor | None] = [None] * len(first)
        if any(needed[::2]):
            products = torch.cat(by_reduced, dim=1).T @ rows
            by_first = [each.to(a.dtype) for each, a in zip(products.split([len(a) for a in first]), first)]
        gradients = [None] * len(first) if reduced is None else by_second
        pairs = (each for pair in zip(by_first, gradients, strict=True) for each in pair)
        return gradient, None, None, *(each if need else None for each, need in zip(pairs, needed, strict=True))


def _stacked(matrices: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)
