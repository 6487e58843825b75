"""The identity of a model: architecture, preprocessing, weights."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from dive_fast.identity import Identity
from dive_fast.model.towers import Towers


def model_identity(towers: "Towers") -> Identity:
    """What decides a model's features: its architecture, its view of images, its tokenizer and its weights.

    Args:
        towers: as :func:`dive_fast.model.towers.create` built them; a head is left out.
    """
    return {
        "architecture": towers.model_cfg,
        "preprocess": repr(towers.preprocess),
        "weights": weights_digest(towers),
    }


def weights_digest(towers: "Towers") -> str:
    """A hash of all weights, bit for bit, names included; of a head's not."""
    return state_digest(towers.state_dict())


def state_digest(state: Mapping[str, Tensor]) -> str:
    """The hash of :func:`weights_digest`, from the towers' state."""
    from dive_fast.model.towers import HEAD

    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if not name.startswith(HEAD):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
