"""The methods of the study: names, settings and order. The other modules of the study name no method.

Titles, colours, needs and options are the registry's.
"""

from typing import Any

from dive_fast.config.schema import ObjectiveConfig
from dive_fast.evaluate import plots
from dive_fast.methods import registry

BASELINE = "flyp"
"""Its ID validation accuracy is the level at which methods are compared."""
STUDIED = "dive"
"""The method of sweeps, curves and lengths of difference vectors."""
AVERAGE_ALONE = "avl"
"""The method of the paper's sweep over alpha, Table 6."""
LITERAL_COSINE = "cosine_literal"
WEIGHTS: dict[str, tuple[float | None, ...]] = {
    BASELINE: (None,),
    STUDIED: (1, 10, 100),
    "flyp_replay": (0.3, 1, 3),
    "snd": (1, 10, 100),
    AVERAGE_ALONE: (1, 10, 100),
    "pvl": (1, 10, 100),
    "cosine": (1, 10, 100),
    "vanilla_ft": (None,),
    "lp_ft": (None,),
}
"""Weights of the grid; the most important methods first."""
MAIN = (BASELINE, STUDIED, "flyp_replay", "snd")
ABLATIONS = (AVERAGE_ALONE, "pvl", "cosine")
HEADS = tuple(name for name in WEIGHTS if registry.needs(ObjectiveConfig(name=name)).head)
"""Methods with a classifier of their own, whose ID accuracy is not that of the text embeddings."""
TABLE_ORDER = (BASELINE, "flyp_replay", "snd", STUDIED, *ABLATIONS, *HEADS)
"""Order of methods in tables and figures."""
FURTHER_WEIGHTS = {STUDIED: (0.1, 0.3, 3, 30, 1000), "flyp_replay": (0.1, 10, 30), "snd": (3, 30, 300)}
"""Further weights for the curves of ID and ZS, at the method's best learning rate."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    # Eq. 6 starts the average at 0. Cosines begin at 1, and short runs end before the average is there.
    "cosine": {"name": "cosine", "average_start": 1},
    LITERAL_COSINE: {"name": "cosine", "average_start": 0},
}
"""Methods whose ``objective`` is more than their name."""
LABELS = {name: label for name, (label, _) in plots.method_styles().items()} | {"cosine": "Cosine, m from 1"}
COLOURS = {name: colour for name, (_, colour) in plots.method_styles().items()}


def objective(method: str, weight: float | None, every: int, decay: float, default_decay: float) -> dict[str, Any]:
    """The ``objective`` section of a run.

    Args:
        decay: set for methods that have this option; for others, if it is not the default.
    """
    section = dict(OBJECTIVES.get(method, {"name": method}))
    preset = registry.table().presets.get(section["name"])
    if decay != default_decay or (preset is not None and "decay" in registry.options_of(preset)):
        section["decay"] = decay
    if weight is not None:
        section["weight"] = weight
    if every != 1:
        section["reference_every"] = every
    return section
