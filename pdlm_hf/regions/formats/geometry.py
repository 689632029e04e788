"""Shapes that several formats have: rectangles, ellipses, parts of masks; and coordinates that a file has rounded."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors_pdlm import RegionError
from .facts import ImageFacts

_CORNERS = 64  # of the polygon that replaces an ellipse


def snap(values: np.ndarray, tolerance: float | np.ndarray) -> np.ndarray:
    """Coordinates, whole where a whole number is within the tolerance: the error that the digits of a file allow."""
    whole = np.round(values)
    return np.where(np.abs(values - whole) <= tolerance, whole, values)


def rectangle(box: Sequence[float], degrees: float = 0.0, centred: bool = True) -> list[float]:
    """The corners `[x0, y0, ...]` of a rectangle.

    Args:
        box (`Sequence[float]`): x, y, width, height.
        degrees (`float`): turned clockwise on the screen, about the centre; or about (x, y) if not `centred`.
        centred (`bool`): what it is turned about.
    """
    x, y, width, height = box
    corners = np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], dtype=float)
    if degrees % 360:
        corners = turned(corners, degrees, corners.mean(0) if centred else corners[0])
    return corners.ravel().tolist()


def ellipse(values: Sequence[float], degrees: float = 0.0) -> list[float]:
    """Corners of a polygon in place of an ellipse.

    Args:
        values (`Sequence[float]`): x and y of the centre, and the two half axes.
        degrees (`float`): turned clockwise on the screen.
    """
    x, y, a, b = values
    turns = 2 * math.pi * np.arange(_CORNERS) / _CORNERS
    points = np.array([x, y]) + np.stack([a * np.cos(turns), b * np.sin(turns)], 1)
    return turned(points, degrees, np.array([x, y])).ravel().tolist()


def turned(points: np.ndarray, degrees: float, about: np.ndarray) -> np.ndarray:
    """Points `(N, 2)` turned clockwise on the screen, where y points down."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return (points - about) @ np.array([[cos, sin], [-sin, cos]]) + about


def pasted(part: np.ndarray, x: int, y: int, image: ImageFacts, where: str) -> np.ndarray:
    """A mask of the whole image, `(H, W)`, from a part of it.

    Args:
        part (`np.ndarray` of shape `(h, w)`): bool.
        x, y (`int`): where its corner lies.

    Raises:
        RegionError: the part leaves the image.
    """
    height, width = part.shape
    if x < 0 or y < 0 or x + width > image.width or y + height > image.height:
        raise RegionError(
            f"{where}: a mask of {width} x {height} pixels at ({x}, {y}) leaves the image of {image.width} x "
            f"{image.height}."
        )
    mask = np.zeros((image.height, image.width), dtype=bool)
    mask[y : y + height, x : x + width] = part
    return mask


def number(value: Any, where: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number from a file.

    Raises:
        RegionError: the value is something else, or not within the bounds.
    """
    try:
        found = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found) or not low <= found <= high:
        bounds = "" if math.isinf(high) else f" from {low:g} to {high:g}"
        raise RegionError(f"{where}: expected a number{bounds}, got {value!r:.60}.")
    return found
