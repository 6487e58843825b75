"""The methods by the name in a config."""

from dive_fast.config.schema import ObjectiveConfig
from dive_fast.methods.cosine import Cosine
from dive_fast.methods.dive import Dive
from dive_fast.methods.flyp import Flyp, FlypReplay
from dive_fast.methods.linear_head import CrossEntropy
from dive_fast.methods.method import Objective
from dive_fast.methods.snd import Snd

KINDS: dict[str, type[Objective]] = {
    "vanilla_ft": CrossEntropy,
    "lp_ft": CrossEntropy,
    "flyp": Flyp,
    "flyp_replay": FlypReplay,
    "snd": Snd,
    "cosine": Cosine,
    "avl": Dive,
    "pvl": Dive,
    "dive": Dive,
}
"""By the name in a config: what an objective needs is known before there is one."""


def create(config: ObjectiveConfig, width: int) -> Objective:
    """The objective that a config names, for embeddings of ``width`` elements."""
    return KINDS[config.name].of(config, width)
