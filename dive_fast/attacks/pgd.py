"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083): steps of equal length up the cross-entropy.

::

    x_0 = project(x + eps U),   x_{t+1} = project(x_t + a steepest(dCE / dx_t)),   t = 0 .. T - 1

``project`` limits the distance to x by eps and the values to [0, 1]; ``steepest`` is the sign of the gradient in
L-infinity and the gradient divided by its length in L2.
"""

import torch
from torch import Tensor

from dive_fast.attacks.threat import Attacked, Best, Model, Threat, gradient


@torch.no_grad()
def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: int,
    step_size: float,
    noise: Tensor | None = None,
    start: Tensor | None = None,
    keep_best: bool = True,
) -> Attacked:
    """Attacks each image by ``steps`` gradients.

    Args:
        images: ``(B, 3, H, W)`` fp32 in [0, 1], clean.
        labels: ``(B,)`` int64.
        step_size: a, on the scale of images in [0, 1].
        noise: numbers in (-1, 1) for the random start, the images' shape; None starts at the clean images.
        start: the first images, such as those of :meth:`Threat.random_start`, instead of noise.
        keep_best: keep the best of all images that were tried, which costs one more forward, for the last one.
            False: the result is the last image, as training uses it; its loss and whether it is robust are those
            of the image before.
    """
    best, attacked = Best(images), threat.start(images, noise) if start is None else start
    tried = None
    for _ in range(steps):
        tried = gradient(model, attacked, labels)
        if keep_best:
            best.update(attacked, tried)
        else:
            best.judge(tried)
        attacked = threat.step(attacked, images, tried.images, step_size)
    if keep_best or tried is None:
        best.update(attacked, gradient(model, attacked, labels))
        return best.result()
    is_finite = best.is_finite
    return Attacked(
        torch.where(is_finite[:, None, None, None], attacked, images), tried.loss, best.is_robust, is_finite
    )
