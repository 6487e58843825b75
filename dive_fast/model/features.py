"""Feature tuples: outputs of the towers and inputs of the losses."""

from typing import NamedTuple

from torch import Tensor


class Pairs(NamedTuple):
    """Image and text features of pairs, ``(B, D)`` each."""

    image: Tensor
    text: Tensor


class Outputs(NamedTuple):
    """Outputs of the towers for the target or reference half of a step, one row per pair."""

    image: Tensor
    """``(B, D)``"""
    text: Tensor | None
    """``(B, D)``; None if the objective does not use the texts of this half."""
    logit_scale: Tensor
    """``(1,)``"""
    logits: Tensor | None = None
    """``(B, C)`` of the classification head; None without one."""
    second_text: Tensor | None = None
    """``(B, D)`` of the second prompts; None without them."""
    views: "tuple[Outputs, ...]" = ()
    """Outputs of the further views of the images that the method asks for; they have no texts."""

    classes: Tensor | None = None
    """``(C, D)`` features of the target's classes by learned prompts; None without them."""

    @property
    def pairs(self) -> Pairs:
        """Image and text features; there must be texts."""
        assert self.text is not None
        return Pairs(self.image, self.text)


class Features(NamedTuple):
    """Outputs of the towers for a batch, with unnormalised features."""

    image: Tensor
    """``(B, D)``"""
    text: Tensor | None
    """``(U, D)``, one row per distinct text; ``text[index]`` has one row per pair. None without texts."""
    logit_scale: Tensor
    """``(1,)``: s = 1 / tau (not its logarithm), at most ``model.logit_scale_max``."""
    logits: Tensor | None = None
    """``(B, C)`` of the classification head on unit image features; None without one."""
