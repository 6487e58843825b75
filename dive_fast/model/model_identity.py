"""The identity of a model: architecture, preprocessing and weights."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from dive_fast.identity import Identity
from dive_fast.model.towers import ADDED, Towers


def model_identity(towers: Towers) -> Identity:
    """The identity of a model's features: architecture (which names the tokenizer), preprocessing and weights.

    Args:
        towers: from :func:`dive_fast.model.towers.create`; a head and learned prompts are ignored.
    """
    return {
        "architecture": towers.model_cfg,
        "preprocess": repr(towers.preprocess),
        "weights": weights_digest(towers),
    }


def weights_digest(towers: Towers) -> str:
    """A digest of the names and bits of all weights except those of a head and of learned prompts."""
    return state_digest(towers.state_dict())


def state_digest(state: Mapping[str, Tensor]) -> str:
    """The digest of :func:`weights_digest` from a state dict of the towers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if not name.startswith(ADDED):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
