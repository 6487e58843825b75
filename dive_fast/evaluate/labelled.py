"""A labelled or captioned set, opened: what is measured, and against which prompts."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from PIL import Image
from tqdm import tqdm

from dive_fast.data.prompts import Template
from dive_fast.data.samples import EvaluationSamples, Found, Place
from dive_fast.data.source import Source
from dive_fast.data.views import Preprocess
from dive_fast.evaluate.classifier import Members
from dive_fast.evaluate.scores import Regions
from dive_fast.ranks import Ranks


@dataclass(frozen=True)
class Labelled:
    """Images with labels, and the classes that compete for them."""

    source: Source
    """Labels count what is predicted: the classes, or where ``members`` are given, these."""
    class_names: tuple[str, ...]
    templates: tuple[Template, ...]
    members: Members | None = None
    """For each label, the classes that stand for it; None: class i for label i."""
    regions: Regions | None = None
    border: int = 0
    """Pixels at each edge that are no part of the picture."""
    layout: str = ""
    """How it lies on the disk, in a word."""


@dataclass(frozen=True)
class Captioned:
    """Images with all their captions."""

    source: Source
    layout: str = ""

    def captions(self) -> list[tuple[str, ...]]:
        """Of each image."""
        return [sample.texts for sample in self.source.samples]


class CountedSamples(EvaluationSamples):
    """Images in the evaluation view, each counted once: a broken one is an error, not replaced by the next."""

    def __init__(self, source: Source, preprocess: Preprocess, border: int = 0) -> None:
        super().__init__(source, preprocess)
        self.border = border

    def cut(self, place: Place, image: Image.Image) -> Image.Image:
        """The evaluation view of what is inside the border."""
        if self.border:
            width, height = image.size
            if min(width, height) <= 2 * self.border:
                raise self.source.samples[place[1]].unusable(f"no larger than its border of {self.border} pixels")
            image = image.crop((self.border, self.border, width - self.border, height - self.border))
        return super().cut(place, image)

    def usable(self, place: Place, read: Callable[[Place], Found]) -> tuple[Place, Found]:
        """What ``read`` finds at a place.

        Raises:
            DataError: the sample is broken.
        """
        return place, read(place)


def plain_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names of folders as words."""
    return tuple(name.replace("_", " ") for name in names)


def progress(ranks: Ranks, total: int, name: str, unit: str) -> AbstractContextManager["tqdm[Any]"]:
    """A bar for this rank's part, called ``name``; none without a name."""
    return ranks.progress(total, name, unit) if name else tqdm(disable=True)
