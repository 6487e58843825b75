"""Starting values for a fine-tuning run, by the size of the data and the machine. docs/own_data.md explains each.

The tables of that page are those of this module: ``python -m dive_fast.quickstart.choose_settings`` prints them,
and a test compares them.
"""

from collections.abc import Iterator
from typing import NamedTuple

from dive_fast.errors import DataError


class SizeRule(NamedTuple):
    """The number of epochs, and the largest batch, from a number of images on."""

    min_images: int
    epochs: int
    max_batch_size: int
    evidence: str


SIZE_RULES = (
    SizeRule(500_000, 10, 512, "ImageNet in the DiVE paper, Table 11: 1.28 million images, 10 epochs, batch 512"),
    SizeRule(20_000, 20, 256, "iWildCam and FMoW in Table 11: 130,000 and 77,000 images, 20 epochs, batch 256"),
    SizeRule(
        0,
        50,
        256,
        "between FLYP's 20 epochs of its few-shot runs and its 100 of Stanford Cars and Caltech-101; batch 256",
    ),
)
"""From the largest size down."""
MIN_IMAGES = 8
"""Smallest training set: the loss contrasts at least two pairs, and an epoch has at least four steps."""
MIN_BATCHES = 4
"""Smallest number of batches in an epoch."""
MAX_WARMUP_STEPS = 500
"""The paper's warm-up."""
LEARNING_RATE = 1e-5
"""FLYP's for all of its sets but one, and the DiVE paper's for ImageNet."""
WEIGHT = 1000.0
"""DiVE's lambda in the paper."""
DEMO_LEARNING_RATE, DEMO_WEIGHT = 6e-4, 0.1
"""Those of the demo, whose small model is trained in few steps (launch/configs/demo.json)."""
HALF_REFERENCE_FROM = 256
"""Batch from which the reference batch is half of it."""
ENOUGH_PAIRS = 2500
"""Reference pairs that preserved as much as 25,000 in docs/study.md."""
MAX_WORKERS = 8
"""Loader processes for each half on each GPU."""
MAX_EVALUATIONS = 25
"""Largest number of evaluations, each of which writes a checkpoint."""
PATIENCE = 5
"""Evaluations without improvement after which a run ends."""
LARGE_SHARE, SMALL_SHARE, SMALL_SET = 0.2, 0.1, 1000
"""Share of the images that is held out below and from :data:`SMALL_SET` images on."""
HELD_OUT_PER_CLASS, MIN_HELD_OUT = 50, 2000
"""Held-out images are at most 50 of a class on average, which ImageNet has, or 2,000 where that is more."""


class Settings(NamedTuple):
    """Numbers of a config."""

    batch_size: int
    reference_batch_size: int | None
    epochs: int
    total_steps: int
    warmup_steps: int
    learning_rate: float
    weight: float
    workers: int
    evaluate_workers: int
    every_epochs: int
    patience: int


def choose_settings(images: int, pairs: int | None, cores: int, is_demo: bool = False) -> Settings:
    """The settings for a training set.

    Args:
        images: number of images that are trained on.
        pairs: number of reference pairs; None without a reference set.
        cores: processor cores that the run may use.
        is_demo: whether the model is the small one of the demo.

    Raises:
        DataError: there are too few images or pairs.
    """
    if images < MIN_IMAGES:
        raise DataError(f"{images} images to train on are too few: at least {MIN_IMAGES} are needed")
    rule = size_rule(images)
    batch = batch_size(images)
    total_steps = images // batch * rule.epochs
    halves = 1 if pairs is None else 2
    return Settings(
        batch_size=batch,
        reference_batch_size=None if pairs is None else reference_batch_size(batch, pairs),
        epochs=rule.epochs,
        total_steps=total_steps,
        warmup_steps=warmup_steps(total_steps),
        learning_rate=DEMO_LEARNING_RATE if is_demo else LEARNING_RATE,
        weight=DEMO_WEIGHT if is_demo else WEIGHT,
        workers=_workers(cores, halves),
        evaluate_workers=_workers(cores, 1),
        every_epochs=-(-rule.epochs // MAX_EVALUATIONS),
        patience=PATIENCE,
    )


def size_rule(images: int) -> SizeRule:
    """The rule for a number of images."""
    return next(rule for rule in SIZE_RULES if images >= rule.min_images)


def batch_size(images: int) -> int:
    """The largest power of two that is allowed for the size and at most a quarter of the images."""
    return _power_of_two(min(size_rule(images).max_batch_size, images // MIN_BATCHES))


def reference_batch_size(batch: int, pairs: int) -> int:
    """B', which is the batch size or half of it, and at most a quarter of the pairs.

    Raises:
        DataError: there are too few pairs.
    """
    if pairs < MIN_IMAGES:
        raise DataError(f"{pairs} reference pairs are too few: at least {MIN_IMAGES} are needed")
    wanted = batch // 2 if batch >= HALF_REFERENCE_FROM else batch
    return _power_of_two(min(wanted, pairs // MIN_BATCHES))


def warmup_steps(total_steps: int) -> int:
    """A tenth of the run, at most the paper's."""
    return min(MAX_WARMUP_STEPS, total_steps // 10)


def holdout_share(images: int, classes: int) -> float:
    """The share of the images to measure on, where the data has no validation set."""
    if images < SMALL_SET:
        return LARGE_SHARE
    most = max(HELD_OUT_PER_CLASS * classes, MIN_HELD_OUT)
    return min(SMALL_SHARE, float(f"{most / images:.1g}"))


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1)


def _workers(cores: int, halves: int) -> int:
    """Loader processes of each half; one core is left for the training process."""
    return max(1, min(MAX_WORKERS, (cores - 1) // halves))


TABLE_SIZES = (50, 200, 1000, 5000, 20_000, 100_000, 1_281_167)
"""Numbers of training images in the table of docs/own_data.md."""


def tables() -> Iterator[str]:
    """The tables of docs/own_data.md as lines of Markdown."""
    yield "| images to train on | B | B' | epochs | steps | warm-up | evaluations |"
    yield "|---|---|---|---|---|---|---|"
    for images in TABLE_SIZES:
        chosen = choose_settings(images, 1_000_000, 16)
        row = (chosen.batch_size, chosen.reference_batch_size or 0, chosen.epochs, chosen.total_steps)
        numbers = [images, *row, chosen.warmup_steps, chosen.epochs // chosen.every_epochs]
        yield f"| {' | '.join(f'{number:,}' for number in numbers)} |"
    yield ""
    yield "| images | epochs | B at most | evidence |"
    yield "|---|---|---|---|"
    for rule in SIZE_RULES[::-1]:
        start = max(rule.min_images, MIN_IMAGES)
        yield f"| from {start:,} | {rule.epochs} | {rule.max_batch_size} | {rule.evidence} |"


if __name__ == "__main__":
    print("\n".join(tables()))
