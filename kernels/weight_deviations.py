"""Deviations of weights from their anchors: sums by tensor or row, and changes along them, in place."""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from dive_fast.kernels import backend as backends
from dive_fast.kernels import checks, direct, naive_deviations
from dive_fast.kernels.backend import Backend
from dive_fast.kernels.naive_deviations import Product
from dive_fast.kernels.slots import Slots

if backends.primitives is not None:
    # The import registers the custom ops, which must happen before anything is traced.
    from dive_fast.kernels import deviations


class Deviations:
    """Deviations ``d = W - W0`` of fp32 weights from their anchors, in pieces of flattened tensors.

    ::

        d = W - W0                      rounded to fp32
        sums    <x, y> by slot          exact products, summed in fp64 in a fixed order
        change  x <- x + c d            in fp64, rounded to fp32 once; c = 0 changes no bit, whatever d is

    All methods work in place on the tensors of the constructor, have no gradient, and never wait for the device.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        anchors: Sequence[Tensor],
        slots: Slots,
        previous: Sequence[Tensor] | None = None,
        backend: Backend = "auto",
        device: torch.device | None = None,
    ) -> None:
        """Keeps the tensors, which stay at their addresses from now on.

        Args:
            weights: W, ``(n_k,)`` fp32 each, contiguous; there may be none.
            anchors: W0, in the same order, of the same shapes and on the same device.
            slots: the slots of the pieces' elements.
            previous: p, like the anchors: the deviations of an earlier step, which changes replace.
            backend: "triton", "torch", or "auto": triton where it can run (see :mod:`dive_fast.kernels.backend`).
            device: device of the sums if there is no piece; None: the CPU.

        Raises:
            ValueError: a tensor has the wrong shape, dtype, layout or device, or the slots do not fit the pieces.
        """
        checks.check_deviations(weights, anchors, previous)
        _check_slots(slots, weights)
        self._weights, self._anchors = list(weights), list(anchors)
        self._previous = None if previous is None else list(previous)
        self._slots, self._backend = slots, backend
        self._device = weights[0].device if weights else torch.device("cpu") if device is None else device
        self._table: deviations.Table | None = None
        self._addresses: deviations.Gradients | None = None

    @torch.no_grad()
    def sums(self, products: Sequence[Product], gradients: Sequence[Tensor | None] | None = None) -> Tensor:
        """Sums of products over the pieces, by slot.

        ::

            gd = <g, d>    dd = <d, d>    gg = <g, g>    gp = <g, p>    pp = <p, p>    d1 = sum |d|

        Args:
            products: names of the sums, in the order of the columns.
            gradients: g, ``(n_k,)`` fp32 each, contiguous; None, or a None among them, adds nothing.

        Returns:
            ``(S, len(products))`` fp64; 0 for a slot without elements here.

        Raises:
            ValueError: a product is unknown or needs p and there is none, a gradient does not fit its weight, or
                the backend cannot run.
        """
        self._check_products(products)
        gradients = self._check_gradients(gradients)
        if not self._uses_triton():
            return naive_deviations.sums(
                self._weights, self._anchors, self._slots, products, gradients, self._previous, self._device
            )
        names, has_gradients = " ".join(products), any("g" in product for product in products)
        if self._is_eager(gradients):
            return deviations.launch_sums(
                self._find_table(), self._find_addresses(gradients) if has_gradients else None, names
            )
        has_d, has_p = "d" in names, "p" in names
        present = _present(gradients) if has_gradients else {}
        return deviations.sums(
            self._weights if has_d else [],
            self._anchors if has_d else [],
            self._previous if has_p else [],
            list(present.values()),
            list(present),
            names,
            *self._slot_lists(),
            [len(weight) for weight in self._weights],
            self._device,
        )

    @torch.no_grad()
    def add_to_gradients(
        self,
        coefficients: Tensor,
        gradients: Sequence[Tensor | None],
        skipped: Tensor | None = None,
        with_squares: bool = False,
    ) -> Tensor | None:
        """``g <- g + c d`` in place; then ``p <- d`` if there is p, unless the step is skipped.

        Args:
            coefficients: c, ``(S,)`` fp64 or fp32.
            gradients: g, ``(n_k,)`` fp32 each, contiguous; None: only p changes.
            skipped: ``()`` or ``(1,)``, fp32 or bool; other than 0 where p has to keep its bits. None: 0.
            with_squares: whether to sum ``d^2`` in the same pass.

        Returns:
            ``(S,)`` fp64, the sums of ``d^2``, or None.

        Raises:
            ValueError: an argument has the wrong shape, dtype or device, or the backend cannot run.
        """
        return self._add(self._check_gradients(gradients), coefficients, skipped, with_squares)

    @torch.no_grad()
    def add_to_weights(
        self, coefficients: Tensor, skipped: Tensor | None = None, with_squares: bool = False
    ) -> Tensor | None:
        """``W <- W + c d`` in place; also ``p <- d`` if there is p, with the d before, unless the step is skipped.

        Args:
            coefficients: c, ``(S,)`` fp64 or fp32; 0 where W has to keep its bits, also in a skipped step.
            skipped: ``()`` or ``(1,)``, fp32 or bool; other than 0 where p has to keep its bits. None: 0.
            with_squares: whether to sum ``d^2`` in the same pass, with the d before.

        Returns:
            ``(S,)`` fp64, the sums of ``d^2``, or None.

        Raises:
            ValueError: an argument has the wrong shape, dtype or device, or the backend cannot run.
        """
        return self._add(None, coefficients, skipped, with_squares)

    def _add(
        self,
        gradients: Sequence[Tensor | None] | None,
        coefficients: Tensor,
        skipped: Tensor | None,
        with_squares: bool,
    ) -> Tensor | None:
        """Changes the gradients, or the weights if there are no gradients."""
        checks.check_coefficients(coefficients, skipped, self._slots.count, self._device)
        weights, anchors = self._weights, self._anchors
        if not self._uses_triton():
            return naive_deviations.add(
                weights if gradients is None else gradients,
                *(weights, anchors, self._slots),
                *(coefficients, self._previous, skipped, with_squares),
            )
        factors, skip = coefficients.double().contiguous(), None if skipped is None else skipped.float()
        previous = self._previous or []
        if self._is_eager([*(gradients or []), factors, skip]):
            addresses = None if gradients is None else self._find_addresses(gradients)
            squares = deviations.launch_add(
                self._find_table(), addresses, factors, skip, bool(previous), with_squares
            )
        elif gradients is None:
            arguments = weights, anchors, previous, factors, skip, with_squares, *self._slot_lists()
            squares = deviations.add_to_weights(*arguments)
        else:
            present = _present(gradients)
            tensors = list(present.values()), list(present), weights, anchors, previous, factors
            squares = deviations.add_to_gradients(*tensors, skip, with_squares, *self._slot_lists())
        return squares if with_squares else None

    def _is_eager(self, arguments: Sequence[Tensor | None]) -> bool:
        tensors = *self._weights, *self._anchors, *(self._previous or ()), *arguments
        return direct.is_eager(*(tensor for tensor in tensors if tensor is not None))

    def _find_table(self) -> "deviations.Table":
        """The table of the weights' addresses, which is built once."""
        if self._table is None:
            sizes = [len(weight) for weight in self._weights]
            tensors = self._weights, self._anchors, self._previous or []
            self._table = deviations.Table(self._slots, sizes, *tensors, self._device)
        return self._table

    def _find_addresses(self, gradients: Sequence[Tensor | None]) -> "deviations.Gradients":
        """The table of these gradients' addresses."""
        if self._addresses is None:
            self._addresses = deviations.Gradients(self._device)
        self._addresses.update(gradients)
        return self._addresses

    def _slot_lists(self) -> tuple[int, list[int], list[int], list[int]]:
        """The slots as arguments of a custom op."""
        slots = self._slots
        return slots.count, list(slots.first), list(slots.start), list(slots.length)

    def _check_products(self, products: Sequence[Product]) -> None:
        for product in products:
            if product not in get_args(Product):
                raise ValueError(f"products: expected names among {', '.join(get_args(Product))}, got {product!r}")
            if "p" in product and self._previous is None:
                raise ValueError(f"products: {product!r} needs previous deviations, but previous is None")
        if not products or len(set(products)) != len(products):
            raise ValueError(f"products: expected at least one name and each once, got {tuple(products)}")

    def _check_gradients(self, gradients: Sequence[Tensor | None] | None) -> Sequence[Tensor | None]:
        if gradients is None:
            return [None] * len(self._weights)
        checks.check_gradients(gradients, self._weights)
        return gradients

    def _uses_triton(self) -> bool:
        return bool(self._weights) and backends.uses_triton(self._backend, self._weights[0], any_width=True)


def _present(gradients: Sequence[Tensor | None]) -> dict[int, Tensor]:
    """The gradients that are not None, by the number of their piece."""
    return {piece: gradient for piece, gradient in enumerate(gradients) if gradient is not None}


def _check_slots(slots: Slots, weights: Sequence[Tensor]) -> None:
    """Checks that there are slots for each element of the pieces.

    Raises:
        ValueError: a tuple has another length than the pieces, or a piece has elements in slots that do not exist.
    """
    for name in ("first", "start", "length"):
        if len(getattr(slots, name)) != len(weights):
            expected, actual = len(weights), len(getattr(slots, name))
            raise ValueError(f"slots.{name}: expected {expected} numbers, one for each piece, got {actual}")
    for piece, (first, start, length) in enumerate(zip(slots.first, slots.start, slots.length, strict=True)):
        if length < 1:
            raise ValueError(f"slots.length[{piece}]: expected at least 1, got {length}")
        last = first + (start + len(weights[piece]) - 1) // length
        if first < 0 or start < 0 or last >= slots.count:
            raise ValueError(f"slots: piece {piece} has elements outside of the {slots.count} slots")
