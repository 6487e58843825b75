"""The methods of the study: names, settings and order. The other modules of the study name no method.

Titles, colours, needs and options are the registry's. A method's *strength* is the option that its grid varies:
the weight of its reference loss, that of its distillation on the target batch, or an option of its projection.
"""

from typing import Any, NamedTuple

from dive_fast.config.schema import NO_PROJECTION, ObjectiveConfig
from dive_fast.evaluation import plots
from dive_fast.methods import registry
from dive_fast.projections import rules as projections

REFERENCE_WEIGHT, DISTILLATION_WEIGHT = "weight", "distillation_weight"


class Strength(NamedTuple):
    """The option of ``objective``, or of ``projection``, that a method's grid varies."""

    option: str
    grid: tuple[float, ...]
    """Its values in the grid, a decade apart (replay: half of one)."""


def _around_default(method: str) -> Strength:
    """The distillation weight's default, a tenth of it and ten times it."""
    part = registry.options_of(registry.table().presets[method])[DISTILLATION_WEIGHT]
    default = float(part.Options.model_fields[DISTILLATION_WEIGHT].default)
    return Strength(DISTILLATION_WEIGHT, tuple(round(default * factor, 9) for factor in (0.1, 1, 10)))


_DECADES = Strength(REFERENCE_WEIGHT, (1.0, 10.0, 100.0))
BASELINE = "flyp"
"""Its ID validation accuracy is the level at which methods are compared."""
STUDIED = "dive"
"""The method of sweeps, curves and lengths of difference vectors."""
AVERAGE_ALONE = "avl"
"""The method of the paper's sweep over alpha, Table 6."""
LITERAL_COSINE = "cosine_literal"
DISTILLED = "tracer"
COMBINED = "tracer_dive"
"""``DISTILLED`` on the target batch and ``STUDIED`` on the reference batch. Its grid is that of the reference
loss; the distillation weight is the default."""
LIGHT = "tracer_dive_light"
"""``COMBINED`` with a tenth of its distillation."""
MAIN = (BASELINE, STUDIED, "flyp_replay", "snd")
SELF_DISTILLING = (DISTILLED, COMBINED, LIGHT, "tracer_fd", "carot", "lipsum")
"""Methods with a teacher on the target batch. StarFT is not one of the study's: its distillation is 0 in the last
epoch, which is the only one on CIFAR-10, and its backgrounds are words that the small model has never read."""
CORE = (BASELINE, STUDIED, DISTILLED, COMBINED)
"""Methods that answer whether the combination keeps what each of its halves keeps."""
UNDECAYED = "flyp_undecayed"
"""FLYP without weight decay, as all methods in weight space are run; their level instead of ``BASELINE``."""
PROJECTIONS = {f"flyp_{rule}": rule for rule in ("l2sp", "spd", "ftp", "digrap")}
"""FLYP with a method in weight space, and ``projection.name``."""
ENSEMBLE = "flyp_ensemble"
"""Weights between the pre-trained ones and those that a run of ``UNDECAYED`` left."""
IN_WEIGHT_SPACE = (UNDECAYED, *PROJECTIONS, ENSEMBLE)
ADAPTED = "vanilla_lora"
"""Vanilla FT by adapters of the image tower."""
ADVERSARIAL_COMBINED = "grace_dive"
"""GRACE on the target batch and ``STUDIED`` on the reference batch."""
ADVERSARIAL_ADAPTED = "tecoa_lora"
"""TeCoA by GRACE's adapters."""
ADVERSARIAL = ("tecoa", ADVERSARIAL_ADAPTED, "grace", ADVERSARIAL_COMBINED)
"""Methods that train on attacked images."""
ADAPTERS: dict[str, dict[str, Any]] = {
    name: {"rank": 16, "towers": ["image"]}
    for name in (ADAPTED, ADVERSARIAL_ADAPTED, "grace", ADVERSARIAL_COMBINED)
}
"""Methods that train adapters, and ``model.lora``."""
UNDER_ATTACK = (BASELINE, "vanilla_ft", ADAPTED, STUDIED, DISTILLED, *ADVERSARIAL)
"""Methods whose accuracy under attack is compared, in the order of tables."""
ATTACKED_FIRST = (
    "vanilla_ft", ADAPTED, "grace", ADVERSARIAL_COMBINED, "tecoa", STUDIED, BASELINE, DISTILLED
)  # fmt: skip
"""Those with three seeds, in the order of their runs."""
LEARNING_RATES_UNDER_ATTACK: dict[str, tuple[float, ...]] = {
    ADAPTED: (3e-3, 1e-2),
    "tecoa": (1e-3, 3e-4),
    **dict.fromkeys(("grace", ADVERSARIAL_COMBINED), (3e-3, 1e-2)),
}
"""Those that are tried at seed 0, of methods without a setting from the study's grid."""
STRENGTHS_UNDER_ATTACK = {ADVERSARIAL_COMBINED: 1.0}
"""Weights of the reference loss of these methods."""
LAST_UNDER_ATTACK, LIKE = ADVERSARIAL_ADAPTED, "grace"
"""A method that has one seed, and the method whose learning rate it takes over."""
NARROW = (LIGHT, "tracer_fd", "carot", "lipsum", *IN_WEIGHT_SPACE)
"""Methods whose grid has only the learning rate that is best for the baseline."""
ABLATIONS = (AVERAGE_ALONE, "pvl", "cosine")
STRENGTHS: dict[str, Strength | None] = {
    BASELINE: None,
    STUDIED: _DECADES,
    "flyp_replay": Strength(REFERENCE_WEIGHT, (0.3, 1.0, 3.0)),
    "snd": _DECADES,
    **{name: _DECADES if name in (COMBINED, LIGHT) else _around_default(name) for name in SELF_DISTILLING},
    **dict.fromkeys(ABLATIONS, _DECADES),
    "vanilla_ft": None,
    "lp_ft": None,
    UNDECAYED: None,
    "flyp_l2sp": Strength("strength", (1e-3, 1e-2, 3e-2, 1e-1)),
    "flyp_spd": Strength("strength", (0.5, 1.0, 2.0, 5.0, 10.0)),
    "flyp_ftp": Strength("k", (0.0, 0.5, 1.0)),
    "flyp_digrap": Strength("mu", (0.1, 0.5, 10.0)),
    ENSEMBLE: Strength("1 - alpha", (0.1, 0.2, 0.3, 0.5, 0.7)),
}
"""Every method of the study and its strength; None: it has no such option."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    # Eq. 6 starts the average at 0. Cosines begin at 1, and short runs end before the average is there.
    "cosine": {"name": "cosine", "average_start": 1},
    LITERAL_COSINE: {"name": "cosine", "average_start": 0},
    LIGHT: {"name": COMBINED, "distillation_weight": _around_default(DISTILLED).grid[0]},
    **{method: {"name": BASELINE} for method in IN_WEIGHT_SPACE},
    ADAPTED: {"name": "vanilla_ft"},
    ADVERSARIAL_ADAPTED: {"name": "tecoa"},
    ADVERSARIAL_COMBINED: {"name": None, "target": "grace", "reference": STUDIED},
}
"""Methods whose ``objective`` is more than their name."""
HEADS = tuple(
    name for name in STRENGTHS if registry.needs(ObjectiveConfig(**OBJECTIVES.get(name, {"name": name}))).head
)
"""Methods with a classifier of their own, whose ID accuracy is not that of the text embeddings."""
PAPER = (BASELINE, "flyp_replay", "snd", STUDIED, *ABLATIONS, "vanilla_ft", "lp_ft")
"""Methods of DiVE's paper, in the order of tables and figures."""
FURTHER_STRENGTHS = {
    STUDIED: (0.1, 0.3, 3.0, 30.0, 1000.0),
    "flyp_replay": (0.1, 10.0, 30.0),
    "snd": (3.0, 30.0, 300.0),
}
"""Further strengths for the curves of ID and ZS, at the method's best learning rate."""
LABELS = {name: label for name, (label, _) in plots.method_styles().items()} | {
    "cosine": "Cosine, m from 1",
    LIGHT: f"{OBJECTIVES[LIGHT]['distillation_weight']:g} TRACER + DiVE",
    UNDECAYED: "FLYP, no decay",
    **{method: f"+ {projections.table()[rule].title}" for method, rule in PROJECTIONS.items()},
    ENSEMBLE: "+ ensemble",
    ADAPTED: "vanilla FT, LoRA",
    ADVERSARIAL_ADAPTED: "TeCoA, LoRA",
    ADVERSARIAL_COMBINED: "GRACE + DiVE",
}
COLOURS = {name: colour for name, (_, colour) in plots.method_styles().items()} | {
    LIGHT: "#7f95d1",
    # In the order in which figures of methods choose colours.
    **dict(zip(IN_WEIGHT_SPACE, plots.OTHERS)),
    ADAPTED: "#7d8590",
    ADVERSARIAL_ADAPTED: "#a0522d",
    ADVERSARIAL_COMBINED: "#0f766e",
}
ATTACK_EPS = 4.0
"""Largest change of a pixel under attack, in units of 1/255, in training and in evaluation."""
ATTACK_STEPS = 5
"""Steps of the attack in training, of half its size each; half as many as by default, since they cost most."""
CURVATURE_EVERY = 10
"""Steps between GRACE's estimates of the curvature; its default of 1000 is longer than a run."""
PUBLISHED_WIDTH, PUBLISHED_STEPS = 512, 25_030
"""Embedding width of ViT-B/16 and steps of 10 epochs of ImageNet at a batch of 512, for which TRACER's and CaRot's
defaults are chosen."""


def grid_of(method: str) -> tuple[float | None, ...]:
    """The strengths of a method's grid."""
    strength = STRENGTHS[method]
    return (None,) if strength is None else strength.grid


def objective(
    method: str,
    strength: float | None,
    every: int,
    decay: float,
    default_decay: float,
    *,
    width: int,
    steps: int,
) -> dict[str, Any]:
    """The ``objective`` section of a run.

    Args:
        decay: set for methods that have this option; for others, if it is not the default.
        width: elements of an embedding.
        steps: of the run.
    """
    section = dict(OBJECTIVES.get(method, {"name": method}))
    preset = registry.table().presets.get(section["name"])
    options = {} if preset is None else registry.options_of(preset)
    if decay != default_decay or "decay" in options:
        section["decay"] = decay
    section |= {
        name: rescaled(name, part.Options.model_fields[name].default, width, steps)
        for name, part in options.items()
        if name in RESCALED
    }
    if strength is not None and method not in IN_WEIGHT_SPACE:
        known = STRENGTHS.get(method)
        section[REFERENCE_WEIGHT if known is None else known.option] = strength
    if every != 1:
        section["reference_every"] = every
    if method in ADVERSARIAL:
        attack = {"attack_eps": ATTACK_EPS, "attack_step": ATTACK_EPS / 2, "attack_steps": ATTACK_STEPS}
        if "grace" in (section["name"], section.get("target")):
            attack["curvature_every"] = CURVATURE_EVERY
        if section["name"] is None:
            section["target"] = {"name": section["target"]} | attack
        else:
            section |= attack
    return section


def projection(method: str, strength: float | None) -> dict[str, Any]:
    """The ``projection`` section of a run."""
    if method not in PROJECTIONS:
        return {"name": NO_PROJECTION}
    known = STRENGTHS[method]
    assert known is not None
    return {"name": PROJECTIONS[method], known.option: strength}


RESCALED = ("feature_weight", "teacher_every")


def rescaled(option: str, default: float, width: int, steps: int) -> float:
    """The default of an option in :data:`RESCALED`, for a smaller model or a shorter run.

    ``feature_weight`` multiplies a mean over the D elements of a difference; its weight per squared length,
    ``feature_weight / D``, stays what it is at :data:`PUBLISHED_WIDTH`. ``teacher_every`` stays the same share of
    the run, and is a step at least.
    """
    if option == "feature_weight":
        return default * width / PUBLISHED_WIDTH
    return max(1, round(default * steps / PUBLISHED_STEPS))
