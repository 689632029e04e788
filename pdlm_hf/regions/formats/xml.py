"""Annotations in XML: CVAT for images, the boxes of PASCAL VOC, and the polygons of LabelMe's older files."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from ...errors_pdlm import RegionError
from ..rle import encode
from .facts import ImageFacts, note
from .geometry import ellipse, number, pasted, rectangle

_VOC = ("xmin", "ymin", "xmax", "ymax")
_FROM_ZERO = ("Unknown", "MyDatabase")  # as labelImg and Label Studio write as the source; corners from 0


def read_xml(path: Path) -> Element:
    """The root of an XML file.

    Raises:
        RegionError: the file does not exist, is not valid XML, or declares entities, by which a small file can grow to
            any size.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise RegionError(f"{path}: declares a document type or entities, which no annotation needs; not read.")
        return ElementTree.fromstring(text)
    except FileNotFoundError:
        raise RegionError(f"{path}: no such file.") from None
    except (ElementTree.ParseError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, RegionError):
            raise
        raise RegionError(f"{path}: not valid XML, perhaps cut short ({error}).") from None


def _attribute(element: Element, key: str, where: str) -> float:
    return number(element.get(key), f"{where}.{key}")


def from_cvat(root: Element, name: str, image: ImageFacts) -> list[dict[str, Any]]:
    """Read the regions of one image of "CVAT for images 1.1": `box` and `ellipse` (also turned), `polygon`, `mask`.

    Args:
        root (`Element`): `<annotations>`.
        name (`str`): the file, for messages.
        image (`ImageFacts`): the image; name, width and height of `<image>` are compared with it.

    Returns:
        regions with "id" (the position), "category" (the label), "bbox" or "segmentation".

    Raises:
        RegionError: the file has no such image, states another size, or a shape has no area (points, lines).
    """
    if root.find("track") is not None:
        raise RegionError(f'{name}: is "CVAT for video"; export the task as "CVAT for images".')
    images = root.findall("image")
    chosen = images[image.choose(name, [element.get("name") for element in images])]
    where = f"{name}: image {chosen.get('id')} ({chosen.get('name')})"
    sides = [_attribute(chosen, key, where) for key in ("width", "height") if chosen.get(key) is not None]
    if len(sides) == 2:
        image.check_size(where, *(int(side) if side.is_integer() else side for side in sides))
    found: list[dict[str, Any]] = []
    for shape in chosen:
        if shape.tag != "tag":  # a label of the whole image
            place = f"{where}: {shape.tag} {len(found)}"
            found.append({"id": len(found), "category": shape.get("label"), **_cvat_shape(shape, place, image)})
    if not found:
        raise RegionError(f"{where}: holds no regions.")
    return found


def _cvat_shape(shape: Element, where: str, image: ImageFacts) -> dict[str, Any]:
    def of(*keys: str) -> list[float]:
        return [_attribute(shape, key, where) for key in keys]

    degrees = number(shape.get("rotation", "0"), f"{where}.rotation")
    if shape.tag == "box":
        x0, y0, x1, y1 = of("xtl", "ytl", "xbr", "ybr")
        if degrees:
            return {"segmentation": [rectangle([x0, y0, x1 - x0, y1 - y0], degrees)]}
        return {"bbox": [x0, y0, x1 - x0, y1 - y0]}
    if shape.tag == "ellipse":
        return {"segmentation": [ellipse(of("cx", "cy", "rx", "ry"), degrees)]}
    if shape.tag == "polygon":
        points = [point.split(",") for point in shape.get("points", "").split(";")]
        if len(points) < 3 or any(len(point) != 2 for point in points):
            raise RegionError(f"{where}: expected points x,y;x,y;..., got {shape.get('points')!r:.60}.")
        return {"segmentation": [[number(value, where) for point in points for value in point]]}
    if shape.tag == "mask":
        left, top, width, height = (int(value) for value in of("left", "top", "width", "height"))
        runs = [int(number(run, f"{where}.rle", 0, 2**31)) for run in shape.get("rle", "").split(",")]
        if min(width, height) < 1 or sum(runs) != width * height or width > image.width or height > image.height:
            raise RegionError(f"{where}: the runs of `rle` do not add up to {width} x {height} pixels of the image.")
        part = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
        return {"segmentation": encode(pasted(part, left, top, image, where))}
    raise RegionError(f"{where}: a {shape.tag} has no area; a region is a box, polygon, ellipse or mask.")


def from_voc(root: Element, name: str, image: ImageFacts, corners: bool | None = None) -> list[dict[str, Any]]:
    """Read the boxes of a PASCAL VOC file. PASCAL VOC counts pixels from 1, and xmax, ymax are the last pixels of the
    box. Other tools write corners from 0; that is recognised by a 0, by fractions in a file that is not VOC's own, or
    by the source that labelImg writes.

    Args:
        root (`Element`): `<annotation>`.
        name (`str`): the file, for messages.
        image (`ImageFacts`): the image; `filename` and `size` are compared with it.
        corners (`bool`, *optional*): whether the numbers are corners from 0; default: by the file.

    Returns:
        regions with "id" (the position), "category" (the name of the object) and "bbox".

    Raises:
        RegionError: the file is about another image, or an object has no box within the image.
    """
    image.check_name(name, root.findtext("filename"))
    sides = [number(text, f"{name}: {key}") for key in ("width", "height") if (text := root.findtext(f"size/{key}"))]
    if len(sides) == 2 and any(sides):  # some tools write 0
        image.check_size(name, *(int(side) if side.is_integer() else side for side in sides))
    objects = root.findall("object")
    if not objects:
        raise RegionError(f"{name}: holds no regions, no `object`.")
    texts = [[item.findtext(f"bndbox/{key}") for key in _VOC] for item in objects]
    boxes = np.array([
        [number(text, f"{name}: object {k}: {key}") for key, text in zip(_VOC, found, strict=True)]
        for k, found in enumerate(texts)
    ])  # fmt: skip
    if corners is None:
        source = root.findtext("source/database") or ""
        written = any("." in text for found in texts for text in found if text) and "VOC" not in source
        corners = bool((boxes[:, :2] < 1).any() or written or source in _FROM_ZERO)
        if not corners:
            note("voc", f"{name}: boxes count pixels from 1, as in PASCAL VOC; corners from 0: --format voc-corners")
    elif not corners and (boxes[:, :2] < 1).any():
        raise RegionError(f"{name}: has a corner at 0; PASCAL VOC counts from 1. Corners from 0: --format voc-corners")
    if not corners:
        boxes[:, :2] -= 1
    regions = []
    for k, (item, (x0, y0, x1, y1)) in enumerate(zip(objects, boxes.tolist(), strict=True)):
        if min(x0, y0) < 0 or x1 > image.width or y1 > image.height:
            raise RegionError(
                f"{name}: object {k} ({item.findtext('name')}): the box {texts[k]} leaves the image of {image.width} "
                f"x {image.height} pixels."
            )
        regions.append({"id": k, "category": item.findtext("name"), "bbox": [x0, y0, x1 - x0, y1 - y0]})
    return regions


def from_labelme_xml(root: Element, name: str, image: ImageFacts) -> list[dict[str, Any]]:
    """Read the polygons of LabelMe on the web, which CVAT and Datumaro write too. Deleted objects are left out.

    Args:
        root (`Element`): `<annotation>`.
        name (`str`): the file, for messages.
        image (`ImageFacts`): the image; `filename` and `imagesize` are compared with it.

    Returns:
        regions with "id" (the position), "category" (the name of the object) and "segmentation".

    Raises:
        RegionError: the file is about another image, or an object is no polygon: a mask in a file of its own, a line.
    """
    image.check_name(name, root.findtext("filename"))
    sides = [root.findtext(f"imagesize/{key}") for key in ("ncols", "nrows")]
    if all(sides):
        image.check_size(name, *(int(number(side, f"{name}: imagesize")) for side in sides))
    regions: list[dict[str, Any]] = []
    kept = [item for item in root.findall("object") if item.findtext("deleted", "0") != "1"]
    for k, item in enumerate(kept):
        where = f"{name}: object {k} ({item.findtext('name')})"
        places = [place for point in item.iterfind("polygon/pt") for place in (point.find("x"), point.find("y"))]
        points = [number(None if place is None else place.text, where) for place in places]
        if len(points) < 6:
            mask = item.findtext("segm/mask")
            what = "a line" if mask is None else f"a mask, {mask}; caption with the folder of these"
            raise RegionError(f"{where}: is {what}; a region is a polygon of three points or more.")
        regions.append({"id": k, "category": item.findtext("name"), "segmentation": [points]})
    if not regions:
        raise RegionError(f"{name}: holds no regions.")
    return regions
