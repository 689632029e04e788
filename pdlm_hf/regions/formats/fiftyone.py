"""FiftyOne's own format, FiftyOneDataset: `samples.json` with the samples as the database has them, in extended JSON.
Masks are arrays of the size of their box, as `numpy.save` writes them, compressed by zlib."""

import base64
import binascii
import io
import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from ...errors_pdlm import NoRegionsError, RegionError
from ..rle import encode
from .facts import CAPTION, LABEL, ImageFacts
from .geometry import number, pasted

FIELD = "regions"
_HEADER = 1024  # bytes of an array file before its values, at most
_NAME = "file_name"  # of a sample that we wrote: the image below its folder; FiftyOne makes paths absolute
_ATTRIBUTES = "attribute_names"  # of a sample that we wrote: which fields of its detections are attributes
DETECTION = {  # fields that a detection has itself
    *("id", "_id", "_cls", "label", "bounding_box", "mask", "mask_path", "confidence", "index", "tags", "attributes"),
    *("instance", "dynamic_attributes", "parent"),
}


def is_fiftyone(data: Any) -> bool:
    """Whether a JSON value is a `samples.json`."""
    samples = data.get("samples") if isinstance(data, dict) else None
    return isinstance(samples, list) and all(
        isinstance(sample, dict) and isinstance(sample.get("filepath"), str) for sample in samples
    )


def from_fiftyone(data: Any, name: str, image: ImageFacts) -> list[dict[str, Any]]:
    """Read the regions of one image: detections, with or without masks.

    Args:
        data: the content of the file.
        name (`str`): the file, for messages.
        image (`ImageFacts`): the image; the path and the metadata of the sample are compared with it.

    Returns:
        regions with "id" (the position), "category" (the label), "segmentation" or "bbox", and where they are there
        "caption", "score", and "attributes", those fields that `attribute_names` of the sample has, by name.

    Raises:
        RegionError: the file has no such image, states another size, has several fields of detections, none of them
            called "regions", or a mask is damaged or in a file of its own.
    """
    samples = _samples(data, name)
    sample = samples[image.choose(name, [_image_of(sample) for sample in samples])]
    where = f"{name}: {_image_of(sample)}"
    image.check_size(where, *_size_of(sample))
    found = _regions(sample, where, image)
    if not found:
        raise NoRegionsError(f"{where}: holds no regions.")
    return found


def fiftyone_images(data: Any, name: str) -> Iterator[tuple[str, ImageFacts, list[dict[str, Any]]]]:
    """All images of a file.

    Yields:
        where it is in the file, the image, and its regions as [`from_fiftyone`] gives them.

    Raises:
        RegionError: the file is another one, a sample has no metadata with the size of its image, or a region cannot
            be read.
    """
    for sample in _samples(data, name):
        where = f"{name}: {_image_of(sample)}"
        width, height = _size_of(sample)
        if not (isinstance(width, int) and isinstance(height, int) and min(width, height) > 0):
            raise RegionError(f"{where}: has no size in its metadata; in FiftyOne: dataset.compute_metadata()")
        image = ImageFacts(_image_of(sample), width, height)
        yield where, image, _regions(sample, where, image)


def _samples(data: Any, name: str) -> list[dict[str, Any]]:
    if not is_fiftyone(data):
        raise RegionError(f"{name}: expected samples with a `filepath`, the samples.json of a FiftyOneDataset.")
    return data["samples"]


def _image_of(sample: dict[str, Any]) -> str:
    return sample[_NAME] if isinstance(sample.get(_NAME), str) else sample["filepath"]


def _size_of(sample: dict[str, Any]) -> tuple[Any, Any]:
    metadata = sample.get("metadata")
    found = metadata if isinstance(metadata, dict) else {}
    return found.get("width"), found.get("height")


def _regions(sample: dict[str, Any], where: str, image: ImageFacts) -> list[dict[str, Any]]:
    fields = [key for key, value in sample.items() if isinstance(value, dict) and value.get("_cls") == "Detections"]
    if FIELD in fields:
        fields = [FIELD]
    if len(fields) > 1:
        raise RegionError(f"{where}: has several fields of detections ({', '.join(fields)}), none of them `{FIELD}`.")
    detections = sample[fields[0]].get("detections") if fields else []
    if not isinstance(detections, list) or not all(isinstance(one, dict) for one in detections):
        raise RegionError(f"{where}: the detections are no list of objects.")
    named = sample.get(_ATTRIBUTES)
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    return [_region(one, k, f"{where}: detection {k}", image, names) for k, one in enumerate(detections)]


def _region(
    detection: dict[str, Any], position: int, where: str, image: ImageFacts, names: list[str]
) -> dict[str, Any]:
    box = detection.get("bounding_box")
    if not isinstance(box, list) or len(box) != 4:
        raise RegionError(f"{where}: expected a bounding_box [x, y, width, height] in fractions, got {box!r:.60}.")
    shares = [number(value, f"{where}.bounding_box", -1, 2) for value in box]
    x, y, w, h = (share * side for share, side in zip(shares, image.size * 2, strict=True))
    region: dict[str, Any] = {"id": position, "category": detection.get("label")}
    if detection.get("mask_path"):
        raise RegionError(
            f"{where}: its mask is a file of its own; in FiftyOne: import_from_disk of fiftyone.utils.labels"
        )
    if detection.get("mask") is None:
        region["bbox"] = [x, y, w, h]
    else:
        size = max(1, round(w)), max(1, round(h))
        part = _mask(detection["mask"], where, image, size)
        region["segmentation"] = encode(pasted(part, round(x), round(y), image, where))
    if isinstance(detection.get("caption"), str):
        region["caption"] = detection["caption"]
    if isinstance(detection.get("confidence"), (int, float)):
        region["score"] = detection["confidence"]
    if known := {name: detection[name] for name in names if isinstance(detection.get(name), (str, int))}:
        region["attributes"] = known
    return region


def _mask(value: Any, where: str, image: ImageFacts, size: tuple[int, int]) -> np.ndarray:
    """The mask of a box `(h, w)`; one of another size than the box is resized, as FiftyOne shows it."""
    inner = value.get("$binary") if isinstance(value, dict) else value
    text = inner.get("base64") if isinstance(inner, dict) else inner
    most = 8 * image.width * image.height + _HEADER
    try:
        if not isinstance(text, str):
            raise ValueError(f"{value!r:.40}")
        file = io.BytesIO(zlib.decompressobj().decompress(base64.b64decode(text, validate=True), most))
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("an array file of another version")
        shape, _, kind = np.lib.format.read_array_header_1_0(file)
        if len(shape) != 2 or min(shape) < 1 or math.prod(shape) > most or kind.kind not in "biuf":
            raise ValueError(f"an array of {kind} {shape}")
        file.seek(0)
        mask = np.load(file, allow_pickle=False)
    except (ValueError, zlib.error, binascii.Error, EOFError) as error:
        raise RegionError(f"{where}: the mask is damaged ({error}).") from None
    inside = mask > 0
    if inside.shape != size[::-1]:
        inside = np.asarray(Image.fromarray(inside).resize(size, Image.Resampling.NEAREST))
    return inside


# ---------------------------------------------------------------- written


def fiftyone_sample(image: ImageFacts, regions: list[dict[str, Any]]) -> dict[str, Any]:
    """A sample whose regions are detections with masks, each with its caption.

    Args:
        image (`ImageFacts`): the image.
        regions (`list[dict]`): "mask" (bool, `(H, W)`), "bbox" (of the mask, in pixels), "score", and "values", texts
            by the name of the attribute, of which the caption is one.
    """
    detections = []
    for region in regions:
        x, y, w, h = region["bbox"]
        buffer = io.BytesIO()
        np.save(buffer, region["mask"][y : y + h, x : x + w])
        mask = {"base64": base64.b64encode(zlib.compress(buffer.getvalue())).decode(), "subType": "00"}
        box = [x / image.width, y / image.height, w / image.width, h / image.height]
        own = {"label": LABEL, "bounding_box": box, "mask": {"$binary": mask}, "confidence": region["score"]}
        detections.append({"_cls": "Detection", "tags": [], "attributes": {}, **own, **region["values"]})
    names = list(dict.fromkeys(name for region in regions for name in region["values"] if name != CAPTION))
    metadata = {"_cls": "ImageMetadata", "width": image.width, "height": image.height}
    return {
        "filepath": image.name,
        "tags": [],
        "metadata": metadata,
        _NAME: image.name,
        **({_ATTRIBUTES: names} if names else {}),
        FIELD: {"_cls": "Detections", "detections": detections},
    }
