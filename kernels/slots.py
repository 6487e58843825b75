"""Slots: the groups of elements, tensors or their rows, over which sums of flattened pieces are formed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Block(NamedTuple):
    """Elements ``offset .. offset + rows * columns`` of a piece, as a matrix with one slot for each row."""

    offset: int
    rows: int
    columns: int
    slot: int
    """Slot of the first row; the others follow it."""


@dataclass(frozen=True)
class Slots:
    """Slots of the elements of flattened pieces: element i of piece k belongs to
    ``first[k] + (start[k] + i) // length[k]``.

    A piece may begin and end anywhere in a tensor, as the fragments of a ZeRO partition do.
    """

    count: int
    """Number S of slots: of complete tensors, equal on all ranks."""
    first: tuple[int, ...]
    """For each piece, the slot of the first element of its complete tensor."""
    start: tuple[int, ...]
    """For each piece, the index of its first element in the flattened complete tensor."""
    length: tuple[int, ...]
    """For each piece, elements of a slot: those of the tensor (one slot for each tensor) or those of one row."""

    def blocks(self, piece: int, count: int, max_elements: int) -> Iterator[Block]:
        """Blocks of at most ``max_elements`` elements that cover a piece, in its order.

        A row that is incomplete or longer than ``max_elements`` is split into blocks of one row.

        Args:
            piece: k.
            count: number of elements of the piece.
        """
        length, offset = self.length[piece], 0
        while offset < count:
            row, column = divmod(self.start[piece] + offset, length)
            columns = min(length - column, count - offset, max_elements)
            rows = min(count - offset, max_elements) // length if columns == length else 1
            yield Block(offset, rows, columns, self.first[piece] + row)
            offset += rows * columns
