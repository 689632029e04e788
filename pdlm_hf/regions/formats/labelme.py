"""LabelMe's JSON files."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors_pdlm import NoRegionsError, RegionError
from ..files import load_json
from ..region import MASK_PIXELS, parse_region
from ..rle import encode
from .facts import ImageFacts
from .geometry import ellipse, pasted, rectangle


def from_labelme(
    source: str | Path | dict[str, Any], name: str | None = None, image: ImageFacts | None = None
) -> list[dict[str, Any]]:
    """Convert a LabelMe file: polygons, rectangles (two corners, or four points), circles and masks. Shapes of the
    same label and group become one region.

    Args:
        source: path of the file, or its content.
        name (`str`, *optional*): the name in messages.
        image (`ImageFacts`, *optional*): the image; `imageWidth`, `imageHeight` and `imagePath` are compared with it.

    Returns:
        regions with "id" (the position), "segmentation" and "category" (the label).

    Raises:
        DataError: the file does not exist or is not valid JSON.
        RegionError: it is not a LabelMe file, has no shapes, states another image, or a shape has no area (points,
            lines).
    """
    data = source if isinstance(source, dict) else load_json(Path(source))
    name = name or ("LabelMe" if isinstance(source, dict) else str(source))
    shapes = data.get("shapes") if isinstance(data, dict) else None
    if not isinstance(shapes, list):
        raise RegionError(f"{name}: has no `shapes`; expected a LabelMe file with at least one.")
    if image is not None:
        image.check_name(name, data.get("imagePath"))
        image.check_size(name, data.get("imageWidth"), data.get("imageHeight"))
    if not shapes:
        raise NoRegionsError(f"{name}: holds no regions, its `shapes` are empty.")
    regions: list[dict[str, Any]] = []
    groups: dict[tuple, int] = {}
    for number, shape in enumerate(shapes):
        where = f"{name}: shapes[{number}]"
        if not isinstance(shape, dict):
            raise RegionError(f"{where}: expected an object with `points`, got {shape!r:.60}.")
        is_mask = shape.get("shape_type") == "mask"
        found = encode(_mask(shape, _size(data, image, name), where)) if is_mask else [_polygon(shape, where)]
        part = {"id": len(regions), "segmentation": found, "category": shape.get("label")}
        group = None if shape.get("group_id") is None else (str(shape.get("label")), str(shape["group_id"]))
        if group in groups:
            place = groups[group]
            regions[place] = _joined(regions[place], part, lambda: _size(data, image, name))
            continue
        if group is not None:
            groups[group] = len(regions)
        regions.append(part)
    return regions


def _size(data: dict, image: ImageFacts | None, name: str) -> ImageFacts:
    """The size of the image that masks are made for. Raises: RegionError if what the file states is none."""
    if image is not None:
        return image
    width, height = data.get("imageWidth"), data.get("imageHeight")
    sides = [side for side in (width, height) if type(side) is int and side > 0]
    if len(sides) < 2 or sides[0] * sides[1] > MASK_PIXELS:
        raise RegionError(f"{name}: states an image of {width!s:.20} x {height!s:.20} pixels.")
    return ImageFacts(str(data.get("imagePath")), *sides)


def _joined(first: dict, second: dict, size: Any) -> dict:
    """Join two parts of a region: their polygons, or the union of their masks."""
    one, other = first["segmentation"], second["segmentation"]
    if isinstance(one, list) and isinstance(other, list):
        return {**first, "segmentation": one + other}
    masks = [parse_region(part, *size().size).mask for part in (first, second)]
    return {**first, "segmentation": encode(masks[0] | masks[1])}


def _points(shape: dict, where: str) -> np.ndarray:
    """The points of a shape, `(N, 2)`."""
    try:
        points = np.asarray(shape["points"], dtype=float)
    except (KeyError, TypeError, ValueError, OverflowError):
        points = np.zeros(0)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise RegionError(f"{where}: `points` must be a list of [x, y], got {shape.get('points')!r:.60}.")
    return points


def _polygon(shape: dict, where: str) -> list[float]:
    points, kind = _points(shape, where), shape.get("shape_type") or "polygon"
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points.tolist()
        return rectangle([x0, y0, x1 - x0, y1 - y0])
    if kind == "circle" and len(points) == 2:
        radius = float(np.linalg.norm(points[1] - points[0]))
        return ellipse([*points[0].tolist(), radius, radius])
    if kind in ("polygon", "rectangle", "oriented_rectangle") and len(points) >= 3:
        return points.ravel().tolist()
    raise RegionError(
        f"{where}: a {kind} of {len(points)} points has no area; a region is a polygon, rectangle, circle or mask."
    )


def _mask(shape: dict, image: ImageFacts, where: str) -> np.ndarray:
    """The mask `(H, W)` of the whole image. LabelMe stores a crop, whose corner is the first of two points."""
    points = _points(shape, where)
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"])), formats=("PNG",)) as part:
            if part.width > image.width or part.height > image.height:  # before it is decoded
                raise ValueError(f"{part.width} x {part.height} pixels, more than the image")
            pixels = np.asarray(part.convert("L") if len(part.getbands()) > 1 else part) > 0
        x, y = points[0].round().astype(int).tolist()
    except (KeyError, TypeError, ValueError, IndexError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise RegionError(f"{where}: the mask cannot be read ({type(error).__name__}: {error}).") from None
    return pasted(pixels, x, y, image, where)
