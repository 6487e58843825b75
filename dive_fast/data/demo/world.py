"""Vocabulary, splits and captions of the generated world that the demo trains on.

A picture shows one shape, with a shade and a texture, before a backdrop, in a style.
Captions, like alt texts on the web, mention only some of these facts, and mostly call a
shade by its loose colour ("red") rather than by its exact name ("crimson"). A model
pre-trained on such captions knows colours, backdrops and styles well and exact shades
badly. Fine-tuning on the exact names can therefore gain accuracy, and can forget what
was known before:

    target                train: photos labelled with the exact shade of their shape
    id                    held-out pictures of the same kind
    ood                   the same classes as sketches, cartoons and neon signs
    zs_*                  loose colours, backdrops and styles: never fine-tuned on
    reference             captioned pictures of all kinds, as in pre-training
    reference_heldout     more of the same, to measure embedding geometry on

Sample i of a split depends on (SEED, split, i) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SEED = 2511

IMAGE_SIZE = 56

NUM_SAMPLES: dict[str, int] = {
    "target": 3200,
    "reference": 4800,
    "id": 2000,
    "ood": 1200,
    "zs_colour": 600,
    "zs_backdrop": 600,
    "zs_style": 600,
    "reference_heldout": 512,
}
SPLITS: tuple[str, ...] = tuple(NUM_SAMPLES)

# Vocabulary

THINGS: tuple[str, ...] = (
    "circle", "square", "triangle", "heart", "arrow", "cross",
    "moon", "house", "tree", "fish", "bolt", "cloud", "flower", "drop",
)  # fmt: skip
GEOMETRY: tuple[str, ...] = (
    "pentagon", "hexagon", "octagon", "rhombus", "trapezoid", "parallelogram", "kite", "tetragram",
    "pentagram", "hexagram", "octagram", "ellipse", "annulus", "semicircle", "stadium", "lens",
)  # fmt: skip
SHAPES = THINGS + GEOMETRY

SHADES: dict[str, tuple[str, tuple[int, int, int]]] = {
    "crimson": ("red", (160, 15, 45)),
    "scarlet": ("red", (240, 45, 25)),
    "apricot": ("orange", (250, 180, 120)),
    "tangerine": ("orange", (240, 120, 15)),
    "lemon": ("yellow", (252, 238, 70)),
    "mustard": ("yellow", (200, 160, 25)),
    "lime": ("green", (150, 220, 50)),
    "emerald": ("green", (15, 140, 80)),
    "olive": ("green", (105, 110, 30)),
    "aqua": ("cyan", (100, 230, 230)),
    "teal": ("cyan", (15, 120, 125)),
    "azure": ("blue", (50, 145, 240)),
    "navy": ("blue", (25, 35, 115)),
    "lavender": ("purple", (190, 160, 235)),
    "violet": ("purple", (120, 40, 180)),
    "magenta": ("pink", (225, 25, 140)),
    "rose": ("pink", (245, 155, 180)),
    "tan": ("brown", (195, 155, 110)),
    "chocolate": ("brown", (90, 50, 25)),
    "silver": ("grey", (192, 194, 200)),
    "charcoal": ("grey", (60, 62, 70)),
}
"""Exact name -> (the loose colour that most captions use instead, RGB). The names are the target classes."""
COLOURS: tuple[str, ...] = tuple(dict.fromkeys(colour for colour, _ in SHADES.values()))
TEXTURES: dict[str, str] = {
    "plain": "without a pattern",
    "striped": "with stripes",
    "dotted": "with dots",
    "checkered": "with checks",
    "meshed": "with a mesh",
    "zigzag": "with zigzags",
}
"""Adjective -> phrase of the same meaning that follows the noun."""
BACKDROPS: dict[str, tuple[int, int, int]] = {
    "grass": (95, 150, 65),
    "sand": (220, 190, 140),
    "water": (60, 120, 175),
    "snow": (225, 232, 240),
    "night": (25, 28, 60),
    "bricks": (165, 90, 70),
}
STYLES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of", "a picture of", "a snapshot of", "a photograph showing", ""),
    "sketch": ("a sketch of", "a drawing of", "a pencil picture of", "a drawing showing", "a sketch showing"),
    "cartoon": ("a cartoon of", "a comic picture of", "a cartoon showing", "an illustration of", "a comic of"),
    "neon sign": ("a neon sign of", "a glowing picture of", "a neon picture of", "a glowing sign showing"),
}
EXACT_NAME_RATE = 0.1
"""Share of the captions with a colour that use the exact name of the shade."""

TARGET_TEMPLATES: tuple[str, ...] = (
    "a photo of a {} shape",
    "a picture of a {} thing",
    "a snapshot of a {} object",
    "a photograph showing a {} shape",
    "a bright photo of a {} thing",
    "a dark photo of a {} thing",
    "a close photo of a {} shape",
    "a {} thing",
)
COLOUR_TEMPLATES: tuple[str, ...] = (
    "a photo of a {} shape",
    "a picture of a {} thing",
    "a drawing of a {} object",
    "a cartoon of a {} shape",
    "a {} thing",
)
BACKDROP_TEMPLATES: tuple[str, ...] = (
    "a photo of a shape on {}",
    "a picture of a thing over {}",
    "a drawing of a shape in front of {}",
    "a cartoon of a thing on {}",
    "a shape over {}",
)
STYLE_TEMPLATES: tuple[str, ...] = ("a {} of a shape", "a {} of a thing", "a {} showing an object")


@dataclass(frozen=True)
class Facts:
    """Attributes of a picture, apart from pose, light and noise."""

    shape: str
    shade: str
    texture: str
    backdrop: str
    style: str

    @property
    def colour(self) -> str:
        """The loose name of the shade."""
        return SHADES[self.shade][0]


@dataclass(frozen=True)
class Task:
    """A classification task: class names, in the order of their labels, and prompt templates."""

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    attribute: str
    """Name of the attribute of Facts that is the label."""


TASKS: dict[str, Task] = {
    "target": Task(tuple(SHADES), TARGET_TEMPLATES, "shade"),
    "id": Task(tuple(SHADES), TARGET_TEMPLATES, "shade"),
    "ood": Task(tuple(SHADES), TARGET_TEMPLATES, "shade"),
    "zs_colour": Task(COLOURS, COLOUR_TEMPLATES, "colour"),
    "zs_backdrop": Task(tuple(BACKDROPS), BACKDROP_TEMPLATES, "backdrop"),
    "zs_style": Task(tuple(STYLES), STYLE_TEMPLATES, "style"),
}

# Samples


def draw_facts(split: str, rng: np.random.Generator) -> Facts:
    """Draws the attributes of a picture of a split."""
    styles = tuple(STYLES)
    if split in ("target", "id"):
        styles = ("photo",)
    elif split == "ood":
        styles = tuple(style for style in STYLES if style != "photo")
    return Facts(
        shape=_choose(rng, SHAPES),
        shade=_choose(rng, tuple(SHADES)),
        texture=_choose(rng, tuple(TEXTURES)),
        backdrop=_choose(rng, tuple(BACKDROPS)),
        style=_choose(rng, styles),
    )


def caption(facts: Facts, rng: np.random.Generator) -> str:
    """Draws one of the many captions that describe a picture; none mentions every attribute."""
    noun = facts.shape if rng.random() < 0.6 else _choose(rng, ("shape", "thing", "object"))
    before, after = [], []
    if rng.random() < 0.3:
        before.append(_choose(rng, ("bright", "dark", "close", "nice", "single")))
    if rng.random() < 0.8:
        before.append(facts.shade if rng.random() < EXACT_NAME_RATE else facts.colour)
    if rng.random() < 0.4:
        if rng.random() < 0.6:
            before.append(facts.texture)
        else:
            after.append(TEXTURES[facts.texture])
    if rng.random() < 0.6:
        after.append(f"{_choose(rng, ('on', 'over', 'in front of'))} {facts.backdrop}")
    words = " ".join([*before, noun])
    article = "the" if rng.random() < 0.2 else "an" if words[0] in "aeiou" else "a"
    return " ".join([_choose(rng, STYLES[facts.style]), article, words, *after]).strip()


def vocabulary() -> list[str]:
    """All words that captions, class names and templates can contain, sorted."""
    common = "a an the bright dark close nice single on over in front of shape thing object"
    words = set(common.split())
    for text in (*SHAPES, *SHADES, *COLOURS, *TEXTURES, *TEXTURES.values(), *STYLES, *BACKDROPS):
        words.update(text.split())
    for phrases in STYLES.values():
        words.update(word for phrase in phrases for word in phrase.split())
    for task in TASKS.values():
        words.update(word for template in task.templates for word in template.replace("{}", "").split())
    return sorted(words)


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
