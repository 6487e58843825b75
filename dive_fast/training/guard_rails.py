"""Warnings of settings under which a run learns little or its results say little, each with key and origin."""

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dive_fast.config.schema import NO_PROJECTION, Config
from dive_fast.data.shared_images import ImageLocations, copies
from dive_fast.data.sources.source import Source
from dive_fast.engine.async_scalars import AsyncScalars
from dive_fast.methods import registry
from dive_fast.methods.method import Method, Needs

logger = logging.getLogger(__name__)

LONG_WARMUP = 0.2
"""Share of a run's steps above which a warm-up is reported."""
LARGE_SHARE = 0.9
"""Share of the reference loss in the loss above which it is reported."""
SHARE_STEPS = 10
"""Reference batches whose losses are averaged for this share."""


def warn_of_schedule(config: Config, needs: Needs, total_steps: int) -> None:
    """Reports settings under which hardly anything is trained."""
    train, origins = config.train, config.origins
    warmup, batch_size = train.warmup_steps, config.data.target.batch_size
    if train.max_steps is not None and train.max_steps > total_steps:
        logger.warning(
            "train.max_steps = %d (%s), but train.epochs = %d (%s) ends the run after %d steps: raise "
            "train.epochs",
            *(train.max_steps, origins.of("train.max_steps")),
            *(train.epochs, origins.of("train.epochs"), total_steps),
        )
    if warmup > LONG_WARMUP * total_steps and warmup > 1:
        peak = min(1.0, total_steps / warmup) * train.learning_rate
        is_linear = train.warmup_rate is None
        rises = f"only rises, to {peak:.2g}" if is_linear else f"stays at {train.warmup_rate:.2g} instead"
        logger.warning(
            "train.warmup_steps = %d (%s) of the %d steps of this run: the learning rate %s; set "
            "train.warmup_steps=%d for a tenth of the run",
            warmup,
            origins.of("train.warmup_steps"),
            total_steps,
            f"{rises} of {train.learning_rate:.2g}"
            if warmup >= total_steps
            else f"{'rises' if is_linear else 'is low'} for {warmup / total_steps:.0%} of it",
            max(1, total_steps // 10),
        )
    if train.ema is not None and total_steps * (1 - train.ema) < 1:
        logger.warning(
            "train.ema = %g (%s) averages over about %.0f steps, and this run has %d: the average stays close to "
            "the pre-trained weights; set train.ema=%.3g for a tenth of the run",
            *(train.ema, origins.of("train.ema"), 1 / (1 - train.ema), total_steps),
            max(1 - 10 / total_steps, 0.1),
        )
    rule = config.projection.name
    if rule != NO_PROJECTION and train.weight_decay > 0:
        logger.warning(
            "train.weight_decay = %g (%s) with projection.name = %s (%s): decay pulls the weights to zero and not "
            "to the pre-trained ones, and the projection sees its pull as a deviation; set train.weight_decay=0",
            *(train.weight_decay, origins.of("train.weight_decay"), rule, origins.of("projection.name")),
        )
    if batch_size == 1 and not (needs.head or needs.prompts):
        logger.warning(
            "data.target.batch_size = 1 (%s): the contrastive loss of a single pair is 0, so nothing is learned "
            "from the target set; raise it",
            origins.of("data.target.batch_size"),
        )


def warn_of_evaluation(config: Config, target: Source, opened: Mapping[str, Source]) -> None:
    """Reports accuracies that are better than on new images: of training images, and of the set that selects.

    Args:
        target: the training set.
        opened: the sources of ``evaluate.sets``.
    """
    options, origins = config.evaluate, config.origins
    if not opened:
        return
    images = {name: ImageLocations(source) for name, source in opened.items()}
    training = ImageLocations(target)
    for name, evaluated in images.items():
        if shared := evaluated.num_shared(training):
            key = f"evaluate.sets.{name}.path"
            logger.warning(
                "%s = %s (%s): %d of its %d images are training images (data.target.path, %s), so its accuracy "
                "says nothing of new images; hold some out",
                *(key, options.sets[name].path, origins.of(key), shared, len(evaluated)),
                origins.of("data.target.path"),
            )
        elif pairs := copies(opened[name], target):
            key, first = f"evaluate.sets.{name}.path", pairs[0]
            logger.warning(
                "%s = %s (%s): at least %d of its %d images are copies of training images (the first: %s is %s), "
                "so its accuracy is optimistic; remove one of each",
                *(key, options.sets[name].path, origins.of(key), len(pairs), len(evaluated)),
                *first,
            )
    if options.select is None:
        return
    chosen, origin = images[options.select], origins.of("evaluate.select")
    same = [name for name in images if name != options.select and images[name].num_shared(chosen)]
    if same:
        logger.warning(
            "evaluate.sets.%s.path = %s (%s) has %d of the %d images of evaluate.select = %s (%s): its accuracy "
            "is optimistic, as the best of many; report another set",
            *(same[0], options.sets[same[0]].path, origins.of(f"evaluate.sets.{same[0]}.path")),
            *(images[same[0]].num_shared(chosen), len(chosen), options.select, origin),
        )
    others = [name for name in options.sets if name not in (options.select, *same)]
    logger.warning(
        "evaluate.select = %s (%s) chooses the weights, so the accuracy on it is optimistic, as the best of many; "
        "%s",
        options.select,
        origin,
        f"report that on {', '.join(others)}" if others else "add a test set to evaluate.sets, and report that",
    )


class ReferenceShare:
    """Reports, once, that the reference loss is nearly all of the loss after the warm-up."""

    def __init__(self, config: Config, method: Method, total_steps: int, first_step: int) -> None:
        """Prepares the check.

        Args:
            total_steps: steps of the run.
            first_step: steps that were made before, by the run that this one resumes.
        """
        # A subclass may add terms to the loss of its base.
        self._config, self._metric = config, vars(type(method.target_loss)).get("loss_metric")
        self._every = config.objective.reference_every
        self._start = max(config.train.warmup_steps, total_steps // 10)
        self._last = min(total_steps, self._start + SHARE_STEPS * self._every)
        # The steps before a resume were checked, or are too few to be checked again.
        self._is_active = method.needs.reference and self._metric is not None and first_step <= self._start
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._pending: AsyncScalars | None = None

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Adds the losses of a step, without waiting for the device."""
        if not self._is_active:
            return
        if self._pending is not None:
            if self._pending.ready():
                self._report(self._pending.numbers())
            return
        if step > self._start and (step - 1) % self._every == 0:
            assert self._metric is not None
            zero = torch.zeros_like(values["loss"])
            for name in ("loss", self._metric, "penalty"):
                self._sums[name] = self._sums.get(name, zero) + values.get(name, zero).detach()
            self._steps += 1
        if step >= self._last and self._steps:
            self._pending = AsyncScalars(self._sums)

    def close(self) -> None:
        """Waits for losses that are on their way."""
        if self._is_active and self._pending is not None:
            self._report(self._pending.numbers())

    def _report(self, sums: Mapping[str, float]) -> None:
        self._is_active = False
        assert self._metric is not None
        target = sums[self._metric] / self._steps
        # A reference batch at every k-th step counts k times there.
        reference = (sums["loss"] - sums["penalty"] - sums[self._metric]) / self._steps / self._every
        if not (math.isfinite(target + reference) and reference > LARGE_SHARE * (target + reference)):
            return
        weight, origin = self._config.objective.weight, self._config.origins.of("objective.weight")
        if weight is None:
            weight = registry.choose(self._config.objective).default_weight or 1.0
        balanced = weight * max(target, 0.0) / reference
        logger.warning(
            "objective.weight = %g (%s): the reference loss is %.0f %% of the loss after the warm-up (%s %.3g, "
            "reference loss %.3g), so little is learned from the target set; try objective.weight=%.1g, at which "
            "both would be equal",
            *(weight, origin, 100 * reference / (target + reference), self._metric, target, reference, balanced),
        )
