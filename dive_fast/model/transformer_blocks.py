"""The towers' transformer blocks: light on memory, compiled one by one, or run again in the backward."""

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
from dive_fast.model.towers import Towers

TEXT_MULTIPLE = 8
"""Compiled text towers take texts of so many tokens or a multiple: else every length would be compiled anew, and
matrices whose sides are no multiples of 8 miss the fast paths of tensor cores."""

BACKEND = "inductor"
CHECKPOINTING = "train.activation_checkpointing"


def replace_quickgelu(towers: Towers) -> None:
    """Has QuickGELU keep its input alone for the backward; open_clip's keeps its sigmoid too. Bits are equal."""
    for module in towers.modules():
        for name, child in module.named_children():
            if isinstance(child, QuickGELU):
                setattr(module, name, SavedInputQuickGELU())


class SavedInputQuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, the activation of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        """Element by element."""
        result: Tensor = _LightQuickGELU.apply(x)  # type: ignore[no-untyped-call]
        return result


class _LightQuickGELU(torch.autograd.Function):
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
    """Compiles the blocks of both towers; all blocks of a tower share their code.

    A batch has as many distinct texts as it happens to have, so the text tower's sizes stay open in its code.

    Raises:
        ConfigError: a tower has no blocks.
    """
    for block in blocks_of(towers.visual, "train.compile"):
        block.compile(backend=BACKEND, dynamic=False)
    for block in blocks_of(towers.text, "train.compile"):
        block.compile(backend=BACKEND, dynamic=True)
    towers.text_multiple = TEXT_MULTIPLE


def check_blocks(towers: Towers, checkpointing: str, compiled: bool) -> None:
    """Looks at the towers' blocks alone, before anything expensive is done.

    Raises:
        ConfigError: a tower has no blocks of the kind that the config asks for.
    """
    for tower in (towers.visual, towers.text):
        if compiled:
            blocks_of(tower, "train.compile")
        if checkpointing != "off":
            for block in blocks_of(tower, CHECKPOINTING):
                if checkpointing == "selective":
                    _mlp_of(block, tower)


def recompute_blocks(towers: Towers) -> None:
    """Makes the blocks of both towers keep only what enters them, and run again in the backward.

    Raises:
        ConfigError: a tower has no blocks.
    """
    for tower in (towers.visual, towers.text):
        for block in blocks_of(tower, CHECKPOINTING):
            block.forward = partial(_recomputed, block.forward)


def recompute_activations(towers: Towers) -> None:
    """Has the MLP of each block keep what enters its activation alone, and compute the rest in the backward again.

    Raises:
        ConfigError: a tower has no blocks, or blocks with another kind of MLP.
    """
    for tower in (towers.visual, towers.text):
        for block in blocks_of(tower, CHECKPOINTING):
            block.mlp = RecomputeMLP(_mlp_of(block, tower))


class RecomputeMLP(nn.Sequential):
    """An MLP under its own names that keeps for the backward what enters its activation, and not what leaves it.

    The backward runs again what lies between the two products: PyTorch ends this second run at the last tensor
    that it asks for, which enters the second product. Under ZeRO-3 that product runs again too, since DeepSpeed's
    keeps its operands only when it is done.
    """

    def __init__(self, mlp: nn.Module) -> None:
        """Takes the layers over from ``mlp``, in the order in which it holds them."""
        super().__init__(OrderedDict(mlp.named_children()))
        self._second = max(place for place, layer in enumerate(self) if isinstance(layer, nn.Linear))

    def forward(self, x: Tensor) -> Tensor:
        """As the MLP's own."""
        first, *others = self
        hidden = first(x)
        result: Tensor = _recomputed(partial(_through, others[: self._second]), hidden)
        return _through(others[self._second :], result)


def blocks_of(tower: nn.Module, key: str) -> list[nn.Module]:
    """The layers of a tower that are built alike and hold most of its parameters, the embedding of words aside.

    Raises:
        ConfigError: there are none; names the ``key`` of the config that asks for them.
    """

    def size(module: nn.Module) -> int:
        words = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
        return sum(parameter.numel() for parameter in module.parameters() if id(parameter) not in words)

    stacks = [module for module in tower.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    alike = [stack for stack in stacks if len({type(block) for block in stack}) == 1]
    largest = max(alike, key=size, default=None)
    if largest is None or 2 * size(largest) < size(tower):
        raise ConfigError(f"{key}: {type(tower).__name__} is no stack of equal blocks; leave it off")
    return list(largest)


def _mlp_of(block: nn.Module, tower: nn.Module) -> nn.Module:
    mlp = getattr(block, "mlp", None)
    if not isinstance(mlp, nn.Module) or not _is_plain_mlp(mlp):
        raise ConfigError(
            f"{CHECKPOINTING} = selective: the blocks of {type(tower).__name__} have no MLP of two linear "
            "layers; take full, or leave it off"
        )
    return mlp


def _is_plain_mlp(mlp: nn.Module | None) -> bool:
    """Whether it is two linear layers with others between, run in the order in which it holds them."""
    if not (isinstance(mlp, nn.Sequential) or type(mlp) is Mlp):
        return False
    is_linear = [isinstance(layer, nn.Linear) for layer in mlp.children()]
    return sum(is_linear) == 2 and is_linear[0] and not is_linear[1]


def _through(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
