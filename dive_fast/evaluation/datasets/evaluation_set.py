"""Opened evaluation sets of all tasks; imports no torch, so that a mistyped name is reported at once."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dive_fast.data.prompt_files import Template
from dive_fast.data.sources.source import Source

if TYPE_CHECKING:
    from dive_fast.evaluation.classifier import Members
    from dive_fast.evaluation.scores import Regions


@dataclass(frozen=True)
class Labelled:
    """Images with labels, and the classes that are predicted."""

    source: Source
    """Labels index the rows of ``members``, or without these the classes."""
    class_names: tuple[str, ...]
    templates: tuple[Template, ...]
    members: "Members | None" = None
    """For each label, the classes that count as it; None: class i is label i."""
    regions: "Regions | None" = None
    border: int = 0
    """Pixels at each edge that are not part of the image."""
    layout: str = ""
    """Name of the layout on disk."""
    imagenet_rows: tuple[int, ...] | None = None
    """For each class, its number among ImageNet's 1000; None if unknown."""
    remarks: tuple[str, ...] = ()
    """Lines to print before the set is measured."""
    reports_skipped: bool = False
    """Whether broken images are left out and counted (``on_skipped: report``) instead of being an error."""
    remedy: str = ""
    """Advice about a broken image, for messages."""

    @property
    def num_labels(self) -> int:
        """Number of labels that are predicted: rows of ``members``, or without these the classes."""
        return len(self.class_names if self.members is None else self.members)


@dataclass(frozen=True)
class Captioned:
    """Distinct images with all their captions."""

    source: Source
    layout: str = ""
    remarks: tuple[str, ...] = ()
    """See :class:`Labelled`."""
    reports_skipped: bool = False
    """See :class:`Labelled`."""
    remedy: str = ""
    """See :class:`Labelled`."""
    num_samples: tuple[int, ...] = ()
    """For each image, the number of samples with that image; empty: one each."""

    def captions(self) -> list[tuple[str, ...]]:
        """Captions of each image."""
        return [self.source.samples.texts(row) for row in range(len(self.source))]


@dataclass(frozen=True)
class Asked:
    """Questions about images, and the candidate answers that are ranked for each."""

    source: Source
    """A sample for each of Q questions, with the question as its text."""
    candidates: tuple[str, ...]
    possible: tuple[tuple[int, ...], ...]
    """Lists of the candidates that are ranked for a question."""
    possible_of: NDArray[np.int64]
    """``(Q,)``: the index of each question's list in ``possible``."""
    ends: NDArray[np.int64]
    """``(Q,)``: the end of each question's entries in ``answers`` and ``scores``."""
    answers: NDArray[np.int64]
    """The possible candidates that people gave as answers, question by question, ascending."""
    scores: NDArray[np.float64]
    """Their soft accuracy min(#agreeing / 3, 1)."""
    layout: str = "vqa"
    """See :class:`Labelled`."""
    remarks: tuple[str, ...] = ()
    """See :class:`Labelled`."""
    reports_skipped: bool = False
    """See :class:`Labelled`."""
    remedy: str = ""
    """See :class:`Labelled`."""

    def digest(self) -> str:
        """A hash of candidates and scores."""
        content = hashlib.sha256(repr((self.candidates, self.possible)).encode())
        for column in (self.possible_of, self.ends, self.answers, self.scores):
            content.update(column.tobytes())
        return content.hexdigest()


EvaluatedSet = Labelled | Captioned | Asked
"""An opened set of any task."""


def plain_names(names: Sequence[str]) -> tuple[str, ...]:
    """Folder names with underscores replaced by spaces."""
    return tuple(name.replace("_", " ") for name in names)
