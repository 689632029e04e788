"""Label Studio: tasks with their annotations, coordinates in per cent of the image. JSON and JSON-MIN exports are
read, tasks with captions to correct are written."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, quote, unquote
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import numpy as np

from ...errors_pdlm import NoRegionsError, RegionError
from ..rle import encode
from .facts import CAPTION, LABEL, ImageFacts, base_name, matching
from .geometry import ellipse, number, rectangle
from .xml import xml_text

_SIDES = ("original_width", "original_height")
_MIN = {"annotator", "annotation_id"}  # what entries of JSON-MIN have
_NAME = "file_name"  # in the data of a task that we wrote: the image, whatever its address
_SHAPES = {"rle", "points", "radiusX", "width"}  # one of them is in the value of a result that has a shape
_LENGTHS = (3, 4, 8, 16)  # bits for the length of a block of a brush mark
_OURS = "attribute "  # before the name of an attribute, in that of its tag
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".jfif")


def is_label_studio(data: Any) -> bool:
    """Whether a JSON value is a list of tasks, or one task."""
    tasks = _tasks(data)
    return bool(tasks) and all(map(_is_task, tasks))


def _tasks(data: Any) -> list[Any]:
    """The tasks of a file. JSON-MIN has the values of an annotation, by the name of their tag, beside the data."""
    tasks = [data] if isinstance(data, dict) else data if isinstance(data, list) else []
    return [_whole(task) if isinstance(task, dict) and task.keys() >= _MIN else task for task in tasks]


def _whole(task: dict) -> dict:
    """The task of an entry of JSON-MIN."""
    named = [values for values in task.values() if isinstance(values, list)]
    values = [value for values in named for value in _dicts(values) if {*_SIDES} <= value.keys()]
    results = [{**{side: value[side] for side in _SIDES}, "value": value} for value in values]
    texts = {key: text for key, text in task.items() if isinstance(text, str)}
    return {"id": task.get("id"), "data": texts, "annotations": [{"id": task["annotation_id"], "result": results}]}


def _is_task(task: Any) -> bool:
    has_data = isinstance(task, dict) and isinstance(task.get("data"), dict)
    return has_data and bool({"annotations", "predictions"} & task.keys())


def from_label_studio(data: Any, name: str, image: ImageFacts) -> list[dict[str, Any]]:
    """Read the regions of one image: rectangles and ellipses (also turned), polygons and brush marks.

    Args:
        data: the content of the file.
        name (`str`): the file, for messages.
        image (`ImageFacts`): the image; the name in `data` and `original_width`, `original_height` are compared.

    Returns:
        regions with "id" (Label Studio's), "segmentation" or "bbox", and where they are there "category" (the label),
        "caption" (the text of the region), "score", and "attributes": choices, and texts of tags that
        [`label_studio_config`] names so, by name.

    Raises:
        RegionError: the file has no such image, it was annotated several times, states another size, or a result has
            no area (keypoints).
    """
    if not is_label_studio(data):
        raise RegionError(f"{name}: expected tasks with `data` and `annotations`, Label Studio's JSON export.")
    shown = [(task, key, stated) for task in _tasks(data) for key, stated in _images_of(task).items()]
    names = [stated for *_, stated in shown]
    found = [k for k, stated in enumerate(names) if matching([stated, _without_upload(stated)], image.name)]
    chosen = found[0] if len(found) == 1 else image.choose(name, [_without_upload(stated) for stated in names])
    task, key, _ = shown[chosen]
    where = f"{name}: task {task.get('id')}"
    regions = _regions(_results(task, where, ("annotations", "predictions"), key), where, image)
    if not regions:
        raise NoRegionsError(f"{where}: holds no regions.")
    return regions


def corrected_tasks(data: Any, name: str) -> Iterator[tuple[str, ImageFacts, list[dict[str, Any]] | None]]:
    """The images of a file, with the regions that a person has submitted.

    Args:
        data: the content of the file.
        name (`str`): the file, for messages.

    Yields:
        where it is in the file, the image, and its regions as [`from_label_studio`] gives them; None for a task that
        nobody has submitted.

    Raises:
        RegionError: the file is another one, a task was annotated several times, or a result cannot be read.
    """
    if not is_label_studio(data):
        raise RegionError(f"{name}: expected tasks with `data` and `annotations`, Label Studio's JSON export.")
    for task in _tasks(data):
        where = f"{name}: task {task.get('id')}"
        submitted = bool(_kept(task, ("annotations",)))
        for key, stated in _images_of(task).items():
            results = _results(task, where, ("annotations",), key) if submitted else {}
            sized = next((part for parts in results.values() for part in parts if "original_width" in part), {})
            width, height = (int(number(sized.get(side, 0), f"{where}.{side}", 0, 2**31)) for side in _SIDES)
            image = ImageFacts(_without_upload(stated), width, height)
            yield where, image, _regions(results, where, image) if submitted else None


def _kept(task: dict, kinds: tuple[str, ...]) -> list[dict]:
    """The annotations of a task, or else its predictions, without those that a person has skipped."""
    for kind in kinds:
        if kept := [one for one in _dicts(task.get(kind)) if not one.get("was_cancelled")]:
            return kept
    return []


def _results(task: dict, where: str, kinds: tuple[str, ...], image: str) -> dict[Any, list[dict]]:
    """The results of a task by region: shape, labels, text; on the image with this key, if the task shows several."""
    kept = _kept(task, kinds)
    if len(kept) != 1:
        ids = ", ".join(str(one.get("id")) for one in kept)
        raise RegionError(f"{where}: has {len(kept)} annotations ({ids}); a region file has one. Delete the others.")
    results: dict[Any, list[dict]] = defaultdict(list)
    several = _images_of(task) if len(_images_of(task)) > 1 else {}
    for position, result in enumerate(_dicts(kept[0].get("result"))):
        own, shows = result.get("id"), result.get("to_name")
        if several and "original_width" in result and shows not in several:
            raise RegionError(
                f"{where}: shows the images {', '.join(several)}, and a region is on {shows!r:.60}, which is none of "
                "these names. Name the Image tags of the project as the data, or export tasks with one image."
            )
        if not several or shows == image:
            results[own if isinstance(own, (int, str)) else position].append(result)
    return results


def _regions(results: dict[Any, list[dict]], where: str, image: ImageFacts) -> list[dict[str, Any]]:
    return [
        {"id": own, **_region(parts, f"{where}: result {own}", image)}
        for own, parts in results.items()
        if any("original_width" in part for part in parts)  # others are choices and texts about the image
    ]


def _dicts(values: Any) -> list[dict]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _images_of(task: dict) -> dict[str, str]:
    """The names of a task's images by the key of their address; where none has the ending of an image, of the first
    text. Of several addresses those are kept that regions are on, by the name of their tag, or that of the only tag. A
    path below the folder of local files has its folders too."""
    data = task["data"]
    if isinstance(data.get(_NAME), str):
        return {_NAME: data[_NAME]}
    names = {key: _name_in(value) for key, value in data.items() if isinstance(value, str)}
    images = {key: name for key, name in names.items() if name.lower().endswith(_IMAGES)}
    results = [part for one in _kept(task, ("annotations", "predictions")) for part in _dicts(one.get("result"))]
    tags = {part.get("to_name") for part in results if "original_width" in part}
    if tags and tags <= images.keys():
        images = {key: name for key, name in images.items() if key in tags}
    elif len(tags) == 1 and "image" in images:
        images = {"image": images["image"]}
    return images or dict([*names.items()][:1]) or {"": ""}


def _name_in(address: str) -> str:
    """The name of the image that an address is of."""
    local = parse_qs(address.partition("?")[2]).get("d") if "/local-files/" in address else None
    if local:
        return local[0]
    name = base_name(address.partition("?")[0])
    return unquote(name) if address.startswith(("http://", "https://", "/")) else name


def _without_upload(stated: str) -> str:
    """The name of an image before it was uploaded: Label Studio puts eight hexadecimal digits and a dash before it."""
    head, dash, rest = stated.partition("-")
    return rest if dash and len(head) == 8 and set(head) <= set("0123456789abcdef") else stated


def _region(parts: list[dict], where: str, image: ImageFacts) -> dict[str, Any]:
    sized = [part for part in parts if "original_width" in part]
    part = next((p for p in sized if isinstance(p.get("value"), dict) and _SHAPES & p["value"].keys()), sized[0])
    image.check_size(where, *(part.get(side) for side in _SIDES))
    if part.get("image_rotation"):
        raise RegionError(f"{where}: was drawn on the image turned by {part['image_rotation']} degrees; not read.")
    values = [one.get("value") or {} for one in parts]
    value = part.get("value")
    if not isinstance(value, dict) or not all(isinstance(given, dict) for given in values):
        raise RegionError(f"{where}: has no `value`, or one that is no object.")
    found = _shape(value, where, image)
    labels = [label for given in values for key, named in given.items()
              if key.endswith("labels") and isinstance(named, list) for label in named]  # fmt: skip
    if labels:
        found["category"] = labels[0]
    known = {}
    for one, given in zip(parts, values, strict=True):
        name, text, choices = str(one.get("from_name", "")), given.get("text"), given.get("choices")
        if isinstance(choices, list) and name:
            known[name.removeprefix(_OURS)] = ", ".join(map(str, choices))
        elif isinstance(text, (str, list)):  # a list has one for each time that a person has pressed Add
            text = text if isinstance(text, str) else " ".join(map(str, text))
            if name.startswith(_OURS):
                known[name.removeprefix(_OURS)] = text
            else:
                found.setdefault("caption", text)
    if known := {name: text for name, text in known.items() if text.strip()}:
        found["attributes"] = known
    if isinstance(part.get("score"), (int, float)):
        found["score"] = part["score"]
    return found


def _shape(value: dict, where: str, image: ImageFacts) -> dict[str, Any]:
    def of(*keys: str) -> np.ndarray:
        """Values in pixels: x and width of the width, y and height of the height."""
        sides = [image.width if key in ("x", "width", "radiusX") else image.height for key in keys]
        numbers = [number(value.get(key), f"{where}.{key}", -1000, 1000) for key in keys]
        return np.array(numbers) * sides / 100

    degrees = number(value.get("rotation", 0), f"{where}.rotation")
    if isinstance(value.get("rle"), list):
        return {"segmentation": encode(_brush(value["rle"], where, image))}
    if isinstance(value.get("points"), list):
        points = value["points"]
        if len(points) < 3 or not all(isinstance(point, list) and len(point) == 2 for point in points):
            raise RegionError(f"{where}: expected three [x, y] or more, got {points!r:.60}.")
        scaled = [number(p, where, -1000, 1000) * side / 100 for point in points
                  for p, side in zip(point, image.size, strict=True)]  # fmt: skip
        return {"segmentation": [scaled]}
    if "radiusX" in value:
        return {"segmentation": [ellipse(of("x", "y", "radiusX", "radiusY").tolist(), degrees)]}
    if {"x", "y", "width", "height"} <= value.keys() and "keypointlabels" not in value:
        box = of("x", "y", "width", "height").tolist()
        return {"segmentation": [rectangle(box, degrees, centred=False)]} if degrees else {"bbox": box}
    raise RegionError(f"{where}: has no area; a region is a rectangle, ellipse, polygon or brush mark.")


def _brush(code: list, where: str, image: ImageFacts) -> np.ndarray:
    """Decode a brush mark `(H, W)`: bits that give RGBA values, row by row; what is opaque is inside.

    The first 32 bits are the number of values, 5 bits the bits of a value less 1, 4 times 4 bits the bits of a length
    less 1. A block begins with a bit (1: one value repeated), 2 bits that choose the bits of its length, and the
    length less 1.
    """
    damaged = RegionError(f"{where}: the brush mark is damaged, or not of {image.width} x {image.height} pixels.")
    try:
        bits = "".join(f"{byte:08b}" for byte in bytes(code))
    except (TypeError, ValueError):
        raise damaged from None
    place = 0

    def take(count: int) -> int:
        nonlocal place
        place += count
        if place > len(bits):
            raise damaged
        return int(bits[place - count : place], 2)

    total, size = take(32), take(5) + 1
    lengths = [take(4) + 1 for _ in range(4)]
    if total != 4 * image.width * image.height:
        raise damaged
    values = np.zeros(total, dtype=np.uint8)
    start = 0
    while start < total:
        repeated = take(1)
        end = start + take(lengths[take(2)]) + 1
        if end > total:
            raise damaged
        values[start:end] = take(size) if repeated else [take(size) for _ in range(end - start)]
        start = end
    return values.reshape(image.height, image.width, 4)[..., 3] > 0


# ---------------------------------------------------------------- written


def label_studio_config(fields: dict[str, list[str]]) -> str:
    """The labelling interface of a project with tasks of [`label_studio_task`]: brush marks, each with a caption,
    attributes, or both.

    Args:
        fields (`dict[str, list[str]]`): "caption" and attributes with their choices; free texts have none.
    """
    view = Element("View")
    SubElement(view, "Image", {"name": "image", "value": "$image", "zoom": "true"})
    SubElement(SubElement(view, "BrushLabels", {"name": "label", "toName": "image"}), "Label", {"value": LABEL})
    per_region = {"toName": "image", "perRegion": "true"}
    text = {**per_region, "editable": "true", "maxSubmissions": "1"}
    for name, choices in fields.items():
        own = {"name": _tag(name)}
        if name == CAPTION:
            SubElement(view, "TextArea", {**own, **text, "rows": "3"})
            continue
        part = SubElement(view, "View", {"visibleWhen": "region-selected"})
        SubElement(part, "Header", {"value": xml_text(name), "size": "5"})
        if choices:
            listed = SubElement(part, "Choices", {**own, **per_region, "choice": "single-radio", "showInline": "true"})
            for choice in choices:
                SubElement(listed, "Choice", {"value": xml_text(choice)})
        else:
            SubElement(part, "TextArea", {**own, **text, "rows": "1"})
    indent(view)
    return tostring(view, "unicode") + "\n"


def _tag(name: str) -> str:
    """The name of the tag of an attribute, or of the caption."""
    return name if name == CAPTION else xml_text(_OURS + name)


def label_studio_task(
    image: ImageFacts, regions: list[dict[str, Any]], address: str, fields: dict[str, list[str]]
) -> dict[str, Any]:
    """A task whose captions or attributes a person corrects: the regions are a prediction, which becomes an annotation
    when it is submitted. The labelling interface of its project is that of [`label_studio_config`].

    Args:
        image (`ImageFacts`): the image.
        regions (`list[dict]`): "id", "mask" (bool, `(H, W)`), "score", and "values", texts by name.
        address (`str`): what stands before the image's name in the address that Label Studio loads it from.
        fields (`dict[str, list[str]]`): "caption" and attributes with their choices.
    """
    fixed = {"to_name": "image", "image_rotation": 0, **dict(zip(_SIDES, image.size, strict=True))}
    results = []
    for region in regions:
        own = {"id": str(region["id"]), "score": region["score"], **fixed}
        brush = {"format": "rle", "rle": brush_code(region["mask"]), "brushlabels": [LABEL]}
        results.append({**own, "type": "brushlabels", "from_name": "label", "value": brush})
        for name, text in region["values"].items():
            if text is not None:
                kind, value = (
                    ("choices", {"choices": [xml_text(text)]}) if fields[name] else ("textarea", {"text": [text]})
                )
                results.append({**own, "type": kind, "from_name": _tag(name), "value": value})
    score = min(region["score"] for region in regions)
    return {
        "data": {"image": address + quote(image.name), _NAME: image.name},
        "predictions": [{"model_version": "pdlm", "score": score, "result": results}],
    }


def brush_code(mask: np.ndarray) -> list[int]:
    """Encode a mask `(H, W)` as a brush mark, see [`_brush`]: every pixel is four values, 255 inside and 0 outside."""
    inside = mask.ravel()
    ends = np.append(np.flatnonzero(inside[1:] != inside[:-1]) + 1, len(inside))
    bits = [f"{4 * mask.size:032b}", f"{8 - 1:05b}", *(f"{length - 1:04b}" for length in _LENGTHS)]
    start = 0
    for end in ends.tolist():
        left, value = 4 * (end - start), f"{255 * bool(inside[start]):08b}"
        while left:
            count = min(left, 1 << _LENGTHS[-1])
            k = next(k for k, length in enumerate(_LENGTHS) if count <= 1 << length)
            bits.append(f"1{k:02b}{count - 1:0{_LENGTHS[k]}b}{value}")
            left -= count
        start = end
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))
