"""Fast transformer blocks: fused element-wise work, packed attention, and a last block for the pooled token alone.

One block of open_clip, with the residual stream x of shape ``(B, N, D)``::

    y = LN_1(x);    x = x + W_o attention(W_qkv y + b_qkv) + b_o
    y = LN_2(x);    x = x + W_2 act(W_1 y + b_1) + b_2

Everything between two matrix products is one kernel, forward and backward: the residual add with the bias of the
product before it and the layer norm after it, the activation with its bias, and the views of queries, keys and
values, whose gradients are packed again (:mod:`dive_fast.kernels.layers`). The second add of a block is left to
the first layer norm of the next one. The last block computes only the token that the tower pools: keys and values
of all tokens, query, projection and MLP of one.

Parameter names, dtypes of the residual stream and the mathematics are those of open_clip.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import (
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    QuickGELU,
    ResidualAttentionBlock,
    TextTransformer,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.checkpoint import checkpoint

from dive_fast.kernels import add_layer_norm, biased_activation, split_qkv
from dive_fast.kernels.backend import Backend
from dive_fast.kernels.checks import Activation
from dive_fast.model import low_rank
from dive_fast.model.low_rank import SplitAttention, product
from dive_fast.model.towers import Towers

_NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32)
_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)
_LAYERS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("ln_1", "ln_2"), _NORMS),
    **dict.fromkeys(("ls_1", "ls_2"), (nn.Identity, LayerScale)),
    **dict.fromkeys(("attn.out_proj", "mlp.c_fc", "mlp.c_proj"), _LINEAR),
    **{"attn": (nn.MultiheadAttention, SplitAttention), "mlp": (nn.Sequential,)},
}
"""Classes of a block's layers by name; the activation may have any."""
_SPLIT: dict[str, tuple[type, ...]] = {f"attn.{part}": _LINEAR for part in low_rank.PARTS}
"""Further layers of an attention that is split for adapters."""
_TEXT_POOLS = ("argmax", "eos", "first", "last")
"""Pools of open_clip's text tower that read one token of each text."""


def install(towers: Towers, defers: bool = True) -> str:
    """Replaces the transformers of both towers by fast ones, where they are open_clip's.

    Args:
        defers: whether a block leaves its second residual add to the next block. False makes each block save and
            need nothing of another one: for blocks that run again in the backward, and for ZeRO-3, which gathers
            parameters block by block.

    Returns:
        One line: the towers that have fast blocks, and why others do not.
    """
    fast, remarks = [], []
    for name, tower in (("image", towers.visual), ("text", towers.text)):
        if (obstacle := find_obstacle(tower)) is not None:
            remarks.append(f"the {name} tower keeps its own ({obstacle})")
            continue
        fast.append(name)
        _replace_transformer(tower, defers)
    replaced = f"{' and '.join(fast)} tower{'s' * (len(fast) > 1)}" if fast else "none"
    return "; ".join([f"fast blocks: {replaced}", *remarks])


def find_obstacle(tower: Any) -> str | None:
    """The reason why a tower cannot have fast blocks; None if it can.

    Fast blocks read parameters and do not call the layers that own them, so every layer has to be open_clip's own:
    a parametrization or a hook would be ignored. Adapters are added to the weights
    (:mod:`dive_fast.model.low_rank`), unless they do more.
    """
    if type(tower) not in (VisionTransformer, TextTransformer):
        return f"{type(tower).__name__} is not a transformer of open_clip"
    transformer = tower.transformer
    if type(transformer) is not Transformer:
        return f"its transformer is a {type(transformer).__name__}"
    if transformer.grad_checkpointing:
        return "open_clip's grad_checkpointing is on; train.activation_checkpointing is for fast blocks"
    if "forward" in tower.__dict__ or any(map(_is_hooked, transformer.modules())):
        return "its layers have hooks or another forward"
    for number, block in enumerate(transformer.resblocks):
        if type(block) is not ResidualAttentionBlock:
            return f"its blocks are {type(block).__name__}"
        if list(dict(_children(block.mlp))) != ["c_fc", "gelu", "c_proj"]:
            return f"resblocks.{number}.mlp has other layers than open_clip's"
        children = dict(_children(block))
        for parent in ("attn", "mlp"):
            children |= {f"{parent}.{name}": kind for name, kind in _children(getattr(block, parent))}
        del children["mlp.gelu"]
        expected = _LAYERS | _SPLIT if isinstance(block.attn, SplitAttention) else _LAYERS
        for name in sorted(children.keys() | expected.keys()):
            kind = children.get(name)
            if kind is not None and low_rank.is_adapted(layer := block.get_submodule(name)):
                if (obstacle := low_rank.find_obstacle(layer)) is not None:
                    return obstacle
                kind = type(layer.base_layer)
            if kind not in expected.get(name, ()):
                return f"resblocks.{number}.{name} is {'missing' if kind is None else kind.__name__}"
        if (obstacle := _obstacle_in_attention(block.attn)) is not None:
            return obstacle
        if any(norm.weight is None or norm.bias is None for norm in (block.ln_1, block.ln_2)):
            return "its layer norms have no weight and bias"
    return None


def _obstacle_in_attention(attention: nn.MultiheadAttention | SplitAttention) -> str | None:
    if isinstance(attention, SplitAttention):
        return None  # it is split only if it has none of these
    if attention.in_proj_bias is None or attention.bias_k is not None or attention.add_zero_attn:
        return "its attention has other parameters than open_clip's"
    return "its attention has dropout" if attention.dropout > 0 else None


def _children(module: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(child)) for name, child in module.named_children()]


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does something besides its class's ``forward``."""
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
    )
    return "forward" in module.__dict__ or any(hooks)


def _replace_transformer(tower: Any, defers: bool) -> None:
    is_text = isinstance(tower, TextTransformer)
    # A class token or padding need a mask of their own; open_clip passes it with the causal one in it.
    is_causal = is_text and tower.attn_mask is not None and tower.cls_emb is None and not tower.use_pad_mask
    tower.transformer = FastTransformer(tower.transformer, is_causal, _pools_one_token(tower), defers)
    if not is_text and type(tower.ln_pre) in _NORMS and not _is_hooked(tower.ln_pre):
        tower.ln_pre = FastLayerNorm(tower.ln_pre)
    if is_text and tower.transformer.is_pooled:
        # A bound method would be pickled by the name of its function, which the tower does not have.
        tower.forward = partial(_encode_text, tower)


def _pools_one_token(tower: Any) -> bool:
    """Whether the tower's feature is a function of one token of the last block's output."""
    if tower.output_tokens:
        return False
    if isinstance(tower, TextTransformer):
        return tower.cls_emb is not None or tower.pool_type in _TEXT_POOLS
    return tower.attn_pool is None and tower.pool_type == "tok"


class FastModule(nn.Module):
    """A module that calls kernels."""

    backend: Backend = "auto"
    """Backend of the kernels; see :mod:`dive_fast.kernels.backend`."""


class FastLayerNorm(FastModule):
    """open_clip's ``LayerNorm``, from and to the input's dtype in one kernel; parameter names stay."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        """Takes over the parameters of ``norm``."""
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """The layer norm of ``(..., D)``."""
        _, normed = add_layer_norm(x, None, None, self.weight, self.bias, self.eps, x.dtype, backend=self.backend)
        return normed


class FastTransformer(nn.Module):
    """open_clip's ``Transformer``, made of :class:`FastBlock`; parameter names stay."""

    def __init__(self, transformer: Transformer, is_causal: bool, is_pooled: bool, defers: bool) -> None:
        """Takes over the parameters of ``transformer``.

        Args:
            is_causal: whether each token sees itself and earlier ones, whatever mask is passed.
            is_pooled: whether only one token of the output is used; the last block then computes it alone.
            defers: as in :func:`install`.
        """
        super().__init__()
        self.is_causal, self.is_pooled = is_causal, is_pooled
        last = len(transformer.resblocks) - 1
        self.resblocks = nn.ModuleList(
            FastBlock(block, is_causal, is_pooled=is_pooled and i == last, defers=defers and i < last)
            for i, block in enumerate(transformer.resblocks)
        )

    def get_cast_dtype(self) -> torch.dtype:
        """Dtype of the weights, to which open_clip's text tower casts its embeddings."""
        return next(self.parameters()).dtype

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Runs all blocks.

        Args:
            x: ``(B, N, D)``.
            attn_mask: ``(B H, N, N)``, added to the scores of attention. Ignored by a causal transformer.
            positions: token of each row that is pooled, ``(B,)``; default: the first one.

        Returns:
            ``(B, N, D)``, or the pooled token, ``(B, 1, D)``.
        """
        mask = None if attn_mask is None or self.is_causal else attn_mask.unflatten(0, (len(x), -1))
        options = {"mask": mask, "positions": positions}
        branch = bias = None
        for block in self.resblocks:
            x, *deferred = block(x, branch=branch, bias=bias, **options)
            branch, bias = (*deferred, block.branch_bias) if deferred else (None, None)
        return x


class FastBlock(FastModule):
    """One ``ResidualAttentionBlock``; see the equations of this module."""

    def __init__(self, block: Any, is_causal: bool, is_pooled: bool, defers: bool) -> None:
        """Takes over the layers of ``block``; arguments as in :class:`FastTransformer`."""
        super().__init__()
        self.ln_1, self.attn, self.ls_1 = block.ln_1, block.attn, block.ls_1
        self.ln_2, self.mlp, self.ls_2 = block.ln_2, block.mlp, block.ls_2
        self.is_causal, self.is_pooled, self.defers = is_causal, is_pooled, defers
        self.recomputes_activation = False
        """Whether the output of the activation is computed again in the backward instead of saved."""
        self.kind = _activation_kind(block.mlp.gelu)

    @property
    def branch_bias(self) -> Tensor | None:
        """The bias that a deferred branch still lacks."""
        return self.mlp.c_proj.bias if isinstance(self.ls_2, nn.Identity) else None

    def forward(
        self,
        x: Tensor,
        *,
        branch: Tensor | None = None,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Adds the branch of the block before and computes attention and MLP.

        Args:
            x: ``(B, N, D)``.
            branch: output of the MLP of the block before, ``(B, N, D)``, if that is not in ``x`` yet.
            bias: the bias that ``branch`` still lacks, ``(D,)``.
            mask: added to the scores of attention, ``(B, H, N, N)``.
            positions: as in :meth:`FastTransformer.forward`.

        Returns:
            x and the branch to add to it, ``(B, N, D)`` each; x alone if the block does not defer.
        """
        x, y = self._add_norm(x, branch, bias, self.ln_1)
        if self.is_pooled:
            x, y = self._attend_pooled(x, y, mask, positions)
        else:
            y = self._attend(y, mask)
        branch, bias = _project(y, self.attn.out_proj, self.ls_1)
        x, y = self._add_norm(x, branch, bias, self.ln_2)
        hidden = product(y, [self.mlp.c_fc], self.mlp.c_fc.bias if self.kind is None else None)
        if self.recomputes_activation and torch.is_grad_enabled():
            branch = checkpoint(self._finish_mlp, hidden, use_reentrant=False)
        else:
            branch = self._finish_mlp(hidden)
        return (x, branch) if self.defers else (x + branch,)

    def _attend(self, y: Tensor, mask: Tensor | None) -> Tensor:
        """Self-attention without the output's product, ``(B, N, D)``."""
        attention = self.attn
        # The bias is added by the product, and its gradient summed where the gradients of all three are packed.
        layers, bias = _in_projection(attention)
        qkv = product(y, layers, bias.detach())
        queries, keys, values = split_qkv(qkv, bias, attention.num_heads, backend=self.backend)
        return _attention(queries, keys, values, None if self.is_causal else mask, self.is_causal)

    def _attend_pooled(
        self, x: Tensor, y: Tensor, mask: Tensor | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The pooled token of ``x`` and its attention to all tokens, ``(B, 1, D)`` each."""
        attention = self.attn
        x = _take_token(x, positions)
        # Its layer norm again: a gradient of one token in that of all would be a tensor of zeros to add.
        _, query_input = self._add_norm(x, None, None, self.ln_1)
        (layer, bias), (others, other_biases) = _split_in_projection(attention)
        queries = product(query_input, layer, bias).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        packed = product(y, others, other_biases.detach())
        keys, values = split_qkv(packed, other_biases, attention.num_heads, parts=2, backend=self.backend)
        if self.is_causal and positions is not None:
            mask = torch.arange(y.shape[1], device=y.device) <= positions[:, None]
            mask = mask[:, None, None]
        elif mask is not None and positions is not None:
            mask = mask.gather(2, positions[:, None, None, None].expand(-1, mask.shape[1], 1, mask.shape[3]))
        return x, _attention(queries, keys, values, mask, is_causal=False)

    def _add_norm(self, x: Tensor, branch: Tensor | None, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
        """``x + branch + bias`` and its layer norm, the latter in the dtype of the next product."""
        if branch is not None:
            # LayerScale's fp32 gain makes a 16-bit residual stream fp32, as in open_clip.
            x = x.to(torch.promote_types(x.dtype, branch.dtype))
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return add_layer_norm(x, branch, bias, norm.weight, norm.bias, norm.eps, dtype, backend=self.backend)

    def _finish_mlp(self, hidden: Tensor) -> Tensor:
        """The MLP after its first product; without the last bias if that is deferred."""
        if self.kind is None:
            activated = self.mlp.gelu(hidden)
        else:
            activated = biased_activation(hidden, self.mlp.c_fc.bias, self.kind, backend=self.backend)
        if not self.defers:
            return self.ls_2(product(activated, [self.mlp.c_proj], self.mlp.c_proj.bias))  # type: ignore[no-any-return]
        return _project(activated, self.mlp.c_proj, self.ls_2)[0]


def _project(rows: Tensor, linear: nn.Linear, scale: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A branch of the residual stream and the bias that it still lacks; LayerScale needs the bias before it."""
    if isinstance(scale, nn.Identity):
        return product(rows, [linear], None), linear.bias
    return scale(product(rows, [linear], linear.bias)), None


def _in_projection(attention: Any) -> tuple[list[Any], Tensor]:
    """The layers or weights of queries, keys and values, and their biases, ``(3 D,)``."""
    if isinstance(attention, SplitAttention):
        layers = [attention.q_proj, attention.k_proj, attention.v_proj]
        return layers, torch.cat([layer.bias for layer in layers])
    return [attention.in_proj_weight], attention.in_proj_bias


def _split_in_projection(attention: Any) -> list[tuple[list[Any], Tensor]]:
    """As :func:`_in_projection`, of queries alone, and of keys and values."""
    layers, bias = _in_projection(attention)
    sizes = [len(bias) // 3, 2 * len(bias) // 3]
    weights = [layers[:1], layers[1:]] if len(layers) > 1 else [[each] for each in layers[0].split(sizes)]
    return list(zip(weights, bias.split(sizes), strict=True))


def _attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Attention of ``(B, H, N, D / H)`` as ``(B, N, D)``; SDPA's result is in that order already."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(queries.dtype)
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=is_causal)
    return attended.transpose(1, 2).flatten(2)


def _take_token(x: Tensor, positions: Tensor | None) -> Tensor:
    """One token of each row: ``(B, N, D) -> (B, 1, D)``; the first one without positions."""
    if positions is None:
        return x[:, :1].contiguous()
    return x.gather(1, positions[:, None, None].expand(-1, 1, x.shape[2]))


def _activation_kind(activation: nn.Module) -> Activation | None:
    """The kernel's name of an activation; None if the kernel does not have it."""
    if isinstance(activation, QuickGELU):
        return "quick_gelu"
    if type(activation) is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return None


def _encode_text(tower: Any, tokens: Tensor) -> Tensor:
    """The ``forward`` of open_clip's text tower for a transformer that returns the pooled token.

    Args:
        tokens: ``(U, context)`` int64.
    """
    x, mask = tower._embeds(tokens)
    x = tower.transformer(x, mask, _pooled_positions(tower, tokens, x.shape[1]))
    pooled: Tensor = tower.ln_final(x[:, 0])
    projection = tower.text_projection
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection


def _pooled_positions(tower: Any, tokens: Tensor, length: int) -> Tensor:
    """Token of each text that open_clip's ``text_global_pool`` reads, ``(U,)``; the class token comes last."""
    pool = "last" if tower.cls_emb is not None else tower.pool_type
    if pool == "argmax":
        return tokens.argmax(dim=-1)
    if pool == "eos":
        return (tokens == tower.eos_id).int().argmax(dim=-1)
    return tokens.new_full((len(tokens),), 0 if pool == "first" else length - 1)
