"""Positions of right answers among all answers in both directions, from one product of all similarities.

A similarity is the product of two rows in fp64. Products in fp32 decide almost all comparisons, as their
rounding has a bound; only similarities closer than that to a right answer's are computed in fp64. Positions do
not depend on blocks, ranks or the library of the product, and equal rows tie exactly.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dive_fast.distributed import Ranks
from dive_fast.numerics import full_fp32

TILE = 1024, 2048
"""Distinct images and distinct captions of a tile of similarities: 8 MiB in fp32. Each tile has a fixed cost, so
that smaller ones take longer together."""
FP64_AT_ONCE = 1 << 16
"""Elements of rows that are multiplied in fp64 at once: 512 KiB."""
CLOSE_SHARE = 64
"""A tile of which one in so many similarities is close to a right answer's is multiplied again in fp64."""


class Positions(NamedTuple):
    """Numbers of wrong answers ranked before the best right answer, int64 on the CPU."""

    of_images: Tensor
    """``(N,)``: captions before each image's best caption."""
    of_captions: Tensor
    """``(C,)``: images before each caption's best image."""


def rank(
    images: Tensor, texts: Tensor, text_of: Tensor, matches: tuple[Tensor, Tensor], ranks: Ranks
) -> Positions:
    """Ranks all captions for each image, and all images for each caption; all ranks call it and get the result.

    Ties are ranked in the order of the set.

    Args:
        images: ``(N, D)`` fp32 unit rows.
        texts: ``(T, D)`` fp32 unit rows.
        text_of: ``(C,)``, the text of each caption.
        matches: the image and the caption of each right pair ``(M,)``; each image and each caption has one.
    """
    image_rows, image_of = _distinct(images)
    text_rows, distinct_text = _distinct(texts)
    caption_of = distinct_text[text_of]
    values = _match_values(image_rows, text_rows, image_of[matches[0]], caption_of[matches[1]], ranks)
    of_images = _Queries.of(image_of, caption_of, *matches, values, len(text_rows))
    of_captions = _Queries.of(caption_of, image_of, *matches[::-1], values, len(image_rows))
    lengths = float(image_rows.norm(dim=1).max()) * float(text_rows.norm(dim=1).max())
    local = ranks.local_range(len(image_rows))
    with full_fp32():
        for first in range(local.start, local.stop, TILE[0]):
            height = slice(first, min(first + TILE[0], local.stop))
            for second in range(0, len(text_rows), TILE[1]):
                width = slice(second, min(second + TILE[1], len(text_rows)))
                _count_tile(image_rows, text_rows, height, width, of_images, of_captions, lengths)
    if ranks.group is not None:
        for queries in (of_images, of_captions):
            dist.all_reduce(queries.ahead, group=ranks.group)
    return Positions(of_images.in_order(), of_captions.in_order())


def _distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows without repetition, and the number of each row among them."""
    on_host = rows.cpu().numpy()
    two_elements = np.ascontiguousarray(on_host[:, :2])
    if two_elements.shape[1] == 2 and len(np.unique(two_elements.view(np.uint64))) == len(rows):
        return rows, torch.arange(len(rows), device=rows.device)
    numbers: dict[bytes, int] = {}
    number_of = [numbers.setdefault(row.tobytes(), len(numbers)) for row in on_host]
    if len(numbers) == len(rows):
        return rows, torch.arange(len(rows), device=rows.device)
    first = dict(zip(reversed(number_of), reversed(range(len(rows))), strict=True))
    kept = torch.tensor([first[number] for number in range(len(numbers))], device=rows.device)
    return rows[kept], torch.tensor(number_of, device=rows.device)


def _match_values(image_rows: Tensor, text_rows: Tensor, image: Tensor, text: Tensor, ranks: Ranks) -> Tensor:
    """Similarities ``(M,)`` of right pairs, each computed by one rank."""
    values = torch.zeros(len(image), dtype=torch.float64, device=image_rows.device)
    local = ranks.local_range(len(image))
    part = slice(local.start, local.stop)
    values[part] = _similarities(image_rows, text_rows, image[part], text[part])
    if ranks.group is not None:
        dist.all_reduce(values, group=ranks.group)
    return values


def _similarities(left: Tensor, right: Tensor, left_row: Tensor, right_row: Tensor) -> Tensor:
    """Products ``(P,)`` of pairs of rows in fp64, with bits that do not depend on the other pairs."""
    values = []
    size = max(1, FP64_AT_ONCE // left.shape[1])
    for rows in zip(left_row.split(size), right_row.split(size), strict=True):
        terms = left[rows[0]].double() * right[rows[1]]
        # Sums of halves: the order of a library's sum may depend on the number of rows.
        while (width := terms.shape[1]) > 1:
            half = width // 2
            terms, odd = terms[:, :half] + terms[:, half : 2 * half], terms[:, 2 * half :]
            if odd.shape[1]:
                terms[:, :1] += odd
        values.append(terms[:, 0])
    return torch.cat(values) if values else left.new_empty(0, dtype=torch.float64)


@dataclass(frozen=True)
class _Queries:
    """The queries of one direction, sorted by their row, and how many wrong answers are ahead so far."""

    order: Tensor
    """``(Q,)``: the number of each query in the set."""
    row: Tensor
    """``(Q,)``: its row among the distinct ones, ascending."""
    best: Tensor
    """``(Q,)`` fp64: similarity of its best right answer."""
    first_best: Tensor
    """``(Q,)``: the first answer in the order of the set with that similarity."""
    best_row: Tensor
    """``(Q,)``: its row."""
    weights: Tensor
    """``(R,)`` fp32: how many answers each distinct row of answers is."""
    answers: Tensor
    """``(A,)``: row of each answer times A plus its number, sorted."""
    ahead: Tensor
    """``(Q,)``: wrong answers ahead."""

    @classmethod
    def of(
        cls, row_of: Tensor, answer_row: Tensor, query: Tensor, answer: Tensor, values: Tensor, num_rows: int
    ) -> "_Queries":
        """The queries of a direction.

        Args:
            row_of, answer_row: ``(Q,)`` and ``(A,)``, the row of each query and of each answer.
            query, answer, values: ``(M,)``, right pairs and their similarities.
            num_rows: number of distinct rows of answers; some may be no answer's.
        """
        count, num_answers = len(row_of), len(answer_row)
        best = values.new_full((count,), -torch.inf).scatter_reduce_(0, query, values, "amax")
        is_best = values == best[query]
        first = torch.full((count,), num_answers, device=row_of.device)
        first.scatter_reduce_(0, query[is_best], answer[is_best], "amin")
        order = row_of.argsort(stable=True)
        numbers = answer_row * num_answers + torch.arange(num_answers, device=row_of.device)
        return cls(
            order,
            row_of[order],
            best[order],
            first[order],
            answer_row[first][order],
            torch.bincount(answer_row, minlength=num_rows).float(),
            numbers.sort().values,
            torch.zeros_like(order),
        )

    def in_order(self) -> Tensor:
        """``ahead`` in the order of the set, on the CPU."""
        return torch.empty_like(self.ahead).index_copy_(0, self.order, self.ahead).cpu()

    def among(self, rows: slice) -> slice:
        """The queries with these rows."""
        ends = torch.tensor([rows.start, rows.stop], device=self.row.device)
        return slice(*torch.searchsorted(self.row, ends).tolist())

    def add(self, query: Tensor, answer_row: Tensor, values: Tensor) -> None:
        """Counts answers that are ahead of queries' best right answers, or equal to them and before them."""
        is_ahead = values > self.best[query]
        self.ahead.index_add_(0, query[is_ahead], self.weights[answer_row[is_ahead]].long())
        is_tied = values == self.best[query]
        query, start = query[is_tied], answer_row[is_tied] * len(self.answers)
        # No right answer is before the first best one, so only wrong answers are counted.
        ends = torch.stack([start, start + self.first_best[query]])
        before, until = torch.searchsorted(self.answers, ends)
        self.ahead.index_add_(0, query, until - before)


def _count_tile(
    images: Tensor,
    texts: Tensor,
    height: slice,
    width: slice,
    of_images: _Queries,
    of_captions: _Queries,
    lengths: float,
) -> None:
    """Counts the answers of a tile for both directions; ``lengths``: largest product of two rows' lengths."""
    tile = images[height] @ texts[width].T
    wide: Tensor | None = None
    for queries, rows, answers in ((of_images, height, width), (of_captions, width, height)):
        axis = 0 if queries is of_captions else 1
        counted = _compare(tile, queries, rows, axis, _rounding(tile, images.shape[1], lengths))
        if sum(len(part.query) for part in counted) * CLOSE_SHARE > tile.numel():
            if wide is None:
                wide = images[height].double() @ texts[width].double().T
            counted = _compare(wide, queries, rows, axis, _rounding(wide, images.shape[1], lengths))
        for part in counted:
            queries.ahead[part.queries] += _sum(part.is_ahead, axis, queries.weights[answers])
            query, answer = part.query, part.answer + answers.start
            # The bits of a right answer's similarity are known.
            values = queries.best[query]
            is_other = answer != queries.best_row[query]
            if len(other := is_other.nonzero()[:, 0]):
                pair = queries.row[query[other]], answer[other]
                values[other] = _similarities(images, texts, *(pair if axis else pair[::-1]))
            queries.add(query, answer, values)


def _rounding(products: Tensor, width: int, lengths: float) -> float:
    """A bound of the rounding of products of rows of that width, and of a threshold in their data type."""
    precision = torch.finfo(products.dtype)
    # Not 0 for rows of zeros: equal similarities are never certainly ahead.
    return (width + 8) * precision.eps / 2 * 1.001 * lengths + precision.tiny


class _Compared(NamedTuple):
    """Similarities compared with those of queries' best right answers."""

    queries: Tensor | slice
    """The numbers of the queries ``(Q,)``."""
    is_ahead: Tensor
    """``(Q, A)`` or ``(A, Q)``: answers that are certainly ahead."""
    query: Tensor
    """``(P,)``: queries of the similarities that are too close to be certain."""
    answer: Tensor
    """``(P,)``: their answers, counted from the first one of the tile."""


def _compare(tile: Tensor, queries: _Queries, rows: slice, axis: int, rounding: float) -> list[_Compared]:
    """Compares a tile with the best right answers of the queries with these rows.

    Args:
        axis: dimension of the answers in the tile.
    """
    chosen = queries.among(rows)
    row = queries.row[chosen] - rows.start
    parts: list[tuple[Tensor | slice, Tensor]] = [(chosen, tile)]
    is_first = row.diff(prepend=row.new_full((1,), -1)) > 0
    if not (
        len(row) == tile.shape[1 - axis] and bool(is_first.all())
    ):  # several queries have one row, or none has
        groups = (is_first.nonzero()[:, 0], (~is_first).nonzero()[:, 0])
        parts = [(group + chosen.start, _rows_of(tile, row[group], axis)) for group in groups]
    compared = []
    for numbers, similarity in parts:
        best = queries.best[numbers].unsqueeze(axis)
        is_ahead = _is_above(similarity, (best + rounding).to(tile.dtype))
        is_close = _is_above(similarity, (best - rounding).to(tile.dtype)) ^ is_ahead
        close = _true(is_close)
        query = close[1 - axis] + numbers.start if isinstance(numbers, slice) else numbers[close[1 - axis]]
        compared.append(_Compared(numbers, is_ahead, query, close[axis]))
    return compared


def _rows_of(tile: Tensor, row: Tensor, axis: int) -> Tensor:
    """The similarities of these ascending rows of queries."""
    is_all = torch.equal(row, torch.arange(tile.shape[1 - axis], device=row.device))
    return tile if is_all else tile.index_select(1 - axis, row)


def _is_above(values: Tensor, threshold: Tensor) -> Tensor:
    if values.is_cuda:
        return values >= threshold
    # torch takes four times as long.
    return torch.from_numpy(np.greater_equal(values.numpy(), threshold.numpy()))


def _true(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the few true elements of a mask."""
    if mask.is_cuda:
        row, column = mask.nonzero().T
        return row, column
    # torch takes ten times as long.
    number = torch.from_numpy(np.flatnonzero(mask.numpy()))
    return number // mask.shape[1], number % mask.shape[1]


def _sum(mask: Tensor, axis: int, weights: Tensor) -> Tensor:
    """Sums of the weights, most of them 1, of the true elements of a mask along an axis."""
    counts = _count(mask, axis)
    if len(others := (weights != 1).nonzero()[:, 0]):
        more = mask.index_select(axis, others).float()
        extra = weights[others] - 1
        counts = counts + (more @ extra if axis else extra @ more).long()
    return counts


def _count(mask: Tensor, axis: int) -> Tensor:
    """Numbers of true elements of a mask along an axis."""
    if mask.shape[1] % 8 or not mask.numel():
        return mask.sum(axis, dtype=torch.int32)
    # Eight elements, each 0 or 1, are added at a time: a byte holds up to 255.
    counts = [part.sum(axis).view(torch.uint8) for part in mask.view(torch.int64).split(255, axis)]
    total = torch.stack(counts).sum(0)
    return total.view(len(mask), 8).sum(1) if axis else total
