"""Parse regions in any form: masks, boxes, polygons, RLE, COCO annotations. Field names are those of COCO."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from ..errors_pdlm import RegionError
from ..image_processing_pdlm import to_binary_mask
from .images import open_image

MASK_PIXELS = 2**29  # limit for all masks of a batch or request together


@dataclass
class Region:
    """One region of an image.

    Args:
        id: the id that the caller gave, or the position among the regions.
        mask (`np.ndarray` of shape `(H, W)`): bool, not empty.
    """

    id: Any
    mask: np.ndarray

    @property
    def bbox(self) -> list[int]:
        """The bounding box of the mask: x, y, width, height in pixels."""
        y, x = self.mask.any(1).nonzero()[0], self.mask.any(0).nonzero()[0]
        return [int(x[0]), int(y[0]), int(x[-1] - x[0] + 1), int(y[-1] - y[0] + 1)]

    @property
    def segmentation(self) -> dict[str, Any]:
        """The mask as COCO's compressed RLE, with counts as text, ready for JSON."""
        rle = coco_mask.encode(np.asfortranarray(self.mask, dtype=np.uint8))
        return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def parse_regions(values: Any, width: int, height: int) -> list[Region]:
    """Parse the regions of one image; [`parse_region`] has the forms.

    Args:
        values: list of regions, or an array of masks (N, H, W).
        width, height (`int`): size of the image in pixels.

    Raises:
        ImageError: the image file of a mask cannot be opened.
        RegionError: there is no region, or a region cannot be parsed; the message names it.
    """
    if isinstance(values, (np.ndarray, torch.Tensor)) and values.ndim == 2:
        values = [values]
    if isinstance(values, (dict, str, Path)):
        values = [values]
    if hasattr(values, "xyxy"):
        raise RegionError("Regions: detections of supervision go through `pdlm_hf.regions.from_supervision` first.")
    if not isinstance(values, (Iterable, np.ndarray, torch.Tensor)):
        raise RegionError(f"Regions: expected a list of masks, boxes, polygons or RLE, got {type(values).__name__}.")
    regions = [parse_region(value, width, height, k) for k, value in enumerate(values)]
    if not regions:
        raise RegionError("No regions given. Pass at least one mask, box, polygon or RLE.")
    return regions


def parse_region(value: Any, width: int, height: int, index: int | str = 0) -> Region:
    """Parse one region.

    Args:
        value: a [`Region`]; a mask (array, tensor, PIL image, or path of an image); a box `[x, y, width, height]` in
            pixels; a polygon `[[x0, y0, x1, y1, ...], ...]`; an RLE `{"size", "counts"}`; or a COCO annotation with
            "segmentation" or "bbox", whose "id" is kept.
        width, height (`int`): size of the image in pixels.
        index (`int` or `str`): position or name of the region; its id unless it has one.

    Raises:
        ImageError: the image file of a mask cannot be opened.
        RegionError: the region cannot be parsed, lies outside the image, is empty, or has another size.
    """
    name = f"region {index}"
    mask: np.ndarray | torch.Tensor | Image.Image
    if isinstance(value, Region):
        return Region(value.id, to_binary_mask(value.mask, height, width, f"region {value.id}"))
    if isinstance(value, dict) and "counts" not in value:
        return _from_annotation(value, width, height, index)
    if isinstance(value, dict):
        mask = _from_rle(value, width, height, name)
    elif isinstance(value, (str, Path)):
        name = str(value)
        mask = open_image(value)
    elif isinstance(value, (list, tuple)) and len(value) == 4 and all(np.isscalar(x) for x in value):
        mask = _from_box(value, width, height, name)
    elif isinstance(value, (list, tuple)):
        mask = _from_polygons(value, width, height, name)
    elif isinstance(value, (np.ndarray, torch.Tensor, Image.Image)):
        mask = value
    else:
        raise RegionError(
            f"{name}: expected a mask, box, polygon, RLE or COCO annotation, got {type(value).__name__}."
        )
    return Region(index, to_binary_mask(mask, height, width, name))


def region_areas(annotations: Sequence[dict], sizes: Sequence[tuple[int, int]]) -> list[int | RegionError]:
    """Compute the areas of many regions at once, without decoding their masks: a fast check of a large data set.

    Args:
        annotations: dicts with "segmentation" (RLE or polygons) or "bbox", from any images.
        sizes: for each annotation the width and height of its image in pixels.

    Returns:
        for each region the number of pixels inside, possibly 0, or the RegionError of [`parse_region`] if it cannot
        be parsed.
    """
    areas: list[int | RegionError] = [0] * len(annotations)
    texts: dict[int, bytes] = {}
    for k, (annotation, (width, height)) in enumerate(zip(annotations, sizes, strict=True)):
        try:
            name, kind, shape = _shape_of(annotation, k)
            if kind == "rle":
                counts = _rle_counts(shape, width, height, name)
                if isinstance(counts, bytes):
                    texts[k] = counts
                else:
                    areas[k] = int(_checked(counts, width, height, name)[1::2].sum())
            elif kind == "polygons":
                areas[k] = int(coco_mask.area(_polygon_rle(shape, width, height, name)))
            else:
                x0, y0, x1, y1 = _box_pixels(shape, width, height, name)
                areas[k] = (x1 - x0) * (y1 - y0)
        except RegionError as error:
            areas[k] = error
    runs, lengths, damaged = _run_lengths(list(texts.values()))
    totals, negative, areas_of = np.zeros((3, len(lengths)), np.int64)
    filled = np.flatnonzero(lengths)
    if len(filled):
        starts = (np.cumsum(lengths) - lengths)[filled]
        inside = (np.arange(len(runs)) - np.repeat(starts, lengths[filled])) & 1
        totals[filled] = np.add.reduceat(runs, starts)
        negative[filled] = np.minimum.reduceat(runs, starts) < 0
        areas_of[filled] = np.add.reduceat(runs * inside, starts)
    for position, k in enumerate(texts):
        width, height = sizes[k]
        if damaged[position] or negative[position] or totals[position] != width * height:
            areas[k] = _damaged(_shape_of(annotations[k], k)[0], width, height)
        else:
            areas[k] = int(areas_of[position])
    return areas


def _shape_of(annotation: dict, index: int | str) -> tuple[str, str, Any]:
    """The name for messages, the kind ("rle", "polygons" or "bbox") and the value of a COCO annotation's shape."""
    name = f"region {annotation.get('id', index)}"
    shape = annotation.get("segmentation")
    if shape is not None and shape != [] and shape != {}:
        if not isinstance(shape, (list, dict)):
            raise RegionError(f"{name}: `segmentation` must be an RLE or polygons.")
        return name, "rle" if isinstance(shape, dict) else "polygons", shape
    if annotation.get("bbox") is None:
        raise RegionError(f"{name}: needs `segmentation` (RLE or polygons) or `bbox` [x, y, width, height].")
    return name, "bbox", annotation["bbox"]


def _from_annotation(annotation: dict, width: int, height: int, index: int | str) -> Region:
    name, kind, shape = _shape_of(annotation, index)
    reader = {"rle": _from_rle, "polygons": _from_polygons, "bbox": _from_box}[kind]
    mask = reader(shape, width, height, name)
    return Region(annotation.get("id", index), to_binary_mask(mask, height, width, name))


def _numbers(values: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise RegionError(f"{name}: expected numbers, got {values!r:.60}.") from None
    if not np.isfinite(array).all():
        raise RegionError(f"{name}: holds NaN or infinite values.")
    return array


def _box_pixels(box: Any, width: int, height: int, name: str) -> tuple[int, int, int, int]:
    """Columns and rows x0, y0, x1, y1 (x1, y1 excluded) of the pixels that the box touches inside the image."""
    array = _numbers(box, name)
    if array.shape != (4,):
        raise RegionError(f"{name}: a box is [x, y, width, height], got {box!r:.60}.")
    x, y, w, h = array.tolist()
    if w <= 0 or h <= 0:
        raise RegionError(f"{name}: the box {list(box)} has no area; it is [x, y, width, height], not two corners.")
    x0, y0 = max(0, math.floor(x)), max(0, math.floor(y))
    x1, y1 = min(width, math.ceil(x + w)), min(height, math.ceil(y + h))
    if x1 <= x0 or y1 <= y0:
        raise RegionError(f"{name}: the box {list(box)} lies outside the image of {width} x {height}.")
    return x0, y0, x1, y1


def _from_box(box: Any, width: int, height: int, name: str) -> np.ndarray:
    x0, y0, x1, y1 = _box_pixels(box, width, height, name)
    mask = np.zeros((height, width), dtype=bool)
    mask[y0:y1, x0:x1] = 1
    return mask


def _polygon_rle(polygons: Any, width: int, height: int, name: str) -> dict:
    rings = [_numbers(ring, name) for ring in polygons]
    if not rings or any(ring.ndim != 1 or len(ring) < 6 or len(ring) % 2 for ring in rings):
        raise RegionError(f"{name}: a polygon is a flat list [x0, y0, x1, y1, ...] of at least three points.")
    # pycocotools allocates memory for every pixel along the outline, also far outside
    if max(np.abs(ring).max() for ring in rings) > 16 * max(width, height):
        raise RegionError(f"{name}: the polygon lies far outside the image of {width} x {height} pixels.")
    return coco_mask.merge(coco_mask.frPyObjects([ring.tolist() for ring in rings], height, width))


def _from_polygons(polygons: Any, width: int, height: int, name: str) -> np.ndarray:
    return coco_mask.decode(_polygon_rle(polygons, width, height, name))


def _from_rle(rle: dict, width: int, height: int, name: str) -> np.ndarray:
    """Decode COCO's run lengths, compressed or not. Not by pycocotools, which reads past the end of a damaged RLE."""
    runs = _rle_counts(rle, width, height, name)
    if isinstance(runs, bytes):
        runs, _, damaged = _run_lengths([runs])
        if damaged[0]:
            raise _damaged(name, width, height)
    runs = _checked(runs, width, height, name)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _rle_counts(rle: dict, width: int, height: int, name: str) -> bytes | np.ndarray:
    """Check the size of an RLE and return its compressed counts, or the run lengths of an uncompressed one.

    Raises:
        RegionError: it is no RLE, or for another size.
    """
    if "counts" not in rle:
        raise RegionError(f"{name}: the RLE has no `counts`.")
    size = list(rle["size"]) if isinstance(rle.get("size"), (list, tuple)) else []
    if size != [height, width]:
        raise RegionError(f"{name}: the RLE is for size {size} (height, width), the image has {[height, width]}.")
    counts = rle["counts"]
    if isinstance(counts, (bytes, str)):
        return counts if isinstance(counts, bytes) else counts.encode("latin-1", "replace")
    array = _numbers(counts, name)
    if array.ndim != 1:
        raise _damaged(name, width, height)
    return array.astype(np.int64)


def _checked(runs: np.ndarray, width: int, height: int, name: str) -> np.ndarray:
    if not len(runs) or runs.min() < 0 or runs.sum() != height * width:
        raise _damaged(name, width, height)
    return runs


def _damaged(name: str, width: int, height: int) -> RegionError:
    return RegionError(
        f"{name}: the RLE is damaged; its runs do not add up to the {height * width} pixels of its size."
    )


def _run_lengths(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode COCO's compressed counts: 5 bits per character, from the third run on relative to the one before last.

    Args:
        texts: counts of any number of masks, so that array operations decode a whole data set.

    Returns:
        the runs of all texts in one array, the number of runs in each text, and which texts are damaged.
    """
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    digits = np.frombuffer(b"".join(texts), dtype=np.uint8) - np.uint8(48)  # others than digits become large
    damaged = sizes == 0
    if len(digits) and digits.max() > 63:
        damaged |= np.bincount(np.repeat(np.arange(len(texts)), sizes), digits > 63, len(texts)) > 0
    last = (digits & 32) == 0  # the last character of its run
    filled = np.flatnonzero(sizes)
    text_ends = np.cumsum(sizes)[filled] - 1
    damaged[filled] |= ~last[text_ends]
    last[text_ends] = True  # a text cut short must not run into the next one
    ends = np.flatnonzero(last)
    lengths = np.zeros(len(texts), np.int64)
    if not len(ends):
        return np.zeros(0, np.int64), lengths, damaged
    lengths[filled] = np.diff(np.searchsorted(ends, text_ends, "right"), prepend=0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    count = ends - starts + 1  # characters of each run
    damaged[np.repeat(np.arange(len(texts)), lengths)[count > 12]] = True  # more bits than an integer has
    runs = (digits[starts] & 31).astype(np.int64)
    for place in range(1, min(int(count.max()), 12)):  # most runs have one or two characters
        longer = np.flatnonzero(count > place)
        runs[longer] |= (digits[starts[longer] + place] & 31).astype(np.int64) << (5 * place)
    runs -= np.where(digits[ends] & 16, np.int64(1) << (5 * np.minimum(count, 12)), 0)
    number = np.arange(len(runs)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # of each run in its text
    # sums over every second run of a text; the first run is not part of them
    for parity in (0, 1):
        chosen = np.flatnonzero((number % 2 == parity) & (number > 0))
        sums = np.cumsum(runs[chosen])
        first = np.flatnonzero(number[chosen] <= 2)
        before = sums[first] - runs[chosen][first]
        runs[chosen] = sums - np.repeat(before, np.diff(np.append(first, len(chosen))))
    return runs, lengths, damaged


def probe_image() -> tuple[Image.Image, list[Region]]:
    """Return a small grey image with one region, to test an engine and its settings before the work."""
    image = Image.new("RGB", (32, 32), (128, 128, 128))
    return image, [parse_region([4, 4, 24, 24], *image.size)]
