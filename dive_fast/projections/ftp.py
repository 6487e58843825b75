"""FTP (arXiv 2310.19182), Fast Trainable Projection: cuts rows of d to a radius that each tensor learns.

::

    C = (W - lr u) - W0                                   u: AdamW's step on G, weight decay included
    N = rows of |C|, summed, + 1e-8                       rows: all dimensions but the first
    t = 1:  gamma = 1e-8
    t > 1:  g = sum over rows of (row of <G, C_prev>) / N_prev;   g <- k g where g > 0
            gamma <- clamp(gamma - 1e-2 AdamStep(g), 1e-8, max N)
    W <- W0 + clamp(gamma / N, 0, 1) C;   C_prev, N_prev = C, N

All of it follows the authors' code. The radius is in units of the weights: at CLIP's learning rates it grows
faster than the weights move, so that the rule binds only where g > 0 persists. Two public programs convert k to an
integer, so that 0.5 runs there as 0.
"""

from typing import Any

import torch

from dive_fast.config.section import Section, Share
from dive_fast.projections.adam import ADAM, adam_step
from dive_fast.projections.anchored_group import AnchoredGroup, Layout
from dive_fast.projections.projection import Projection

RATE = 1e-2
"""Learning rate of the radii, in the code a constant."""
SMALLEST = 1e-8
"""Smallest radius, and the term that keeps norms above 0."""


class FTP(Projection):
    """Projects the rows of each tensor onto a ball in the L1 norm, around the anchor; learns its radius."""

    name, title = "ftp", "FTP"
    summary = "Rows of the weights stay within a radius around the pre-trained ones, which Adam learns."
    layout = Layout(("radius", *ADAM), by_rows=True, keeps_previous=True, keeps_rows=True)
    strength = "cut"

    class Options(Section):
        """Options of FTP."""

        k: Share = 1.0
        """Share of the shrinking steps of the radii: 1 is the strongest, at 0 a radius never shrinks."""

    def __init__(self, options: Section) -> None:
        """Reads the options."""
        values: dict[str, Any] = options.model_dump()
        self._k: float = values["k"]

    def after_step(self, group: AnchoredGroup) -> None:
        """Moves the radii and projects the weights. AdamW has divided the gradients by their scale."""
        lengths, products, squares = group.sums("d1", "gp", "dd")
        norms, is_first = lengths + SMALLEST, group.updates == 0
        assert group.row_norms is not None
        gradient = group.sum_rows(products / torch.where(group.row_norms > 0, group.row_norms, 1.0))
        gradient = torch.where(gradient > 0, self._k * gradient, gradient)
        move, moments = adam_step(group, torch.where(is_first, 0.0, gradient), RATE)
        moved = group.value("radius") - move
        largest = group.max_rows(norms)
        radius = torch.where(is_first, SMALLEST, torch.minimum(moved.clamp(min=SMALLEST), largest))
        ratio = torch.where(group.applied, (group.to_rows(radius) / norms).clamp(0, 1), 1.0)
        group.add_to_weights(ratio - 1)
        group.keep(radius=radius, **moments)
        group.keep_rows(norms)
        total, kept = group.sum_rows(lengths), group.sum_rows(ratio * lengths)
        group.measures |= {
            "triggered": (gradient > 0).double(),
            "applied": ((radius < largest) & group.applied).double(),
            # The share of a tensor's rows' lengths that is removed.
            "cut": torch.where(total > 0, 1 - kept / torch.where(total > 0, total, 1.0), 0.0),
            "squares": group.sum_rows(ratio.square() * squares),
        }
