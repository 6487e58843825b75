"""Renders the pictures of the demo's generated world."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from dive_fast.data.demo.world import BACKDROPS, IMAGE_SIZE, SHADES, Facts

Points = NDArray[np.float64]
"""``(n, 2)``: corners of a polygon in the unit disc; y points down."""
Pixels = NDArray[np.floating[Any]]
"""``(h, w)`` or ``(h, w, 3)``, from 0 to 1."""


def _arc(start: float, stop: float, radius: float = 1.0, centre: tuple[float, float] = (0.0, 0.0)) -> Points:
    """Points on an arc; angles in degrees, 0 = right, clockwise since y points down."""
    angle = np.radians(np.linspace(start, stop, 40))
    return np.stack([centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)], axis=1)


def _regular(num_corners: int) -> Points:
    angle = 2 * np.pi * np.arange(num_corners) / num_corners
    return np.stack([np.sin(angle), -np.cos(angle)], axis=1)


def _star(num_points: int, inner_radius: float) -> Points:
    corners = _regular(2 * num_points)
    corners[1::2] *= inner_radius
    return corners


def _polygon(*xy: float) -> Points:
    return np.array(xy, dtype=np.float64).reshape(-1, 2)


def _heart() -> Points:
    t = np.linspace(0, 2 * np.pi, 60)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1) / 17


def _flower() -> Points:
    t = np.linspace(0, 2 * np.pi, 90)
    radius = 0.68 + 0.32 * np.cos(5 * t)
    return np.stack([radius * np.sin(t), -radius * np.cos(t)], axis=1)


@functools.cache
def _contours(shape: str) -> tuple[tuple[Points, int], ...]:
    """Polygons of a shape, painted in order: 1 fills, 0 cuts a hole."""
    single: dict[str, Callable[[], Points]] = {
        "pentagon": lambda: _regular(5),
        "hexagon": lambda: _regular(6),
        "octagon": lambda: _regular(8),
        "rhombus": lambda: _polygon(0, -1, 0.62, 0, 0, 1, -0.62, 0),
        "trapezoid": lambda: _polygon(-0.45, -0.6, 0.45, -0.6, 0.95, 0.6, -0.95, 0.6),
        "parallelogram": lambda: _polygon(-0.4, -0.55, 1, -0.55, 0.4, 0.55, -1, 0.55),
        "kite": lambda: _polygon(0, -0.85, 0.62, -0.3, 0, 1, -0.62, -0.3),
        "tetragram": lambda: _star(4, 0.42),
        "pentagram": lambda: _star(5, 0.42),
        "hexagram": lambda: _star(6, 0.55),
        "octagram": lambda: _star(8, 0.62),
        "ellipse": lambda: _arc(0, 360) * [1, 0.62],
        "semicircle": lambda: _arc(180, 360) + np.array([0, 0.45]),
        "stadium": lambda: np.concatenate([_arc(-90, 90, 0.5, (0.5, 0)), _arc(90, 270, 0.5, (-0.5, 0))]),
        "lens": lambda: np.concatenate([_arc(217, 323, 1.25, (0, 0.75)), _arc(37, 143, 1.25, (0, -0.75))]),
        "circle": lambda: _arc(0, 360, 0.9),
        "square": lambda: _polygon(-0.75, -0.75, 0.75, -0.75, 0.75, 0.75, -0.75, 0.75),
        "triangle": lambda: _regular(3),
        "heart": _heart,
        "arrow": lambda: _polygon(-1, -0.28, 0.15, -0.28, 0.15, -0.75, 1, 0, 0.15, 0.75, 0.15, 0.28, -1, 0.28),
        "cross": lambda: _polygon(
            -0.3, -0.95, 0.3, -0.95, 0.3, -0.3, 0.95, -0.3, 0.95, 0.3, 0.3, 0.3,
            0.3, 0.95, -0.3, 0.95, -0.3, 0.3, -0.95, 0.3, -0.95, -0.3, -0.3, -0.3,
        ),
        "bolt": lambda: _polygon(0.25, -1, -0.6, 0.15, -0.05, 0.15, -0.3, 1, 0.65, -0.25, 0.08, -0.25, 0.6, -1),
        "flower": _flower,
        "drop": lambda: np.concatenate([_polygon(0, -1), _arc(-25, 205, 0.62, (0, 0.35))]),
    }  # fmt: skip
    compound: dict[str, Callable[[], list[tuple[Points, int]]]] = {
        "annulus": lambda: [(_arc(0, 360), 1), (_arc(0, 360, 0.5), 0)],
        "moon": lambda: [(_arc(0, 360, 0.95), 1), (_arc(0, 360, 0.8, (0.45, -0.1)), 0)],
        "house": lambda: [
            (_polygon(-0.95, -0.1, 0, -1, 0.95, -0.1), 1),
            (_polygon(-0.7, -0.1, 0.7, -0.1, 0.7, 0.9, -0.7, 0.9), 1),
            (_polygon(-0.2, 0.3, 0.2, 0.3, 0.2, 0.9, -0.2, 0.9), 0),
        ],
        "tree": lambda: [
            (_polygon(0, -1, 0.6, -0.15, -0.6, -0.15), 1),
            (_polygon(0, -0.55, 0.8, 0.5, -0.8, 0.5), 1),
            (_polygon(-0.16, 0.5, 0.16, 0.5, 0.16, 1, -0.16, 1), 1),
        ],
        "fish": lambda: [
            (_arc(0, 360) * [0.7, 0.48] + [-0.3, 0], 1),
            (_polygon(0.15, 0, 1, -0.6, 0.8, 0, 1, 0.6), 1),
        ],
        "cloud": lambda: [
            (_arc(0, 360, 0.42, (-0.55, 0.15)), 1),
            (_arc(0, 360, 0.52, (0, -0.15)), 1),
            (_arc(0, 360, 0.4, (0.55, 0.15)), 1),
            (_polygon(-0.55, 0.1, 0.55, 0.1, 0.55, 0.57, -0.55, 0.57), 1),
        ],
    }  # fmt: skip
    return tuple(compound[shape]()) if shape in compound else ((single[shape](), 1),)


def _mask(shape: str, rng: np.random.Generator) -> Pixels:
    """``(IMAGE_SIZE, IMAGE_SIZE)``: coverage of a shape at a random position, size and angle."""
    canvas_size = 4 * IMAGE_SIZE  # painted at 4 times the size, then averaged: smooth edges
    radius = canvas_size * rng.uniform(0.33, 0.42)
    centre = canvas_size * (0.5 + rng.uniform(-0.04, 0.04, size=2))
    angle = np.radians(rng.uniform(-15, 15))
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    stretch = rng.uniform(0.92, 1.08, size=2)
    canvas = Image.new("L", (canvas_size, canvas_size), 0)
    draw = ImageDraw.Draw(canvas)
    for points, filled in _contours(shape):
        placed = (points * stretch) @ rotation * radius + centre
        draw.polygon([(float(x), float(y)) for x, y in placed], fill=255 * filled)
    return _to_pixels(canvas.reduce(4))


def render(facts: Facts, rng: np.random.Generator) -> Image.Image:
    """Renders a picture: RGB, IMAGE_SIZE square."""
    mask = _mask(facts.shape, rng)
    pattern = _pattern(facts.texture, rng)
    colour = np.array(SHADES[facts.shade][1], dtype=np.float32) / 255
    colour = np.clip(colour + rng.normal(0, 0.03, size=3).astype(np.float32), 0, 1)
    backdrop = _backdrop(facts.backdrop, facts.style, rng)
    # The outline: 1 on the mask's edge, falling to 0 on both sides.
    soft = _blurred(mask, 1.2)
    outline = np.clip(4.4 * soft * (1 - soft), 0, 1)[..., None]
    cover, pattern = mask[..., None], pattern[..., None]
    # The pattern is darker than a light shade, and lighter than a dark one.
    accent = colour * 0.35 if colour.mean() > rng.uniform(0.3, 0.6) else 0.25 * colour + 0.75
    if facts.style == "photo":
        picture = _photo(cover, pattern, colour, accent, backdrop, rng)
    elif facts.style == "sketch":
        paper = np.float32(rng.uniform(0.90, 0.97))
        lines = np.clip(outline + 0.6 * pattern * cover, 0, 1)
        faint = paper * (0.75 + 0.25 * backdrop)
        picture = faint * (1 - 0.45 * cover) + 0.45 * cover * colour
        picture = picture * (1 - 0.85 * lines) + 0.85 * lines * (0.55 * colour)
    elif facts.style == "cartoon":
        fill = colour * (1 - pattern) + accent * pattern
        picture = backdrop * (1 - cover) + fill * cover
        picture = picture * (1 - outline)
    else:  # neon
        glow = _blurred(outline[..., 0], 2.0)[..., None]
        picture = 0.18 * backdrop + colour * (outline + 0.7 * glow + 0.6 * pattern * cover)
    picture = picture + rng.normal(0, 0.015, size=picture.shape)
    return Image.fromarray((np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8))


def _photo(
    cover: Pixels, pattern: Pixels, colour: Pixels, accent: Pixels, backdrop: Pixels, rng: np.random.Generator
) -> Pixels:
    """A picture with directional light, a cast shadow, slight blur and noise."""
    x, y = _grid()
    angle = rng.uniform(0, 2 * np.pi)
    light = (1 + 0.25 * (np.cos(angle) * x + np.sin(angle) * y))[..., None]
    shift = (round(-3 * np.sin(angle)), round(-3 * np.cos(angle)))
    shadow = _blurred(np.roll(cover[..., 0], shift, axis=(0, 1)), 1.5)[..., None]
    fill = (colour * (1 - pattern) + accent * pattern) * light
    picture = backdrop * (1 - 0.4 * shadow) * (1 - cover) + fill * cover
    picture = picture * rng.uniform(0.75, 1.15) + rng.normal(0, 0.03, size=picture.shape)
    return picture.astype(np.float32)


def _pattern(texture: str, rng: np.random.Generator) -> Pixels:
    """``(IMAGE_SIZE, IMAGE_SIZE)``: share of the second colour in a texture, at a random phase and angle."""
    x, y = _grid()
    if texture == "plain":
        return np.zeros_like(x)
    angle = rng.uniform(-0.2, 0.2)
    waves = np.pi * rng.uniform(4.5, 5.5)  # radians from the centre to the border
    phase = rng.uniform(0, 2 * np.pi, size=2)
    u = waves * (np.cos(angle) * x + np.sin(angle) * y) + phase[0]
    v = waves * (np.cos(angle) * y - np.sin(angle) * x) + phase[1]
    if texture == "striped":
        wave = np.sin(u)
    elif texture == "dotted":
        wave = np.cos(u) + np.cos(v) - 0.9
    elif texture == "checkered":
        wave = np.sin(0.8 * u) * np.sin(0.8 * v)
    elif texture == "meshed":
        wave = np.maximum(np.cos(u), np.cos(v)) - 0.75
    else:  # zigzag
        wave = np.sin(u + 1.6 * np.arcsin(np.sin(v)))
    return np.clip(0.5 + 2 * wave, 0, 1).astype(np.float32)


def _backdrop(backdrop: str, style: str, rng: np.random.Generator) -> Pixels:
    """``(IMAGE_SIZE, IMAGE_SIZE, 3)``: the background of a picture."""
    x, y = _grid()
    base = np.array(BACKDROPS[backdrop], dtype=np.float32) / 255
    base = np.clip(base + rng.normal(0, 0.03, size=3).astype(np.float32), 0, 1)
    phase = rng.uniform(0, 2 * np.pi, size=2)
    if backdrop == "water":
        relief = 0.07 * np.sin(14 * y + 1.5 * np.sin(4 * x + phase[0]) + phase[1])
    elif backdrop == "bricks":
        row = np.floor(4 * y + phase[0])
        mortar = np.maximum(np.cos(2 * np.pi * (4 * y + phase[0])), np.cos(2 * np.pi * (2 * x + 0.5 * row)))
        relief = 0.20 * (mortar > 0.85)
    elif backdrop == "night":
        relief = 0.8 * (rng.random(x.shape) > 0.985)
    elif backdrop == "snow":
        relief = 0.05 * np.sin(3 * x + 3 * y + phase[0])
    else:  # grass is coarser than sand
        noise = rng.normal(0, 1, size=x.shape)
        relief = 0.07 * np.repeat(noise[::3], 3, axis=0)[: x.shape[0]] if backdrop == "grass" else 0.04 * noise
    strength = 1.0 if style == "photo" else 0.6
    return np.clip(base + strength * relief[..., None], 0, 1).astype(np.float32)


@functools.cache
def _grid() -> tuple[Pixels, Pixels]:
    """x and y of every pixel, from -1 to 1."""
    axis = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _to_pixels(image: Image.Image) -> Pixels:
    return np.asarray(image, dtype=np.float32) / 255


def _blurred(pixels: Pixels, radius: float) -> Pixels:
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8))
    return _to_pixels(image.filter(ImageFilter.GaussianBlur(radius)))
