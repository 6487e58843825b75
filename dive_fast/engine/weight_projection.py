"""A method in weight space on DeepSpeed: hooks around the optimizer's step, anchors, metrics and saved state."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dive_fast.engine.flat_groups import States, flat_groups
from dive_fast.errors import ConfigError
from dive_fast.kernels.backend import Backend
from dive_fast.model.adapters import is_factor
from dive_fast.projections.anchored_group import PREVIOUS, AnchoredGroup
from dive_fast.projections.projection import Projection

HEAD = "head."
"""Prefix of the parameters whose anchor a resumed run cannot build again, so that checkpoints store it."""
EXCLUDED = ("logit_scale", "logit_bias")
"""Parameters of one element, for which a projection would be no more than a freeze."""
METRICS = "projection/"
"""Prefix of the metrics' names."""
VALUES, ROWS, ANCHOR, CHECKSUM = "values", "rows", "anchor", "checksum"
"""Kinds of tensors in :meth:`WeightProjection.state`, by which their names begin."""
_CHECKSUM_PART = 1 << 22
"""Elements of which checksums are summed at once."""


class WeightProjection:
    """The rule of a run, applied to each parameter group around each step of the optimizer.

    Anchors are the weights at construction, which come before a checkpoint is loaded: the pre-trained ones, and a
    head that was started from prompts or probed. Those of adapters are zero, for each factor. Only deviations from
    them are measured and changed.
    """

    def __init__(
        self,
        rule: Projection,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        towers: nn.Module,
        has_head_anchor: bool,
        backend: Backend = "auto",
    ) -> None:
        """Copies the anchors and registers the hooks.

        Args:
            engine: DeepSpeed's, at ZeRO 0 to 2.
            optimizer: torch's fused AdamW inside it; it has ``grad_scale`` and ``found_inf`` before each step.
            has_head_anchor: whether the head takes part; a random start has no anchor.

        Raises:
            ConfigError: no tuned parameter takes part.
        """
        self.rule = rule
        self.states = States(optimizer)
        """State of the optimizer that the rule adds, one fp32 tensor each of the weights' size."""
        groups = flat_groups(engine, optimizer, towers, self.states)

        def takes_part(name: str) -> bool:
            is_head = name.startswith(HEAD)
            return name.rpartition(".")[2] not in EXCLUDED and (has_head_anchor or not is_head)

        shapes = {name: shape for _, group in groups for name, shape in group.shapes.items()}
        self.left_out = tuple(name for name in shapes if not takes_part(name))
        """Names of the tuned parameters that do not take part."""
        kept = [(first, group) for first, group in groups if any(map(takes_part, group.shapes))]
        for _, group in groups:
            if rule.layout.keeps_previous and not any(map(takes_part, group.shapes)):
                # Checkpoints read each key of the state from every parameter.
                group.new_state(PREVIOUS)
        self.groups = [AnchoredGroup(group, takes_part, rule.layout, backend) for _, group in kept]
        """The parameter groups with at least one tensor that takes part."""
        self._start_factors_at_zero()
        self._flat_groups = [(first, group, anchored) for (first, group), anchored in zip(kept, self.groups)]
        if not kept:
            raise ConfigError(
                f"projection.name = {rule.name}: no tuned parameter takes part ({', '.join(self.left_out)}); set "
                "projection.name=none"
            )
        parameters = dict(towers.named_parameters())
        self._head_anchors = {
            name: parameters[name].detach().clone()
            for group in self.groups
            for name in group.shapes
            if name.startswith(HEAD)
        }
        self._anchor_square = self._sum_of_squares()
        self._known_checksums: dict[str, Tensor] | None = None
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @property
    def remark(self) -> str:
        """One line about what takes part, for the start of a run."""
        shapes = [shape for group in self.groups for shape in group.shapes.values()]
        elements = sum(shape.numel() for shape in shapes)
        left_out = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return (
            f"projection {self.rule.name}: {len(shapes)} of {len(shapes) + len(self.left_out)} tuned tensors, "
            f"{elements:,} parameters{left_out}"
        )

    def memory(self) -> Iterator[Tensor]:
        """The tensors that the rule keeps besides those of the run without it."""
        for group in self.groups:
            yield from group.anchors
            yield group.values
            yield from () if group.row_norms is None else (group.row_norms,)
        yield from self.states.tensors()
        yield from self._head_anchors.values()

    def metrics(self) -> dict[str, Tensor]:
        """Numbers of the last step, ``()`` each on the device.

        ``triggered`` and ``applied``: share of tensors for which the rule's condition holds, and which it changes;
        the mean of the rule's own strength; ``distance``: ``|W - W0|`` over all tensors, and relative to ``|W0|``
        unless that is zero, where the rule measures it: before the update, for FTP after it.
        """
        names = [name for name in ("triggered", "applied", self.rule.strength) if name is not None]
        metrics = {}
        for name in names:
            measured = [group.measures[name] for group in self.groups if name in group.measures]
            if measured:
                metrics[f"{METRICS}{name}"] = torch.cat(measured).mean().float()
        square = self._total([group.measures["squares"].sum() for group in self.groups])
        metrics[f"{METRICS}distance"] = square.sqrt().float()
        if not self._is_at_zero:
            metrics[f"{METRICS}relative_distance"] = (square / self._anchor_square).sqrt().float()
        return metrics

    def state(self) -> dict[str, Tensor]:
        """State that is equal on all ranks, by kind and name of the tensor; checkpoints store it.

        The rule's numbers ``(k,)`` fp64, those of rows ``(rows,)`` fp64, the anchors of the head, and a checksum
        ``()`` int64 of each anchor.
        """
        return (
            {f"{VALUES}/{name}": value for name, value in self._values()}
            | {f"{ROWS}/{name}": value for group in self.groups for name, value in group.full_rows()}
            | {f"{ANCHOR}/{name}": anchor for name, anchor in self._head_anchors.items()}
            | {f"{CHECKSUM}/{name}": value for name, value in self._checksums().items()}
        )

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Restores the state; the previous deviations are restored with the optimizer's moments.

        Args:
            state: as of :meth:`state`, on the device.
            updates: updates that were applied.

        Raises:
            ConfigError: an anchor differs from that of the run that wrote the checkpoint.
        """
        for name, anchor in self._head_anchors.items():
            anchor.copy_(state[f"{ANCHOR}/{name}"])
        for group in self.groups:
            for segment, anchor in zip(group.segments, group.anchors, strict=True):
                if segment.name in self._head_anchors:
                    flat = self._head_anchors[segment.name].view(-1)
                    anchor.copy_(flat[segment.start : segment.start + len(anchor)])
            group.updates.fill_(updates)
        self._anchor_square, self._known_checksums = self._sum_of_squares(), None
        for name, value in self._checksums().items():
            if int(state[f"{CHECKSUM}/{name}"]) != int(value):
                raise ConfigError(
                    f"projection: the weights that {name} starts from differ from those of the run that wrote the "
                    "checkpoint; start it again from the same pre-trained weights"
                )
        for name, value in self._values():
            value.copy_(state[f"{VALUES}/{name}"])
        for group in self.groups:
            for name, rows in group.full_rows():
                rows.copy_(state[f"{ROWS}/{name}"])

    @torch.no_grad()
    def _before(self, optimizer: Any, *_: Any) -> None:
        for group in self._current(optimizer):
            self.rule.before_step(group)

    @torch.no_grad()
    def _after(self, optimizer: Any, *_: Any) -> None:
        for group in self._current(optimizer):
            self.rule.after_step(group)
            group.count_update()
        self.states.link()

    def _current(self, optimizer: Any) -> Iterator[AnchoredGroup]:
        """The groups that this call of the optimizer updates: one under ZeRO 1 and 2, otherwise all."""
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for first, flat, anchored in self._flat_groups:
            if first in rates:
                flat.gradient_scale, flat.skipped = optimizer.grad_scale, optimizer.found_inf
                flat.learning_rate = rates[first]
                yield anchored

    def _start_factors_at_zero(self) -> None:
        """Sets the anchors of adapters: zero for A and for B apart, which keeps ``W0 + B A`` near W0."""
        for group in self.groups:
            for segment, anchor in zip(group.segments, group.anchors, strict=True):
                if is_factor(segment.name):
                    anchor.zero_()

    @property
    def _is_at_zero(self) -> bool:
        """Whether all anchors are zero."""
        return all(is_factor(name) for group in self.groups for name in group.shapes)

    def _values(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.groups:
            if group.values.shape[1]:
                yield from zip(group.shapes, group.values, strict=True)

    def _checksums(self) -> dict[str, Tensor]:
        """A checksum of the bits of each complete anchor: ``()`` int64 by name, the same at any partition.

        A collective operation at the first call and after :meth:`load`.
        """
        if self._known_checksums is None:
            self._known_checksums = {}
            for _, flat, group in self._flat_groups:
                checksums = dict.fromkeys(group.shapes, torch.zeros((), dtype=torch.int64, device=flat.device))
                for segment, anchor in zip(group.segments, group.anchors, strict=True):
                    checksums[segment.name] = checksums[segment.name] + _checksum(anchor, segment.start)
                sums = torch.stack(list(checksums.values()))
                flat.reduce(sums)
                self._known_checksums |= dict(zip(checksums, sums, strict=True))
        return self._known_checksums

    def _sum_of_squares(self) -> Tensor:
        """``|W0|^2`` of all tensors."""
        totals = []
        for _, flat, group in self._flat_groups:
            total = torch.zeros((), dtype=torch.float64, device=flat.device)
            for anchor in group.anchors:
                total += torch.linalg.vector_norm(anchor, dtype=torch.float64).square()
            flat.reduce(total)
            totals.append(total)
        return self._total(totals)

    @staticmethod
    def _total(values: list[Tensor]) -> Tensor:
        return torch.stack(values).sum()


def _checksum(piece: Tensor, start: int) -> Tensor:
    """``sum_i bits_i (2 i + 1)`` modulo 2^64, ``()`` int64, for elements ``start`` and on of a flattened tensor.

    The checksums of a tensor's pieces add up to its own. A change of a single element always changes it.
    """
    total = torch.zeros((), dtype=torch.int64, device=piece.device)
    # In parts, since positions and bits take 16 bytes an element.
    for part in piece.split(_CHECKSUM_PART):
        positions = torch.arange(start, start + len(part), device=piece.device)
        # Sums and products of 64 bits wrap around.
        total += (part.view(torch.int32) * (2 * positions + 1)).sum()
        start += len(part)
    return total
