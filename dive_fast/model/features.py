"""Features of images and texts, as towers return them and losses take them."""

from typing import NamedTuple

from torch import Tensor


class Pairs(NamedTuple):
    """Features of the two halves of each pair, ``(B, D)`` each."""

    image: Tensor
    text: Tensor


class Outputs(NamedTuple):
    """What the towers make of one half of a step, a row for each of its pairs."""

    image: Tensor
    """``(B, D)``"""
    text: Tensor | None
    """``(B, D)``; None where the objective has no use for the texts of this half."""
    logit_scale: Tensor
    """``(1,)``"""
    logits: Tensor | None = None
    """``(B, C)`` of the classification head; None where there is none."""

    @property
    def pairs(self) -> Pairs:
        """Both features of each pair."""
        assert self.text is not None
        return Pairs(self.image, self.text)


class Features(NamedTuple):
    """What the towers make of a batch; features are un-normalised."""

    image: Tensor
    """``(B, D)``"""
    text: Tensor | None
    """``(U, D)``, a row for each distinct text; ``text[index]`` has a row for each pair. None without texts."""
    logit_scale: Tensor
    """``(1,)``: s = 1 / tau itself, at most ``model.logit_scale_max``."""
    logits: Tensor | None = None
    """``(B, C)``, of the classification head on unit image features; None without one."""
