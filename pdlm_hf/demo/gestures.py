"""Masks of what a person does on the page; coordinates are fractions of the image's width and height."""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..errors_pdlm import RegionError
from ..regions.finding.selection import FoundRegion
from ..regions.region import Region, parse_region

_POINTS = 10_000  # of a stroke
_STEP = 0.005  # share of the longer side by which an arrow key moves a region; at least a pixel
_STEPS = 1000  # at a time


def read_numbers(values: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Parse fractions of an image, clipped to 0 to 1. Raises: RegionError for anything else."""
    array: np.ndarray | None = None
    try:
        given = np.asarray(values, dtype=float)
        if given.size <= 2 * _POINTS:
            array = given.reshape(shape)
    except (TypeError, ValueError):
        pass
    if array is None or not array.size or not np.isfinite(array).all():
        raise RegionError("This mark cannot be read; try again, with a shorter stroke.")
    return array.clip(0, 1)


def pixel_at(point: np.ndarray, width: int, height: int) -> tuple[int, int]:
    """Column and row of the pixel at a point."""
    return min(int(point[0] * width), width - 1), min(int(point[1] * height), height - 1)


def box_mask(corners: np.ndarray, width: int, height: int) -> np.ndarray:
    """Mask of the box between two corners, `[x0, y0, x1, y1]` in any order. Raises: RegionError: it has no area."""
    x, y = np.sort(corners[[0, 2]]) * width, np.sort(corners[[1, 3]]) * height
    return parse_region([x[0], y[0], x[1] - x[0], y[1] - y[0]], width, height, 0).mask


def stroke_mask(points: np.ndarray, radius: float, width: int, height: int) -> np.ndarray:
    """The mask that a stroke of a round brush covers; the radius is a fraction of the width."""
    pixels, radius = points * [width, height], max(0.5, radius * width)
    canvas = Image.new("1", (width, height))
    draw = ImageDraw.Draw(canvas)
    draw.line([tuple(point) for point in pixels.tolist()], fill=1, width=max(1, round(2 * radius)))
    for x, y in pixels.tolist():
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=1)
    return np.array(canvas)


class ClickFinder:
    """Turns a click into a region, where no segmenter does: the smallest one of all that are found.

    Args:
        finder ([`~pdlm_hf.regions.RegionFinder`]): finds them.
    """

    def __init__(self, finder: Callable[[Image.Image], list[FoundRegion]]):
        self.finder = finder

    def mask(self, image: Image.Image, x: int, y: int) -> np.ndarray:
        """The mask, bool `(H, W)`, of the region at a pixel. Raises: RegionError: there is none."""
        masks = [region.as_region(None).mask for region in self.finder(image)]
        hit = [mask for mask in masks if mask[y, x]]
        if not hit:
            raise RegionError("Nothing was found there; click on something else, or mark it with a box or the brush.")
        return min(hit, key=np.count_nonzero)


def nudged_mask(mask: np.ndarray, right: Any, down: Any, resize: bool) -> np.ndarray:
    """The mask after presses of arrow keys; it stays within the image.

    Args:
        mask (`np.ndarray` of shape `(H, W)`): bool, not empty.
        right, down (`int`): number of steps; a step is 0.5 % of the image's longer side, at least a pixel.
        resize (`bool`): move the right and the lower side of a box instead of the whole region.

    Raises:
        RegionError: the steps cannot be read, or the region to resize is no box.
    """
    if not all(type(steps) is int and abs(steps) <= _STEPS for steps in (right, down)):
        raise RegionError("This move cannot be read; press an arrow key again.")
    height, width = mask.shape
    x, y, w, h = Region(None, mask).bbox
    step = max(1, round(_STEP * max(mask.shape)))
    if not resize:
        rows, columns = np.clip([down * step, right * step], [-y, -x], [height - y - h, width - x - w])
        return np.roll(mask, (rows, columns), (0, 1))  # it has room, so that nothing comes in at the other side
    if mask.sum() != w * h:
        raise RegionError("Only boxes can be resized; arrow keys without Shift move this region.")
    w, h = np.clip([w + right * step, h + down * step], 1, [width - x, height - y])
    resized = np.zeros_like(mask)
    resized[y : y + h, x : x + w] = True
    return resized
