"""An image and its regions as data for a page, which draws the outlines itself: they can be hidden, lit, enlarged."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..processing_pdlm import area_order
from ..regions.region import Region
from .html import jpeg_url


def figure_data(image: Image.Image, regions: Sequence[Region], side: int) -> dict[str, Any]:
    """What `figure` of the template `page.html` shows.

    Args:
        image (`PIL.Image.Image`): RGB.
        regions: of the image.
        side (`int`): pixels of the longer side of the image in the page, at most.

    Returns:
        `url`, `width` and `height` of the image; `shapes`, for every region the `path` of its outline (of SVG, in
        pixels of the image in the page) and the place of its number `x`, `y` (in per cent); and `order`, the regions
        from large to small.
    """
    factor = min(1, side / max(image.size))
    width, height = (max(1, round(length * factor)) for length in image.size)
    small = image if factor == 1 else image.resize((width, height), Image.Resampling.LANCZOS)
    shapes = []
    for region in regions:
        left, top, w, h = region.bbox
        y, x = (float(places.mean()) + 0.5 for places in region.mask[top : top + h, left : left + w].nonzero())
        place = {"x": round(100 * (left + x) / image.width, 1), "y": round(100 * (top + y) / image.height, 1)}
        shapes.append({"path": outline_path(region, (width, height)), **place})
    order = area_order([region.mask for region in regions])
    return {"url": jpeg_url(small), "width": width, "height": height, "shapes": shapes, "order": order}


def outline_path(region: Region, size: tuple[int, int]) -> str:
    """The outline of a region as a path of SVG, along the sides of its pixels, holes included.

    Args:
        region (`Region`)
        size (`tuple[int, int]`): width and height that the image has in the path's own pixels.
    """
    height, width = region.mask.shape
    x, y, w, h = region.bbox
    x0, x1 = x * size[0] // width, -(-(x + w) * size[0] // width)
    y0, y1 = y * size[1] // height, -(-(y + h) * size[1] // height)
    part = Image.fromarray(region.mask[y : y + h, x : x + w])
    inside = np.asarray(part.convert("L").resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)) > 127
    if not inside.any():  # thinner than a pixel
        inside = np.ones_like(inside)
    return "".join(f"M{x0 + left} {y0 + top}{steps}z" for left, top, steps in _loops(np.pad(inside, 1)))


def _loops(padded: np.ndarray) -> Iterator[tuple[int, int, str]]:
    """Closed lines around the pixels of a mask with a border of a pixel, the inside at their right hand: where each
    starts, and its steps, across and down by turns."""
    cells = padded.astype(np.int8)
    across = _sides(np.diff(cells[:, 1:-1], axis=0))
    down = {(x, y): ends for (y, x), ends in _sides(-np.diff(cells[1:-1], axis=1).T).items()}
    while across:
        start = x, y = next(iter(across))
        steps: list[int] = []
        while not steps or (x, y) != start:
            right = _take(across, (x, y))
            bottom = _take(down, (right, y))
            steps += [right - x, bottom - y]
            x, y = right, bottom
        yield *start, "".join(f"{'hv'[k % 2]}{step}" for k, step in enumerate(steps))


def _sides(changes: np.ndarray) -> dict[tuple[int, int], list[int]]:
    """Straight sides of pixels: for the place and line where one starts, the places where it ends. There are two where
    pixels touch at a corner only.

    Args:
        changes (`np.ndarray` of shape `(lines, places)`): 1 for a side that runs forwards, -1 for one that runs
            backwards, and 0 for none.
    """
    padded = np.pad(changes, ((0, 0), (1, 1)))
    lines, places = (padded[:, 1:] != padded[:, :-1]).nonzero()
    values = padded[lines, places + 1]
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for k in values.nonzero()[0]:
        ends = int(places[k]), int(places[k + 1])  # a line ends with a change to 0
        start, end = ends if values[k] > 0 else ends[::-1]
        found[start, int(lines[k])].append(end)
    return found


def _take(sides: dict[tuple[int, int], list[int]], place: tuple[int, int]) -> int:
    """The end of a side that starts at a place, which is removed."""
    ends = sides[place]
    end = ends.pop()
    if not ends:
        del sides[place]
    return end
