"""Hints about regions that can be read, and may not be what was meant."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .images import load_image, orientation_of
from .region import Region, parse_regions


def hint_all_inside(region: Region, name: str) -> str | None:
    """Say that a mask covers nearly all of its image, or all that surrounds something, as an inverted mask does.

    Args:
        region (`Region`): read from a mask.
        name (`str`): how to call it.

    Returns:
        a sentence, or None.
    """
    mask = region.mask
    part = np.count_nonzero(mask) / mask.size
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    if part < 0.95 and not (part > 0.5 and border.mean() > 0.99):
        return None
    return (
        f"{name}: {part:.0%} of the mask is white (inside the region), its border too. If it is inverted, with the "
        "region black, turn it round, for example with ImageMagick: magick MASK.png -negate OUT.png"
    )


def hint_turned(source: Any, size: tuple[int, int]) -> str | None:
    """Say that the EXIF orientation turns an image into one of the same size: a mask of its pixels as stored would be
    accepted, in the wrong place.

    Args:
        source: path of the image or PIL image.
        size (`tuple[int, int]`): its width and height in pixels.

    Returns:
        a sentence, or None.
    """
    if not isinstance(source, (str, Path, Image.Image)):
        return None
    orientation = orientation_of(source)
    if orientation == 1 or (orientation > 4 and size[0] != size[1]):
        return None
    if isinstance(source, Image.Image):
        return (
            f"The EXIF orientation {orientation} of the image is not applied, because it is in memory; its regions "
            "are taken to be of its pixels as they are. Pass the path, or PIL.ImageOps.exif_transpose(image)."
        )
    return (
        f"{source}: the EXIF orientation {orientation} is applied; the regions are taken to be of the image as it is "
        "shown. For regions of the pixels as stored: pdlm caption --orientation stored, in Python "
        f"parse_regions(..., orientation={orientation})."
    )


def load_pair(image: Any, regions: Any) -> tuple[Image.Image, list[Region]]:
    """Read an image and its regions, and warn where they may not be what was meant.

    Args:
        image: see [`~pdlm_hf.regions.load_image`].
        regions: see [`~pdlm_hf.regions.parse_regions`].

    Raises:
        ImageError: the image cannot be read.
        RegionError: a region cannot be parsed, or does not fit the image.
    """
    opened = load_image(image)
    found = parse_regions(regions, *opened.size)
    given = regions if isinstance(regions, (list, tuple)) and len(regions) == len(found) else [regions] * len(found)
    hints = [
        hint_all_inside(region, f"region {region.id}")
        for region, value in zip(found, given, strict=True)
        if isinstance(value, (np.ndarray, torch.Tensor, Image.Image, str, Path))
    ]
    if not all(isinstance(value, Region) for value in given):  # who parsed them by parse_regions chose by that
        hints.append(hint_turned(image, opened.size))
    for hint in filter(None, hints):
        warnings.warn(hint, stacklevel=3)
    return opened, found
