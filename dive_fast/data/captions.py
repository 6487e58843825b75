"""Several captions of an image: one a line of its text, or one a text."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dive_fast.data.sources.source import LazySamples, Sample, Source

_NEW_LINE = re.compile(r"\r\n|\r|\n")
"""Ends of lines; ``str.splitlines`` also splits at form feeds and Unicode separators."""


def lines(texts: Sequence[str]) -> tuple[str, ...]:
    """Each line of each text that is not blank; a text of one line is unchanged."""
    captions: list[str] = []
    for text in texts:
        several = [line.strip() for line in _NEW_LINE.split(text) if line.strip()]
        captions += several if len(several) > 1 else [text]
    return tuple(captions)


class CaptionedSamples(LazySamples):
    """Samples whose texts are split into lines on access."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, row: int) -> Sample:
        """The sample of a row, with its lines as texts."""
        sample = self._samples[row]
        captions = lines(sample.texts)
        return sample if captions == sample.texts else replace(sample, texts=captions)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """``(N,)``: the number of captions of each sample."""
        return np.fromiter((len(lines(sample.texts)) for sample in self._samples), np.int64, len(self))


def with_lines(source: Source) -> Source:
    """The source with each line of a sample's texts as a caption."""
    return replace(source, samples=CaptionedSamples(source.samples), tokens=None)


def caption_counts(source: Source) -> NDArray[np.int64] | None:
    """``(N,)``: the number of captions of each sample of :func:`with_lines`; None: every sample has one."""
    if not isinstance(source.samples, CaptionedSamples):
        return None
    counts = source.samples.counts
    return counts if len(counts) and int(counts.max()) > 1 else None


MAX_PROBED = 1 << 16
"""Samples whose texts :func:`remark_on_captions` reads, spread evenly over the set."""


def remark_on_captions(source: Source) -> list[str]:
    """One line if images have several captions: how they are used, or that only the first is.

    Args:
        source: a captioned set.
    """
    if (counts := caption_counts(source)) is not None:
        low, high = int(counts.min()), int(counts.max())
        each = f"{low} each" if low == high else f"{low} to {high} each"
        return [
            f"{len(counts)} images have {int(counts.sum())} captions, {each}; one is drawn per image and epoch"
        ]
    if isinstance(source.samples, CaptionedSamples):
        return ["captions = lines, but every image has a single caption"]
    probed = range(0, len(source), max(1, -(-len(source) // MAX_PROBED)))
    texts = [source.samples[row].texts for row in probed]
    several = sum(len(each) > 1 for each in texts)
    multiline = sum(len(lines(each[:1])) > 1 for each in texts)
    remarks = []
    if several:
        remarks.append(
            f"{several} of {len(texts)} images have several captions, and only the first of each is used; set "
            "captions=lines to draw one per epoch"
        )
    if multiline:
        remarks.append(
            f"{multiline} of {len(texts)} captions have several lines and are read as one text; set "
            "captions=lines if each line is a caption"
        )
    return remarks
