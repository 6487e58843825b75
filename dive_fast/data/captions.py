"""Several captions of an image: one a line of its text, or one a text."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dive_fast.data.sources.sample_table import split_lines
from dive_fast.data.sources.source import Source


def with_lines(source: Source) -> Source:
    """The source with each line of a sample's texts as a caption."""
    return replace(source, samples=source.samples.split_lines(), tokens=None)


def caption_counts(source: Source) -> NDArray[np.int64] | None:
    """``(N,)``: the number of captions of each sample of :func:`with_lines`; None: every sample has one."""
    if not source.samples.captions_are_lines:
        return None
    counts = source.samples.text_counts
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
    if source.samples.captions_are_lines:
        return ["captions = lines, but every image has a single caption"]
    probed = range(0, len(source), max(1, -(-len(source) // MAX_PROBED)))
    texts = [source.samples.texts(row) for row in probed]
    several = sum(len(each) > 1 for each in texts)
    multiline = sum(len(split_lines(each[:1])) > 1 for each in texts)
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
