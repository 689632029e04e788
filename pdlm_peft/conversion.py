"""Conversion of other annotation files into region data (JSONL)."""

import base64
import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from pdlm_hf.errors_pdlm import DataError, SettingError
from pdlm_hf.regions.coco import CocoIndex
from pdlm_hf.regions.files import load_json, replacing, without_collection

from .corrected import CORRECTED, PlacedRow, corrected_rows
from .rows import WHOLE, Fault, RowError, check_row, is_rle, sound_row
from .sources import Source, find_source, raw_rows

FORMS = ("coco-instances", "coco-panoptic", "dam", "gar", "reference", *CORRECTED)

# Gives the caption of a region for the id of its image, its own id and the name of its category; None: no caption.
Captions = Callable[[Any, Any, str | None], str | None]
_PROMPT = re.compile(r"<Prompt\d+>")


def convert(
    source: str | Path,
    out: Path,
    form: str,
    images: Path | None = None,
    captions: Captions | None = None,
    masks: Path | None = None,
    crowds: bool = False,
) -> Counter:
    """Convert annotations into region data. If anything fails, no file is written.

    Args:
        source (`str` or `Path`): the annotation file, or for "gar" and "reference" also a saved `datasets` folder, for
            "fiftyone" the exported folder.
        out (`Path`): JSONL file.
        form (`str`): one of [`FORMS`].
        images (`Path`, *optional*): folder that the images' paths start from, and will start from later; default: the
            folder of the file, and the written paths start from the folder of `out`.
        captions (*optional*): captions of COCO annotations, see [`read_captions`] and [`category_captions`].
        masks (`Path`, *optional*): folder of the PNG files of COCO panoptic; default: the file's name without .json.
        crowds (`bool`): also convert COCO's crowd regions.

    Returns:
        numbers of "rows" and "regions", and of everything left out, by reason.

    Raises:
        DataError: the file cannot be read as this form.
        RegionError: a region of an annotation tool cannot be read.
        SettingError: there is no such form, or COCO annotations come without `captions`.
    """
    if form not in FORMS:
        raise SettingError(f"The form must be one of {', '.join(FORMS)}, got {form!r}.")
    counts: Counter = Counter()
    folder: Path | None = Path(source).parent
    if form.startswith("coco"):
        if captions is None:
            raise SettingError("COCO annotations have no captions: give --captions or --category-captions.")
        png_folder = _png_folder(source, masks) if form == "coco-panoptic" else None
        rows = coco_rows(Path(source), captions, counts, crowds, png_folder)
    elif form == "dam":
        rows = dam_rows(Path(source), images)
    elif form in CORRECTED:
        rows = corrected_rows(Path(source), form, counts)
    else:
        found = find_source(source, images)
        rows, folder = gar_rows(found, counts) if form == "gar" else reference_rows(found), found.own_folder
    start = None if images is not None else folder
    with writing(out) as file, without_collection():
        for row in count_rows(rows, counts, source):
            write_row(file, relocated(row, start, out.parent))
    return counts


def count_rows(rows: Iterable[PlacedRow], counts: Counter, source: str | Path) -> Iterator[dict]:
    """Check and count rows, and leave out those without regions.

    Args:
        rows: place in the source and row; a row about one image.
        counts (`Counter`): changed in place.
        source (`str` or `Path`): for messages.

    Raises:
        DataError: a row has a fault; the message names its place in the source, and its region by its own id.
    """
    for place, row in rows:
        if not row["regions"]:
            counts["rows without regions"] += 1
            continue
        for fault in check_row(row, 0):
            raise DataError(f"{source}: {_place_of(fault, place, row)}: got {fault.got}, expected {fault.expected}.")
        counts["rows"] += 1
        counts["regions"] += len(row["regions"])
        yield row


def _place_of(fault: Fault, place: str, row: dict) -> str:
    """Where a fault is in the source: regions of a row are named by their ids, since many may have been left out."""
    found = re.match(r"regions\[(\d+)\]\.?(.*)", fault.field)
    if found is None:
        return f"{place}: {fault.field}"
    return ": ".join([place, f"region {row['regions'][int(found[1])].get('id')!r}", *[found[2]] * bool(found[2])])


def writing(out: Path):
    """Open a JSONL file in one piece: if writing fails, an earlier file is unchanged.

    Raises:
        SettingError: the folder does not exist.
    """
    if not out.parent.is_dir():
        raise SettingError(f"{out}: there is no folder {out.parent}.")
    return replacing(out)


def write_row(file: TextIO, row: dict) -> None:
    """Write a line of JSONL."""
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def relocated(row: dict, start: Path | None, folder: Path) -> dict:
    """Copy a row for a file in another folder: relative paths are adapted, and an image is encoded as text.

    Args:
        row (`dict`): in the one form.
        start (`Path`, *optional*): folder that the path starts from now; None leaves paths unchanged.
        folder (`Path`): folder that it shall start from.
    """
    image = row.get("image")
    if isinstance(image, dict) and image.get("bytes") is not None:
        return {**row, "image": "data:base64," + base64.b64encode(image["bytes"]).decode()}
    if isinstance(image, dict):
        image = image.get("path")
    path = image if isinstance(image, str) and not image.startswith("data:") and not os.path.isabs(image) else None
    if path is not None and start is not None and start.resolve() != folder.resolve():
        image = Path(os.path.relpath(start / path, folder)).as_posix()
    return {**row, "image": image}


# ---------------------------------------------------------------------------------------------------- COCO


def read_captions(path: Path) -> Captions:
    """Read captions from a CSV file or from JSONL, which `pdlm batch` writes.

    The columns or fields are `id` (or `annotation_id`), `caption` and optionally `image_id`. Panoptic segments need
    `image_id`, since their ids are not unique.

    Raises:
        DataError: the file does not exist, lacks a column, or has an id twice.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    found: dict[tuple[str, str], str] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            rows = (
                csv.DictReader(file) if path.suffix == ".csv" else (json.loads(line) for line in file if line.strip())
            )
            for number, row in enumerate(rows, 1):
                identifier = row.get("annotation_id", row.get("id"))
                if identifier is None or not isinstance(row.get("caption"), str):
                    raise DataError(f"row {number} needs `id` (or `annotation_id`) and `caption`.")
                key = (str(row.get("image_id", "")), str(identifier))
                if key in found:
                    raise DataError(f"row {number}: the id {identifier!r} occurs twice.")
                found[key] = row["caption"].strip()
        except (ValueError, csv.Error, AttributeError) as error:
            raise DataError(f"{path}: {error}") from None

    def caption(image_id: Any, annotation_id: Any, category: str | None) -> str | None:
        return found.get((str(image_id), str(annotation_id)), found.get(("", str(annotation_id)))) or None

    return caption


def category_captions(template: str = "{}") -> Captions:
    """Use the name of the category as caption.

    Args:
        template (`str`): caption with {} in place of the name.

    Raises:
        SettingError: the template has no {}.
    """
    if "{}" not in template:
        raise SettingError(f"The template needs {{}} in place of the category's name, got {template!r}.")
    return lambda image_id, annotation_id, category: None if category is None else template.replace("{}", category)


def _png_folder(source: str | Path, masks: Path | None) -> Path:
    folder = masks if masks is not None else Path(source).with_suffix("")
    if not folder.is_dir():
        raise SettingError(f"{folder}: no such folder of panoptic PNG files; give --masks.")
    return folder


def coco_rows(
    path: Path, captions: Captions, counts: Counter, crowds: bool = False, png_folder: Path | None = None
) -> Iterator[PlacedRow]:
    """Yield a row for each image of a COCO instances file or, with a folder of PNG files, of a panoptic file."""
    index = CocoIndex.read(path, needed=("id",) if png_folder is None else ())
    index.check()
    for image_id, own in index.annotations.items():
        if not own:
            continue
        image = index.images[image_id]
        place = f"images[{index.positions[image_id]}] (id {image_id!r}, {image['file_name']})"
        regions = []
        for segment in own if png_folder is None else _panoptic_segments(path, place, own, png_folder, counts):
            category = _category_of(segment, index)
            caption = captions(image_id, segment.get("id"), category)
            shape = {key: segment[key] for key in ("segmentation", "bbox") if segment.get(key)}
            if segment.get("iscrowd") and not crowds:
                counts["crowd regions"] += 1
            elif not shape:
                counts["regions without a shape"] += 1
            elif caption is None:
                counts["regions without a caption"] += 1
            else:
                extra = {} if category is None else {"category": category}
                regions.append({"id": segment.get("id"), **shape, "caption": caption, **extra})
        yield place, {"image": image["file_name"], "regions": regions} | sizes_of(image)


def sizes_of(image: dict) -> dict[str, Any]:
    """Width and height of COCO's entry of an image, if it has them."""
    return {key: image[key] for key in ("width", "height") if key in image}


def _category_of(segment: dict, index: CocoIndex) -> str | None:
    """The name of an annotation's category; None if the file has none."""
    identifier = segment.get("category_id")
    name = index.categories.get(identifier) if isinstance(identifier, (int, str)) else None
    return name if isinstance(name, str) else None


def _panoptic_segments(
    path: Path, place: str, annotations: list[dict], folder: Path, counts: Counter
) -> Iterator[dict]:
    """Yield the segments of an image with their RLE instead of their box."""
    from pdlm_hf.regions.readers import from_panoptic

    for annotation in annotations:
        name, segments = annotation.get("file_name"), annotation.get("segments_info")
        if not isinstance(name, str) or not isinstance(segments, list) or not all(map(_is_segment, segments)):
            raise DataError(
                f"{path}: {place}: its annotation is none of COCO panoptic, which has `file_name` and "
                "`segments_info`, a list of objects with an `id`."
            )
        found = from_panoptic(folder / Path(name).name, segments)
        counts["segments without a pixel"] += len(segments) - len(found)
        yield from ({**segment, "bbox": None} for segment in found)


def _is_segment(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("id"), int)


# ---------------------------------------------------------------------------------------------------- others


def dam_rows(path: Path, images: Path | None) -> Iterator[PlacedRow]:
    """Read an `annotations.json` of the Describe Anything data set, one row per image.

    The file is `{img_id: [{"ann_id", "image", "mask_rle", "caption", ...}]}`. Its images are in the tar files beside
    it. If the folder `images` has no file of the full name, the last part of the name and the name without leading
    zeros are tried.
    """
    data = _read_json(path)
    if not all(isinstance(regions, list) for regions in data.values()):
        raise DataError(f"{path}: expected {{img_id: [regions]}}, an annotations.json of describe-anything-dataset.")
    for image_id, own in data.items():
        regions = []
        for k, region in enumerate(own):
            sound = isinstance(region, dict) and {"ann_id", "caption"} <= region.keys()
            shape = _text_rle(region.get("mask_rle")) if sound and isinstance(region.get("image"), str) else None
            if shape is None:
                expected = "an object with ann_id, image, mask_rle (`size` and `counts`) and caption"
                raise DataError(f"{path}: {image_id}[{k}]: got {region!r:.80}, expected {expected}.")
            regions.append({"id": region["ann_id"], "segmentation": shape, "caption": region["caption"]})
        yield image_id, {"image": _find_image(own[0]["image"], images) if own else image_id, "regions": regions}


def _find_image(name: str, images: Path | None) -> str:
    last = Path(name).name
    short = Path(last).stem.lstrip("0") + Path(last).suffix
    for candidate in (name, last, short):
        if images is not None and (images / candidate).is_file():
            return candidate
    return name


def gar_rows(source: Source, counts: Counter) -> Iterator[PlacedRow]:
    """Read rows of the Grasp Any Region data set.

    They are `{"image", "mask_rle", "conversations"}`; the k-th answer describes the k-th mask, and a row without masks
    is about the whole image. Questions about relations (with <Prompt0>) are left out, since their answers are no
    captions.
    """
    for number, raw in raw_rows(source):
        if isinstance(raw, RowError):
            raise raw
        turns = raw.get("conversations") if isinstance(raw, dict) else None
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            expected = "a list of turns, as in Grasp-Any-Region-Dataset"
            raise RowError(Fault(number, "conversations", "wrong type", f"{turns!r:.60}", expected))
        if any(_PROMPT.search(str(turn.get("value"))) for turn in turns):
            counts["rows about relations"] += 1
            continue
        captions = [turn.get("value") for turn in turns if turn.get("from") == "gpt"]
        masks = raw.get("mask_rle")
        masks = [None] * len(captions) if masks in (None, []) else masks if isinstance(masks, list) else [masks]
        if len(masks) != len(captions):
            got = f"{len(masks)} masks and {len(captions)} answers"
            raise RowError(Fault(number, "mask_rle", "wrong length", got, "one answer for each mask"))
        regions = []
        for k, (mask, text) in enumerate(zip(masks, captions, strict=True)):
            shape = {"bbox": WHOLE} if mask is None else {"segmentation": _text_rle(mask)}
            if None in shape.values():
                expected = "an RLE with `size` and `counts`, or null for the whole image"
                raise RowError(Fault(number, f"mask_rle[{k}]", "broken RLE", f"{mask!r:.60}", expected))
            regions.append({"id": k, **shape, "caption": text})
        yield f"row {number}", {"image": raw.get("image"), "regions": regions}


def reference_rows(source: Source) -> Iterator[PlacedRow]:
    """Read rows of the reference's training json, or of any source that [`~data.RegionDataset`] reads."""
    for number, raw in raw_rows(source):
        yield f"row {number}", sound_row(raw, number)


def _text_rle(rle: Any) -> dict[str, Any] | None:
    """An RLE with its counts as text; None if it is none."""
    if not is_rle(rle):
        return None
    counts = rle["counts"]
    # the counts of compressed RLE are ASCII; other bytes become a fault when the mask is decoded
    return {"size": list(rle["size"]), "counts": counts.decode("latin-1") if isinstance(counts, bytes) else counts}


def _read_json(path: Path) -> dict:
    data = load_json(path)
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(data).__name__}.")
    return data
