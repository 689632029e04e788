"""A stand-in for a segmenter, which knows drawn figures: their colours, their forms, and how large they can be.

Pixels get the label of the nearest colour. The pixels of one colour that hang together are searched for figures: a
form, a place and a radius whose outline holds as many of them as possible, and little else. Where two outlines
overlap, the figure whose colour is seen there lies on top.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..errors_pdlm import ImageError, SettingError
from ..regions.finding.selection import FoundRegion, SelectionSettings
from ..tiling_pdlm import best_grid
from .scenes import ACCENTS, COLOURS, LARGE, SHAPES_DOMAIN, SMALL, TILE, WORDS

_DARK, _LIGHT = "black", "white"  # also the colours of stripes and dots on the others
_GREY, _BACKGROUND = "grey", "background"
_PERIOD = 5.5  # of stripes and dots, in pixels of a tile
_GAP = 0.45 * _PERIOD  # the widest stripe or dot
_RADII = [SMALL[0], sum(SMALL) / 2, SMALL[1], LARGE[0], sum(LARGE) / 2, LARGE[1]]
_OUTLINES = {shape: SHAPES_DOMAIN.outline(shape, 0.0, 0.0, 1.0) for shape in WORDS["shape"]}
# What a pixel inside an outline is worth: of the figure's colour; of its stripes and dots; of another figure, which
# may lie on top; of the background, where that looks like the stripes; else of the background.
_OWN, _ACCENT, _OTHER, _UNSURE, _EMPTY = 2.0, 0.5, 0.0, -0.4, -1.0

_PIXELS = 2**16  # larger images are searched at a whole fraction of their size
_PLAIN = 0.2  # least share of the background
_MOST = 12  # components of a colour that are looked at
_TOUCHING = 3  # figures of a colour that touch, at most; what is larger is no figure
_STARTS = 2  # outlines of each form that are moved into place; the best one stays
_WAYS = [way for way in product((0, -1, 1), repeat=3) if any(way)]  # to move right, down, and to grow


@dataclass
class _Found:
    """A figure: colour, form, the pixels inside its outline, and the share of them that is not plainly background."""

    colour: str
    shape: str
    mask: np.ndarray
    worth: float


class ShapesSegmenter:
    """Finds drawn figures; photographs it refuses, or finds nothing of use. It answers words that name a colour, a
    form, or both, such as "red circle". Where figures of one colour overlap, it cannot see which lies on top."""

    min_score = 0.5

    def propose(
        self, image: Image.Image, names: Sequence[str] | None, settings: SelectionSettings
    ) -> list[FoundRegion]:
        """Find all figures, or those that the names name; see [`~pdlm_hf.regions.Proposer`].

        Raises:
            ImageError: there is no plain background.
            SettingError: a name has a word that is no colour and no form.
        """
        asked = [(name, _meaning(name)) for name in names] if names is not None else [(None, (None, None))]
        found = _figures(image)
        return [
            FoundRegion.of_mask(figure.mask, figure.worth, name=name)
            for name, (colour, shape) in asked
            for figure in found
            if colour in (None, figure.colour) and shape in (None, figure.shape)
        ]

    def masks(self, image: Image.Image, boxes: list[list[float]]) -> np.ndarray:
        """Masks bool `(boxes, H, W)`: of the figure that fills most of each box, empty if none is in it."""
        found = [figure.mask for figure in _figures(image)]
        masks = np.zeros((len(boxes), image.height, image.width), bool)
        for k, (x0, y0, x1, y1) in enumerate(boxes):
            inside = [mask[int(y0) : math.ceil(y1), int(x0) : math.ceil(x1)].sum() for mask in found]
            if inside and max(inside):
                masks[k] = found[int(np.argmax(inside))]
        return masks


def _meaning(name: str) -> tuple[str | None, str | None]:
    """Colour and form that a name names. Raises: SettingError."""
    colours, forms = (
        {word: value for value, words in WORDS[a].items() for word in words} for a in ("colour", "shape")
    )
    colour = shape = None
    for word in name.lower().split():
        if word in colours:
            colour = colours[word]
        elif word in forms or word.removesuffix("s") in forms:
            shape = forms.get(word) or forms[word.removesuffix("s")]
        elif word not in ("a", "the", "figure", "figures", "shape", "shapes"):
            raise SettingError(
                f"{name!r}: the stand-in segmenter knows the colours {', '.join(colours)} and the forms "
                f"{', '.join(forms)} only, not {word!r}."
            )
    return colour, shape


def _figures(image: Image.Image) -> list[_Found]:
    """The figures of a drawing, each with its visible pixels."""
    factor = math.ceil(math.sqrt(image.width * image.height / _PIXELS))
    if factor > 1:
        small = _figures(image.reduce(factor))
        for figure in small:
            figure.mask = np.kron(figure.mask, np.ones((factor, factor), bool))[: image.height, : image.width]
        return small
    columns, rows = best_grid(*image.size, TILE, 1, 6)
    scale = (image.width / columns + image.height / rows) / (2 * TILE)
    labels, unsure = _label(np.asarray(image, dtype=np.float32))
    taken = np.zeros(labels.shape, bool)
    found: list[_Found] = []
    # black and white last: what is left of them when the stripes and dots of the others are known
    for colour in [c for c in COLOURS if c not in (_DARK, _LIGHT)] + [_DARK, _LIGHT]:
        own = (labels == colour) & ~taken
        for part in _components(_closed(own, math.ceil(_GAP * scale / 2))):
            if 30 * scale**2 <= (own & part).sum() <= _TOUCHING * (2 * LARGE[1] * scale) ** 2:
                for figure in _fit_all(own & part, colour, labels, unsure, scale):
                    found.append(figure)
                    taken |= figure.mask
    _hide(found, labels)
    return [figure for figure in found if figure.mask.any()]


def _label(pixels: np.ndarray) -> tuple[np.ndarray, dict[str, bool]]:
    """The name of the nearest colour of every pixel; and for black and white whether their stripes look like the
    background."""
    values, counts = np.unique((pixels // 4).astype(np.int32) @ (1, 64, 4096), return_counts=True)
    most = int(values[counts.argmax()])
    background = np.array([most % 64, most // 64 % 64, most // 4096]) * 4.0 + 2
    near = (np.abs(pixels - background).max(-1) < 24) & (np.ptp(pixels - background, axis=-1) < 12)
    if near.mean() < _PLAIN:
        raise ImageError(
            "The stand-in segmenter finds figures drawn on a plain background, and this image has none. For "
            "photographs: --segmenter facebook/sam2.1-hiera-large, with --model MSALab/PerceptionDLM."
        )
    background = np.median(pixels[near], axis=0)
    greys = {colour: np.array(ACCENTS[colour], float) for colour in (_DARK, _LIGHT)}
    unsure = {colour: bool(np.linalg.norm(grey - background) < 24) for colour, grey in greys.items()}
    palette = {**{name: np.array(rgb, float) for name, rgb in COLOURS.items()}, _BACKGROUND: background}
    palette |= {f"{_GREY} {colour}": grey for colour, grey in greys.items() if not unsure[colour]}
    distances = np.stack([np.linalg.norm(pixels - rgb, axis=-1) for rgb in palette.values()])
    return np.array(list(palette))[distances.argmin(0)], unsure


def _fit_all(
    own: np.ndarray, colour: str, labels: np.ndarray, unsure: dict[str, bool], scale: float
) -> Iterator[_Found]:
    """The figures among the pixels of one component: more than one where figures of a colour touch."""
    least = own.sum() * 0.12
    while own.sum() > max(least, 30 * scale**2):
        found = _fit(own, colour, labels, unsure, scale)
        if found is None:
            return
        yield found
        own = own & ~_grown(found.mask, 1)


def _fit(own: np.ndarray, colour: str, labels: np.ndarray, unsure: dict[str, bool], scale: float) -> _Found | None:
    """The outline that holds most of these pixels, and least else."""
    edge = math.ceil(6 * scale)
    (y0, y1), (x0, x1) = ((int(k[0]), int(k[-1]) + 1) for k in (own.any(1).nonzero()[0], own.any(0).nonzero()[0]))
    top, left = max(0, y0 - edge), max(0, x0 - edge)
    worth = _worth(own, colour, labels, unsure, scale)[top : y1 + edge, left : x1 + edge]
    corners = x0 - left, y0 - top, x1 - left, y1 - top
    starts = [
        (shape, at)
        for shape, outline in _OUTLINES.items()
        for _, at in sorted((-_value(worth, outline, *at), at) for at in _starts(outline, *corners, scale))[:_STARTS]
    ]
    value, (x, y, radius), shape = max((*_climb(worth, _OUTLINES[shape], at, scale), shape) for shape, at in starts)
    if value <= 0:
        return None
    mask = np.zeros(own.shape, bool)
    inside = _stencil(_OUTLINES[shape], x, y, radius, worth.shape)
    mask[top : top + worth.shape[0], left : left + worth.shape[1]] = inside
    return _Found(colour, shape, mask, float((worth[inside] > _EMPTY).mean()))


def _worth(own: np.ndarray, colour: str, labels: np.ndarray, unsure: dict[str, bool], scale: float) -> np.ndarray:
    """What every pixel is worth inside the outline of a figure of this colour."""
    accent = f"{_GREY} {colour}" if colour in (_DARK, _LIGHT) else _LIGHT if colour in ACCENTS else _DARK
    worth = np.full(own.shape, _OTHER)
    worth[np.char.startswith(labels, _GREY)] = _EMPTY
    worth[labels == _BACKGROUND] = _UNSURE if unsure.get(colour) else _EMPTY
    worth[(labels == accent) & _grown(own, math.ceil(_GAP * scale))] = _ACCENT
    worth[own] = _OWN
    return worth


def _starts(outline: Any, x0: int, y0: int, x1: int, y1: int, scale: float) -> Iterator[tuple[float, float, float]]:
    """Places and radii at which an outline stays in a box of pixels, a little tolerance aside."""
    corners = np.concatenate([np.array(ring) for ring in outline])
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    for radius in _RADII:
        r = radius * scale
        places = []
        for low, high, start, end in ((left, right, x0, x1), (top, bottom, y0, y1)):
            first, last = start - low * r, end - 1 - high * r
            if last < first:
                first = last = (first + last) / 2
            places.append(np.linspace(first, last, 1 + math.ceil((last - first) / (3 * scale))))
        yield from ((float(x), float(y), r) for x in places[0] for y in places[1])


def _climb(
    worth: np.ndarray, outline: Any, at: tuple[float, float, float], scale: float
) -> tuple[float, tuple[float, float, float]]:
    """Move and resize an outline as long as its value rises, in ever smaller steps. Returns: value and place."""
    best = _value(worth, outline, *at)
    for step in (2 * scale, scale, 0.5 * scale, 0.25):
        moved = True
        while moved:
            moved = False
            for way in _WAYS:
                to = (at[0] + way[0] * step, at[1] + way[1] * step, at[2] + way[2] * step)
                if _fits(to[2] / scale) and (value := _value(worth, outline, *to)) > best:
                    best, at, moved = value, to, True
    return best, at


def _fits(radius: float) -> bool:
    """Whether figures are drawn with this radius, half a pixel of a tile aside."""
    return any(low - 0.5 <= radius <= high + 0.5 for low, high in (SMALL, LARGE))


def _value(worth: np.ndarray, outline: Any, x: float, y: float, radius: float) -> float:
    return float(worth[_stencil(outline, x, y, radius, worth.shape)].sum())


def _stencil(outline: Any, x: float, y: float, radius: float, size: Any) -> np.ndarray:
    """The pixels of an outline, as scenes draw it, bool (height, width)."""
    stencil = Image.new("L", (size[1], size[0]), 0)
    draw = ImageDraw.Draw(stencil)
    for ring in outline:
        draw.polygon([(x + radius * a, y + radius * b) for a, b in ring], fill=1)
    return np.asarray(stencil).astype(bool)


def _hide(found: list[_Found], labels: np.ndarray) -> None:
    """Take from every figure the pixels of those on top of it."""
    outlines = [figure.mask.copy() for figure in found]
    for k, figure in enumerate(found):
        for j, other in enumerate(found[:k]):
            both = outlines[k] & outlines[j]
            if both.any():
                seen = [(labels[both] == one.colour).sum() for one in (figure, other)]
                below = other if seen[0] >= seen[1] else figure
                below.mask &= ~both


def _closed(mask: np.ndarray, gap: int) -> np.ndarray:
    """The mask with its gaps filled, up to twice this width."""
    return ~_grown(~_grown(mask, gap), gap)


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    """The mask and all pixels at most so far from it, along rows and columns."""
    for axis in (0, 1):
        padded = np.pad(mask, [(by, by) if k == axis else (0, 0) for k in (0, 1)])
        mask = np.any([np.take(padded, range(k, k + mask.shape[axis]), axis) for k in range(2 * by + 1)], axis=0)
    return mask


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """The parts of a mask that hang together, from large to small."""
    names = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # every pixel takes the largest name around it
        padded = np.pad(names, 1)
        around = [padded[y : y + mask.shape[0], x : x + mask.shape[1]] for y in range(3) for x in range(3)]
        largest = np.where(mask, np.max(around, axis=0), 0)
        if np.array_equal(largest, names):
            break
        names = largest
    found, counts = np.unique(names[mask], return_counts=True)
    return [names == name for name in found[np.argsort(-counts)][:_MOST]]
