"""Regions of an image from a JSON file: a COCO file, or a list of regions."""

from pathlib import Path
from typing import Any

from ..errors_pdlm import RegionError
from .files import load_json


def is_coco(data: Any) -> bool:
    """Whether a JSON value has the two lists of a COCO file."""
    return isinstance(data, dict) and all(isinstance(data.get(key), list) for key in ("images", "annotations"))


def read_regions(path: Path, image_name: str) -> list[dict[str, Any]]:
    """Annotations of one image.

    Args:
        path (`Path`): a COCO file, or a list of regions, or `{"regions": [...]}`.
        image_name (`str`): image to look up in a COCO file, by file name; not needed if the file has one image.

    Raises:
        RegionError: not JSON, cut short, no such image, or no regions for it.
    """
    return regions_in(load_json(path), path, image_name)


def regions_in(data: Any, path: Path, image_name: str) -> list[dict[str, Any]]:
    """As [`read_regions`], from what the file holds."""
    if is_coco(data):
        try:
            regions = _of_image(data, path, image_name)
        except (AttributeError, KeyError, TypeError):  # its parts are not what COCO says
            regions = None
    elif isinstance(data, dict):
        regions = data.get("regions", data.get("annotations"))
    else:
        regions = data
    if not isinstance(regions, list) or not all(isinstance(region, dict) for region in regions):
        raise RegionError(f"{path}: expected a COCO file or a list of regions with `segmentation` or `bbox`.")
    if not regions:
        raise RegionError(f"{path}: holds no regions for {image_name}.")
    return regions


def _of_image(data: dict[str, Any], path: Path, image_name: str) -> list[dict[str, Any]]:
    images = data["images"]
    matching = [image for image in images if Path(str(image.get("file_name", ""))).name == Path(image_name).name]
    if not matching and len(images) == 1:
        matching = images
    if len(matching) != 1:
        raise RegionError(f"{path}: has {len(images)} images, {len(matching)} of them named {Path(image_name).name}.")
    return [a for a in data["annotations"] if a.get("image_id") == matching[0]["id"]]
