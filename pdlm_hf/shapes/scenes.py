"""Synthetic scenes with region masks, and captions in many wordings.

An image has up to six figures, each with a size, a colour, a texture and a shape; they may touch and overlap. Size and
aspect ratio of the images vary, so that they have 1 to 6 tiles. A caption is true if it is a sentence of this domain
and all four attributes are those of the region. Sentences differ in pattern, order and synonyms, so that the words of
a caption depend on each other: a model that knows all sentences and writes in a single step mixes them and fails,
unless it has learned to commit to one wording (see `dataset.CommitDataset`).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from ..tiling_pdlm import best_grid, tile_grids

TILE = 64  # pixels; side of a tile of the tiny checkpoint
MAX_REGIONS = 6

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (45, 85, 215),
    "yellow": (240, 215, 45),
    "purple": (135, 50, 175),
    "orange": (243, 140, 25),
    "white": (245, 245, 245),
    "black": (22, 22, 22),
}
# colour of stripes and dots that are not nearly black; grey on black and white, so that these stay distinct
ACCENTS = {"black": (150, 150, 150), "white": (120, 120, 120), "blue": (235, 235, 235), "purple": (235, 235, 235)}
# attribute -> value -> words for it
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "size": {"small": ("small", "little"), "large": ("large", "big")},
    "colour": {name: (name,) for name in COLOURS},
    "texture": {"plain": ("plain", "solid"), "striped": ("striped", "lined"), "dotted": ("dotted", "spotted")},
    "shape": {
        "circle": ("circle", "disc"),
        "square": ("square", "box"),
        "triangle": ("triangle",),
        "star": ("star",),
        "cross": ("cross", "plus"),
    },
}
PATTERNS = (
    "A {size} {colour} {texture} {shape}",
    "One {texture} {shape}, {size} and {colour}.",
    "This {shape} is {colour}, {texture} and {size}.",
    "The {colour} {shape} looks {size} and has a {texture} surface.",
    "Here is a {shape} of {size} size with {texture} {colour} paint.",
    "The {size} figure in this region is a {texture} {shape} drawn in {colour}.",
    "In this region we see a {colour} {shape}, which is {size} and {texture} all over.",
    "What is shown here has the form of a {shape}; it is {texture}, {colour} and {size}.",
)
SMALL, LARGE = (9.5, 11.5), (17.0, 20.0)  # radius in pixels of a tile


@dataclass(frozen=True)
class Figure:
    """The attributes of one figure."""

    size: str
    colour: str
    texture: str
    shape: str


@dataclass
class Scene:
    """A drawn image.

    Args:
        image (`PIL.Image.Image`): RGB.
        masks (`list[np.ndarray]`): visible part of every described figure, bool (H, W).
        figures (`list[Figure]`): their attributes.
    """

    image: Image.Image
    masks: list[np.ndarray]
    figures: list[Figure]


@dataclass(frozen=True, eq=False)
class Domain:
    """The figures that can be drawn, and the words for them.

    Args:
        words (`dict`): attribute ("size", "colour", "texture", "shape") -> value -> words for it. The
            sizes are "small" and "large".
        patterns (`tuple[str, ...]`): sentences with a place for every attribute.
        colours, accents (`dict`): RGB of every colour, and of its stripes and dots if these are not nearly black.
        outline (`Callable`): (shape, x, y, radius) -> polygons.
        texture (`Callable`): (drawing, texture, width, height, period, phase, accent) draws stripes, dots and so on.
        large (`float`): share of large figures among those that are tried; a crowded image has room for fewer.
        often (`tuple[str, ...]`): values other than sizes that are drawn twice as often as the others.
    """

    words: dict[str, dict[str, tuple[str, ...]]]
    patterns: tuple[str, ...]
    colours: dict[str, tuple[int, int, int]]
    accents: dict[str, tuple[int, int, int]]
    outline: Callable[[str, float, float, float], list[list[tuple[float, float]]]]
    texture: Callable[[ImageDraw.ImageDraw, str, int, int, float, float, tuple[int, int, int]], None]
    large: float = 0.5
    often: tuple[str, ...] = ()


def describe(figure: Figure, rng: np.random.Generator, easy: bool = False, domain: Domain | None = None) -> str:
    """Write a true caption in random words; `easy`: always in the same words."""
    domain = domain or SHAPES_DOMAIN
    if easy:
        return domain.patterns[0].format(**vars(figure))
    pattern = domain.patterns[rng.integers(len(domain.patterns))]
    words = {}
    for attribute, values in domain.words.items():
        choices = values[getattr(figure, attribute)]
        words[attribute] = choices[rng.integers(len(choices))]
    return pattern.format(**words)


@lru_cache
def _grammar(domain: Domain) -> list[tuple[re.Pattern, dict[str, dict[str, str]]]]:
    value_of = {a: {word: value for value, words in vs.items() for word in words} for a, vs in domain.words.items()}
    grammar = []
    for pattern in domain.patterns:
        groups = {a: f"(?P<{a}>{'|'.join(words)})" for a, words in value_of.items()}
        escaped = re.escape(pattern).replace(r"\{", "{").replace(r"\}", "}")
        grammar.append((re.compile(escaped.format(**groups)), value_of))
    return grammar


def read(caption: str, domain: Domain | None = None) -> Figure | None:
    """Return the attributes that a caption states, or None if it is no sentence of this domain."""
    for pattern, value_of in _grammar(domain or SHAPES_DOMAIN):
        if match := pattern.fullmatch(caption):
            return Figure(**{attribute: value_of[attribute][word] for attribute, word in match.groupdict().items()})
    return None


def _outline(shape: str, cx: float, cy: float, r: float) -> list[list[tuple[float, float]]]:
    """Polygons of a shape; a circle is a polygon of many corners."""
    if shape == "circle":
        angles = [2 * math.pi * k / 40 for k in range(40)]
        return [[(cx + r * math.cos(a), cy + r * math.sin(a)) for a in angles]]
    if shape == "square":
        s = 0.88 * r
        return [[(cx - s, cy - s), (cx + s, cy - s), (cx + s, cy + s), (cx - s, cy + s)]]
    if shape == "triangle":
        return [[(cx, cy - r), (cx + r, cy + 0.85 * r), (cx - r, cy + 0.85 * r)]]
    if shape == "star":
        radii = [r * (1.05 if k % 2 == 0 else 0.42) for k in range(10)]
        return [
            [(cx + q * math.sin(k * math.pi / 5), cy - q * math.cos(k * math.pi / 5)) for k, q in enumerate(radii)]
        ]
    t = 0.34 * r
    return [
        [(cx - t, cy - r), (cx + t, cy - r), (cx + t, cy + r), (cx - t, cy + r)],
        [(cx - r, cy - t), (cx + r, cy - t), (cx + r, cy + t), (cx - r, cy + t)],
    ]


def _texture(
    draw: ImageDraw.ImageDraw, texture: str, width: int, height: int, period: float, phase: float, accent: tuple
) -> None:
    """Stripes, dots or nothing over the whole image."""
    if texture == "striped":
        for k in range(int(height / period) + 2):
            y = (k + phase) * period
            draw.rectangle([0, y, width, y + 0.36 * period], fill=accent)
    elif texture == "dotted":
        rows, columns = (_marks(length, period, phase) for length in (height, width))
        draw.bitmap((0, 0), Image.fromarray(rows[:, None] & columns), accent)


def _marks(length: int, period: float, phase: float) -> np.ndarray:
    """Where the dots of a line are, uint8: a dot is a square, so that all dots are the product of two lines."""
    line = Image.new("L", (length, 1))
    draw = ImageDraw.Draw(line)
    for k in range(int(length / period) + 2):
        x = (k + phase) * period
        draw.rectangle([x, 0, x + 0.45 * period, 0], fill=255)
    return np.asarray(line)[0]


SHAPES_DOMAIN = Domain(WORDS, PATTERNS, COLOURS, ACCENTS, _outline, _texture)


def _fill(figure: Figure, width: int, height: int, scale: float, phase: float, domain: Domain) -> Image.Image:
    """The figure's colour and texture over the whole image."""
    fill = Image.new("RGB", (width, height), domain.colours[figure.colour])
    accent = domain.accents.get(figure.colour, (25, 25, 25))
    domain.texture(ImageDraw.Draw(fill), figure.texture, width, height, 5.5 * scale, phase, accent)
    return fill


def _choose_layout(rng: np.random.Generator, easy: bool) -> tuple[int, tuple[int, int]]:
    """Number of described figures, and a grid with room for them; small grids are more frequent."""
    count = int(rng.integers(1, 3 if easy else MAX_REGIONS + 1))
    least = 1 if count <= 2 else 2 if count <= 4 else 3
    grids = [grid for grid in tile_grids(1, 1 if easy else 6) if grid[0] * grid[1] >= least]
    weight = np.array([1 / (columns * rows) for columns, rows in grids])
    return count, grids[rng.choice(len(grids), p=weight / weight.sum())]


def draw_scene(
    rng: np.random.Generator,
    layout_rng: np.random.Generator | None = None,
    easy: bool = False,
    domain: Domain = SHAPES_DOMAIN,
) -> Scene:
    """Draw a random image with 1 to 6 described figures, and perhaps others that are not described.

    Args:
        rng (`np.random.Generator`): decides everything.
        layout_rng (`np.random.Generator`, *optional*): decides the number of figures and the grid instead; images
            drawn from the same state fit well into one batch.
        easy (`bool`): one tile, one or two described figures.
        domain (`Domain`): the figures and words.
    """
    while True:
        count, (columns, rows) = _choose_layout(layout_rng or rng, easy)
        layout_rng = None
        scale = rng.uniform(0.9, 1.35)
        width = round(columns * TILE * scale * rng.uniform(0.95, 1.05))
        height = round(rows * TILE * scale * rng.uniform(0.95, 1.05))
        columns, rows = best_grid(width, height, TILE, 1, 6)
        scale = (width / columns + height / rows) / (2 * TILE)
        extra = int(rng.integers(0, 3)) if rng.random() < 0.3 else 0
        scene = paint(rng, width, height, scale, count + extra, domain)
        if len(scene.masks) >= count:
            keep = sorted(rng.permutation(len(scene.masks))[:count].tolist())
            return Scene(scene.image, [scene.masks[k] for k in keep], [scene.figures[k] for k in keep])


def paint(
    rng: np.random.Generator, width: int, height: int, scale: float, count: int, domain: Domain = SHAPES_DOMAIN
) -> Scene:
    """Draw figures on a plain background.

    Args:
        rng (`np.random.Generator`): decides everything.
        width, height (`int`): size of the image in pixels.
        scale (`float`): pixels per pixel of a tile.
        count (`int`): number of figures; fewer are drawn if there is no room.
        domain (`Domain`): the figures and words.
    """
    grey = rng.integers(105, 175)
    background = tuple(int(x) for x in np.clip(grey + rng.integers(-14, 15, 3), 0, 255))
    image = Image.new("RGB", (width, height), background)
    placed: list[tuple[float, float, float]] = []
    masks: list[np.ndarray] = []
    areas: list[int] = []
    figures: list[Figure] = []
    for _ in range(count * 12):
        if len(figures) == count:
            break
        size = "large" if rng.random() < domain.large else "small"
        r = scale * rng.uniform(*(LARGE if size == "large" else SMALL))
        if 2 * r + 2 > min(width, height):
            continue
        cx, cy = rng.uniform(r + 1, width - r - 1), rng.uniform(r + 1, height - r - 1)
        if any(math.hypot(cx - x, cy - y) < 0.85 * (r + q) for x, y, q in placed):
            continue
        options = {a: [*vs, *(v for v in domain.often if v in vs)] for a, vs in domain.words.items() if a != "size"}
        figure = Figure(size=size, **{a: vs[rng.integers(len(vs))] for a, vs in options.items()})
        stencil = Image.new("L", (width, height), 0)
        for polygon in domain.outline(figure.shape, cx, cy, r):
            ImageDraw.Draw(stencil).polygon(polygon, fill=255)
        mask = np.asarray(stencil) > 0
        visible = [old & ~mask for old in masks]
        if any(v.sum() < 0.8 * area for v, area in zip(visible, areas, strict=True)):
            continue  # it would hide too much of an earlier figure
        box = stencil.getbbox()
        image.paste(_fill(figure, width, height, scale, rng.random(), domain).crop(box), box, stencil.crop(box))
        masks = [*visible, mask]
        areas.append(int(mask.sum()))
        placed.append((cx, cy, r))
        figures.append(figure)
    noise = rng.normal(0, 4, (height, width, 1))
    pixels = np.asarray(image) + noise
    image = Image.fromarray(pixels.clip(0, 255, out=pixels).astype(np.uint8))
    return Scene(image, masks, figures)
