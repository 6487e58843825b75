"""The tensors of one parameter group with their anchors: sums over tensors, numbers of each, and changes."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dive_fast.kernels import Deviations, Slots
from dive_fast.kernels.backend import Backend
from dive_fast.kernels.naive_deviations import Product
from dive_fast.projections.flat_group import FlatGroup

PREVIOUS = "previous_deviation"
"""Key of the deviation of the previous update in the optimizer's state."""
_CHUNK = 256
"""Rows that are summed at once."""


class Layout(NamedTuple):
    """What a group keeps and sums for a rule."""

    values: tuple[str, ...] = ()
    """Names of the rule's numbers for each tensor, kept in ``AnchoredGroup.values`` and saved in checkpoints."""
    by_rows: bool = False
    """Whether sums are those of rows (all dimensions but the first) instead of complete tensors."""
    keeps_previous: bool = False
    """Whether the deviation of the previous update is kept, one more fp32 copy of the weights."""
    keeps_rows: bool = False
    """Whether a number of each row is kept from one update to the next, in ``AnchoredGroup.row_norms``."""


class AnchoredGroup:
    """P tensors with R rows in all, of which this rank updates pieces.

    Vectors are fp64 on the device and equal on all ranks: ``(P,)`` has an entry for each tensor, ``(R,)`` one for
    each row. A row is a slice of the first dimension; a tensor of one dimension is one row.
    """

    def __init__(
        self, group: FlatGroup, takes_part: Callable[[str], bool], layout: Layout, backend: Backend = "auto"
    ) -> None:
        """Copies the anchors: the weights as they are now.

        Args:
            takes_part: whether the rule changes a parameter, by its name.
        """
        self._group = group
        self.shapes = {name: shape for name, shape in group.shapes.items() if takes_part(name)}
        self.segments = [segment for segment in group.segments if segment.name in self.shapes]
        self.anchors = [segment.weights.clone() for segment in self.segments]
        """``(n,)`` fp32 for each segment."""
        self.num_rows = {name: _num_rows(shape) for name, shape in self.shapes.items()}
        previous = None
        if layout.keeps_previous:
            states = group.new_state(PREVIOUS)
            previous = [
                state for segment, state in zip(group.segments, states, strict=True) if segment.name in self.shapes
            ]
        slots = self._slots(layout.by_rows)
        weights = [segment.weights for segment in self.segments]
        self._deviations = Deviations(weights, self.anchors, slots, previous, backend, group.device)
        self._names = {name: index for index, name in enumerate(layout.values)}
        self.values = self._zeros(len(self.shapes), len(layout.values))
        """``(P, k)``, the rule's numbers of each tensor, in the order of ``Layout.values``."""
        self.row_norms = self._zeros(sum(self.num_rows.values())) if layout.keeps_rows else None
        """``(R,)``, a number of each row that the rule keeps from one update to the next."""
        self.updates = self._zeros()
        """``()``, updates that were applied."""
        self.measures: dict[str, Tensor] = {}
        """Numbers of the last step: ``(P,)`` for each tensor. ``squares`` are those of d."""
        if layout.by_rows:
            self._tensor_of_row = self._indices(
                [index for index, rows in enumerate(self.num_rows.values()) for _ in range(rows)]
            )
            self._chunks, self._chunks_of_tensor = (
                self._indices(table) for table in _row_tables(list(self.num_rows.values()))
            )

    @property
    def gradient_scale(self) -> Tensor:
        """``()``, factor on the gradients before the optimizer's step."""
        return self._group.gradient_scale

    @property
    def learning_rate(self) -> float:
        """Learning rate of this update."""
        return self._group.learning_rate

    @property
    def applied(self) -> Tensor:
        """``()`` bool, whether this update is applied."""
        return self._group.skipped.to(self._group.device) == 0

    def sums(self, *products: Product) -> tuple[Tensor, ...]:
        """Sums over complete tensors, ``(P,)`` each, or over rows, ``(R,)`` each, as ``Layout.by_rows`` says.

        Args:
            products: as of :meth:`dive_fast.kernels.Deviations.sums`.
        """
        gradients = self._gradients() if any("g" in product for product in products) else None
        sums = self._deviations.sums(products, gradients)
        self._group.reduce(sums)
        return sums.unbind(1)

    def add_to_gradients(self, coefficients: Tensor, with_squares: bool = False) -> Tensor | None:
        """``g += c d``, and keeps d where the rule says so; see :class:`dive_fast.kernels.Deviations`.

        Args:
            coefficients: c, ``(P,)`` or ``(R,)``; 0 changes no bit.
            with_squares: return the sums of d^2 from the same pass, as :meth:`sums`.
        """
        gradients = self._gradients()
        squares = self._deviations.add_to_gradients(coefficients, gradients, self._group.skipped, with_squares)
        return self._reduced(squares)

    def add_to_weights(self, coefficients: Tensor, with_squares: bool = False) -> Tensor | None:
        """``W += c d``, and keeps d where the rule says so; as :meth:`add_to_gradients`."""
        squares = self._deviations.add_to_weights(coefficients, self._group.skipped, with_squares)
        return self._reduced(squares)

    def value(self, name: str) -> Tensor:
        """``(P,)``, a number of the rule, by its name in ``Layout.values``."""
        return self.values[:, self._names[name]]

    def keep(self, **values: Tensor) -> None:
        """Sets numbers of the rule, ``(P,)`` each, unless this update is skipped."""
        applied = self.applied
        for name, value in values.items():
            old = self.value(name)
            old.copy_(torch.where(applied, value, old))

    def keep_rows(self, values: Tensor) -> None:
        """Sets the number of each row, ``(R,)``, unless this update is skipped."""
        assert self.row_norms is not None
        self.row_norms.copy_(torch.where(self.applied, values, self.row_norms))

    def sum_rows(self, values: Tensor) -> Tensor:
        """``(R,) -> (P,)``: the sum over the rows of each tensor, in a fixed order."""
        return self._reduce_rows(values, torch.sum)

    def max_rows(self, values: Tensor) -> Tensor:
        """``(R,) -> (P,)``: the largest of the rows of each tensor, of values above 0."""
        return self._reduce_rows(values, torch.amax)

    def _reduce_rows(self, values: Tensor, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Reduces the rows of each tensor in two steps; 0 stands for unused entries."""
        for indices in (self._chunks, self._chunks_of_tensor):
            values = reduce(torch.cat([values, values.new_zeros(1)])[indices], 1)
        return values

    def to_rows(self, values: Tensor) -> Tensor:
        """``(P,) -> (R,)``: the value of each row's tensor."""
        return values[self._tensor_of_row]

    def count_update(self) -> None:
        """Counts this update, unless it is skipped."""
        self.updates += self.applied

    def full_rows(self) -> Iterator[tuple[str, Tensor]]:
        """The kept numbers of each tensor's rows, by name; views."""
        if self.row_norms is not None:
            parts = self.row_norms.split(list(self.num_rows.values()))
            yield from zip(self.num_rows, parts, strict=True)

    def _gradients(self) -> list[Tensor | None]:
        return [segment.gradient() for segment in self.segments]

    def _reduced(self, sums: Tensor | None) -> Tensor | None:
        if sums is not None:
            self._group.reduce(sums)
        return sums

    def _slots(self, by_rows: bool) -> Slots:
        names = list(self.shapes)
        if by_rows:
            ends = list(itertools.accumulate(self.num_rows.values(), initial=0))
            first = dict(zip(names, ends[:-1], strict=True))
            count, length = ends[-1], {n: max(1, s.numel() // self.num_rows[n]) for n, s in self.shapes.items()}
        else:
            first, count = {name: index for index, name in enumerate(names)}, len(names)
            length = {name: max(1, shape.numel()) for name, shape in self.shapes.items()}
        return Slots(
            count,
            tuple(first[segment.name] for segment in self.segments),
            tuple(segment.start for segment in self.segments),
            tuple(length[segment.name] for segment in self.segments),
        )

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self._group.device)

    def _indices(self, values: Sequence[int] | Tensor) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int64).to(self._group.device)


def _num_rows(shape: torch.Size) -> int:
    return shape[0] if len(shape) > 1 else 1


def _row_tables(num_rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Indices by which rows are summed in two steps, chunks of rows and then the chunks of each tensor.

    Returns:
        ``(M, chunk)``, the rows of each chunk, and ``(P, m)``, the chunks of each tensor; unused entries are the
        number of rows or of chunks.
    """
    counts = [math.ceil(rows / _CHUNK) for rows in num_rows]
    chunks = torch.full((sum(counts), _CHUNK), sum(num_rows), dtype=torch.int64)
    of_tensor = torch.full((len(num_rows), max(counts, default=0)), sum(counts), dtype=torch.int64)
    row = chunk = 0
    for tensor, (rows, count) in enumerate(zip(num_rows, counts, strict=True)):
        chunks[chunk : chunk + count].view(-1)[:rows] = torch.arange(row, row + rows)
        of_tensor[tensor, :count] = torch.arange(chunk, chunk + count)
        row, chunk = row + rows, chunk + count
    return chunks, of_tensor
