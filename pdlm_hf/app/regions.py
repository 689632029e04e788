"""Regions in every form people have them: masks, boxes, polygons, RLE, COCO annotations. COCO's field names."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from ..image_processing_pdlm import to_binary_mask
from .images import open_image


@dataclass
class Region:
    """One region of a picture.

    Args:
        id: the caller's own, or the position among the regions.
        mask (`np.ndarray` of shape `(H, W)`): bool, not empty.
    """

    id: Any
    mask: np.ndarray

    @property
    def bbox(self) -> list[int]:
        """x, y, width, height in pixels, around the mask."""
        y, x = self.mask.any(1).nonzero()[0], self.mask.any(0).nonzero()[0]
        return [int(x[0]), int(y[0]), int(x[-1] - x[0] + 1), int(y[-1] - y[0] + 1)]


def parse_regions(values: Any, width: int, height: int) -> list[Region]:
    """Regions of one picture; see [`parse_region`] for the forms.

    Args:
        values: list of regions, or an array of masks (N, H, W).
        width, height (`int`): of the picture, in pixels.

    Raises:
        ValueError: no region, or one that cannot be read; the message names it.
    """
    if isinstance(values, (np.ndarray, torch.Tensor)) and values.ndim == 2:
        values = [values]
    if isinstance(values, (dict, str, Path)):
        values = [values]
    if not isinstance(values, (Iterable, np.ndarray, torch.Tensor)):
        raise ValueError(f"Regions: expected a list of masks, boxes, polygons or RLE, got {type(values).__name__}.")
    regions = [parse_region(value, width, height, k) for k, value in enumerate(values)]
    if not regions:
        raise ValueError("No regions given. Pass at least one mask, box, polygon or RLE.")
    return regions


def parse_region(value: Any, width: int, height: int, index: int = 0) -> Region:
    """One region.

    Args:
        value: a [`Region`]; a mask (array, tensor, PIL image, or path of a picture); a box `[x, y, width, height]` in
            pixels; a polygon `[[x0, y0, x1, y1, ...], ...]`; an RLE `{"size", "counts"}`; or a COCO annotation with
            "segmentation" or "bbox", whose "id" is kept.
        width, height (`int`): of the picture, in pixels.
        index (`int`): its position; its id unless it brings one.

    Raises:
        ValueError: it cannot be read, lies outside the picture, is empty, or has another size.
    """
    name = f"region {index}"
    if isinstance(value, Region):
        return Region(value.id, to_binary_mask(value.mask, height, width, f"region {value.id}"))
    if isinstance(value, dict) and "counts" not in value:
        return _from_annotation(value, width, height, index)
    if isinstance(value, dict):
        mask = _from_rle(value, width, height, name)
    elif isinstance(value, (str, Path)):
        mask = open_image(value)
    elif isinstance(value, (list, tuple)) and len(value) == 4 and all(np.isscalar(x) for x in value):
        mask = _from_box(value, width, height, name)
    elif isinstance(value, (list, tuple)):
        mask = _from_polygons(value, width, height, name)
    elif isinstance(value, (np.ndarray, torch.Tensor, Image.Image)):
        mask = value
    else:
        raise ValueError(f"{name}: expected a mask, box, polygon, RLE or COCO annotation, got {type(value).__name__}.")
    return Region(index, to_binary_mask(mask, height, width, name))


def _from_annotation(annotation: dict, width: int, height: int, index: int) -> Region:
    identifier = annotation.get("id", index)
    if annotation.get("segmentation") not in (None, [], {}):
        shape = annotation["segmentation"]
        if not isinstance(shape, (list, dict)):
            raise ValueError(f"region {identifier}: `segmentation` must be an RLE or polygons.")
        name = f"region {identifier}"
        reader = _from_rle if isinstance(shape, dict) else _from_polygons
        mask = reader(shape, width, height, name)
    elif annotation.get("bbox") is not None:
        mask = _from_box(annotation["bbox"], width, height, f"region {identifier}")
    else:
        raise ValueError(
            f"region {identifier}: needs `segmentation` (RLE or polygons) or `bbox` [x, y, width, height]."
        )
    return Region(identifier, to_binary_mask(mask, height, width, f"region {identifier}"))


def _numbers(values: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected numbers, got {values!r:.60}.") from None
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: holds NaN or infinite values.")
    return array


def _from_box(box: Any, width: int, height: int, name: str) -> np.ndarray:
    """All pixels the box touches; parts outside the picture are cut off."""
    array = _numbers(box, name)
    if array.shape != (4,):
        raise ValueError(f"{name}: a box is [x, y, width, height], got {box!r:.60}.")
    x, y, w, h = array
    if w <= 0 or h <= 0:
        raise ValueError(f"{name}: the box {list(box)} has no area; it is [x, y, width, height], not two corners.")
    mask = np.zeros((height, width), dtype=bool)
    mask[
        max(0, int(np.floor(y))) : max(0, int(np.ceil(y + h))), max(0, int(np.floor(x))) : max(0, int(np.ceil(x + w)))
    ] = 1
    if not mask.any():
        raise ValueError(f"{name}: the box {list(box)} lies outside the picture of {width} x {height}.")
    return mask


def _from_polygons(polygons: Any, width: int, height: int, name: str) -> np.ndarray:
    rings = [_numbers(ring, name) for ring in polygons]
    if not rings or any(ring.ndim != 1 or len(ring) < 6 or len(ring) % 2 for ring in rings):
        raise ValueError(f"{name}: a polygon is a flat list [x0, y0, x1, y1, ...] of at least three points.")
    # pycocotools allocates memory for every pixel on the way, also far outside
    if max(np.abs(ring).max() for ring in rings) > 16 * max(width, height):
        raise ValueError(f"{name}: the polygon lies far outside the picture of {width} x {height} pixels.")
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([ring.tolist() for ring in rings], height, width)))


def _from_rle(rle: dict, width: int, height: int, name: str) -> np.ndarray:
    """COCO run lengths, compressed or not. Checked first: pycocotools reads past the end of a damaged one."""
    if "counts" not in rle:
        raise ValueError(f"{name}: the RLE has no `counts`.")
    size = list(rle["size"]) if isinstance(rle.get("size"), (list, tuple)) else []
    if size != [height, width]:
        raise ValueError(f"{name}: the RLE is for size {size} (height, width), the picture has {[height, width]}.")
    counts = rle["counts"]
    if isinstance(counts, (bytes, str)):
        text = counts if isinstance(counts, bytes) else counts.encode("latin-1", "replace")
        runs = _run_lengths(text)
    else:
        array = _numbers(counts, name)
        runs = array.astype(int).tolist() if array.ndim == 1 else None
    if runs is None or min(runs, default=-1) < 0 or sum(runs) != height * width:
        raise ValueError(
            f"{name}: the RLE is damaged; its runs do not add up to the {height * width} pixels of its size."
        )
    values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return values.reshape(width, height).T


def _run_lengths(text: bytes) -> list[int] | None:
    """COCO's compressed counts: 5 bits a character, from the third run on relative to the one before last."""
    runs, value, shift = [], 0, 0
    for character in text:
        digit = character - 48
        if not 0 <= digit < 64:
            return None
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            if digit & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs
