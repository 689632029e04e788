"""JSON files of the VGG Image Annotator (VIA), versions 1 and 2: projects and annotations."""

import math
from typing import Any

from ...errors_pdlm import NoRegionsError, RegionError
from .facts import ImageFacts
from .geometry import ellipse, number


def is_via(data: Any) -> bool:
    """Whether a JSON value is a VIA project, or the annotations of one: objects with `filename` and `regions`."""
    if not isinstance(data, dict):
        return False
    entries = data.get("_via_img_metadata", data)
    return (
        "_via_img_metadata" in data
        or bool(entries)
        and all(isinstance(entry, dict) and {"filename", "regions"} <= entry.keys() for entry in entries.values())
    )


def from_via(data: dict[str, Any], name: str, image: ImageFacts, resaved: bool = False) -> list[dict[str, Any]]:
    """Read the regions of one image: `rect`, `polygon`, `circle` and `ellipse`.

    Args:
        data (`dict`): the content of the file.
        name (`str`): the file, for messages.
        image (`ImageFacts`): the image; `filename` and `size`, the bytes of its file, are compared with it.
        resaved (`bool`): the file of the image has been written anew since, so that the bytes differ.

    Returns:
        regions with "id" (the position), "bbox" or "segmentation", and "category" if the regions have one attribute.

    Raises:
        RegionError: the file has no such image, its bytes differ, it has no regions, or one has no area.
    """
    entries = data.get("_via_img_metadata", data) if isinstance(data, dict) else None
    entries = list(entries.values()) if isinstance(entries, dict) else [None]
    if not all(isinstance(entry, dict) for entry in entries):
        raise RegionError(f"{name}: expected a project of VIA 2, images as objects with `filename` and `regions`.")
    entry = entries[image.choose(name, [entry.get("filename") for entry in entries])]
    where = f"{name}: {entry['filename']}"
    stated = entry.get("size", -1)
    if not resaved and image.num_bytes is not None and isinstance(stated, int) and stated not in (-1, image.num_bytes):
        raise RegionError(
            f"{where}: states a file of {stated} bytes, the image has {image.num_bytes}: it is another, or of another "
            "size. If it has only been saved anew, with the same width and height: --format via-resaved"
        )
    regions = entry.get("regions")
    regions = list(regions.values()) if isinstance(regions, dict) else regions
    if not isinstance(regions, list) or not regions:
        raise NoRegionsError(f"{where}: holds no regions.")
    found = []
    for position, region in enumerate(regions):
        shape = region.get("shape_attributes") if isinstance(region, dict) else None
        if not isinstance(shape, dict):
            raise RegionError(f"{where}: regions[{position}]: has no `shape_attributes`, got {region!r:.60}.")
        attributes = region.get("region_attributes")
        named = list(attributes.values()) if isinstance(attributes, dict) else []
        category = {"category": named[0]} if len(named) == 1 and isinstance(named[0], str) else {}
        found.append({"id": position, **_shape(shape, f"{where}: regions[{position}]"), **category})
    return found


def _shape(shape: dict[str, Any], where: str) -> dict[str, Any]:
    kind = shape.get("name")

    def of(*keys: str) -> list[float]:
        return [number(shape.get(key), f"{where}.{key}") for key in keys]

    if kind == "rect":
        return {"bbox": of("x", "y", "width", "height")}
    if kind == "circle":
        x, y, radius = of("cx", "cy", "r")
        return {"segmentation": [ellipse([x, y, radius, radius])]}
    if kind == "ellipse":
        degrees = number(shape.get("theta", 0), f"{where}.theta") * 180 / math.pi
        return {"segmentation": [ellipse(of("cx", "cy", "rx", "ry"), degrees)]}
    xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
    if kind == "polygon" and isinstance(xs, list) and isinstance(ys, list) and len(xs) == len(ys) >= 3:
        points = zip(xs, ys, strict=True)
        return {"segmentation": [[number(value, where) for point in points for value in point]]}
    raise RegionError(
        f"{where}: a {kind!s:.20} has no area, or its points are not numbers; a region is a rect, polygon, circle or "
        "ellipse."
    )
