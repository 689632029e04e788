"""Annotations in XML: the boxes of PASCAL VOC, and the polygons of LabelMe's older files."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from ...errors_pdlm import NoRegionsError, RegionError
from .facts import ImageFacts, note
from .geometry import number

_VOC = ("xmin", "ymin", "xmax", "ymax")
_FROM_ZERO = ("Unknown", "MyDatabase")  # as labelImg and Label Studio write as the source; corners from 0

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def xml_text(text: str) -> str:
    """A text without the characters that XML does not have."""
    return _NOT_XML.sub("", text)


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
        raise NoRegionsError(f"{name}: holds no regions, no `object`.")
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
        raise NoRegionsError(f"{name}: holds no regions.")
    return regions
