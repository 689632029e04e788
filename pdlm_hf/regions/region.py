"""Parse regions in any form: masks, boxes, polygons, RLE, COCO annotations. Field names are those of COCO."""

import math
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from ..errors_pdlm import RegionError
from ..image_processing_pdlm import as_array, to_binary_mask
from .images import open_image, turned_mask
from .limits import MASK_PIXELS as MASK_PIXELS
from .limits import check_image_pixels, check_outline
from .rle import encode, run_lengths

_TOO_LARGE = 2.0**53  # beyond it floats skip integers
_MERGED = 64  # rings of a polygon at a time
_TOLERANCE = 1e-3  # pixels by which a side of a box may miss a whole number
_BRIEF = reprlib.Repr()  # the start of a value, without writing all of it: a polygon may have a million numbers
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 30
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 200


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
        return encode(self.mask)


def parse_regions(values: Any, width: int, height: int, orientation: int = 1) -> list[Region]:
    """Parse the regions of one image; [`parse_region`] has the forms.

    Args:
        values: list of regions, array of masks (N, H, W), or one region.
        width, height (`int`): size of the image in pixels.
        orientation (`int`): see [`parse_region`].

    Raises:
        ImageError: the image file of a mask cannot be opened.
        RegionError: there is no region, or a region cannot be parsed; the message names it.
    """
    listed = list_of_regions(values, width, height)
    return [parse_region(value, width, height, k, orientation) for k, value in enumerate(listed)]


def list_of_regions(values: Any, width: int, height: int) -> list[Any]:
    """List what [`parse_regions`] takes, region by region, without parsing it; see there for the arguments.

    Raises:
        RegionError: there is no region.
    """
    if isinstance(values, torch.Tensor):
        values = as_array(values, "Regions", RegionError)
    if _is_one(values, width, height):
        values = [values]
    if hasattr(values, "xyxy"):
        raise RegionError("Regions: detections of supervision go through `pdlm_hf.regions.from_supervision` first.")
    if not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise RegionError(f"Regions: expected a list of masks, boxes, polygons or RLE, got {type(values).__name__}.")
    listed = list(values)
    if not listed:
        raise RegionError("No regions given. Pass at least one mask, box, polygon or RLE.")
    return listed


def _is_one(values: Any, width: int, height: int) -> bool:
    """Whether the value is one region without a list around it."""
    if isinstance(values, np.ndarray):
        numbers = values.ndim == 1 and len(values) > 0 and values.dtype.kind in "iuf"
        return values.ndim == 2 or numbers or values.shape in ((height, width, 1), (width, height, 1))
    if isinstance(values, (list, tuple)):
        return len(values) > 0 and all(_is_number(value) for value in values)
    return isinstance(values, (dict, str, Path, Region, Image.Image))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) or getattr(value, "ndim", None) == 0


def parse_region(value: Any, width: int, height: int, index: int | str = 0, orientation: int = 1) -> Region:
    """Parse one region.

    Args:
        value: a [`Region`]; a mask (array, tensor, PIL image, or path of an image); a box `[x, y, width, height]` in
            pixels; a polygon `[[x0, y0, x1, y1, ...], ...]`, or its only ring; an RLE `{"size", "counts"}`; or a COCO
            annotation with "segmentation" or "bbox", whose "id" is kept.
        width, height (`int`): size of the image in pixels.
        index (`int` or `str`): position or name of the region; its id unless it has one.
        orientation (`int`): the EXIF orientation of the image, see [`~pdlm_hf.regions.orientation_of`], where the
            region belongs to the pixels as its file stores them. It is turned with the image then, except a
            [`Region`].

    Raises:
        ImageError: the image file of a mask cannot be opened, or the image has too many pixels.
        RegionError: the region cannot be parsed, lies outside the image, is empty, or has another size.
    """
    check_image_pixels(width, height)
    if isinstance(value, Region):
        return Region(value.id, to_binary_mask(value.mask, height, width, f"region {value.id}"))
    if orientation not in range(1, 9):
        raise RegionError(f"region {index}: an EXIF orientation is 1 to 8, got {orientation!r:.60}.")
    if orientation > 4:
        width, height = height, width
    if isinstance(value, dict) and "counts" not in value:
        region = _from_annotation(value, width, height, index)
    else:
        region = _from_shape(value, width, height, index, upright=orientation == 1)
    return Region(region.id, turned_mask(region.mask, orientation))


def _from_shape(value: Any, width: int, height: int, index: int | str, upright: bool) -> Region:
    name = f"region {index}"
    if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 1:
        value = (as_array(value, name, RegionError) if isinstance(value, torch.Tensor) else value).tolist()
    mask: np.ndarray | torch.Tensor | Image.Image
    if isinstance(value, dict):
        mask = _from_rle(value, width, height, name)
    elif isinstance(value, (str, Path)):
        name = str(value)
        mask = open_image(value, check=lambda image: _check_frames(image, name), upright=upright)
    elif isinstance(value, (list, tuple)) and len(value) == 4 and all(np.isscalar(x) or _is_number(x) for x in value):
        mask = _from_box(value, width, height, name)
    elif isinstance(value, (list, tuple)):
        mask = _from_polygons(value, width, height, name)
    elif isinstance(value, (np.ndarray, torch.Tensor, Image.Image)):
        mask = _from_mask(value, width, height, name)
    else:
        raise RegionError(
            f"{name}: expected a mask, box, polygon, RLE or COCO annotation, got {type(value).__name__}."
        )
    return Region(index, to_binary_mask(mask, height, width, name))


def _from_mask(value: Any, width: int, height: int, name: str) -> np.ndarray:
    mask = to_binary_mask(value, height, width, name)
    return mask if isinstance(value, Image.Image) else mask.copy()  # the caller's array may change later


def _check_frames(image: Image.Image, name: str) -> None:
    """Raises: RegionError: a file of several images, of which Pillow would read the first only."""
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a JPEG with previews of itself
    if frames > 1:
        raise RegionError(
            f"{name}: holds {frames} images, and a mask is a file of one. Split it, for example with ImageMagick: "
            f"magick {name} mask-%d.png"
        )


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
            elif kind == "mask":
                areas[k] = int(to_binary_mask(shape, height, width, name).sum())
            else:
                x0, y0, x1, y1 = _box_pixels(shape, width, height, name)
                areas[k] = (x1 - x0) * (y1 - y0)
        except RegionError as error:
            areas[k] = error
    runs, lengths, damaged = run_lengths(list(texts.values()))
    totals, areas_of = np.zeros((2, len(lengths)), np.int64)
    filled = np.flatnonzero(lengths)
    if len(filled):
        starts = (np.cumsum(lengths) - lengths)[filled]
        totals[filled] = np.add.reduceat(runs, starts)
        if runs.min() < 0:
            damaged[filled] |= np.minimum.reduceat(runs, starts) < 0
        runs[1::2] *= -1
        balance = np.add.reduceat(runs, starts) * np.where(starts % 2, -1, 1)  # outside minus inside
        areas_of[filled] = (totals[filled] - balance) // 2
    for position, k in enumerate(texts):
        width, height = sizes[k]
        if damaged[position] or totals[position] != width * height:
            areas[k] = _damaged(_shape_of(annotations[k], k)[0], width, height)
        else:
            areas[k] = int(areas_of[position])
    return areas


def _shape_of(annotation: dict, index: int | str) -> tuple[str, str, Any]:
    """The name for messages, the kind ("rle", "polygons", "mask", "bbox") and the value of an annotation's shape."""
    own = annotation.get("id", index)
    name = f"region {own[:60] if isinstance(own, str) else _shown(own)}"
    shape = annotation.get("segmentation")
    if isinstance(shape, (np.ndarray, torch.Tensor, Image.Image)):
        return name, "mask", shape
    if isinstance(shape, (list, tuple, dict)) and shape:
        return name, "rle" if isinstance(shape, dict) else "polygons", shape
    if shape is not None and not isinstance(shape, (list, tuple, dict)):
        raise RegionError(f"{name}: `segmentation` must be an RLE or polygons, got {_shown(shape)}.")
    if annotation.get("bbox") is None:
        raise RegionError(f"{name}: needs `segmentation` (RLE or polygons) or `bbox` [x, y, width, height].")
    return name, "bbox", annotation["bbox"]


def _from_annotation(annotation: dict, width: int, height: int, index: int | str) -> Region:
    name, kind, shape = _shape_of(annotation, index)
    reader = {"rle": _from_rle, "polygons": _from_polygons, "mask": _from_mask, "bbox": _from_box}[kind]
    mask = reader(shape, width, height, name)
    return Region(annotation.get("id", index), to_binary_mask(mask, height, width, name))


def _numbers(values: Any, name: str) -> np.ndarray:
    """An array of numbers that are finite, and small enough to be counted with."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except OverflowError:
        raise RegionError(f"{name}: holds a number that is too large.") from None
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: of torch's tensors
        raise RegionError(f"{name}: expected numbers, got {_shown(values)}.") from None
    largest = np.abs(array).max(initial=0)
    if not np.isfinite(largest):
        raise RegionError(f"{name}: holds NaN or infinite values.")
    if largest > _TOO_LARGE:
        raise RegionError(f"{name}: holds a number that is too large.")
    return array


def _shown(value: Any) -> str:
    try:
        return _BRIEF.repr(value)[:60]
    except Exception:  # an integer of more digits than Python writes
        return type(value).__name__


def _box_pixels(box: Any, width: int, height: int, name: str) -> tuple[int, int, int, int]:
    """Columns and rows x0, y0, x1, y1 (x1, y1 excluded) of the pixels that the box touches inside the image.

    An edge within a thousandth of a pixel of a whole number is whole: float32 is not more exact.
    """
    array = _numbers(box, name)
    if array.shape != (4,):
        raise RegionError(f"{name}: a box is [x, y, width, height], got {_shown(box)}.")
    x, y, w, h = array.tolist()
    given = "[" + ", ".join(f"{side:.6g}" for side in (x, y, w, h)) + "]"
    if w <= 0 or h <= 0:
        raise RegionError(f"{name}: the box {given} has no area; it is [x, y, width, height], not two corners.")
    if min(w, h) < 1 - _TOLERANCE or (max(x + w, y + h) <= 1 and max(width, height) > 1):
        pixels = f"{x * width:.6g},{y * height:.6g},{w * width:.6g},{h * height:.6g}"
        raise RegionError(
            f"{name}: the box {given} is smaller than a pixel; pixels are expected, not fractions of the image. As "
            f"fractions it would be {pixels} in pixels."
        )
    if (x + w > width + 1 or y + h > height + 1) and 0 <= x < w <= width and 0 <= y < h <= height:
        raise RegionError(
            f"{name}: the box {given} leaves the image of {width} x {height} as [x, y, width, height], and fits as "
            f"two corners. As corners it would be {x:.6g},{y:.6g},{w - x:.6g},{h - y:.6g}."
        )
    edges = [x, y, x + w, y + h]
    x, y, right, bottom = (round(edge) if abs(edge - round(edge)) <= _TOLERANCE else edge for edge in edges)
    x0, y0 = max(0, math.floor(x)), max(0, math.floor(y))
    x1, y1 = min(width, math.ceil(right)), min(height, math.ceil(bottom))
    if x1 <= x0 or y1 <= y0:
        raise RegionError(f"{name}: the box {given} lies outside the image of {width} x {height}.")
    return x0, y0, x1, y1


def _from_box(box: Any, width: int, height: int, name: str) -> np.ndarray:
    x0, y0, x1, y1 = _box_pixels(box, width, height, name)
    mask = np.zeros((height, width), dtype=bool)
    mask[y0:y1, x0:x1] = 1
    return mask


def _polygon_rle(polygons: Any, width: int, height: int, name: str) -> dict:
    if all(_is_number(value) for value in polygons):  # the only ring
        polygons = [polygons]
    rings = [_numbers(ring, name) for ring in polygons]
    if len(rings) > 2 and all(ring.shape == (2,) for ring in rings):  # the points of the only ring
        rings = [np.concatenate(rings)]
    elif len(rings) == 1 and rings[0].ndim == 2 and rings[0].shape[1] == 2:
        rings = [rings[0].ravel()]
    if any(ring.ndim != 1 or len(ring) % 2 for ring in rings):
        raise RegionError(  # several rings of points may be GeoJSON, where all but the first are holes
            f"{name}: polygons are a list of rings [[x0, y0, x1, y1, ...], ...], in each ring x and y of all points "
            f"in turn, without brackets around points; got {_shown(polygons)}."
        )
    if not rings or any(len(ring) < 6 for ring in rings):
        raise RegionError(f"{name}: a ring of a polygon has at least three points x, y; got {_shown(polygons)}.")
    if max(np.abs(ring).max() for ring in rings) > 16 * max(width, height):
        raise RegionError(f"{name}: the polygon lies far outside the image of {width} x {height} pixels.")
    if max(ring.max() for ring in rings) <= 1 < max(width, height):
        raise RegionError(
            f"{name}: the polygon lies within the first pixel; pixels are expected, not fractions of the image."
        )
    check_outline(rings, name)
    shapes = coco_mask.frPyObjects([ring.tolist() for ring in rings], height, width)
    while len(shapes) > _MERGED:  # each merge reads all of what was merged before
        shapes = [coco_mask.merge(shapes[k : k + _MERGED]) for k in range(0, len(shapes), _MERGED)]
    return coco_mask.merge(shapes)


def _from_polygons(polygons: Any, width: int, height: int, name: str) -> np.ndarray:
    return coco_mask.decode(_polygon_rle(polygons, width, height, name)).astype(bool)


def _from_rle(rle: dict, width: int, height: int, name: str) -> np.ndarray:
    """Decode COCO's run lengths, compressed or not. Not by pycocotools, which reads past the end of a damaged RLE."""
    runs = _rle_counts(rle, width, height, name)
    if isinstance(runs, bytes):
        runs, _, damaged = run_lengths([runs])
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
    size = list(rle["size"]) if isinstance(rle.get("size"), (list, tuple, np.ndarray)) else []
    if size != [height, width] and _numbers(size, name).tolist() != [height, width]:
        raise RegionError(
            f"{name}: the RLE is for size {_shown(size)} (height, width), the image has {[height, width]}."
        )
    counts = rle["counts"]
    if isinstance(counts, (bytes, str)):
        return counts if isinstance(counts, bytes) else counts.encode("latin-1", "replace")
    array = _numbers(counts, name)
    if array.ndim != 1 or (array % 1).any():
        raise _damaged(name, width, height)
    return array.astype(np.int64)


def _checked(runs: np.ndarray, width: int, height: int, name: str) -> np.ndarray:
    pixels = height * width  # the longest run first: a sum of longer ones might overflow
    if not len(runs) or runs.min() < 0 or runs.max() > pixels or runs.sum() != pixels:
        raise _damaged(name, width, height)
    return runs


def _damaged(name: str, width: int, height: int) -> RegionError:
    return RegionError(
        f"{name}: the RLE is damaged; its runs do not add up to the {height * width} pixels of its size."
    )


def probe_image() -> tuple[Image.Image, list[Region]]:
    """Return a small grey image with one region, to test an engine and its settings before the work."""
    image = Image.new("RGB", (32, 32), (128, 128, 128))
    return image, [parse_region([4, 4, 24, 24], *image.size)]
