"""Visual question answering by two towers: candidate answers are ranked by the similarity of image and text.

Two towers have no layer that sees both question and image. The score of an answer a to a question q about an image
x is therefore that of the text that models are trained on (:func:`dive_fast.data.sources.vqa_json.vqa_prompt`):

    score(a) = cos(f(x), g("question: q answer: a"))

Training never shows the answer of another kind of question, which a picture may suit as well: only the candidates
that training questions with the same opening have are ranked, see :mod:`dive_fast.data.sources.vqa_json`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dive_fast.data.loaders.loader import Options
from dive_fast.data.sources.vqa_json import vqa_prompt
from dive_fast.data.text_tokenizer import Tokenizer
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError
from dive_fast.evaluation.datasets.evaluation_set import Asked
from dive_fast.evaluation.datasets.strict_samples import StrictSamples, progress
from dive_fast.evaluation.image_features import check_finite, embed_images
from dive_fast.evaluation.text_features import KeptTokens, embed_texts
from dive_fast.model.towers import Towers

TEXTS_AT_ONCE = 1 << 15
"""Texts whose features are in memory at once, at least those of one question: 67 MB in fp32 at width 512."""


class Answered(NamedTuple):
    """Results on a set of questions."""

    metrics: dict[str, float]
    """``soft_accuracy``: mean of min(#agreeing / 3, 1) of the answers that are ranked first. ``upper_bound``: the
    largest that the candidates allow. ``unanswerable``: share of the questions whose answers are no candidates."""
    samples: int
    """Number of questions measured."""
    left_out: int
    """Number of questions left out since their images are broken."""


def answer_questions(
    towers: Towers,
    tokenizer: Tokenizer,
    data: Asked,
    ranks: Ranks,
    batch_size: int,
    options: Options,
    name: str = "",
) -> Answered:
    """Ranks the possible candidates of each question; all ranks must call this, and all get the result.

    Each distinct image, and each distinct question with each candidate, is encoded once; the texts of some
    questions are in memory at a time. Of answers with equal scores the first candidate counts.

    Args:
        batch_size: images encoded at once on each rank.
        name: name of the set on progress bars and in messages; empty disables the bars.

    Raises:
        DataError: an image is broken and the set does not accept that, none can be read, or features are not
            finite.
    """
    table = data.source.samples
    image_of = table.image_numbers(np.arange(len(table)))
    _, first = np.unique(image_of, return_index=True)
    samples = StrictSamples(data.source, towers.preprocess, 0, data.reports_skipped, data.remedy)
    images, is_broken = embed_images(towers, samples, first.tolist(), ranks, batch_size, options, name)
    kept = ~is_broken.cpu().numpy()[image_of]
    if not kept.any():
        raise DataError(f"{name or 'the set'}: none of its {len(first)} images can be read")
    chosen = np.full(len(table), -1, np.int64)
    rows_of: dict[str, list[int]] = {}
    for row in np.flatnonzero(kept).tolist():
        rows_of.setdefault(table.texts(row)[0], []).append(row)
    possible = {question: data.possible[data.possible_of[rows[0]]] for question, rows in rows_of.items()}
    # Millions of texts that are not encoded again.
    tokenizer = tokenizer.tokenizer if isinstance(tokenizer, KeptTokens) else tokenizer
    with progress(ranks, len(possible), name, "question") as bar:
        for part in _parts(possible):
            texts = [vqa_prompt(each, data.candidates[row]) for each in part for row in possible[each]]
            features = embed_texts(towers, tokenizer, texts, ranks)
            check_finite(features, name)
            sizes = [len(possible[each]) for each in part]
            for question, answers in zip(part, features.split(sizes), strict=True):
                rows = rows_of[question]
                scores = images[torch.from_numpy(image_of[rows]).to(images.device)] @ answers.T
                chosen[rows] = np.array(possible[question])[scores.argmax(1).cpu().numpy()]
            bar.update(len(part))
    return Answered(_metrics(data, chosen, kept), int(kept.sum()), int((~kept).sum()))


def _parts(possible: Mapping[str, Sequence[int]]) -> Iterator[list[str]]:
    """The questions in parts of at most :data:`TEXTS_AT_ONCE` texts, or of one question."""
    part, count = list[str](), 0
    for question, candidates in possible.items():
        if part and count + len(candidates) > TEXTS_AT_ONCE:
            yield part
            part, count = [], 0
        part.append(question)
        count += len(candidates)
    yield part


def _metrics(data: Asked, chosen: NDArray[np.int64], kept: NDArray[np.bool_]) -> dict[str, float]:
    """The metrics of the kept questions.

    Args:
        chosen: ``(Q,)``: the candidate of each question.
    """
    counts = np.diff(data.ends, prepend=0)
    question = np.repeat(np.arange(len(counts)), counts)
    soft, best = np.zeros(len(counts)), np.zeros(len(counts))
    is_chosen = data.answers == chosen[question]
    soft[question[is_chosen]] = data.scores[is_chosen]
    np.maximum.at(best, question, data.scores)
    return {
        "soft_accuracy": float(soft[kept].mean()),
        "upper_bound": float(best[kept].mean()),
        "unanswerable": float((counts[kept] == 0).mean()),
    }
