"""Auto-PGD on the cross-entropy, APGD-CE (Croce & Hein 2020, arXiv 2003.01690): PGD that chooses its step sizes.

::

    z       = project(x_t + s_t steepest(dCE / dx_t))
    x_{t+1} = project(x_t + 3/4 (z - x_t) + 1/4 (x_t - x_{t-1}))           without the last term at t = 0

Each sample has its step size s, at first 2 eps. At checkpoints it is halved, and the sample continues from its
best image, if at most 3/4 of the steps since the last checkpoint raised the loss, or if neither the step size nor
the highest loss changed since then. The attack on a sample ends at the first checkpoint after it succeeded.
"""

import torch
from torch import Tensor

from dive_fast.attacks.threat import Attacked, Best, Model, Threat, gradient

MOMENTUM = 0.75
"""Share of the new step; the rest is that of the step before."""
MIN_RISES = 0.75
"""Share of steps that have to raise the loss for the step size to stay."""


@torch.no_grad()
def apgd_ce(
    model: Model, images: Tensor, labels: Tensor, threat: Threat, *, steps: int = 100, noise: Tensor | None = None
) -> Attacked:
    """Attacks each image by ``steps`` gradients, without a step size to choose.

    Args:
        images: ``(B, 3, H, W)`` fp32 in [0, 1], clean.
        labels: ``(B,)`` int64.
        noise: numbers in (-1, 1) for the random start, the images' shape, scaled so that the largest is 1 as in
            the authors' code; None starts at the clean images.
    """
    if noise is not None and threat.norm == "linf":
        noise = noise / noise.abs().flatten(1).amax(1).clamp(min=1e-12)[:, None, None, None]
    best = Best(images)
    present = before = threat.start(images, noise)
    tried = gradient(model, present, labels)
    best.update(present, tried)
    direction, loss = tried.images, tried.loss
    # The sample's image of the highest loss, from which it restarts; it may be classified rightly.
    peak, peak_direction = present, direction
    peak_loss = torch.where(tried.is_finite, loss, -torch.inf)
    size = images.new_full((len(images),), 2 * threat.eps)
    rises = torch.zeros(len(images), device=images.device)
    was_halved = torch.ones_like(tried.is_right)
    checked_loss = peak_loss
    due = set(checkpoints(steps))
    last = 0
    rows = None  # the samples that are still attacked
    for step in range(steps):
        ahead = threat.step(present, images, direction, size)
        if step:
            ahead = threat.project(
                present + MOMENTUM * (ahead - present) + (1 - MOMENTUM) * (present - before), images
            )
        before, present = present, ahead
        tried = gradient(model, present, labels, rows)
        best.update(present, tried)
        rises += tried.loss > loss
        direction, loss = tried.images, tried.loss
        is_higher = tried.is_finite & (tried.loss > peak_loss)
        peak = torch.where(is_higher[:, None, None, None], present, peak)
        peak_direction = torch.where(is_higher[:, None, None, None], direction, peak_direction)
        peak_loss = torch.where(is_higher, tried.loss, peak_loss)
        if step + 1 in due:
            has_few_rises = rises <= MIN_RISES * (step + 1 - last)
            is_stuck = ~was_halved & (checked_loss >= peak_loss)
            was_halved = has_few_rises | is_stuck
            checked_loss, last = peak_loss, step + 1
            rises = torch.zeros_like(rises)
            restart = was_halved[:, None, None, None]
            size = torch.where(was_halved, size / 2, size)
            present = torch.where(restart, peak, present)
            direction = torch.where(restart, peak_direction, direction)
            rows = best.stop_at_success()
            if not len(rows):
                break
    return best.result()


def checkpoints(steps: int) -> list[int]:
    """The numbers of steps after which step sizes are reviewed: 22, 41, 57, 70, 80, 87, 93 and 99 of 100.

    The first interval is 22 % of the steps, each further one 3 % shorter, down to 6 %.
    """
    interval, shrink, shortest = (max(1, int(share * steps)) for share in (0.22, 0.03, 0.06))
    due = []
    last = 0
    while (last := last + interval) <= steps:
        due.append(last)
        interval = max(interval - shrink, shortest)
    return due
