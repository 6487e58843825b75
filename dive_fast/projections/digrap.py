"""DiGraP (arXiv 2502.15895), Directional Gradient Projection: removes what leads G away from the anchor.

::

    d = W - W0,  a = <G, d>,  b = |d|^2                   a < 0: the step -G leads away from W0
    t = 1:  omega = 0
    t > 1:  h = sgn(a_prev) <G, d_prev> / (|G| |d_prev|)
            omega <- clamp(omega - AdamStep(h; mu, t), 0, 1)
    a < 0:  G <- G - omega (a / b) d                      otherwise G stays; AdamW on G

omega, one number for each tensor, is learned: where successive gradients agree along d it falls, where they
disagree it rises. It moves before the gradient is projected.

Certain: the projection, its trigger (figure 1 and the public prototype; the paper's Algorithm 1 reads the other
way) and omega's range. Reconstructed: ``h`` as the cosine of complete tensors. The prototype sums cosines of rows
(``cosine = row``), which its code can compute for matrices alone; for it we count all dimensions but the first as
a row, and a vector as one row. ``direction = current`` replaces d_prev by d, and spares a copy of the weights.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from dive_fast.config.section import NonNegativeFloat, Section
from dive_fast.projections.adam import ADAM, adam_step
from dive_fast.projections.anchored_group import AnchoredGroup, Layout
from dive_fast.projections.projection import Projection


class DiGraP(Projection):
    """Projects gradients that lead away from the anchor, as far as a learned strength says."""

    name, title = "digrap", "DiGraP"
    summary = (
        "Removes from each gradient, by a learned share, the part that leads away from the pre-trained weights."
    )
    strength = "omega"

    class Options(Section):
        """Options of DiGraP."""

        mu: NonNegativeFloat = 0.5
        """Learning rate of omega; the paper's experiments have 0.01 to 10. At 0 the rule does nothing."""
        cosine: Literal["tensor", "row"] = "tensor"
        """`tensor`: omega's gradient is the cosine of complete tensors, as the paper writes it. `row`: the sum of
        the rows' cosines, as the authors' prototype has it."""
        direction: Literal["previous", "current"] = "previous"
        """`previous`: the cosine is that with the deviation before the last update, as published; it is kept, one
        more fp32 copy of the weights. `current`: with the present one; omega is nearly the same."""

    def __init__(self, options: Section) -> None:
        """Reads the options."""
        values: dict[str, Any] = options.model_dump()
        self._mu: float = values["mu"]
        self._has_rows, self._has_previous = values["cosine"] == "row", values["direction"] == "previous"
        numbers = ("omega", *ADAM, "previous_product", "previous_square")
        self.layout = Layout(numbers, self._has_rows, self._has_previous)

    def before_step(self, group: AnchoredGroup) -> None:
        """Moves omega and projects the gradients. Both are the same at every scale of the gradients."""
        a, b, cosine = self._products(group)
        is_first, sign = group.updates == 0, group.value("previous_product").sign()
        h = torch.where(group.value("previous_square") > 0, sign * cosine, 0.0)
        move, moments = adam_step(group, torch.where(is_first, 0.0, h), self._mu)
        moved = group.value("omega") - move
        omega = torch.where(is_first, 0.0, moved.clamp(0, 1))
        is_away = (a < 0) & (b > 0) & group.applied
        strength = torch.where(is_away, omega * -a / torch.where(b > 0, b, 1.0), 0.0)
        group.add_to_gradients(group.to_rows(strength) if self._has_rows else strength)
        group.keep(omega=omega, previous_product=a, previous_square=b, **moments)
        group.measures |= {
            "triggered": (a < 0).double(),
            "applied": (strength > 0).double(),
            "omega": group.value("omega"),
            "squares": b,
        }

    def _products(self, group: AnchoredGroup) -> tuple[Tensor, Tensor, Tensor]:
        """a and b of each tensor, and the cosine of the gradient with the previous or the present deviation."""
        if self._has_previous and self._has_rows:
            a, b, n, q, p = group.sums("gd", "dd", "gg", "gp", "pp")
        elif self._has_previous:
            a, b, n, q = group.sums("gd", "dd", "gg", "gp")
            p = group.value("previous_square")
        else:
            a, b, n = group.sums("gd", "dd", "gg")
            q, p = a, b
        # Not the root of n p, which may leave the range of numbers.
        is_zero = (n == 0) | (p == 0)
        lengths = torch.where(is_zero, 1.0, n).sqrt() * torch.where(is_zero, 1.0, p).sqrt()
        cosine = torch.where(is_zero, 0.0, q / lengths)
        if self._has_rows:
            return group.sum_rows(a), group.sum_rows(b), group.sum_rows(cosine)
        return a, b, cosine
