"""One step on DeepSpeed: the backward of each half, then one update.

::

    step(target, reference):
        backward(target,    method.target)
        backward(reference, method.reference)
        update()

The first half's graph is freed before the second half's forward, so DiVE needs the memory of the larger half, not
of both. With micro-batches each half is embedded without gradient, the loss is differentiated with respect to the
embeddings, and each micro-batch is run again through the towers against its part of those gradients. This is
exact, since the loss sees the complete batch. Further views of the images, such as adversarial ones, are run like
further micro-batches. With learned prompts, images are embedded without gradient, and the classes instead of the
images are differentiated in micro-batches (:mod:`dive_fast.engine.class_features`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor

from dive_fast.config.schema import NO_PROJECTION, Config, ProjectionConfig
from dive_fast.data.batch import ReferenceBatch, TargetBatch, Text
from dive_fast.distributed import Ranks
from dive_fast.engine.class_features import ClassFeatures
from dive_fast.engine.deepspeed_config import (
    deepspeed_section,
    offloads_optimizer,
    updates_on_device,
    zero_section,
)
from dive_fast.engine.feature_consistency import FeatureConsistency, check_config, inspect_modules, make_consistent
from dive_fast.engine.optimizer import make_optimizer, schedule_of
from dive_fast.engine.profiler import span
from dive_fast.engine.target_teacher import TargetTeacher, split_prompts
from dive_fast.engine.trained_parameters import freeze_untrained
from dive_fast.engine.update import DeepSpeedUpdate, DeviceUpdate, LossScale
from dive_fast.engine.weight_average import WeightAverage
from dive_fast.engine.weight_projection import WeightProjection
from dive_fast.errors import ConfigError
from dive_fast.methods import registry
from dive_fast.methods.method import (
    ImageInfo,
    Loss,
    Method,
    Part,
    Student,
    TeacherOutputs,
    View,
    join_metrics,
    overrides,
)
from dive_fast.model import fast_blocks
from dive_fast.model.features import Features, Outputs, Pairs
from dive_fast.model.learned_prompts import encode_classes
from dive_fast.model.towers import Towers
from dive_fast.model.transformer_blocks import (
    compile_blocks,
    recompute_activations,
    recompute_blocks,
    replace_quickgelu,
)
from dive_fast.projections import rules as projections

PER_ROW = ("image", "text", "logits")
"""Fields of :class:`Features` with a row for each image or text, which micro-batches split."""


@dataclass
class StepBatches:
    """This rank's batches of one step, on its device; a step consumes them."""

    target: TargetBatch | None
    reference: ReferenceBatch | None = None
    """None where the method has no reference loss, or none at this step."""
    teacher: Pairs | None = None
    """Unit embeddings of the reference batch by the frozen model, ``(B', D)`` each."""

    def take(self) -> tuple[TargetBatch, ReferenceBatch | None, Pairs | None]:
        """Returns the batches and drops them, so that the caller can free their memory."""
        assert self.target is not None, "a step takes its batches once"
        batches = self.target, self.reference, self.teacher
        self.target = self.reference = self.teacher = None
        return batches


@dataclass(frozen=True)
class _Half:
    """One forward and backward: pairs, and the loss on their features."""

    name: str
    images: Tensor
    text: Text | None
    """None skips the text tower."""
    loss: Callable[[Outputs], Loss]
    parts: tuple[Part, ...]
    """The parts of the method that ``loss`` computes."""
    last: bool
    """Whether its backward is the last of the step, after which DeepSpeed reduces gradients."""
    views: tuple[View, ...] = ()
    """Further views of the images, which are encoded after them."""


class Engine:
    """Trains towers by a method on DeepSpeed."""

    def __init__(
        self,
        config: Config,
        towers: Towers,
        method: Method,
        ranks: Ranks,
        total_steps: int,
        steps_per_epoch: int | None = None,
    ) -> None:
        """Wraps the towers by DeepSpeed.

        Args:
            towers: with the adapters of ``model.lora`` (:func:`dive_fast.engine.trained_parameters.adapt`).
            total_steps: updates of the complete run, for the learning rate's schedule.
            steps_per_epoch: updates of one pass over the target set, for the same; default: the run is one.

        Raises:
            ConfigError: as :func:`check_config`, :func:`deepspeed_section`, :func:`check_hooks`,
                :func:`check_projection` and :func:`~dive_fast.engine.trained_parameters.freeze_untrained`.
        """
        train = config.train
        method.prepare(towers)
        self.ranks, self.schedule, self.micro_batch_size = ranks, train.schedule, train.micro_batch_size
        self.towers = towers.to(ranks.device).train()
        self.towers.set_precision(train.precision)
        make_consistent(self.towers)
        consistency: FeatureConsistency = self.towers.feature_consistency or inspect_modules(self.towers)
        check_config(config, consistency)
        self.features_are_random = consistency.is_random
        """Whether features of one batch by the same weights differ from call to call."""
        self.method = method.to(ranks.device)
        if self.towers.prompts is not None:
            self._classes = method.target_loss.classes.to(ranks.device)
        self.steps_done = 0
        """Number of steps before the present one."""
        freeze_untrained(config.model, self.towers, method)
        section = deepspeed_section(config, ranks.world_size)
        self.remark = "fast blocks: none (train.fast_blocks = false)"
        """One line about the towers' blocks, for the start of a run."""
        if train.fast_blocks:
            is_partitioned = zero_section(section).get("stage", 0) == 3
            defers = train.activation_checkpointing != "full" and not is_partitioned
            self.remark = fast_blocks.install(self.towers, defers)
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
        clipping, on_device = section["gradient_clipping"], updates_on_device(section)
        check_hooks(section, method, train.schedule)
        check_projection(section, config.projection)
        if on_device:
            _disable_deepspeed_grad_norm(section)
        optimizer = self._optimizer = make_optimizer(train, towers, offloads_optimizer(section))
        schedule = schedule_of(train, total_steps, steps_per_epoch or total_steps)
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.towers,
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
            config=section,
        )
        self.average = (
            None
            if train.ema is None
            else WeightAverage(self.towers, train.ema, train.export_ema, method.target_loss.backend)
        )
        """Averaged weights; None without ``train.ema``."""
        if ranks.world_size == 1 and zero_section(section).get("stage", 0) == 0:
            # DeepSpeed would copy all gradients into one tensor and back to average them over a single rank.
            self.deepspeed.enable_backward_allreduce = False
        self.projection = None
        """The method in weight space; None without ``projection``."""
        if (rule := projections.create(config.projection)) is not None:
            backend = method.target_loss.backend
            has_anchor = registry.has_head_anchor(config.objective)
            self.projection = WeightProjection(rule, self.deepspeed, optimizer, self.towers, has_anchor, backend)
        self.scale = LossScale(train.precision, ranks.device if on_device else torch.device("cpu"))
        self._update = (
            DeviceUpdate(self.deepspeed, optimizer, self.scale, clipping)
            if on_device
            else DeepSpeedUpdate(self.deepspeed, self.scale)
        )

    def step(self, batches: StepBatches) -> dict[str, Tensor]:
        """Computes gradients and makes one update.

        Args:
            batches: consumed; the engine frees each batch once its half is done.

        Returns:
            Metrics, global over ranks, ``()`` each on the device: the losses, |u|, |v|, the logit scale, the
            gradient's norm, and after the update the loss scale and the number of steps skipped so far.
        """
        metrics = self.accumulate(batches)
        norm = self.update(metrics["loss"])
        metrics |= {"gradient_norm": norm} | self.scale.metrics()
        return metrics if self.projection is None else metrics | self.projection.metrics()

    def accumulate(self, batches: StepBatches) -> dict[str, Tensor]:
        """Computes the gradients of a step without its update; arguments and result as in :meth:`step`."""
        # ZeRO-3 would add to the previous step's gradient of a parameter that the first backward does not reach,
        # e.g. of the text tower where a reference loss uses the images alone.
        if (partition := getattr(self.deepspeed.optimizer, "grad_partitions_flat_buffer", None)) is not None:
            partition.zero_()
        self.method.begin_step(self.steps_done)
        metrics: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.ranks.device)
        for half in self._halves(batches):
            with span(half.name):
                loss = self._backward(half)
            total = total + loss.loss
            metrics = join_metrics(metrics, loss.metrics)
        return join_metrics({"loss": total}, metrics)

    def update(self, loss: Tensor) -> Tensor:
        """Updates weights unless gradient or ``loss`` is not finite on some rank; returns the gradient's norm."""
        with span("optimizer"):
            norm = self._update.apply(loss)
            if self.average is not None:
                self.average.move(self._update.skipped)
        if self.teacher is not None:
            with span("target teacher"):
                self.teacher.move(self._update.skipped)
        self.steps_done += 1
        return norm

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update, without the factors of ``train.layer_decay``."""
        return float(self.deepspeed.get_lr()[0]) / float(self._optimizer.param_groups[0]["factor"])

    def set_step(self, step: int) -> None:
        """Sets the engine to a run after ``step`` steps; weights and the optimizer's state are set elsewhere."""
        self.steps_done = step
        schedule = self.deepspeed.lr_scheduler
        rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule.last_epoch, schedule._last_lr = step, rates
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _halves(self, batches: StepBatches) -> Iterator[_Half]:
        method, group, needs = self.method, self.ranks.group, self.method.needs
        target, reference, teacher = batches.take()
        target_text = target.text if needs.target_texts else None
        if needs.second_prompts and target.second_text is not None:
            target_text = _join_texts(target_text, target.second_text)
        reference_text = None if reference is None or not needs.reference_texts else reference.text
        labels, target_part, reference_part = target.labels, method.target_loss, method.reference_loss
        images = self._change_images(target.images, target_text, target_part, labels, None, target.sample)
        info = ImageInfo(labels, None, target.sample, target.images)
        views = self._views(images, target_part, info)
        # Before the student's forward, whose activations would add to the teacher's.
        target_teacher = None if self.teacher is None else self._teach(images, target_text)

        def target_loss(outputs: Outputs) -> Loss:
            return method.target(_split_prompts(outputs), labels, group, target_teacher)

        def reference_loss(outputs: Outputs) -> Loss:
            return method.reference(outputs, teacher, group)

        def joint_loss(outputs: Outputs) -> Loss:
            texts = [0 if text is None else len(text.index) for text in (target_text, reference_text)]
            first, second = _split_halves(outputs, sizes, texts)
            return method.joint(_split_prompts(first), labels, second, teacher, group, target_teacher)

        first = _Half("target", images, target_text, target_loss, (target_part,), False, views)
        if reference is None:
            yield replace(first, last=True)
            return
        assert reference_part is not None
        assert teacher is not None or not needs.reference_teacher, "this method needs a teacher"
        samples = reference.sample
        images = self._change_images(reference.images, reference_text, reference_part, None, teacher, samples)
        views = self._views(images, reference_part, ImageInfo(None, teacher, samples, reference.images))
        second = _Half("reference", images, reference_text, reference_loss, (reference_part,), True, views)
        sizes = [len(target.images), len(reference.images)]
        del target, reference, images, views, info
        if self.schedule == "joint":
            text, parts = _join_texts(first.text, second.text), (*first.parts, *second.parts)
            half = _Half("joint", torch.cat([first.images, second.images]), text, joint_loss, parts, last=True)
            del first, second
            yield half
            return
        if second.text is None and first.text is not None:
            # ZeRO reduces gradients in the last backward, which therefore has to reach both towers.
            first, second = replace(second, last=False), replace(first, last=True)
        yield first
        # Memory peaks in the second half, which holds the gradients of the first; its images are freed.
        del first
        yield second

    def _teach(self, images: Tensor, text: Text | None) -> TeacherOutputs:
        """The target batch by the target half's teacher."""
        assert self.teacher is not None
        with span("target teacher"):
            return self.teacher(images, text, self.micro_batch_size)

    def _change_images(
        self,
        images: Tensor,
        text: Text | None,
        part: Part,
        labels: Tensor | None,
        teacher: Pairs | None,
        samples: Tensor,
    ) -> Tensor:
        """Images of a half after its part's ``change_images``, called once for each micro-batch."""
        if not overrides(part, "change_images"):
            return images
        with torch.no_grad():
            # Without the second prompts, which follow the prompts.
            index = None if text is None else text.index[: len(images)]
            texts = None if text is None else self.towers.encode_text(text.tokens, text.length)[index]
        changed, samples = [], samples.to(images.device)
        with _evaluating(self.towers):
            for piece in self._pieces(len(images)):

                def outputs(images: Tensor, piece: slice = piece) -> Outputs:
                    features = self.towers(images)
                    rows = None if texts is None else texts[piece]
                    return Outputs(features.image, rows, features.logit_scale, features.logits)

                info = ImageInfo(
                    None if labels is None else labels[piece],
                    None if teacher is None else Pairs(*(rows[piece] for rows in teacher)),
                    samples[piece],
                    images[piece],
                )
                changed.append(part.change_images(images[piece], outputs, info).detach())
        return torch.cat(changed)

    def _views(self, images: Tensor, part: Part, info: ImageInfo) -> tuple[View, ...]:
        """The further views of a half's images that its part asks for."""
        if not overrides(part, "views"):
            return ()
        info = info._replace(samples=info.samples.to(images.device))
        with _evaluating(self.towers), span("views"):
            views = tuple(part.views(images, Student(self.towers, self._pieces, self.ranks.group), info))
        assert all(len(view.images) == len(images) for view in views)
        return views

    def _pieces(self, count: int) -> list[slice]:
        """The slices of ``count`` images that the towers encode at once."""
        size = self.micro_batch_size or max(1, count)
        return [slice(start, start + size) for start in range(0, count, size)]

    def _penalty(self, half: _Half) -> Loss | None:
        """The penalty on parameters; None but in the last half, so that it counts once a step."""
        return self.method.penalty(self.towers) if half.last else None

    def _backward(self, half: _Half) -> Loss:
        """Runs forward and backward of one half."""
        if self.towers.prompts is not None:
            return self._backward_prompts(half)
        with self.method.change_weights(self.towers, half.parts):
            if half.views or len(self._pieces(len(half.images))) > 1:
                return self._backward_in_pieces(half)
            self.deepspeed.set_gradient_accumulation_boundary(half.last)
            features = self._forward(half.images, None if half.text is None else half.text.tokens, half)
            with span("loss"):
                loss = _add_penalty(half.loss(_expand_texts(features, half.text)), self._penalty(half))
            _check_gradient(loss.loss, half)
            self.deepspeed.backward(self._update.scale_loss(loss.loss))
        return Loss(loss.loss.detach(), loss.metrics)

    def _backward_prompts(self, half: _Half) -> Loss:
        """Forward and backward of the prompts by the features of all classes, the towers in evaluation mode."""
        with _evaluating(self.towers):
            image, scale = self._encode_images(half.images), self.towers.scale().detach()
            count = len(self._classes.tokens)
            features = ClassFeatures(self._encode_classes, count, self._pieces, self.ranks)
            leaf = features.leaf()
            with span("loss"):
                loss = half.loss(Outputs(image, None, scale, classes=leaf))
                (gradient,) = torch.autograd.grad(loss.loss, [leaf])
            for number, surrogate in enumerate(features.surrogates(gradient)):
                self.deepspeed.set_gradient_accumulation_boundary(half.last and number == len(features) - 1)
                self.deepspeed.backward(self._update.scale_loss(surrogate))
        return Loss(loss.loss.detach(), loss.metrics)

    @torch.no_grad()
    def _encode_images(self, images: Tensor) -> Tensor:
        """Features of images, ``(B, D)`` fp32, without gradient and in micro-batches."""
        pieces = [self.towers.encode_image(images[each]) for each in self._pieces(len(images))]
        return torch.cat(pieces).float()

    def _encode_classes(self, rows: Sequence[int]) -> Tensor:
        """Features of consecutive classes by the learned prompts, with gradient."""
        return encode_classes(self.towers, self.towers.prompts, self._classes, rows)

    def _forward(self, images: Tensor, tokens: Tensor | None, half: _Half) -> Features:
        features: Features = self.deepspeed(images, tokens, None if half.text is None else half.text.length)
        return features

    def _backward_in_pieces(self, half: _Half) -> Loss:
        """Backward by cached embedding gradients: micro-batches of the half's views and of the half in turn."""
        slices = self._pieces(len(half.images))
        texts: Sequence[Tensor | None] = [None] * len(slices)
        if half.text is not None:
            texts = _split_texts(half.text.tokens, len(slices))
        # The half's own pieces are last: ZeRO reduces gradients in the last backward, which reaches both towers.
        pieces = [_Piece(view.images[each], None, view.weights) for view in half.views for each in slices]
        pieces += [_Piece(half.images[each], text) for each, text in zip(slices, texts, strict=True)]
        passes = []
        for piece in pieces:
            with torch.no_grad(), piece.weights():
                passes.append(self._forward(piece.images, piece.tokens, half))
        # Embedding gradients at |u| = 3e-3 underflow fp16, so they stay in fp32 until the loss scale is applied.
        image, text, logits = (_make_leaf([getattr(each, name) for each in passes]) for name in PER_ROW)
        assert image is not None
        leaves = Features(image, text, passes[0].logit_scale.detach().requires_grad_(), logits)
        del passes
        with span("loss"):
            loss = half.loss(_leaf_outputs(leaves, half, _lengths(texts)))
            gradients = _differentiate(loss.loss, leaves)
        sizes = [len(piece.images) for piece in pieces]
        sizes_of = {"image": sizes, "text": _lengths([piece.tokens for piece in pieces]), "logits": sizes}
        splits = [_split_rows(getattr(gradients, name), sizes_of[name]) for name in PER_ROW]
        for number, (piece, *row_gradients) in enumerate(zip(pieces, *splits, strict=True)):
            is_last = number == len(pieces) - 1
            self.deepspeed.set_gradient_accumulation_boundary(half.last and is_last)
            with piece.weights():
                features = self._forward(piece.images, piece.tokens, half)
                # Has the gradient of the loss; the logit scale enters every piece but counts once.
                surrogate = (features.logit_scale * gradients.logit_scale * is_last).sum()
                for name, gradient in zip(PER_ROW, row_gradients, strict=True):
                    rows = getattr(features, name)
                    if gradient is not None and rows is not None:
                        surrogate = surrogate + (rows.float() * gradient).sum()
                penalty = self._penalty(half) if is_last else None
                if penalty is not None:
                    loss, surrogate = _add_penalty(loss, penalty), surrogate + penalty.loss
                _check_gradient(surrogate, half)
                self.deepspeed.backward(self._update.scale_loss(surrogate))
        return Loss(loss.loss.detach(), loss.metrics)


class _Piece(NamedTuple):
    """Images and texts that the towers encode at once, and the context of their weights."""

    images: Tensor
    tokens: Tensor | None
    weights: Callable[[], AbstractContextManager[None]] = nullcontext


@contextmanager
def _evaluating(towers: Towers) -> Iterator[None]:
    """A context in which the towers are in evaluation mode, without dropout."""
    was_training = towers.training
    towers.eval()
    try:
        yield
    finally:
        towers.train(was_training)


def check_hooks(section: dict[str, Any], method: Method, schedule: str) -> None:
    """Validates the schedule and the ZeRO options against a method's hooks on weights.

    Args:
        section: the ``deepspeed`` section.
        schedule: ``train.schedule``.

    Raises:
        ConfigError: a hook needs weights that a rank lacks under ZeRO-3 or offload, or the two halves of a joint
                forward need different weights.
    """
    if schedule == "joint" and method.needs.sequential:
        raise ConfigError(
            "train.schedule = joint: this method has change_weights, which changes the weights of one half alone; "
            "use sequential"
        )
    if hooks := method.hooks():
        _require_device_weights(section, f"this method has {', '.join(hooks)}, which need all weights")


def check_projection(section: dict[str, Any], projection: ProjectionConfig) -> None:
    """Validates the ZeRO options against a method in weight space.

    Args:
        section: the ``deepspeed`` section.

    Raises:
        ConfigError: the rule needs weights that a rank lacks under ZeRO-3 or offload.
    """
    if projection.name != NO_PROJECTION:
        _require_device_weights(section, f"projection.name = {projection.name} needs the optimizer's weights")


def _require_device_weights(section: dict[str, Any], need: str) -> None:
    """Refuses ZeRO-3 and offload; ``need`` is the beginning of the reason."""
    if updates_on_device(section):
        return
    stage = zero_section(section).get("stage", 0)
    option = "offload_optimizer" if stage < 3 else f"stage = {stage}"
    raise ConfigError(
        f"deepspeed.zero_optimization.{option}: {need} on each rank's device; use stage 0, 1 or 2 without offload"
    )


def _check_gradient(loss: Tensor, half: _Half) -> None:
    """Validates that the loss of a half depends on a trained parameter.

    Raises:
        ConfigError: every parameter that it depends on is frozen.
    """
    if not loss.requires_grad:
        raise ConfigError(
            f"model.freeze: the loss of the {half.name} batch depends on no trained parameter; remove an entry, "
            "adapt another tower (model.lora.towers), or choose a method without this loss"
        )


def _add_penalty(loss: Loss, penalty: Loss | None) -> Loss:
    return loss if penalty is None else Loss(loss.loss + penalty.loss, join_metrics(loss.metrics, penalty.metrics))


def _disable_deepspeed_grad_norm(section: dict[str, Any]) -> None:
    section["gradient_clipping"] = 0.0
    if zero_section(section).get("stage", 0) > 0:
        section["zero_optimization"]["compute_grad_norm"] = False


def _expand_texts(features: Features, text: Text | None) -> Outputs:
    """The towers' features with one row for each pair: repeats the rows of distinct texts."""
    rows = None if text is None or features.text is None else features.text[text.index]
    return Outputs(features.image, rows, features.logit_scale, features.logits)


def _leaf_outputs(leaves: Features, half: _Half, text_sizes: list[int]) -> Outputs:
    """Outputs of a half from the rows of all its pieces; rows of its views come first.

    Args:
        text_sizes: text rows of each piece of the half itself.
    """
    count = len(half.images)
    *views, itself = (
        leaves._replace(image=image, logits=logits)
        for image, logits in zip(
            leaves.image.split(count),
            [None] * (1 + len(half.views)) if leaves.logits is None else leaves.logits.split(count),
            strict=True,
        )
    )
    if half.text is not None and leaves.text is not None:
        rows = _text_rows(len(half.text.tokens), text_sizes, leaves.text.device)
        itself = itself._replace(text=leaves.text[rows])
    others = tuple(Outputs(view.image, None, view.logit_scale, view.logits) for view in views)
    return _expand_texts(itself, half.text)._replace(views=others)


def _split_prompts(outputs: Outputs) -> Outputs:
    """Outputs of the target half with its text rows split into those of prompts and of second prompts."""
    if outputs.text is None:
        return outputs
    text, second = split_prompts(outputs.text, len(outputs.image))
    return outputs._replace(text=text, second_text=second)


def _split_halves(joint: Outputs, sizes: list[int], num_texts: list[int]) -> tuple[Outputs, Outputs]:
    """Splits outputs of a joint forward into those of the target and the reference half."""
    images, logits = joint.image.split(sizes), _split_rows(joint.logits, sizes)
    texts = _split_rows(joint.text, num_texts)
    first, second = (
        Outputs(image, text if count else None, joint.logit_scale, logit)
        for image, text, count, logit in zip(images, texts, num_texts, logits, strict=True)
    )
    return first, second


def _make_leaf(pieces: list[Tensor | None]) -> Tensor | None:
    """Concatenates rows of all micro-batches to an fp32 leaf that requires gradient; None where there are none."""
    rows = [piece for piece in pieces if piece is not None]
    return torch.cat(rows).float().requires_grad_() if rows else None


def _differentiate(loss: Tensor, leaves: Features) -> Features:
    """Gradients of a loss with respect to the leaves; None where a leaf is None."""
    inputs = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))
    return Features._make(None if leaf is None else next(gradients) for leaf in leaves)


def _lengths(pieces: Sequence[Tensor | None]) -> list[int]:
    return [0 if piece is None else len(piece) for piece in pieces]


def _split_rows(rows: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if rows is None else rows.split(sizes)


def _join_texts(first: Text | None, second: Text | None) -> Text | None:
    """Concatenates the texts of both halves; the shorter context is padded with zeros."""
    if first is None or second is None:
        return second if first is None else first
    context = max(first.tokens.shape[1], second.tokens.shape[1])
    pad = torch.nn.functional.pad
    tokens = [pad(text.tokens, (0, context - text.tokens.shape[1])) for text in (first, second)]
    index = torch.cat([first.index, second.index + len(first.tokens)])
    return Text(torch.cat(tokens), index, max(first.length, second.length))


def _split_texts(tokens: Tensor, num_pieces: int) -> list[Tensor]:
    """Splits token rows into pieces, with the first row as filler of empty ones.

    No piece may be empty, since under ZeRO-3 every rank has to run both towers equally often.
    """
    return [piece if len(piece) else tokens[:1] for piece in tokens.tensor_split(num_pieces)]


def _text_rows(num_texts: int, sizes: list[int], device: torch.device) -> Tensor:
    """Row of each text in the concatenated pieces of :func:`_split_texts`; fillers are skipped.

    Args:
        sizes: rows of each piece.
    """
    pieces = torch.arange(num_texts, device=device).tensor_split(len(sizes))
    starts = [sum(sizes[:piece]) for piece in range(len(sizes))]
    return torch.cat([texts - texts[:1] + start for texts, start in zip(pieces, starts, strict=True)])
