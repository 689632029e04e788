"""Rows of region data, from every kind of file, in one form (COCO's field names), and what can be wrong with one.

The form: `{"image": path, "regions": [{"id", "segmentation" | "bbox", "caption"}, ...], "question"?, "width"?,
"height"?}`. Pictures and masks stay encoded here.
"""

import base64
import binascii
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pdlm_hf.app.images import load_image, open_image

ROW_KEYS = {"image", "regions", "question", "width", "height", "id", "meta"}
REGION_KEYS = {
    "id",
    "segmentation",
    "bbox",
    "caption",
    "category",
    "category_id",
    "image_id",
    "area",
    "iscrowd",
    "meta",
}
IMAGE_NAMES = ("image", "image_file", "image_path")  # the reference knows all three
# A box is cut off at the edges of its picture: this one is any whole picture.
WHOLE = [0, 0, 2**31, 2**31]
_CHUNK = 1 << 20  # characters read at a time


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with the data.

    Args:
        row (`int`): from 1; the line of a JSONL file, the position in a list, in COCO that of the picture.
        field (`str`): where in the row.
        kind (`str`): by which faults are counted.
        got, expected (`str`): in a few words.
    """

    row: int
    field: str
    kind: str
    got: str
    expected: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.field}: got {self.got}, expected {self.expected}"


class RowError(ValueError):
    """A row that cannot be used; `fault` says why."""

    def __init__(self, fault: Fault):
        super().__init__(str(fault))
        self.fault = fault


# ---------------------------------------------------------------------------------------------------- one row


def normal_row(raw: Any) -> Any:
    """A row in the one form, whatever form it came in; what is not understood is left for [`check_row`].

    The reference's training rows have `image`, `image_file` or `image_path`, and `mask_rles` with `captions`, or
    `annotations` whose `segmentation` is an RLE or null for the whole picture.
    """
    if not isinstance(raw, dict):
        return raw
    # a column of a `datasets` table is there in every row, with null where a row has no such field
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


def check_row(row: Any, number: int, captions: bool = True) -> Iterator[Fault]:
    """Everything that is wrong with the form of a row; pictures and masks are not decoded.

    Args:
        row: from [`normal_row`].
        number (`int`): of the row, from 1.
        captions (`bool`): every region needs one.
    """
    if not isinstance(row, dict):
        yield Fault(number, "row", "wrong type", type(row).__name__, "an object with `image` and `regions`")
        return
    for name in row:
        if name not in ROW_KEYS and name not in ("mask_rles", "captions"):
            yield Fault(number, name, "unknown key", "an unknown key", f"one of {', '.join(sorted(ROW_KEYS))}")
    if "image" not in row:
        yield Fault(number, "image", "missing field", "nothing", "the path of a picture")
    elif not (isinstance(row["image"], (str, dict, Image.Image)) and row["image"]):
        yield Fault(number, "image", "wrong type", _said(row["image"]), "the path of a picture")
    if "question" in row and not (isinstance(row["question"], str) and row["question"].strip()):
        yield Fault(number, "question", "wrong type", _said(row["question"]), "a text")
    for name in ("width", "height"):
        if name in row and not (_is_whole(row[name]) and row[name] > 0):
            yield Fault(number, name, "wrong type", _said(row[name]), "a number of pixels")
    if "mask_rles" in row:
        got = " and ".join(f"{_count(row.get(name))} {name}" for name in ("mask_rles", "captions"))
        yield Fault(number, "captions", "wrong length", got, "one caption for each mask")
    elif "regions" not in row:
        yield Fault(number, "regions", "missing field", "nothing", "a list of regions")
    elif not isinstance(row["regions"], list):
        yield Fault(number, "regions", "wrong type", _said(row["regions"]), "a list of regions")
    elif not row["regions"]:
        yield Fault(number, "regions", "no regions", "an empty list", "at least one region")
    else:
        yield from _check_regions(row["regions"], number, captions)


def _check_regions(regions: list, number: int, captions: bool) -> Iterator[Fault]:
    seen = set()
    for k, region in enumerate(regions):
        field = f"regions[{k}]"
        if not isinstance(region, dict):
            yield Fault(number, field, "wrong type", _said(region), "an object with a shape and `caption`")
            continue
        for name in region.keys() - REGION_KEYS:
            expected = f"one of {', '.join(sorted(REGION_KEYS))}"
            yield Fault(number, f"{field}.{name}", "unknown key", "an unknown key", expected)
        identifier = region.get("id", k)
        if not isinstance(identifier, (int, str)) or isinstance(identifier, bool):
            yield Fault(number, f"{field}.id", "wrong type", _said(identifier), "a number or a text")
        elif identifier in seen:
            yield Fault(number, f"{field}.id", "duplicate id", repr(identifier) + " again", "an id for each region")
        else:
            seen.add(identifier)
        yield from _check_shape(region, field, number)
        if captions:
            yield from _check_caption(region, f"{field}.caption", number)


def _check_shape(region: dict, field: str, number: int) -> Iterator[Fault]:
    shape, box = region.get("segmentation"), region.get("bbox")
    if shape is not None and shape != [] and shape != {}:
        if not isinstance(shape, (dict, list)):
            yield Fault(number, f"{field}.segmentation", "wrong type", _said(shape), "an RLE or polygons")
    elif box is None:
        yield Fault(number, field, "missing field", "no shape", "`segmentation` (RLE or polygons) or `bbox`")
    elif not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        yield Fault(number, f"{field}.bbox", "wrong type", _said(box), "[x, y, width, height] in pixels")


def _check_caption(region: dict, field: str, number: int) -> Iterator[Fault]:
    caption = region.get("caption")
    if caption is None:
        yield Fault(number, field, "missing field", "nothing", "a text")
    elif not isinstance(caption, str):
        yield Fault(number, field, "wrong type", _said(caption), "a text")
    elif not caption.strip():
        yield Fault(number, field, "empty caption", repr(caption), "a text")


def _said(value: Any) -> str:
    return f"{value!r:.60} ({type(value).__name__})"


def _count(value: Any) -> str:
    return str(len(value)) if isinstance(value, list) else "no list of"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def row_size(row: dict) -> tuple[int, int] | None:
    """Width and height of the picture as the row says them: in so many words, or by an RLE; None if it does not."""
    if _is_whole(row.get("width")) and _is_whole(row.get("height")):
        return row["width"], row["height"]
    regions = row["regions"] if isinstance(row.get("regions"), list) else []
    for region in regions:
        shape = region.get("segmentation") if isinstance(region, dict) else None
        size = shape.get("size") if isinstance(shape, dict) else None
        if isinstance(size, (list, tuple)) and len(size) == 2 and all(map(_is_whole, size)):
            return size[1], size[0]
    return None


def open_row_image(image: Any, folder: Path | None) -> Image.Image:
    """The picture of a row, RGB, turned the way it is meant to be seen.

    Args:
        image: path, `data:...;base64,...`, a picture, or the `{"bytes", "path"}` of a `datasets` column.
        folder (`Path`, *optional*): what relative paths start from.

    Raises:
        ValueError: missing, or not to be decoded.
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
    except (binascii.Error, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the picture in the row cannot be decoded ({error}).") from None


# ---------------------------------------------------------------------------------------------------- all rows


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Args:
        kind (`str`): "jsonl", "list" (a JSON list), "coco", "table" (a saved `datasets` folder) or "hub".
        path (`Path`, *optional*): of the file or folder.
        name (`str`): as the user wrote it.
        images (`Path`, *optional*): the folder of pictures that the user gave.
    """

    kind: str
    path: Path | None
    name: str
    images: Path | None

    @property
    def own_folder(self) -> Path | None:
        """What relative paths start from if no folder was given; files written elsewhere must say another path."""
        return None if self.images is not None or self.path is None else self.path.parent

    @property
    def folder(self) -> Path | None:
        """What relative paths of pictures start from."""
        return self.images if self.images is not None else self.own_folder


def find_source(source: str | Path, images: str | Path | None = None) -> Source:
    """What kind of data this is, by its first character.

    Args:
        source (`str` or `Path`): COCO json, JSONL, a JSON list of rows, a folder written by `save_to_disk` of
            `datasets`, or `hf:NAME[:CONFIG][@SPLIT]`.
        images (`str` or `Path`, *optional*): folder of the pictures; default: that of the file.

    Raises:
        ValueError: there is no such thing, or it is of no known kind.
    """
    name = str(source)
    folder = None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of pictures.")
    if name.startswith("hf:"):
        return Source("hub", None, name, folder)
    path = Path(source)
    if path.is_dir():
        if not any((path / file).exists() for file in ("dataset_info.json", "dataset_dict.json")):
            raise ValueError(f"{path}: is a folder, but none that `save_to_disk` of `datasets` has written.")
        return Source("table", path, name, folder)
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    with open(path, "rb") as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if path.suffix in (".jsonl", ".ndjson"):
        return Source("jsonl", path, name, folder)
    if start[:1] == b"[":
        return Source("list", path, name, folder)
    if start[:1] == b"{":
        return Source("coco" if _is_one_object(path) else "jsonl", path, name, folder)
    raise ValueError(f"{path}: expected a COCO json, a JSON list of rows, or JSONL (one row a line).")


def _is_one_object(path: Path) -> bool:
    """Whether a file that starts with { is one JSON object, not one a line."""
    with open(path, encoding="utf-8", errors="replace") as file:
        first, second = file.readline(), file.readline()
    try:
        return not (json.loads(first) and second.strip())
    except ValueError:
        return True


def raw_rows(source: Source) -> Iterator[tuple[int, Any]]:
    """Rows as they are, with their numbers from 1, one after the other; nothing is kept of JSONL, lists and hub data.

    Yields:
        number and row; instead of a row that is no JSON, the [`RowError`] that says so.

    Raises:
        ValueError: the source as a whole is of no use.
    """
    if source.kind == "jsonl":
        with open(source.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, parse_line(line, number)
    elif source.kind == "list":
        yield from _list_rows(source.path)
    elif source.kind == "coco":
        yield from _coco_rows(source.path)
    else:
        table = open_table(source, streaming=source.kind == "hub")
        yield from enumerate(table, 1)


def parse_line(line: bytes, number: int) -> Any:
    """The row in a line of a JSONL file, or the [`RowError`] that says why there is none."""
    try:
        return json.loads(line)
    except ValueError as error:
        where = f"line {number}, column {error.colno}: {error.msg}" if hasattr(error, "colno") else f"{error}"
        return RowError(Fault(number, "row", "broken JSON", where, "one whole JSON object a line"))


def _list_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON list, which is read piece by piece."""
    decoder, number, text, more = json.JSONDecoder(), 0, "", True
    with open(path, encoding="utf-8-sig") as file:
        while file.read(1) != "[":  # which is there: that made it a list
            pass
        while True:
            text = text.lstrip().removeprefix(",").lstrip() if number else text.lstrip()
            if text.startswith("]"):
                return
            try:
                row, end = decoder.raw_decode(text)
                if end == len(text) and more:  # a number may go on in the next piece
                    raise json.JSONDecodeError("cut", text, end)
            except json.JSONDecodeError as error:
                piece = file.read(max(_CHUNK, len(text)))
                text, more = text + piece, bool(piece)
                if more:
                    continue
                got = f"{error.msg}, after {number} whole rows"
                yield number + 1, RowError(Fault(number + 1, "row", "broken JSON", got, "a whole JSON list"))
                return
            number += 1
            text = text[end:]
            yield number, row


def _coco_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """A row for each picture of a COCO file that has annotations, numbered by its place among the pictures."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        yield 1, RowError(Fault(1, "file", "broken JSON", str(error), "one whole JSON object"))
        return
    images, annotations = data.get("images"), data.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        got = f"an object with {', '.join(sorted(data)[:5])}"
        yield 1, RowError(Fault(1, "file", "wrong type", got, "COCO's lists `images` and `annotations`"))
        return
    rows: dict[Any, tuple[int, dict, list]] = {}
    for k, image in enumerate(images):
        if fault := _coco_fault(image, ("id", "file_name"), k, "images", rows):
            yield k + 1, RowError(fault)
        else:
            rows[image["id"]] = (k + 1, image, [])
    ids: set = set()
    for k, annotation in enumerate(annotations):
        if fault := _coco_fault(annotation, ("image_id",), k, "annotations", ids):
            yield k + 1, RowError(fault)
        elif annotation["image_id"] not in rows:
            got = f"{annotation['image_id']!r}"
            field = f"annotations[{k}].image_id"
            yield k + 1, RowError(Fault(k + 1, field, "unknown picture", got, "the id of one of `images`"))
        else:
            ids.add(annotation.get("id"))
            rows[annotation["image_id"]][2].append(annotation)
    names = {entry.get("id"): entry.get("name") for entry in data.get("categories") or [] if isinstance(entry, dict)}
    for number, image, own in rows.values():
        if own:
            row = {"image": image["file_name"], "regions": [_coco_region(annotation, names) for annotation in own]}
            yield number, row | {name: image[name] for name in ("width", "height") if name in image}


def _coco_fault(entry: Any, needed: tuple[str, ...], k: int, name: str, ids: Any) -> Fault | None:
    """What is wrong with the k-th entry of one of COCO's lists."""
    for key in needed:
        if not isinstance(entry, dict) or not isinstance(entry.get(key), (int, str)):
            return Fault(k + 1, f"{name}[{k}].{key}", "missing field", f"{entry!r:.60}", f"`{key}`")
    if entry.get("id") is not None and entry["id"] in ids:
        return Fault(k + 1, f"{name}[{k}].id", "duplicate id", f"{entry['id']!r} again", "an id for each")
    return None


def _coco_region(annotation: dict, names: dict) -> dict:
    """COCO files of all kinds have keys of their own; only what is known is kept."""
    region = {name: value for name, value in annotation.items() if name in REGION_KEYS}
    if isinstance(names.get(annotation.get("category_id")), str):
        region.setdefault("category", names[annotation["category_id"]])
    return region


def open_table(source: Source, streaming: bool = False) -> Any:
    """A `datasets` table with its pictures left encoded. Raises: ImportError, or ValueError if it cannot be had."""
    try:
        import datasets
    except ImportError:
        raise ImportError('Reading tables needs datasets: pip install "perceptiondlm[peft]".') from None
    try:
        if source.kind == "table":
            table = datasets.load_from_disk(str(source.path))
        else:
            name, _, split = source.name.removeprefix("hf:").partition("@")
            name, _, config = name.partition(":")
            table = datasets.load_dataset(name, config or None, split=split or "train", streaming=streaming)
    except Exception as error:  # whatever its readers raise; all of it means the same to the user
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source.name}: `datasets` cannot read it ({reason}).") from None
    if isinstance(table, datasets.DatasetDict):
        if "train" not in table:
            raise ValueError(f"{source.name}: has the splits {', '.join(table)}; give the folder of one of them.")
        table = table["train"]
    for name, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table
