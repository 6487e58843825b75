"""One step on DeepSpeed: the backward of each half, then one update.

::

    step(target, reference):
        backward(target,    method.target)
        backward(reference, method.reference)
        update()

The first half's graph is gone before the second half's forward, so DiVE needs the memory of the larger half, not
of both. With micro-batches each half is embedded without gradient, the loss is differentiated down to the
embeddings, and the towers are run again in pieces against those gradients: exact, since the loss sees the whole
batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from torch import Tensor

from dive_fast.config.schema import Config
from dive_fast.data.batch import ReferenceBatch, TargetBatch, Text
from dive_fast.distributed import Ranks
from dive_fast.engine import feature_consistency, flat_groups
from dive_fast.engine.deepspeed_config import (
    deepspeed_section,
    offloads_optimizer,
    updates_on_device,
    zero_section,
)
from dive_fast.engine.optimizer import learning_rate_schedule, make_optimizer
from dive_fast.engine.profiler import span
from dive_fast.engine.target_teacher import TargetTeacher
from dive_fast.engine.update import DeepSpeedUpdate, DeviceUpdate, LossScale
from dive_fast.errors import ConfigError
from dive_fast.methods.method import ImageInfo, Loss, Method, Part, join_metrics, overrides
from dive_fast.model.features import Features, Outputs, Pairs
from dive_fast.model.towers import Towers
from dive_fast.model.transformer_blocks import (
    compile_blocks,
    recompute_activations,
    recompute_blocks,
    replace_quickgelu,
)

PER_ROW = ("image", "text", "logits")
"""Of the towers' features: those with a row for each pair or text, to be cut into micro-batches."""


@dataclass
class StepBatches:
    """This rank's batches of one step, on its device, until the step takes them."""

    target: TargetBatch | None
    reference: ReferenceBatch | None = None
    """None where the method has no reference loss, or not at this step."""
    teacher: Pairs | None = None
    """Unit embeddings of the reference batch by the frozen model, ``(B', D)`` each."""

    def take(self) -> tuple[TargetBatch, ReferenceBatch | None, Pairs | None]:
        """Hands them over: whoever takes them can let go of their memory."""
        assert self.target is not None, "a step takes its batches once"
        taken = self.target, self.reference, self.teacher
        self.target = self.reference = self.teacher = None
        return taken


@dataclass(frozen=True)
class _Half:
    """One forward and backward: pairs, and the loss of their features."""

    name: str
    images: Tensor
    text: Text | None
    """None leaves the text tower out."""
    loss: Callable[[Outputs], Loss]
    parts: tuple[Part, ...]
    """The parts of the method whose loss it is."""
    last: bool
    """Whether DeepSpeed may reduce what has accumulated by its end."""


class Engine:
    """Towers and a method on DeepSpeed."""

    def __init__(self, config: Config, towers: Towers, method: Method, ranks: Ranks, total_steps: int) -> None:
        """Hands the towers to DeepSpeed.

        Args:
            total_steps: updates in the whole run, for the learning rate's schedule.

        Raises:
            ConfigError: as :func:`deepspeed_section`.
        """
        train = config.train
        self.ranks, self.schedule, self.micro_batch_size = ranks, train.schedule, train.micro_batch_size
        self.towers = towers.to(ranks.device).train()
        self.towers.set_precision(train.precision)
        feature_consistency.settle(self.towers)
        found: feature_consistency.FeatureConsistency = (
            self.towers.feature_consistency or feature_consistency.by_modules(self.towers)
        )
        feature_consistency.check(config, found)
        self.features_are_random = found.is_random
        """Whether the same weights make other features of the same batch each time."""
        self.method = method.to(ranks.device)
        _choose_tuned(self.towers, method)
        self.teacher = (
            None if method.needs.target_teacher == "none" else TargetTeacher(self.towers, method.target_loss)
        )
        replace_quickgelu(self.towers)
        if train.activation_checkpointing == "full":
            recompute_blocks(self.towers)
        elif train.activation_checkpointing == "selective":
            recompute_activations(self.towers)
        if train.compile:
            compile_blocks(self.towers)
        section = deepspeed_section(config, ranks.world_size)
        clipping, on_device = section["gradient_clipping"], updates_on_device(section)
        check_hooks(section, method, train.schedule)
        if on_device:
            _disable_deepspeed_grad_norm(section)
        optimizer = make_optimizer(train, towers, offloads_optimizer(section))
        schedule = learning_rate_schedule(train.warmup_steps, total_steps)
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.towers,
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
            config=section,
        )
        if ranks.world_size == 1 and zero_section(section).get("stage", 0) == 0:
            # DeepSpeed would copy all gradients into one tensor and back, to average them over this one rank.
            self.deepspeed.enable_backward_allreduce = False
        if projections := method.projections():
            flat_groups.install(self.deepspeed, optimizer, self.towers, projections)
        self.scale = LossScale(train.precision, ranks.device if on_device else torch.device("cpu"))
        self._update = (
            DeviceUpdate(self.deepspeed, optimizer, self.scale, clipping)
            if on_device
            else DeepSpeedUpdate(self.deepspeed, self.scale)
        )

    def step(self, batches: StepBatches) -> dict[str, Tensor]:
        """One update.

        Args:
            batches: taken: the engine lets go of each batch once its half is done.

        Returns:
            What to log, global over ranks, ``()`` each on the device: the losses, |u|, |v|, the logit scale, the
            gradient's norm, and after the update the loss scale and the number of steps skipped so far.
        """
        metrics = self.accumulate(batches)
        norm = self.update(metrics["loss"])
        return metrics | {"gradient_norm": norm} | self.scale.metrics()

    def accumulate(self, batches: StepBatches) -> dict[str, Tensor]:
        """The gradients of a step, without its update; argument and result of :meth:`step`."""
        # ZeRO-3 adds to the gradients of the step before where a step's first backward does not reach a parameter,
        # as the text tower's by the images of SnD.
        if (partition := getattr(self.deepspeed.optimizer, "grad_partitions_flat_buffer", None)) is not None:
            partition.zero_()
        metrics: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.ranks.device)
        for half in self._halves(batches):
            with span(half.name):
                loss = self._backward(half)
            total = total + loss.loss
            metrics = join_metrics(metrics, loss.metrics)
        return join_metrics({"loss": total}, metrics)

    def update(self, loss: Tensor) -> Tensor:
        """Applies the gradients, unless they or ``loss`` are not finite on some rank; returns their norm."""
        with span("optimizer"):
            norm = self._update.apply(loss)
        if self.teacher is not None:
            with span("target teacher"):
                self.teacher.move(self.towers, self._update.skipped)
        return norm

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return float(self.deepspeed.get_lr()[0])

    def set_step(self, step: int) -> None:
        """Sets the learning rate to that of a run which has made so many steps."""
        schedule = self.deepspeed.lr_scheduler
        rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule.last_epoch, schedule._last_lr = step, rates
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _halves(self, batches: StepBatches) -> Iterator[_Half]:
        method, group, needs = self.method, self.ranks.group, self.method.needs
        target, reference, teacher = batches.take()
        target_text = target.text if needs.target_texts else None
        reference_text = None if reference is None or not needs.reference_texts else reference.text
        labels = target.labels
        target_teacher = None
        if self.teacher is not None:
            with span("target teacher"):
                target_teacher = self.teacher(target.images, target_text, self.micro_batch_size)

        def target_loss(outputs: Outputs) -> Loss:
            return method.target(outputs, labels, group, target_teacher)

        def reference_loss(outputs: Outputs) -> Loss:
            return method.reference(outputs, teacher, group)

        def joint_loss(outputs: Outputs) -> Loss:
            first, second = _split(outputs, sizes, [target_text is not None, reference_text is not None])
            return method.joint(first, labels, second, teacher, group, target_teacher)

        target_part, reference_part = method.target_loss, method.reference_loss
        images = self._changed(target.images, target_text, target_part, labels, None)
        first = _Half("target", images, target_text, target_loss, (target_part,), last=False)
        if reference is None:
            yield replace(first, last=True)
            return
        assert reference_part is not None
        assert teacher is not None or not needs.reference_teacher, "this method needs a teacher"
        images = self._changed(reference.images, reference_text, reference_part, None, teacher)
        second = _Half("reference", images, reference_text, reference_loss, (reference_part,), last=True)
        sizes = [len(target.images), len(reference.images)]
        del target, reference, images
        if self.schedule == "joint":
            text, parts = _join(first.text, second.text), (*first.parts, *second.parts)
            half = _Half("joint", torch.cat([first.images, second.images]), text, joint_loss, parts, last=True)
            del first, second
            yield half
            return
        if second.text is None and first.text is not None:
            # The last backward is the one that ZeRO reduces by: it has to go through both towers.
            first, second = replace(second, last=False), replace(first, last=True)
        yield first
        # The second half is the peak: the gradients of the first are there too, its images need not be.
        del first
        yield second

    def _changed(
        self, images: Tensor, text: Text | None, part: Part, labels: Tensor | None, teacher: Pairs | None
    ) -> Tensor:
        """Images of a half as its part changes them, a micro-batch at a time."""
        if not overrides(part, "change_images"):
            return images
        with torch.no_grad():
            rows = None if text is None else self.towers.encode_text(text.tokens, text.length)[text.index]
        size = self.micro_batch_size or len(images)
        changed = []
        for start in range(0, len(images), size):
            piece = slice(start, start + size)

            def outputs(images: Tensor, piece: slice = piece) -> Outputs:
                made = self.towers(images)
                return Outputs(made.image, None if rows is None else rows[piece], made.logit_scale, made.logits)

            info = ImageInfo(
                None if labels is None else labels[piece],
                None if teacher is None else Pairs(*(each[piece] for each in teacher)),
            )
            changed.append(part.change_images(images[piece], outputs, info).detach())
        return torch.cat(changed)

    def _penalty(self, half: _Half) -> Loss | None:
        """The penalty on parameters, with the half that is reduced last: once a step."""
        return self.method.penalty(dict(self.towers.named_parameters())) if half.last else None

    def _backward(self, half: _Half) -> Loss:
        """Forward and backward of one half."""
        with self.method.change_weights(self.towers, half.parts):
            if self.micro_batch_size is not None and self.micro_batch_size < len(half.images):
                return self._backward_in_pieces(half)
            self.deepspeed.set_gradient_accumulation_boundary(half.last)
            features = self._forward(half.images, None if half.text is None else half.text.tokens, half)
            with span("loss"):
                loss = _added(half.loss(_by_pair(features, half.text)), self._penalty(half))
            self.deepspeed.backward(self._update.scaled(loss.loss))
        return Loss(loss.loss.detach(), loss.metrics)

    def _forward(self, images: Tensor, tokens: Tensor | None, half: _Half) -> Features:
        features: Features = self.deepspeed(images, tokens, None if half.text is None else half.text.length)
        return features

    def _backward_in_pieces(self, half: _Half) -> Loss:
        assert self.micro_batch_size is not None
        pieces = math.ceil(len(half.images) / self.micro_batch_size)
        images = half.images.split(self.micro_batch_size)
        texts: Sequence[Tensor | None] = [None] * pieces
        if half.text is not None:
            texts = _deal(half.text.tokens, pieces)
        with torch.no_grad():
            passes = [self._forward(image, text, half) for image, text in zip(images, texts, strict=True)]
        # Embedding gradients at |u| = 3e-3 underflow fp16, so they stay in fp32 until the loss scale is applied.
        image, text, logits = (_leaf([getattr(found, name) for found in passes]) for name in PER_ROW)
        assert image is not None
        leaves = Features(image, text, passes[0].logit_scale.detach().requires_grad_(), logits)
        del passes
        features = leaves
        if half.text is not None and text is not None:
            rows = _rows_of(len(half.text.tokens), _lengths(texts), text.device)
            features = leaves._replace(text=text[rows])
        with span("loss"):
            loss = half.loss(_by_pair(features, half.text))
            gradients = _gradients(loss.loss, leaves)
        sizes = _lengths(images), _lengths(texts), _lengths(images)
        shares = [_in_parts(getattr(gradients, name), size) for name, size in zip(PER_ROW, sizes, strict=True)]
        for piece, (image, tokens, *share) in enumerate(zip(images, texts, *shares, strict=True)):
            final = piece == pieces - 1
            self.deepspeed.set_gradient_accumulation_boundary(half.last and final)
            features = self._forward(image, tokens, half)
            # Its gradient is the loss's own; the logit scale enters every piece but counts once.
            surrogate = (features.logit_scale * gradients.logit_scale * final).sum()
            for name, gradient in zip(PER_ROW, share, strict=True):
                if gradient is not None:
                    surrogate = surrogate + (getattr(features, name).float() * gradient).sum()
            penalty = self._penalty(half) if final else None
            if penalty is not None:
                loss, surrogate = _added(loss, penalty), surrogate + penalty.loss
            self.deepspeed.backward(self._update.scaled(surrogate))
        return Loss(loss.loss.detach(), loss.metrics)


def _choose_tuned(towers: Towers, method: Method) -> None:
    """Freezes the parameters that the method does not train."""
    if not method.needs.texts:
        towers.text.requires_grad_(False)
        towers.logit_scale.requires_grad_(False)
    for name, parameter in towers.named_parameters():
        if not method.tunes(name):
            parameter.requires_grad_(False)


def check_hooks(section: dict[str, Any], method: Method, schedule: str) -> None:
    """Validates that each rank has all weights where a method reads or changes them, and each half its own ones.

    Args:
        section: DeepSpeed's.
        schedule: ``train.schedule``.

    Raises:
        ConfigError: ZeRO-3, an optimizer on the CPU, or one forward of two halves with different weights.
    """
    if schedule == "joint" and method.needs.sequential:
        raise ConfigError(
            "train.schedule = joint: this method has change_weights, which changes the weights of one half alone; "
            "take sequential"
        )
    hooks = method.hooks()
    if hooks and not updates_on_device(section):
        stage = zero_section(section).get("stage", 0)
        place = "offload_optimizer" if stage < 3 else f"stage = {stage}"
        raise ConfigError(
            f"deepspeed.zero_optimization.{place}: this method has {', '.join(hooks)}, which need all weights "
            "on each rank's device; take stage 0, 1 or 2 without offload"
        )


def _added(loss: Loss, penalty: Loss | None) -> Loss:
    return loss if penalty is None else Loss(loss.loss + penalty.loss, join_metrics(loss.metrics, penalty.metrics))


def _disable_deepspeed_grad_norm(section: dict[str, Any]) -> None:
    section["gradient_clipping"] = 0.0
    if zero_section(section).get("stage", 0) > 0:
        section["zero_optimization"]["compute_grad_norm"] = False


def _by_pair(features: Features, text: Text | None) -> Outputs:
    """The towers' features with a row for each pair."""
    rows = None if text is None or features.text is None else features.text[text.index]
    return Outputs(features.image, rows, features.logit_scale, features.logits)


def _split(joint: Outputs, sizes: list[int], has_texts: list[bool]) -> tuple[Outputs, Outputs]:
    """Both halves of what was made of both at once."""
    images, logits = joint.image.split(sizes), _in_parts(joint.logits, sizes)
    with_texts = [size * has for size, has in zip(sizes, has_texts, strict=True)]
    texts = _in_parts(joint.text, with_texts)
    first, second = (
        Outputs(image, text if count else None, joint.logit_scale, logit)
        for image, text, count, logit in zip(images, texts, with_texts, logits, strict=True)
    )
    return first, second


def _leaf(passes: list[Tensor | None]) -> Tensor | None:
    """What the passes made, end to end in fp32, to be differentiated by."""
    rows = [found for found in passes if found is not None]
    return torch.cat(rows).float().requires_grad_() if rows else None


def _gradients(loss: Tensor, leaves: Features) -> Features:
    """Of a loss, by those leaves that there are."""
    there = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(loss, there, allow_unused=True, materialize_grads=True))
    return Features._make(None if leaf is None else next(found) for leaf in leaves)


def _lengths(parts: Sequence[Tensor | None]) -> list[int]:
    return [0 if part is None else len(part) for part in parts]


def _in_parts(rows: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if rows is None else rows.split(sizes)


def _join(first: Text | None, second: Text | None) -> Text | None:
    """Both halves' texts as one; their contexts may differ, and zero pads behind the end of a text."""
    if first is None or second is None:
        return second if first is None else first
    context = max(first.tokens.shape[1], second.tokens.shape[1])
    pad = torch.nn.functional.pad
    tokens = [pad(text.tokens, (0, context - text.tokens.shape[1])) for text in (first, second)]
    index = torch.cat([first.index, second.index + len(first.tokens)])
    return Text(torch.cat(tokens), index, max(first.length, second.length))


def _deal(tokens: Tensor, pieces: int) -> list[Tensor]:
    """Rows in ``pieces`` parts, none empty: every rank must run both towers equally often under ZeRO-3."""
    return [part if len(part) else tokens[:1] for part in tokens.tensor_split(pieces)]


def _rows_of(count: int, sizes: list[int], device: torch.device) -> Tensor:
    """Where each of ``count`` rows stands in the parts of :func:`_deal` laid end to end, fillers left out."""
    real = torch.arange(count, device=device).tensor_split(len(sizes))
    starts = [sum(sizes[:part]) for part in range(len(sizes))]
    return torch.cat([rows - rows[:1] + start for rows, start in zip(real, starts, strict=True)])
