"""Parameters that a config freezes, by patterns of their names or by open_clip's locks of a tower."""

import contextlib
import io
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from dive_fast.errors import ConfigError
from dive_fast.model.towers import Towers
from dive_fast.model.transformer_blocks import blocks_of

_LOCK = re.compile(r"(image|text)(?::(\d+))?")


def frozen_names(towers: Towers, patterns: Sequence[str]) -> set[str]:
    """Names of the parameters that the patterns of ``model.freeze`` match.

    Args:
        towers: patterns see a factor of an adapter also by the name of the weight that it adapts.

    Raises:
        ConfigError: a pattern matches nothing, or open_clip cannot leave groups of this tower unlocked.
    """
    plain = (lambda name: name) if towers.adapters is None else towers.adapters.plain_name
    names: set[str] = set()
    for pattern in patterns:
        if lock := _LOCK.fullmatch(pattern):
            matched = _locked_names(towers, lock[1], int(lock[2] or 0), pattern)
        else:
            matched = {
                name
                for name, _ in towers.named_parameters()
                if fnmatchcase(name, pattern) or fnmatchcase(plain(name), pattern)
            }
        if not matched:
            raise ConfigError(
                f"model.freeze: {pattern} matches no parameter; expected image, text, image:N, text:N or a "
                f"pattern of names such as {next(name for name, _ in towers.named_parameters())}"
            )
        names |= matched
    return names


def _locked_names(towers: Towers, tower: str, unlocked: int, pattern: str) -> set[str]:
    """The parameters that open_clip's ``lock`` of a tower freezes, with its last groups unlocked."""
    module, prefix = {"image": (towers.visual, "visual"), "text": (towers.text, "text")}[tower]
    trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        module.requires_grad_(True)
        with contextlib.redirect_stdout(io.StringIO()):  # towers of transformers print what they lock
            module.lock(unlocked)
        return {f"{prefix}.{name}" for name, parameter in module.named_parameters() if not parameter.requires_grad}
    except (AssertionError, AttributeError, ImportError, KeyError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"model.freeze: open_clip cannot lock the {tower} tower ({type(module).__name__}) as {pattern}: "
            f"{str(error) or type(error).__name__}; name its parameters by patterns"
        ) from error
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def layer_factors(towers: Towers, decay: float) -> dict[str, float]:
    """Factor on the learning rate of each parameter: ``decay^(blocks above it)``, by name.

    A tower of L blocks has L + 2 layers from the input to the output, as in BEiT: embeddings, blocks, and the last
    layer norm with the projection. The last one has factor 1, the embeddings ``decay^(L + 1)``.

    Raises:
        ConfigError: a tower is not a stack of equal blocks.
    """
    factors = {name: 1.0 for name, _ in towers.named_parameters()}
    for prefix, tower in (("visual", towers.visual), ("text", towers.text)):
        depths = _depths(tower)
        for name, _ in tower.named_parameters():
            factors[f"{prefix}.{name}"] = decay ** depths[name]
    return factors


_TOP = ("ln_post", "ln_final", "proj", "text_projection", "attn_pool", "head", "norm", "fc_norm", "pooler")
"""Modules and parameters of a tower, or of the model within it, that come after its blocks."""


def _depths(tower: nn.Module) -> dict[str, int]:
    """Number of layers above each parameter of a tower, by name."""
    blocks = blocks_of(tower, "train.layer_decay")
    depths = {}
    above = {id(parameter): len(blocks) - i for i, block in enumerate(blocks) for parameter in block.parameters()}
    for name, parameter in tower.named_parameters():
        parts = name.removeprefix("trunk.").removeprefix("transformer.").split(".")
        is_top = parts[0] in _TOP or parts[:2] == ["encoder", "final_layer_norm"]
        depths[name] = above.get(id(parameter), 0 if is_top else len(blocks) + 1)
    return depths
