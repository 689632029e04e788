"""Rows of region data: their one form, with COCO's field names, and the faults they can have.

A row is `{"image": path, "regions": [{"id", "segmentation" | "bbox", "caption"?, "attributes"?}, ...], "question"?,
"width"?, "height"?}`. A region has a caption, attributes, or both. Images and masks stay encoded in it.
"""

import base64
import binascii
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from PIL import Image

from pdlm_hf.attributes.schema import AttributeSchema, fault_of_text, text_of
from pdlm_hf.errors_pdlm import DataError, ImageError
from pdlm_hf.regions.images import load_image, open_image

ROW_KEYS = {"image", "regions", "question", "width", "height", "id", "meta"}
REGION_KEYS = {
    "id",
    "segmentation",
    "bbox",
    "caption",
    "attributes",
    "category",
    "category_id",
    "image_id",
    "area",
    "iscrowd",
    "meta",
}
IMAGE_NAMES = ("image", "image_file", "image_path")  # the reference accepts all three
BROKEN = "a text of whole characters; this one has half of a UTF-16 pair"
# A box is clipped to its image, so that this one covers any image.
WHOLE = [0, 0, 2**31, 2**31]


@dataclass(frozen=True)
class Fault:
    """One fault of the data.

    Args:
        row (`int`): number of the row, from 1: the line of a JSONL file, the position in a list, or the position of
            the image in a COCO file.
        field (`str`): path of the field in the row, `regions[0].caption` for example.
        kind (`str`): kind of fault, "missing field" for example; reports count faults by kind.
        got, expected (`str`): the value of the field, and the expected one.
    """

    row: int
    field: str
    kind: str
    got: str
    expected: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.field}: got {self.got}, expected {self.expected}"


class RowError(DataError):
    """A row cannot be used; `fault` is the reason."""

    def __init__(self, fault: Fault):
        super().__init__(str(fault))
        self.fault = fault


# ---------------------------------------------------------------------------------------------------- one row


def normal_row(raw: Any) -> Any:
    """Convert a row of any known form into the one form; unknown values are left unchanged for [`check_row`].

    Rows of the reference's training files have `image`, `image_file` or `image_path`, and either `mask_rles` with
    `captions`, or `annotations` whose `segmentation` is an RLE, or null for the whole image.
    """
    if not isinstance(raw, dict):
        return raw
    # a row of a `datasets` table has every column of the table, with null where it has no value
    row = {name: value for name, value in raw.items() if value is not None}
    for name in IMAGE_NAMES[1:]:
        if name in row:
            row.setdefault("image", row.pop(name))
    masks, captions = row.get("mask_rles"), row.get("captions")
    if isinstance(masks, list) and isinstance(captions, list) and len(masks) == len(captions):
        pairs = enumerate(zip(masks, captions, strict=True))
        row["regions"] = [{"id": k, "segmentation": mask, "caption": caption} for k, (mask, caption) in pairs]
        del row["mask_rles"], row["captions"]
    elif isinstance(row.get("annotations"), list) and "regions" not in row:
        row["regions"] = [_reference_region(region) for region in row.pop("annotations")]
    elif isinstance(row.get("regions"), list):
        row["regions"] = [_without_nulls(region) for region in row["regions"]]
    return row


def _without_nulls(region: Any) -> Any:
    if not isinstance(region, dict):
        return region
    return {name: value for name, value in region.items() if value is not None}


def _reference_region(region: Any) -> Any:
    whole = isinstance(region, dict) and region.get("segmentation", ()) is None and region.get("bbox") is None
    return _without_nulls({**region, "bbox": WHOLE} if whole else region)


def sound_row(raw: Any, number: int, captions: bool = True, attributes: bool = True) -> dict:
    """Convert a row into the one form and check it, see [`check_row`].

    Raises:
        RowError: the row has a fault; the error has the first one.
    """
    if isinstance(raw, RowError):
        raise raw
    row = normal_row(raw)
    for fault in check_row(row, number, captions, attributes):
        raise RowError(fault)
    return row


def check_row(row: Any, number: int, captions: bool = True, attributes: bool = True) -> Iterator[Fault]:
    """Find all faults in the form of a row, without decoding images and masks.

    Args:
        row: from [`normal_row`].
        number (`int`): number of the row, from 1.
        captions (`bool`): whether every region needs a caption.
        attributes (`bool`): whether attributes do in place of a caption.
    """
    # By hand, not by pydantic: it skips a list's own checks (ids that occur twice, an empty list) as soon as one item
    # has a fault, so that faults would go uncounted, and each message would have to be mapped to kind, got, expected.
    if not isinstance(row, dict):
        yield Fault(number, "row", "wrong type", type(row).__name__, "an object with `image` and `regions`")
        return
    for name in row:
        if name not in ROW_KEYS and name not in ("mask_rles", "captions"):
            yield Fault(number, name, "unknown key", "an unknown key", f"one of {', '.join(sorted(ROW_KEYS))}")
    if "image" not in row:
        yield Fault(number, "image", "missing field", "nothing", "the path of an image")
    elif not is_image(row["image"]):
        yield Fault(number, "image", "wrong type", _shown(row["image"]), "the path of an image")
    if "question" in row and not (is_text(row["question"]) and row["question"].strip()):
        yield Fault(number, "question", "wrong type", _shown(row["question"]), "a text")
    for name in ("width", "height"):
        if name in row and not (_is_whole(row[name]) and row[name] > 0):
            yield Fault(number, name, "wrong type", _shown(row[name]), "a number of pixels")
    if "mask_rles" in row:
        got = " and ".join(f"{_count(row.get(name))} {name}" for name in ("mask_rles", "captions"))
        yield Fault(number, "captions", "wrong length", got, "one caption for each mask")
    elif "regions" not in row:
        yield Fault(number, "regions", "missing field", "nothing", "a list of regions")
    elif not isinstance(row["regions"], list):
        yield Fault(number, "regions", "wrong type", _shown(row["regions"]), "a list of regions")
    elif not row["regions"]:
        yield Fault(number, "regions", "no regions", "an empty list", "at least one region")
    else:
        yield from _check_regions(row["regions"], number, captions, attributes)


def _check_regions(regions: list, number: int, captions: bool, attributes: bool) -> Iterator[Fault]:
    seen = set()
    for k, region in enumerate(regions):
        field = f"regions[{k}]"
        if not isinstance(region, dict):
            yield Fault(number, field, "wrong type", _shown(region), "an object with a shape and `caption`")
            continue
        for name in region.keys() - REGION_KEYS:
            expected = f"one of {', '.join(sorted(REGION_KEYS))}"
            yield Fault(number, f"{field}.{name}", "unknown key", "an unknown key", expected)
        identifier = region.get("id", k)
        if not isinstance(identifier, (int, str)) or isinstance(identifier, bool):
            yield Fault(number, f"{field}.id", "wrong type", _shown(identifier), "a number or a text")
        elif isinstance(identifier, str) and not is_text(identifier):
            yield Fault(number, f"{field}.id", "broken text", _shown(identifier), BROKEN)
        elif identifier in seen:
            yield Fault(number, f"{field}.id", "duplicate id", repr(identifier) + " again", "an id for each region")
        else:
            seen.add(identifier)
        yield from _check_shape(region, field, number)
        if captions and not (attributes and region.get("attributes") and region.get("caption") is None):
            yield from _check_caption(region, f"{field}.caption", number)
        if "attributes" in region:
            yield from attribute_faults(region["attributes"], f"{field}.attributes", number)


def _check_shape(region: dict, field: str, number: int) -> Iterator[Fault]:
    shape, box = region.get("segmentation"), region.get("bbox")
    if shape is not None and shape != [] and shape != {}:
        if not isinstance(shape, list) and not is_rle(shape):
            yield Fault(number, f"{field}.segmentation", "wrong type", _shown(shape), "an RLE or polygons")
    elif box is None:
        yield Fault(number, field, "missing field", "no shape", "`segmentation` (RLE or polygons) or `bbox`")
    elif not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        yield Fault(number, f"{field}.bbox", "wrong type", _shown(box), "[x, y, width, height] in pixels")


def _check_caption(region: dict, field: str, number: int) -> Iterator[Fault]:
    caption = region.get("caption")
    if caption is None:
        yield Fault(number, field, "missing field", "nothing", "a text")
    elif not isinstance(caption, str):
        yield Fault(number, field, "wrong type", _shown(caption), "a text")
    elif not is_text(caption):
        yield Fault(number, field, "broken text", _shown(caption), BROKEN)
    elif not caption.strip():
        yield Fault(number, field, "empty caption", repr(caption), "a text")


def attribute_faults(values: Any, field: str, number: int) -> Iterator[Fault]:
    """Faults of the form of a region's attributes.

    Args:
        values: what should be names with values.
        field (`str`), number (`int`): their place in the row, and the number of the row.
    """
    if not isinstance(values, dict):
        yield Fault(number, field, "wrong type", _shown(values), "an object of names with their values")
        return
    for name, value in values.items():
        place = f"{field}.{name:.60}"
        if reason := fault_of_text(name):
            yield Fault(number, field, "attribute name", f"the name {name!r:.60}, which {reason}", "a name")
        elif "{" in name or "}" in name:
            yield Fault(number, field, "attribute name", f"the name {name!r:.60}", "a name without braces")
        elif not isinstance(value, (str, int, NoneType)):
            yield Fault(number, place, "wrong type", _shown(value), "a text, a whole number, true or false")
        elif value is not None and (reason := fault_of_text(text_of(value))):
            yield Fault(number, place, "attribute value", f"{value!r:.60}, which {reason}", "a value of one line")


def schema_faults(region: dict, field: str, number: int, schema: AttributeSchema) -> Iterator[Fault]:
    """Faults of the attributes of a region whose form is right, by a schema.

    Args:
        region (`dict`), field (`str`), number (`int`): the region, its place in the row, and the number of the row.
        schema (`AttributeSchema`)
    """
    for name, value in known_attributes(region).items():
        attribute, place = schema.attributes.get(name), f"{field}.attributes.{name:.60}"
        if attribute is None:
            expected = f"one of {', '.join(schema.attributes):.200}"
            yield Fault(number, place, "unknown attribute", "an attribute that the schema does not have", expected)
        elif attribute.choices and value not in (texts := attribute.texts):
            yield Fault(number, place, "attribute value", f"{value!r:.60}", f"one of {', '.join(texts):.200}")


def known_attributes(region: dict) -> dict[str, str]:
    """Texts of the attributes that are known of a region, by name; null stands for an unknown one."""
    values = region.get("attributes") or {}
    return {name.strip(): text_of(value) for name, value in values.items() if value is not None}


def num_characters(region: dict) -> int:
    """Characters of the caption of a region, or of its attributes in a list, if these are longer."""
    values = known_attributes(region)
    return max(len(region.get("caption") or ""), sum(len(name) + len(value) + 4 for name, value in values.items()))


def is_text(value: Any) -> bool:
    """Whether a value is a text that can be written in UTF-8: JSON can name halves of characters (`\\ud800`)."""
    if not isinstance(value, str):
        return False
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_image(value: Any) -> bool:
    """Whether a value can be the image of a row: a path, an encoded image, or an image; see [`open_row_image`]."""
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes) or bool(value.get("path")) and isinstance(value["path"], str)
    return isinstance(value, (str, Image.Image)) and bool(value)


def is_rle(value: Any) -> bool:
    """Whether a value has the form of an RLE: `size` (height and width) and `counts`."""
    if not isinstance(value, dict):
        return False
    size, counts = value.get("size"), value.get("counts")
    whole = isinstance(size, (list, tuple)) and len(size) == 2 and all(map(_is_whole, size))
    return whole and isinstance(counts, (str, bytes, list))


def _shown(value: Any) -> str:
    return f"{value!r:.60} ({type(value).__name__})"


def _count(value: Any) -> str:
    return str(len(value)) if isinstance(value, list) else "no list of"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def row_size(row: dict) -> tuple[int, int] | None:
    """Width and height of the image, from the row's fields or the size of an RLE; None if the row has neither."""
    if _is_whole(row.get("width")) and _is_whole(row.get("height")):
        return row["width"], row["height"]
    regions = row["regions"] if isinstance(row.get("regions"), list) else []
    for region in regions:
        shape = region.get("segmentation") if isinstance(region, dict) else None
        size = shape.get("size") if isinstance(shape, dict) else None
        if isinstance(size, (list, tuple)) and len(size) == 2 and all(map(_is_whole, size)):
            return size[1], size[0]
    return None


def size_fault(row: dict, number: int, size: tuple[int, int]) -> Fault | None:
    """The fault of a row whose `width` and `height` differ from the size of its image; None if they do not."""
    if "width" not in row or "height" not in row or (row["width"], row["height"]) == size:
        return None
    got, expected = (f"{w} x {h}" for w, h in ((row["width"], row["height"]), size))
    return Fault(number, "width", "other size", got, f"{expected}, as the image")


def open_row_image(image: Any, folder: Path | None) -> Image.Image:
    """Open the image of a row, as RGB, rotated according to its EXIF data.

    Args:
        image: a path, `data:...;base64,...`, an image, or the `{"bytes", "path"}` of a `datasets` column.
        folder (`Path`, *optional*): folder that relative paths start from.

    Raises:
        ImageError: there is no such file, or it cannot be decoded.
    """
    if isinstance(image, str) and not image.startswith("data:"):
        return load_image(Path(folder or "", image))
    if isinstance(image, Image.Image):
        return load_image(image)
    try:
        if isinstance(image, str):
            data = base64.b64decode(image.partition("base64,")[2], validate=True)
        elif image.get("bytes") is None:
            return load_image(Path(folder or "", image["path"]))
        else:
            data = image["bytes"]
        return load_image(open_image(io.BytesIO(data)))
    except (binascii.Error, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ImageError(f"the image in the row cannot be decoded ({error}).") from None
