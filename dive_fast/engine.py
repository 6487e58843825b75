"""One step on DeepSpeed: the backward of each half, then one update.

::

    step(target, reference):
        backward(target,    objective.target)
        backward(reference, objective.reference)
        update()

The first half's graph is gone before the second half's forward, so DiVE needs the memory of the larger half, not
of both. With micro-batches each half is embedded without gradient, the loss is differentiated down to the
embeddings, and the towers are run again in pieces against those gradients: exact, since the loss sees the whole
batch.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor

from dive_fast.blocks import compile_blocks, lighten, recompute_activations, recompute_blocks
from dive_fast.config import Config, ConfigError
from dive_fast.data.batch import ReferenceBatch, TargetBatch, Text
from dive_fast.objective import Loss, Objective, Pairs
from dive_fast.ranks import Ranks
from dive_fast.towers import Features, Towers
from dive_fast.trace import span
from dive_fast.update import (
    DeepSpeedUpdate,
    DeviceUpdate,
    LossScale,
    learning_rate_schedule,
    make_optimizer,
    offloads,
    runs_on_device,
    zero_of,
)

AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}

BUCKET = 50_000_000
"""Elements that ZeRO reduces and gathers at once, unless told otherwise. DeepSpeed's default is ten times as many,
1.9 GiB of each GPU, and more than these models have parameters."""


@dataclass
class StepBatches:
    """This rank's batches of one step, on its device, until the step takes them."""

    target: TargetBatch | None
    reference: ReferenceBatch | None = None
    """None where the objective has no reference half."""
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
    text: Text
    loss: Callable[[Pairs, Tensor], Loss]
    last: bool
    """Whether DeepSpeed may reduce what has accumulated by its end."""


class Engine:
    """Towers and objective on DeepSpeed."""

    def __init__(
        self, config: Config, towers: Towers, objective: Objective, ranks: Ranks, total_steps: int
    ) -> None:
        """Hands the towers to DeepSpeed.

        Args:
            total_steps: updates in the whole run, for the learning rate's schedule.

        Raises:
            ConfigError: the ``deepspeed`` section contradicts the rest, or DeepSpeed refuses it.
        """
        train = config.train
        self.ranks, self.schedule, self.micro_batch_size = ranks, train.schedule, train.micro_batch_size
        self.towers = towers.to(ranks.device).train()
        self.towers.autocast = AUTOCAST[train.precision]
        if self.micro_batch_size is not None and any(_is_random(module) for module in towers.modules()):
            raise ConfigError("train.micro_batch_size: this model drops features at random; remove it")
        lighten(self.towers)
        if train.activation_checkpointing == "full":
            recompute_blocks(self.towers)
        elif train.activation_checkpointing == "selective":
            recompute_activations(self.towers)
        if train.compile:
            compile_blocks(self.towers)
        self.objective = objective.to(ranks.device)
        section = deepspeed_section(config, ranks.world_size)
        clipping, on_device = section["gradient_clipping"], runs_on_device(section)
        if on_device:
            _leave_the_norm_to_us(section)
        optimizer = make_optimizer(train, towers, offloads(section))
        schedule = learning_rate_schedule(train.warmup_steps, total_steps)
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.towers,
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
            config=section,
        )
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
        norm = self.update()
        return metrics | {"gradient_norm": norm} | self.scale.metrics()

    def accumulate(self, batches: StepBatches) -> dict[str, Tensor]:
        """The gradients of a step, without its update; argument and result of :meth:`step`."""
        metrics: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.ranks.device)
        for half in self._halves(batches):
            with span(half.name):
                loss = self._backward(half)
            total = total + loss.loss
            metrics |= loss.metrics
        return {"loss": total} | metrics

    def update(self) -> Tensor:
        """Applies the gradients, unless they are not finite on some rank; returns their norm, ``()``."""
        with span("optimizer"):
            return self._update.apply()

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return float(self.deepspeed.get_lr()[0])

    def _halves(self, batches: StepBatches) -> Iterator[_Half]:
        objective, group = self.objective, self.ranks.group
        target, reference, teacher = batches.take()

        def target_loss(pairs: Pairs, scale: Tensor) -> Loss:
            return objective.target(pairs, scale, group)

        if not objective.needs_reference:
            yield _Half("target", target.images, target.text, target_loss, last=True)
            return
        assert reference is not None, "this objective needs a reference batch"
        assert teacher is not None or not objective.needs_teacher, "this objective needs a teacher"

        def reference_loss(pairs: Pairs, scale: Tensor) -> Loss:
            return objective.reference(pairs, scale, teacher, group)

        def joint_loss(pairs: Pairs, scale: Tensor) -> Loss:
            first, second = (Pairs(*halves) for halves in zip(*(half.split(sizes) for half in pairs), strict=True))
            return objective.joint(first, scale, second, teacher, group)

        if self.schedule == "sequential":
            yield _Half("target", target.images, target.text, target_loss, last=False)
            # The reference half is the peak: the target's gradients are there too, its images need not be.
            del target
            yield _Half("reference", reference.images, reference.text, reference_loss, last=True)
            return
        sizes = [len(target.images), len(reference.images)]
        images, text = torch.cat([target.images, reference.images]), _join(target.text, reference.text)
        del target, reference
        yield _Half("joint", images, text, joint_loss, last=True)

    def _backward(self, half: _Half) -> Loss:
        """Forward and backward of one half."""
        if self.micro_batch_size is not None and self.micro_batch_size < len(half.images):
            return self._backward_in_pieces(half)
        self.deepspeed.set_gradient_accumulation_boundary(half.last)
        features: Features = self.deepspeed(half.images, half.text.tokens, half.text.length)
        pairs = Pairs(features.image, features.text[half.text.index])
        with span("loss"):
            loss = half.loss(pairs, features.logit_scale)
        self.deepspeed.backward(self._update.scaled(loss.loss))
        return Loss(loss.loss.detach(), loss.metrics)

    def _backward_in_pieces(self, half: _Half) -> Loss:
        assert self.micro_batch_size is not None
        pieces = math.ceil(len(half.images) / self.micro_batch_size)
        images = half.images.split(self.micro_batch_size)
        texts = _deal(half.text.tokens, pieces)
        with torch.no_grad():
            passes = [
                self.deepspeed(image, text, half.text.length) for image, text in zip(images, texts, strict=True)
            ]
        # Embedding gradients at |u| = 3e-3 underflow fp16, so they stay in fp32 until the loss scale is applied.
        image_leaf = torch.cat([features.image for features in passes]).float().requires_grad_()
        text_leaf = torch.cat([features.text for features in passes]).float().requires_grad_()
        scale_leaf = passes[0].logit_scale.detach().requires_grad_()
        del passes
        rows = _rows_of(len(half.text.tokens), [len(text) for text in texts], text_leaf.device)
        pairs = Pairs(image_leaf, text_leaf[rows][half.text.index])
        leaves = (image_leaf, text_leaf, scale_leaf)
        with span("loss"):
            loss = half.loss(pairs, scale_leaf)
            gradients = torch.autograd.grad(loss.loss, leaves, allow_unused=True, materialize_grads=True)
        image_gradients = gradients[0].split(self.micro_batch_size)
        text_gradients = gradients[1].split([len(text) for text in texts])
        for piece in range(pieces):
            final = piece == pieces - 1
            self.deepspeed.set_gradient_accumulation_boundary(half.last and final)
            features = self.deepspeed(images[piece], texts[piece], half.text.length)
            # Its gradient is the loss's own; the logit scale enters every piece but counts once.
            surrogate = (features.image.float() * image_gradients[piece]).sum()
            surrogate = surrogate + (features.text.float() * text_gradients[piece]).sum()
            surrogate = surrogate + (features.logit_scale * gradients[2] * final).sum()
            self.deepspeed.backward(self._update.scaled(surrogate))
        return Loss(loss.loss.detach(), loss.metrics)


def deepspeed_section(config: Config, world_size: int) -> dict[str, Any]:
    """The ``deepspeed`` section with the keys filled in that have their home elsewhere in the config.

    Raises:
        ConfigError: the section contradicts the rest of the config, or a batch cannot be dealt out to the ranks.
    """
    section = dict(config.deepspeed)
    for half in ("target", "reference"):
        data = getattr(config.data, half)
        if data is not None and data.batch_size % world_size:
            raise ConfigError(f"data.{half}.batch_size = {data.batch_size} is not divisible by {world_size} ranks")
    homes = {
        "optimizer": "train.learning_rate, train.weight_decay, train.betas",
        "scheduler": "train.warmup_steps, train.epochs",
        "fp16": "train.precision",
        "bf16": "train.precision",
        "torch_autocast": "train.precision",
    }
    for key, home in homes.items():
        value = section.get(key)
        if value is not None and not (isinstance(value, dict) and value.get("enabled") is False):
            raise ConfigError(f"deepspeed.{key} has its home in {home}: set it there and remove it here")
    if config.train.compile and zero_of(section).get("stage", 0) == 3:
        raise ConfigError(
            "train.compile: ZeRO-3 brings each block's parameters by hooks that cannot be compiled; turn it off, "
            "or take deepspeed.zero_optimization.stage = 2"
        )
    batch_size = config.data.target.batch_size
    filled = {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // world_size,
        "gradient_accumulation_steps": 1,
    }
    for key, value in filled.items():
        if section.setdefault(key, value) != value:
            raise ConfigError(f"deepspeed.{key} = {section[key]} contradicts {value}, which the config implies")
    if isinstance(zero := section.get("zero_optimization"), dict):
        section["zero_optimization"] = (
            dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size"), BUCKET) | zero
        )
    # DeepSpeed clips at 1.0 unless told otherwise; the paper does not clip.
    section.setdefault("gradient_clipping", 0.0)
    # Else it waits for the device twice a step, to tell a throughput that the metrics have.
    section.setdefault("timers", {"throughput": {"enabled": False}})
    return section


def _leave_the_norm_to_us(section: dict[str, Any]) -> None:
    section["gradient_clipping"] = 0.0
    if zero_of(section).get("stage", 0) > 0:
        section["zero_optimization"]["compute_grad_norm"] = False


def _is_random(module: torch.nn.Module) -> bool:
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return module.p > 0
    return type(module).__name__ == "PatchDropout" and getattr(module, "prob", 0.0) > 0


def _join(first: Text, second: Text) -> Text:
    """Both halves' texts as one; their contexts may differ, and zero pads behind the end of a text."""
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
