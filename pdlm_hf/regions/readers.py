"""Convert regions of other tools to a form that [`~pdlm_hf.regions.parse_regions`] reads.

`captioner.caption(image, from_supervision(detections))`, and likewise [`from_sam`], [`from_labelme`], [`from_yolo`],
[`from_label_map`] and [`from_panoptic`]. [`read_region_file`] reads the files of all of them.
"""

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors_pdlm import RegionError
from .coco import regions_in
from .files import load_json
from .images import open_image
from .region import Region, parse_region

_IMAGES = {".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}  # lossless formats, which keep labels intact
_CIRCLE = 64  # corners of the polygon that replaces a circle


def read_region_file(path: Path, image_name: str, width: int, height: int) -> list[Any]:
    """Read the regions of one image from a file: COCO, a list of regions, LabelMe (.json), YOLO (.txt), a label map
    (.png).

    Args:
        path (`Path`): the file; its ending decides how it is read.
        image_name (`str`): name of the image in a COCO file.
        width, height (`int`): of the image, in pixels.

    Raises:
        DataError: the file does not exist or is not valid JSON.
        ImageError: the label map cannot be opened.
        RegionError: the file is of no known form, or holds no regions for the image.
    """
    ending = path.suffix.lower()
    if ending == ".txt":
        return from_yolo(path, width, height)
    if ending in _IMAGES:
        return from_label_map(path)
    if ending in (".jpg", ".jpeg"):
        raise RegionError(f"{path}: JPEG changes the labels; save the label map as PNG, or give a mask with --mask.")
    data = load_json(path)
    if isinstance(data, dict) and isinstance(data.get("shapes"), list):
        return from_labelme(data, str(path))
    return regions_in(data, path, image_name)


def from_supervision(detections: Any) -> list[Any]:
    """Convert `supervision.Detections`: their masks, or their boxes if they have no masks. The ids are the tracker's
    ids, or else the positions.

    Args:
        detections (`supervision.Detections`): any number of detections.
    """
    ids = range(len(detections)) if detections.tracker_id is None else [int(k) for k in detections.tracker_id]
    if detections.mask is not None:
        return [Region(k, np.asarray(mask, dtype=bool)) for k, mask in zip(ids, detections.mask, strict=True)]
    corners = np.asarray(detections.xyxy, dtype=float).tolist()
    return [{"id": k, "bbox": [x0, y0, x1 - x0, y1 - y0]} for k, (x0, y0, x1, y1) in zip(ids, corners, strict=True)]


def from_sam(masks: Any) -> list[Any]:
    """Convert the output of a SAM model of any version.

    Args:
        masks: the dicts of the automatic mask generator ("segmentation" is a mask or RLE); or masks as an array or
            tensor of shape `(N, H, W)` or `(N, 1, H, W)`, bool or logits (above 0 is inside).

    Raises:
        RegionError: there are several masks for each prompt, or the array has another shape.
    """
    if isinstance(masks, (list, tuple)) and masks and isinstance(masks[0], dict):
        shapes = [mask.get("segmentation") for mask in masks]
        return [
            {"id": k, "segmentation": shape} if isinstance(shape, dict) else Region(k, np.asarray(shape, dtype=bool))
            for k, shape in enumerate(shapes)
        ]
    array = masks.detach().cpu().float().numpy() if isinstance(masks, torch.Tensor) else np.asarray(masks)
    if array.ndim == 4 and array.shape[1] > 1:
        raise RegionError(
            f"SAM: {array.shape[1]} masks for each prompt, shape {array.shape}; choose one of them, masks[:, 0] or "
            "the one with the best score."
        )
    if array.ndim not in (3, 4):
        raise RegionError(f"SAM: expected masks of shape (N, H, W) or (N, 1, H, W), got {array.shape}.")
    return [Region(k, mask > 0) for k, mask in enumerate(array.reshape(-1, *array.shape[-2:]))]


def from_labelme(source: str | Path | dict[str, Any], name: str | None = None) -> list[Any]:
    """Convert a LabelMe file: polygons, rectangles, circles and masks. Shapes of the same label and group become one
    region. The ids are positions; "category" is the label (not for masks).

    Args:
        source: path of the file, or its content.
        name (`str`, *optional*): the name in messages.

    Raises:
        DataError: the file does not exist or is not valid JSON.
        RegionError: it is not a LabelMe file, or a shape has no area (points, lines).
    """
    data = source if isinstance(source, dict) else load_json(Path(source))
    name = name or ("LabelMe" if isinstance(source, dict) else str(source))
    shapes = data.get("shapes") if isinstance(data, dict) else None
    if not isinstance(shapes, list) or not shapes:
        raise RegionError(f"{name}: has no `shapes`; expected a LabelMe file with at least one.")
    regions: list[Any] = []
    groups: dict[tuple, int] = {}
    part: Region | dict[str, Any]
    for number, shape in enumerate(shapes):
        where = f"{name}: shapes[{number}]"
        if not isinstance(shape, dict):
            raise RegionError(f"{where}: expected an object with `points`, got {shape!r:.60}.")
        if shape.get("shape_type") == "mask":
            part = Region(len(regions), _labelme_mask(shape, data, where))
        else:
            polygon = _labelme_polygon(shape, where)
            part = {"id": len(regions), "segmentation": [polygon], "category": shape.get("label")}
        group = None if shape.get("group_id") is None else (str(shape.get("label")), str(shape["group_id"]))
        if group in groups:
            place = groups[group]
            regions[place] = _joined(regions[place], part, data)
            continue
        regions.append(part)
        if group is not None:
            groups[group] = len(regions) - 1
    return regions


def _joined(first: Any, second: Any, data: dict) -> Any:
    """Join two parts of a region: their polygons, or the union of their masks."""
    if isinstance(first, dict) and isinstance(second, dict):
        return {**first, "segmentation": first["segmentation"] + second["segmentation"]}
    size = int(data["imageWidth"]), int(data["imageHeight"])
    masks = [part.mask if isinstance(part, Region) else parse_region(part, *size).mask for part in (first, second)]
    return Region(first.id if isinstance(first, Region) else first["id"], masks[0] | masks[1])


def _points(shape: dict, where: str) -> np.ndarray:
    """The points of a shape, `(N, 2)`."""
    try:
        points = np.asarray(shape["points"], dtype=float)
    except (KeyError, TypeError, ValueError):
        points = np.zeros(0)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise RegionError(f"{where}: `points` must be a list of [x, y], got {shape.get('points')!r:.60}.")
    return points


def _labelme_polygon(shape: dict, where: str) -> list[float]:
    points, kind = _points(shape, where), shape.get("shape_type", "polygon")
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points.tolist()
        return [x0, y0, x1, y0, x1, y1, x0, y1]
    if kind == "circle" and len(points) == 2:
        turns = 2 * math.pi * np.arange(_CIRCLE) / _CIRCLE
        radius = np.linalg.norm(points[1] - points[0])
        return (points[0] + radius * np.stack([np.cos(turns), np.sin(turns)], 1)).ravel().tolist()
    if kind in ("polygon", "rectangle") and len(points) >= 3:
        return points.ravel().tolist()
    raise RegionError(
        f"{where}: a {kind} of {len(points)} points has no area; a region is a polygon, rectangle, circle or mask."
    )


def _labelme_mask(shape: dict, data: dict, where: str) -> np.ndarray:
    """The mask `(H, W)` of the whole image. LabelMe stores a crop, whose corner is the first of two points."""
    points = _points(shape, where)
    try:
        size = (int(data["imageHeight"]), int(data["imageWidth"]))
        part = np.asarray(Image.open(io.BytesIO(base64.b64decode(shape["mask"])), formats=("PNG",))) > 0
        x, y = points[0].astype(int).tolist()
        mask = np.zeros(size, dtype=bool)
        mask[y : y + part.shape[0], x : x + part.shape[1]] = part
    except (KeyError, TypeError, ValueError, IndexError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise RegionError(f"{where}: the mask cannot be read ({type(error).__name__}: {error}).") from None
    return mask


def from_yolo(path: str | Path, width: int, height: int) -> list[dict[str, Any]]:
    """Read a YOLO label file. A line is `class x y w h` with the centre of a box (and perhaps a confidence), or
    `class x0 y0 x1 y1 x2 y2 ...` with a polygon, in fractions of the image. The ids are positions; "category" is the
    class.

    Args:
        path: the file.
        width, height (`int`): size of the image in pixels.

    Raises:
        RegionError: the file does not exist, or a line is neither a box nor a polygon; the message has its number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise RegionError(f"{path}: no such file.") from None
    except UnicodeDecodeError:
        raise RegionError(f"{path}: not a text file.") from None
    regions: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            kind, *values = line.split()
            numbers = np.asarray([float(value) for value in values])
        except ValueError:
            numbers = np.asarray([math.nan])
        count = len(numbers)
        if not np.isfinite(numbers).all() or count < 4 or (count > 5 and count % 2):
            raise RegionError(f"{path}: line {number}: expected `class x y w h` or a polygon, got {line!r:.60}.")
        if numbers[:4].max() > 1.5:
            raise RegionError(f"{path}: line {number}: expected fractions of the image, got {line!r:.60} (pixels?).")
        region: dict[str, Any] = {"id": len(regions), "category": kind}
        if count <= 5:
            x, y, w, h = (numbers[:4] * [width, height, width, height]).tolist()
            region["bbox"] = [x - w / 2, y - h / 2, w, h]
        else:
            region["segmentation"] = [(numbers.reshape(-1, 2) * [width, height]).ravel().tolist()]
        regions.append(region)
    if not regions:
        raise RegionError(f"{path}: holds no regions.")
    return regions


def from_label_map(source: Any) -> list[Region]:
    """Convert a label map: an image in which every region has its own value, and 0 is no region. The ids are the
    values; of colours they are R + 256 G + 65536 B, as in COCO's panoptic images.

    Args:
        source: path, PIL image, or array of integers `(H, W)` or `(H, W, 3)`.

    Raises:
        ImageError: the file cannot be opened.
        RegionError: the map has transparency or fractions, or no region.
    """
    name = str(source) if isinstance(source, (str, Path)) else "label map"
    labels = _labels(source, name)
    regions = [Region(int(value), labels == value) for value in np.unique(labels) if value]
    if not regions:
        raise RegionError(f"{name}: holds no regions; every pixel is 0.")
    return regions


def from_panoptic(path: str | Path, segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Read the regions of one image of a COCO panoptic file.

    Args:
        path: the PNG file of the annotation, whose colours are the ids of the segments.
        segments (`list[dict]`): `segments_info` of the annotation.

    Returns:
        the segments with their RLE as "segmentation", without those that have no pixel.

    Raises:
        ImageError: the PNG file cannot be opened.
        RegionError: the PNG file has transparency, or a segment has no id.
    """
    labels = _labels(path, str(path))
    if not all(isinstance(segment, dict) and "id" in segment for segment in segments):
        raise RegionError(f"{path}: each of `segments_info` must be an object with an `id`.")
    masks = [labels == segment["id"] for segment in segments]
    return [
        {**segment, "segmentation": Region(segment["id"], mask).segmentation}
        for segment, mask in zip(segments, masks, strict=True)
        if mask.any()
    ]


def _labels(source: Any, name: str) -> np.ndarray:
    """Labels (H, W) of an image or array; colours as R + 256 G + 65536 B."""
    labels = np.asarray(open_image(source) if isinstance(source, (str, Path)) else source)
    if labels.ndim == 3 and labels.shape[2] == 3:
        labels = labels.astype(np.int64) @ [1, 256, 65536]
    if labels.ndim != 2 or labels.dtype.kind not in "biu":
        raise RegionError(
            f"{name}: a label map has integers of shape (H, W) or colours (H, W, 3), got {labels.dtype} "
            f"{labels.shape}."
        )
    return labels
