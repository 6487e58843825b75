"""Transformer blocks of the towers: less saved memory, compilation per block, and recomputation."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from open_clip.transformer import QuickGELU
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dive_fast.errors import ConfigError
from dive_fast.model.fast_blocks import FastBlock
from dive_fast.model.towers import TEXT_MULTIPLE, Towers

BACKEND = "inductor"
"""torch.compile's backend."""
CHECKPOINTING = "train.activation_checkpointing"
"""Config key of the recomputation, for messages."""


def replace_quickgelu(towers: Towers) -> None:
    """Replaces each QuickGELU by one that saves only its input for the backward, with bit-equal results.

    open_clip's QuickGELU also saves the sigmoid.
    """
    for module in towers.modules():
        for name, child in module.named_children():
            if isinstance(child, QuickGELU):
                setattr(module, name, SavedInputQuickGELU())


class SavedInputQuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, the activation of OpenAI's CLIP, which saves only ``x`` for the backward."""

    def forward(self, x: Tensor) -> Tensor:
        """Applies the activation elementwise."""
        result: Tensor = _SavedInputQuickGELU.apply(x)  # type: ignore[no-untyped-call]
        return result


class _SavedInputQuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * torch.sigmoid(1.702 * x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        sigmoid = torch.sigmoid(1.702 * x)
        return gradient * sigmoid + 1.702 * torch.ops.aten.sigmoid_backward(gradient * x, sigmoid)


def compile_blocks(towers: Towers) -> None:
    """Compiles the blocks of both towers; all blocks of a tower share one compilation.

    The number of distinct texts varies between batches, so the text tower is compiled for dynamic sizes. Its texts
    have a multiple of :data:`TEXT_MULTIPLE` tokens on any device; otherwise every length would be compiled.

    Raises:
        ConfigError: a tower has no blocks.
    """
    for block in blocks_of(towers.visual, "train.compile"):
        block.compile(backend=BACKEND, dynamic=False)
    for block in blocks_of(towers.text, "train.compile"):
        block.compile(backend=BACKEND, dynamic=True)
    towers.text_multiple = TEXT_MULTIPLE


def check_blocks(towers: Towers, checkpointing: str, compiled: bool) -> None:
    """Checks early that the towers have the blocks that compilation and recomputation need.

    Raises:
        ConfigError: a tower has no blocks of the required kind.
    """
    for tower in (towers.visual, towers.text):
        if compiled:
            blocks_of(tower, "train.compile")
        if checkpointing != "off":
            for block in blocks_of(tower, CHECKPOINTING):
                if checkpointing == "selective":
                    _mlp_of(block, tower)


def recompute_blocks(towers: Towers) -> None:
    """Makes the blocks of both towers save only their inputs and run again in the backward.

    Fast blocks should not defer, since a deferred branch would be a second input.

    Raises:
        ConfigError: a tower has no blocks.
    """
    for tower in (towers.visual, towers.text):
        for block in blocks_of(tower, CHECKPOINTING):
            block.forward = partial(_recomputed, block.forward)


def recompute_activations(towers: Towers) -> None:
    """Makes the MLP of each block save only the input of its activation and recompute the rest in the backward.

    Raises:
        ConfigError: a tower has no blocks, or blocks with another kind of MLP.
    """
    for tower in (towers.visual, towers.text):
        for block in blocks_of(tower, CHECKPOINTING):
            if isinstance(block, FastBlock):
                block.recomputes_activation = True
            else:
                block.mlp = RecomputeMLP(_mlp_of(block, tower))


class RecomputeMLP(nn.Sequential):
    """An MLP that saves the input of its activation for the backward, not the output; parameter names stay.

    The backward recomputes the layers between the two matrix products. PyTorch stops this recomputation at the
    last tensor it needs, which is the input of the second product. Under ZeRO-3 that product runs again too,
    because DeepSpeed's linear layer saves its operands only after the product.
    """

    def __init__(self, mlp: nn.Module) -> None:
        """Takes over the layers of ``mlp`` in their registered order."""
        super().__init__(OrderedDict(mlp.named_children()))
        self._second = max(i for i, layer in enumerate(self) if _is_linear(layer))

    def forward(self, x: Tensor) -> Tensor:
        """The output of the original MLP."""
        first, *others = self
        hidden = first(x)
        result: Tensor = _recomputed(partial(_through, others[: self._second]), hidden)
        return _through(others[self._second :], result)


def blocks_of(tower: nn.Module, key: str) -> list[nn.Module]:
    """The stack of equal layers that holds most parameters of a tower, not counting word embeddings.

    Raises:
        ConfigError: there is no such stack; the message names the config ``key`` that needs it.
    """

    def size(module: nn.Module) -> int:
        word_embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
        return sum(parameter.numel() for parameter in module.parameters() if id(parameter) not in word_embeddings)

    stacks = [module for module in tower.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    uniform = [stack for stack in stacks if len({type(block) for block in stack}) == 1]
    largest = max(uniform, key=size, default=None)
    if largest is None or 2 * size(largest) < size(tower):
        raise ConfigError(f"{key}: {type(tower).__name__} is not a stack of equal blocks; turn it off")
    return list(largest)


def _mlp_of(block: nn.Module, tower: nn.Module) -> nn.Module:
    mlp = getattr(block, "mlp", None)
    if not isinstance(mlp, nn.Module) or not _is_plain_mlp(mlp):
        raise ConfigError(
            f"{CHECKPOINTING} = selective: the blocks of {type(tower).__name__} have no MLP of two linear "
            "layers; use full, or turn it off"
        )
    return mlp


def _is_plain_mlp(mlp: nn.Module | None) -> bool:
    """Whether ``mlp`` is two linear layers with other layers between, in registered order."""
    if not (isinstance(mlp, nn.Sequential) or type(mlp) is Mlp):
        return False
    is_linear = [_is_linear(layer) for layer in mlp.children()]
    return sum(is_linear) == 2 and is_linear[0] and not is_linear[1]


def _is_linear(layer: nn.Module) -> bool:
    """Whether a layer is linear, perhaps with an adapter."""
    return isinstance(getattr(layer, "base_layer", layer), nn.Linear)


def _through(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
