"""CVAT for images 1.1, read and written."""

from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element, SubElement

import numpy as np

from ...errors_pdlm import NoRegionsError, RegionError
from ..rle import encode
from .facts import CAPTION, LABEL, ImageFacts
from .geometry import ellipse, number, pasted, rectangle
from .xml import xml_text

UNKNOWN = "__undefined__"  # the choice that CVAT's own examples have for what is not known


def from_cvat(root: Element, name: str, image: ImageFacts) -> list[dict[str, Any]]:
    """Read the regions of one image of "CVAT for images 1.1": `box` and `ellipse` (also turned), `polygon`, `mask`.

    Args:
        root (`Element`): `<annotations>`.
        name (`str`): the file, for messages.
        image (`ImageFacts`): the image; name, width and height of `<image>` are compared with it.

    Returns:
        regions with "id" (the position), "category" (the label), "bbox" or "segmentation", "caption" if the shape has
        an attribute of this name, and its other "attributes" that have a value, as texts by name.

    Raises:
        RegionError: the file has no such image, states another size, or a shape has no area (points, lines).
    """
    images = _cvat_images(root, name)
    chosen = images[image.choose(name, [element.get("name") for element in images])]
    where = f"{name}: image {chosen.get('id')} ({chosen.get('name')})"
    sides = [_attribute(chosen, key, where) for key in ("width", "height") if chosen.get(key) is not None]
    if len(sides) == 2:
        image.check_size(where, *(int(side) if side.is_integer() else side for side in sides))
    found = _cvat_regions(chosen, where, image)
    if not found:
        raise NoRegionsError(f"{where}: holds no regions.")
    return found


def cvat_images(root: Element, name: str) -> Iterator[tuple[str, ImageFacts, list[dict[str, Any]]]]:
    """All images of a file of "CVAT for images 1.1".

    Args:
        root (`Element`): `<annotations>`.
        name (`str`): the file, for messages.

    Yields:
        where it is in the file, the image, and its regions as [`from_cvat`] gives them.

    Raises:
        RegionError: the file is another one, or a shape has no area.
    """
    for element in _cvat_images(root, name):
        where = f"{name}: image {element.get('id')} ({element.get('name')})"
        width, height = (int(number(element.get(key), f"{where}.{key}", 1, 2**31)) for key in ("width", "height"))
        image = ImageFacts(element.get("name", ""), width, height)
        yield where, image, _cvat_regions(element, where, image)


def _cvat_images(root: Element, name: str) -> list[Element]:
    if root.tag != "annotations":
        raise RegionError(f"{name}: expected <annotations> (CVAT for images), got <{root.tag:.40}>.")
    if root.find("track") is not None:
        raise RegionError(f'{name}: is "CVAT for video"; export the task as "CVAT for images".')
    return root.findall("image")


def _cvat_regions(element: Element, where: str, image: ImageFacts) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for shape in element:
        if shape.tag == "tag":  # a label of the whole image
            continue
        place = f"{where}: {shape.tag} {len(found)}"
        region = {"id": len(found), "category": shape.get("label"), **_cvat_shape(shape, place, image)}
        texts = {one.get("name", ""): one.text or "" for one in shape.findall("attribute")}
        if CAPTION in texts:
            region["caption"] = texts.pop(CAPTION)
        if known := {name: text for name, text in texts.items() if text.strip() and text != UNKNOWN}:
            region["attributes"] = known
        found.append(region)
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


def _attribute(element: Element, key: str, where: str) -> float:
    return number(element.get(key), f"{where}.{key}")


# ---------------------------------------------------------------- written


def cvat_labels(fields: dict[str, list[str]]) -> list[dict[str, Any]]:
    """The label of a task for [`cvat_image`], as CVAT's "Raw" tab takes it: a mask with attributes, of which the
    caption is one.

    Args:
        fields (`dict[str, list[str]]`): the attributes with their choices; a free text has none.
    """
    attributes = []
    for name, choices in fields.items():
        values = [UNKNOWN, *map(xml_text, choices)] if choices else [""]
        kind = {"input_type": "select" if choices else "text", "default_value": values[0], "values": values}
        attributes.append({"name": xml_text(name), "mutable": False, **kind})
    return [{"name": LABEL, "type": "mask", "attributes": attributes}]


def cvat_head(fields: dict[str, list[str]]) -> Element:
    """The part of a CVAT file before its images: `<meta>`, which names the label and its attributes, see
    [`cvat_labels`]."""
    meta = Element("meta")
    labels = SubElement(SubElement(meta, "task"), "labels")
    for label in cvat_labels(fields):
        element = SubElement(labels, "label")
        SubElement(element, "name").text, SubElement(element, "type").text = label["name"], label["type"]
        attributes = SubElement(element, "attributes")
        for given in label["attributes"]:
            attribute = SubElement(attributes, "attribute")
            for key in ("name", "mutable", "input_type", "default_value"):
                SubElement(attribute, key).text = str(given[key])
            SubElement(attribute, "values").text = "\n".join(given["values"])
    return meta


def cvat_image(number: int, image: ImageFacts, regions: list[dict[str, Any]]) -> Element:
    """An `<image>` of "CVAT for images 1.1" with its regions as masks.

    Args:
        number (`int`): its id in the file.
        image (`ImageFacts`): the image.
        regions (`list[dict]`): "mask" (bool, `(H, W)`) and "values", texts by the name of the attribute.
    """
    size = {"width": str(image.width), "height": str(image.height)}
    element = Element("image", {"id": str(number), "name": xml_text(image.name), **size})
    for region in regions:
        rows, columns = (region["mask"].any(axis).nonzero()[0] for axis in (1, 0))
        y, x, h, w = rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        inside = np.concatenate([[False], region["mask"][y : y + h, x : x + w].ravel()])  # the first run is outside
        changes = np.flatnonzero(inside[1:] != inside[:-1])
        runs = np.diff(changes, prepend=0, append=h * w)
        place = {"left": str(x), "top": str(y), "width": str(w), "height": str(h), "z_order": "0"}
        code = {"rle": ", ".join(map(str, runs.tolist()))}
        mask = SubElement(element, "mask", {"label": LABEL, "source": "auto", "occluded": "0", **code, **place})
        for name, text in region["values"].items():
            SubElement(mask, "attribute", {"name": xml_text(name)}).text = UNKNOWN if text is None else xml_text(text)
    return element
