"""The options of accuracy under attack; imports no torch, so that a mistake is reported at once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, get_args

from dive_fast.errors import ConfigError
from dive_fast.evaluation.datasets.evaluation_set import EvaluatedSet, Labelled

if TYPE_CHECKING:
    from dive_fast.attacks.threat import Norm

Attack = Literal["apgd-ce", "pgd", "autoattack"]
ATTACKS: tuple[Attack, ...] = get_args(Attack)
NORMS: "tuple[Norm, ...]" = ("linf", "l2")
STEPS: dict[Attack, int] = {"apgd-ce": 100, "pgd": 10}
"""Default number of gradients. AutoAttack has no such option: its steps are part of its definition."""
MAX_BATCH = 64
"""Default limit of the batch size: an attack keeps the graph of a batch, which an evaluation does not."""
SMALL_EPS = 0.1
"""Distances below are warned of: they are probably on the scale of images in [0, 1] and not in 255ths."""
MIN_CLASSES = 4
"""Classes that AutoAttack needs: its targeted loss divides by a difference to the fourth-largest logit."""


@dataclass(frozen=True)
class AttackOptions:
    """An attack on the images of evaluation sets."""

    name: Attack
    eps: tuple[float, ...]
    """Distances, in 255ths of the range of pixel values: 4 is 4/255 of images in [0, 1]. Each has its row."""
    norm: "Norm" = "linf"
    steps: int | None = None
    """Number of gradients; None: that of :data:`STEPS`."""
    samples: int | None = None
    """Size of a random subset of each set, which the seed determines; None: all samples."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Validates the options.

        Raises:
            ConfigError: an option has an unknown or impossible value.
        """
        for option, value, valid in (("attack", self.name, ATTACKS), ("norm", self.norm, NORMS)):
            if value not in valid:
                raise ConfigError(f"{option} = {value!r}: expected one of {', '.join(valid)}")
        if not self.eps:
            raise ConfigError("eps: name at least one distance, in 255ths, e.g. 4")
        for eps in self.eps:
            if not math.isfinite(eps) or eps < 0:
                raise ConfigError(f"eps = {eps:g}: expected a finite number of at least 0, in 255ths")
            if self.norm == "linf" and eps > 255:
                raise ConfigError(f"eps = {eps:g}: any image is within 255/255 in linf; use at most 255")
        for option, number in (("attack steps", self.steps), ("attack samples", self.samples)):
            if number is not None and number < 1:
                raise ConfigError(f"{option} = {number}: expected a number of at least 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"attack seed = {self.seed}: expected a number from 0 to 2^63 - 1")
        if self.name == "autoattack" and self.steps is not None:
            raise ConfigError("attack steps: AutoAttack's numbers of steps are fixed; remove the option")

    @property
    def num_steps(self) -> int | None:
        """The number of gradients; None for AutoAttack."""
        return self.steps or STEPS.get(self.name)


def check_installed(name: Attack) -> None:
    """Checks that the package of an attack is installed, without importing it.

    Raises:
        ConfigError: it is not; the message has the command that installs it.
    """
    if name == "autoattack" and find_spec("pyautoattack") is None:
        raise ConfigError(
            "attack = autoattack: the package pyautoattack is not installed: pip install 'dive_fast[attacks]', or "
            "pip install pyautoattack"
        )


def attackable(opened: Mapping[str, EvaluatedSet], name: Attack) -> dict[str, Labelled]:
    """The sets that can be attacked: those with labels.

    Raises:
        ConfigError: there is none, or AutoAttack needs more classes than a set has.
    """
    sets = {key: data for key, data in opened.items() if isinstance(data, Labelled)}
    if not sets:
        raise ConfigError(f"attack = {name}: none of the sets has labels; name a classification set")
    for key, data in sets.items():
        if name == "autoattack" and data.num_labels < MIN_CLASSES:
            raise ConfigError(
                f"attack = autoattack: {key} has {data.num_labels} classes, and the targeted attack needs "
                f"{MIN_CLASSES}; leave it out, or use apgd-ce"
            )
    return sets
