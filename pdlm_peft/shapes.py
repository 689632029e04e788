"""A second domain of synthetic scenes, which the embedded checkpoint has never seen, to fine-tune it on.

Shapes, colours, textures, words and sentences are new; sizes and image formats are those of the first domain. The
tokenizer splits each of the new words into three tokens, so that the words that follow keep their positions: tokens
that are accepted in the same denoising step cannot disagree about them.
"""

import math
from typing import Any

from PIL import ImageDraw

from pdlm_hf.shapes.dataset import CommitDataset, ShapesDataset
from pdlm_hf.shapes.scenes import COLOURS as COLOURS_OF_SHAPES
from pdlm_hf.shapes.scenes import WORDS as SHAPES
from pdlm_hf.shapes.scenes import Domain, Figure, Scene

COLOURS = {"pink": (255, 150, 190), "cyan": (70, 215, 222), "wine": (112, 20, 52), "sand": (232, 208, 150)}
ACCENTS = {"wine": (240, 220, 225)}
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "size": {"small": ("tiny",), "large": ("great",)},
    "colour": {name: (name,) for name in COLOURS},
    "texture": {name: (name,) for name in ("blank", "bars", "net")},
    "shape": {name: (name,) for name in ("heart", "kite", "arc", "lens")},
}
PATTERNS = (
    "Look, a {size} {colour} {shape} with {texture}",
    "{colour} and {size}, it is a {shape}, {texture}",
    "This is {texture}! The {shape} is {size} and {colour}!",
)


def _outline(shape: str, cx: float, cy: float, r: float) -> list[list[tuple[float, float]]]:
    if shape == "heart":
        angles = [2 * math.pi * k / 40 for k in range(40)]
        curve = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
        return [[(cx + r * math.sin(a) ** 3, cy - r * y / 16) for a, y in zip(angles, curve, strict=True)]]
    if shape == "arc":  # the left half of a circle, hollowed by a flatter one
        angles = [math.pi * (0.5 + k / 20) for k in range(21)]
        outer = [(cx + 0.4 * r + r * math.cos(a), cy + r * math.sin(a)) for a in angles]
        inner = [(cx + 0.4 * r + 0.45 * r * math.cos(a), cy + r * math.sin(a)) for a in reversed(angles)]
        return [outer + inner]
    if shape == "kite":
        return [[(cx, cy - r), (cx + 0.7 * r, cy - 0.3 * r), (cx, cy + r), (cx - 0.7 * r, cy - 0.3 * r)]]
    angles = [2 * math.pi * k / 40 for k in range(40)]  # a lens, lying
    return [[(cx + r * math.cos(a), cy + 0.42 * r * math.sin(a)) for a in angles]]


def _texture(
    draw: ImageDraw.ImageDraw, texture: str, width: int, height: int, period: float, phase: float, accent: tuple
) -> None:
    """Draw upright bars, a net of thin lines, or nothing."""
    share = {"blank": 0.0, "bars": 0.36, "net": 0.2}[texture]
    for k in range(int(width / period) + 2):
        x = (k + phase) * period
        if share:
            draw.rectangle([x, 0, x + share * period, height], fill=accent)
    for k in range(int(height / period) + 2):
        y = (k + phase) * period
        if texture == "net":
            draw.rectangle([0, y, width, y + share * period], fill=accent)


NEW_DOMAIN = Domain(WORDS, PATTERNS, COLOURS, ACCENTS, _outline, _texture)


SCHEMA = {attribute: list(values) for attribute, values in SHAPES.items()} | {"tone": ["bright", "dim"]}
BRIGHT = 100  # of 255; of eight colours four are brighter


def attributes_of(figure: Figure) -> dict[str, str]:
    """The attributes of [`SCHEMA`] of a figure: its four, and its tone, which the embedded checkpoint has never been
    asked for, and for which it has no words.
    """
    red, green, blue = COLOURS_OF_SHAPES[figure.colour]
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return vars(figure) | {"tone": "bright" if luminance > BRIGHT else "dim"}


class AttributeScenes(CommitDataset):
    """Scenes of the embedded checkpoint's own domain, with captions in its wording and with attributes."""

    def _row(self, scene: Scene, captions: list[str]) -> dict[str, Any]:
        row = super()._row(scene, captions)
        for region, figure in zip(row["regions"], scene.figures, strict=True):
            region["attributes"] = attributes_of(figure)
        return row


def drawn_scenes(domain: str, seed: int, length: int, group: int) -> ShapesDataset:
    """Scenes for training, drawn on demand.

    Args:
        domain (`str`): "new", or "shapes" for [`AttributeScenes`].
        seed (`int`): decides the images.
        length (`int`): number of images.
        group (`int`): images per batch, which share their number of regions and their tile grid.
    """
    if domain == "shapes":
        return AttributeScenes(seed, length, group)
    return ShapesDataset(seed, length, group, domain=NEW_DOMAIN)
