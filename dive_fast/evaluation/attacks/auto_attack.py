"""AutoAttack's standard version by the authors' package (Croce & Hein 2020, arXiv 2003.01690).

Four attacks in turn, each on the samples that withstood those before: APGD on the cross-entropy, targeted APGD on
the difference of logits (DLR), targeted FAB, and Square, which uses no gradients.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dive_fast.attacks.threat import Threat

TARGETS = 9
"""Wrong classes that the targeted attacks try, where there are as many."""
_NORMS = {"linf": "Linf", "l2": "L2"}


def num_targets(num_labels: int) -> int:
    """Wrong classes that the targeted attacks try on a set: 9, or all of a set with fewer."""
    return min(TARGETS, num_labels - 1)


def auto_attack(
    model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, seed: int, targets: int
) -> tuple[Tensor, Tensor]:
    """Attacks a batch by AutoAttack's standard version.

    The package draws its random numbers for a batch, so they depend on the other samples of it.

    Args:
        model: logits ``(B, C)`` of images in [0, 1].
        images: ``(B, 3, H, W)`` fp32 in [0, 1], rightly classified.
        labels: ``(B,)`` int64.
        targets: wrong classes that the targeted attacks try, less than C.

    Returns:
        Whether each sample is robust, and whether its attacked image is finite, ``(B,)`` bool.
    """
    from pyautoattack import AutoAttack  # an optional package

    norm = _NORMS[threat.norm]
    attack = AutoAttack(model, norm=norm, eps=threat.eps, seed=seed, version="standard", device=images.device)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
    with _kept_state(images.device):
        attacked, _ = attack.run_standard_evaluation(images.contiguous(), labels, batch_size=len(images))
    with torch.no_grad():
        is_right = model(attacked).argmax(1) == labels
    is_finite = attacked.isfinite().flatten(1).all(1)
    return is_right & is_finite, is_finite


@contextmanager
def _kept_state(device: torch.device) -> Iterator[None]:
    """Restores the process's random state, which the package seeds, and its trace function, which it removes."""
    trace = sys.gettrace()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            sys.settrace(trace)
