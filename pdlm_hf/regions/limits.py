"""Limits on images and regions, checked before memory is taken for them.

Each limit is a module attribute; an environment variable of its name with `PDLM_` before it is read at import. Servers
and pages may call the checks with lower limits of their own.
"""

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..errors_pdlm import ImageError, RegionError, SettingError


def _limit(name: str, default: int) -> int:
    text = os.environ.get(f"PDLM_{name}")
    if text is None:
        return default
    if not text.isdecimal() or len(text) > 10 or not 0 < int(text) < 2**31:  # pycocotools counts pixels with 32 bits
        raise SettingError(f"PDLM_{name} must be a positive integer below 2147483648, got {text!r:.40}.")
    return int(text)


IMAGE_PIXELS = _limit("IMAGE_PIXELS", 178_956_970)  # of one image; the default is Pillow's own limit
MASK_PIXELS = _limit("MASK_PIXELS", 2**29)  # of all masks of a batch or request together
POLYGON_POINTS = _limit("POLYGON_POINTS", 2**20)  # of one region
POLYGON_LENGTH = _limit("POLYGON_LENGTH", 2**21)  # of the outline of one region in pixels
if "PDLM_IMAGE_PIXELS" in os.environ:
    Image.MAX_IMAGE_PIXELS = IMAGE_PIXELS  # or Pillow would refuse, or warn, by its own


def check_image_pixels(width: int, height: int, name: str = "image", limit: int | None = None) -> None:
    """Check the size of an image before it is decoded, or before a mask of it is made.

    Args:
        width, height (`int`): in pixels.
        name (`str`): how to call it in the message.
        limit (`int`, *optional*): default: [`IMAGE_PIXELS`].

    Raises:
        ImageError: it has more pixels.
    """
    limit = IMAGE_PIXELS if limit is None else limit
    if width * height > limit:
        raise ImageError(
            f"{name}: has {width} x {height} pixels, {width * height} together; at most {limit} are read. Scale it "
            "down, or set the environment variable PDLM_IMAGE_PIXELS."
        )


def bomb_error(name: str, error: Image.DecompressionBombError) -> ImageError:
    """Pillow's refusal of an image that has far more pixels than [`IMAGE_PIXELS`], in our words."""
    return ImageError(
        f"{name}: cannot be opened as an image: at most {IMAGE_PIXELS} pixels are read ({error}) Scale it down, or "
        "set the environment variable PDLM_IMAGE_PIXELS."
    )


def check_mask_pixels(width: int, height: int, regions: int, limit: int | None = None) -> None:
    """Check how many pixels the masks of several regions have together, before any is decoded.

    Args:
        width, height (`int`): of the image in pixels.
        regions (`int`): number of regions.
        limit (`int`, *optional*): default: [`MASK_PIXELS`].

    Raises:
        RegionError: they have more pixels.
    """
    limit = MASK_PIXELS if limit is None else limit
    if width * height * regions > limit:
        raise RegionError(
            f"{regions} regions of an image of {width} x {height} pixels are {width * height * regions} pixels "
            f"together, more than {limit} at once; pass fewer regions, or a smaller image."
        )


def check_outline(rings: Sequence[np.ndarray], name: str) -> None:
    """Check the polygons of one region. pycocotools takes memory for each step along the outline, unchecked.

    Args:
        rings: arrays `[x0, y0, x1, y1, ...]` in pixels, finite.
        name (`str`): how to call the region in the message.

    Raises:
        RegionError: more than [`POLYGON_POINTS`] points, or an outline longer than [`POLYGON_LENGTH`].
    """
    points = sum(len(ring) for ring in rings) // 2
    if points > POLYGON_POINTS:
        raise RegionError(f"{name}: the polygon has {points} points, at most {POLYGON_POINTS} are read; simplify it.")
    if sum(len(ring) * np.abs(ring).max() for ring in rings) <= POLYGON_LENGTH:  # no outline is longer than that
        return
    corners = [ring.reshape(-1, 2) for ring in rings]
    length = sum(np.abs(ring - np.roll(ring, -1, 0)).max(1).sum() for ring in corners)
    if length > POLYGON_LENGTH:
        raise RegionError(
            f"{name}: the outline of the polygon, of {points} points, is {length:.0f} pixels long, at most "
            f"{POLYGON_LENGTH} are read; its points may be out of order."
        )
