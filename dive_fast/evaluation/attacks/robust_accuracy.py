"""Accuracy under attack of one set: which samples stay rightly classified whatever the attack tries."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from enum import IntEnum
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dive_fast.attacks.apgd import apgd_ce
from dive_fast.attacks.pgd import pgd
from dive_fast.attacks.threat import Threat
from dive_fast.data.batch import EvaluationBatch
from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.distributed import Ranks
from dive_fast.errors import DataError, UserError
from dive_fast.evaluation.attacks.attack_options import AttackOptions
from dive_fast.evaluation.attacks.auto_attack import auto_attack, num_targets
from dive_fast.evaluation.attacks.block_log import BlockLog
from dive_fast.evaluation.classifier import Classifier
from dive_fast.evaluation.datasets.evaluation_set import Labelled
from dive_fast.evaluation.datasets.strict_samples import BROKEN, StrictSamples, progress
from dive_fast.kernels.naive_attacks import uniform
from dive_fast.model.towers import Towers, unit
from dive_fast.numerics import full_fp32

LEVELS = 255.0
"""Steps of the range of pixel values; the unit of ``eps`` in options and rows is its inverse."""
STEP_SHARE = 2.5
"""PGD's steps together, in eps: a quarter of it each at ten steps."""


class Outcome(IntEnum):
    """The outcome of a sample."""

    BROKEN = 0
    """The image cannot be read; the sample is left out."""
    WRONG = 1
    """Wrongly classified without an attack."""
    FALLEN = 2
    """Rightly classified, wrongly under the attack."""
    NOT_FINITE = 3
    """A loss or gradient of the attack was not finite; not robust."""
    ROBUST = 4
    """Rightly classified whatever the attack tried."""


class UnderAttack(NamedTuple):
    """Accuracy of a set under an attack."""

    robust: float
    """Share of the samples that are robust."""
    clean: float
    """Share of the same samples that are rightly classified without an attack."""
    samples: int
    """Number of samples measured."""
    left_out: int
    """Number of samples of the set that cannot be read; of a subset, those without an image or label count too."""
    not_finite: int
    """Number of samples with a loss or gradient that was not finite; they count as not robust."""


class UnitImageModel(nn.Module):
    """A model of images in [0, 1]: normalisation, image tower, classifier, and its factor in the softmax."""

    def __init__(self, towers: Towers, classes: Classifier) -> None:
        super().__init__()
        self.towers, self.classes = towers, classes
        weight = next(towers.parameters())
        self._dtype = weight.dtype
        for name, values in (("mean", towers.preprocess.mean), ("std", towers.preprocess.std)):
            self.register_buffer(f"_{name}", weight.new_tensor(values).view(-1, 1, 1), persistent=False)

    def logits(self, images: Tensor) -> Tensor:
        """Logits as an evaluation compares them, ``(B, 3, H, W) -> (B, C)``.

        The operations are those of :func:`dive_fast.kernels.normalise_images`, so that the predictions are too.
        """
        mean, std = self.get_buffer("_mean"), self.get_buffer("_std")
        features = self.towers.encode_image((images.to(self._dtype) - mean) / std)
        return self.classes.logits(unit(features))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the softmax, ``(B, C)``, whose scale the cross-entropy depends on."""
        return self.logits(images) * self.classes.scale


Attack = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Images ``(B, 3, H, W)`` in [0, 1], labels ``(B,)`` and numbers of samples ``(B,)`` -> whether each sample is
robust, and whether all losses and gradients were finite, ``(B,)`` bool."""


def attack_of(model: nn.Module, options: AttackOptions, eps: float, num_labels: int) -> Attack:
    """The attack on batches of rightly classified images.

    Args:
        model: logits of images in [0, 1].
        eps: distance in 255ths.
        num_labels: number of the model's logits.
    """
    threat = Threat(options.norm, eps / LEVELS)
    steps = options.num_steps
    if steps is None:
        targets = num_targets(num_labels)
        return lambda images, labels, numbers: auto_attack(
            model, images, labels, threat, options.seed + int(numbers[0]), targets
        )

    def run(images: Tensor, labels: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        noise = uniform(numbers, images.shape[1:], options.seed).to(images)
        if options.name == "pgd":
            step_size = STEP_SHARE * threat.eps / steps
            result = pgd(model, images, labels, threat, steps=steps, step_size=step_size, noise=noise)
        else:
            result = apgd_ce(model, images, labels, threat, steps=steps, noise=noise)
        return result.is_robust, result.is_finite

    return run


def chosen_samples(count: int, options: AttackOptions) -> list[int]:
    """The numbers of the samples that are attacked, in the order of the set.

    A subset is random, since many sets are sorted by class; a larger one of the same seed contains a smaller one.
    """
    if options.samples is None or options.samples >= count:
        return list(range(count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(options.seed))
    return sorted(order[: options.samples].tolist())


def robust_accuracy(
    towers: Towers,
    classes: Classifier,
    data: Labelled,
    ranks: Ranks,
    options: AttackOptions,
    eps: float,
    *,
    batch_size: int,
    loader: Options,
    log: BlockLog | None = None,
    name: str = "",
) -> UnderAttack:
    """Accuracy of a set under an attack; all ranks must call this, and all get the result.

    Each sample is attacked by one rank. Samples that are wrongly classified without an attack are not attacked.

    Args:
        eps: distance in 255ths; 0 attacks nothing.
        batch_size: images attacked at once on each rank.
        log: outcomes of an interrupted measurement, which are not measured again; None stores nothing.
        name: name of the set on the progress bar and in messages; empty disables the bar.

    Raises:
        DataError: an image is broken and must not be, no image can be read, or the logits are not finite.
    """
    numbers = chosen_samples(len(data.source), options)
    with ranks.raise_on_all(UserError):
        stored = log.read(len(numbers)) if log is not None and ranks.is_main else {}
    outcomes: dict[int, int] = ranks.broadcast(stored)
    # Normalised by this mean and deviation, images are x / 255, to the last bit.
    unnormalised = replace(towers.preprocess, mean=(0.0,) * 3, std=(1.0,) * 3)
    samples = StrictSamples(data.source, unnormalised, data.border, data.reports_skipped, data.remedy)
    model = UnitImageModel(towers, classes)
    attack = attack_of(model, options, eps, classes.num_labels) if eps else None
    pending = [position for position in range(len(numbers)) if position not in outcomes]
    blocks = [pending[first : first + batch_size] for first in range(0, len(pending), batch_size)]
    with progress(ranks, len(numbers), name, "image", len(outcomes)) as bar, _frozen(towers):
        for measured in _measured(model, attack, samples, numbers, blocks, ranks, batch_size, loader, name):
            outcomes |= measured
            bar.update(len(measured))
            with ranks.raise_on_all(UserError):
                if log is not None and ranks.is_main:
                    log.add(measured)
    return _summary(torch.tensor(list(outcomes.values())), len(data.source.skipped), name)


def _measured(
    model: UnitImageModel,
    attack: Attack | None,
    samples: StrictSamples,
    numbers: Sequence[int],
    blocks: Sequence[Sequence[int]],
    ranks: Ranks,
    batch_size: int,
    loader: Options,
    name: str,
) -> Iterator[dict[int, int]]:
    """The outcomes by position, each time of the next block of every rank.

    Args:
        numbers: the sample at each position.
        blocks: positions of ``batch_size`` samples each; the last has fewer.
    """
    mine = blocks[ranks.rank :: ranks.world_size]
    keys = [(0, numbers[position]) for position in chain(*mine)]
    with closing(batches_of(samples, keys, batch_size, loader)) as batches:
        for row in range(-(-len(blocks) // ranks.world_size)):
            measured: dict[int, int] = {}
            with ranks.raise_on_all(DataError):
                if row < len(mine):
                    batch = next(batches).to(ranks.device)
                    chosen = torch.tensor([numbers[position] for position in mine[row]], device=ranks.device)
                    values = _outcomes(model, attack, batch, chosen, name)
                    measured = dict(zip(mine[row], values.tolist(), strict=True))
            yield {position: outcome for each in ranks.collect(measured) for position, outcome in each.items()}


def _outcomes(
    model: UnitImageModel, attack: Attack | None, batch: EvaluationBatch, numbers: Tensor, name: str
) -> Tensor:
    """The outcome of each sample of a batch, ``(B,)`` int64.

    Args:
        attack: None attacks nothing.
        numbers: ``(B,)`` int64, of the samples in their set.
    """
    images, labels = batch.images, batch.labels
    with torch.no_grad():
        logits = model.logits(images)
    is_read = labels != BROKEN
    if not bool(logits[is_read].isfinite().all()):
        raise DataError(
            f"{name or 'the set'}: the logits are not finite: weights are broken, or activations overflow"
        )
    is_right = logits.argmax(1) == labels
    outcomes = torch.where(is_right, int(Outcome.ROBUST), int(Outcome.WRONG))
    outcomes[~is_read] = Outcome.BROKEN
    rows = is_right.nonzero().flatten()
    if attack is not None and len(rows):
        is_robust, is_finite = attack(images[rows], labels[rows], numbers[rows])
        outcomes[rows[~is_robust]] = Outcome.FALLEN
        outcomes[rows[~is_finite]] = Outcome.NOT_FINITE
    return outcomes


def _summary(outcomes: Tensor, skipped: int, name: str) -> UnderAttack:
    counts: Sequence[int] = torch.bincount(outcomes, minlength=len(Outcome)).tolist()
    count = len(outcomes) - counts[Outcome.BROKEN]
    if count == 0:
        raise DataError(f"{name or 'the set'}: none of its {len(outcomes)} images can be read")
    clean = count - counts[Outcome.WRONG]
    return UnderAttack(
        counts[Outcome.ROBUST] / count,
        clean / count,
        count,
        skipped + counts[Outcome.BROKEN],
        counts[Outcome.NOT_FINITE],
    )


@contextmanager
def _frozen(towers: Towers) -> Iterator[None]:
    """The towers in evaluation mode, without graphs for gradients of their parameters, and in fp32 without TF32.

    The backward needs the switch as well, which runs outside of the towers' forward.
    """
    tuned = [parameter for parameter in towers.parameters() if parameter.requires_grad]
    was_training = towers.training
    towers.eval()
    for parameter in tuned:
        parameter.requires_grad_(False)
    try:
        with full_fp32(towers.autocast is None):
            yield
    finally:
        for parameter in tuned:
            parameter.requires_grad_()
        towers.train(was_training)
