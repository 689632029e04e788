"""Conversion of other annotation files into region data (JSONL), and a split by image."""

import base64
import csv
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pdlm_hf.errors_pdlm import DataError, SettingError
from pdlm_hf.regions.coco import CocoIndex
from pdlm_hf.regions.files import load_json

from .rows import WHOLE, Fault, RowError, check_row, sound_row
from .sources import Source, find_source, raw_rows

FORMS = ("coco-instances", "coco-panoptic", "dam", "gar", "reference")

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
        source (`str` or `Path`): the annotation file, or for "gar" and "reference" also a saved `datasets` folder.
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
    else:
        found = find_source(source, images)
        rows, folder = gar_rows(found, counts) if form == "gar" else reference_rows(found), found.own_folder
    start = None if images is not None else folder
    write_rows(out, count_rows((relocated(row, start, out.parent) for row in rows), counts))
    return counts


def count_rows(rows: Iterable[dict], counts: Counter) -> Iterator[dict]:
    """Check and count rows, and leave out those without regions.

    Raises:
        RowError: a row has a fault.
    """
    for number, row in enumerate(rows, 1):
        if not row["regions"]:
            counts["rows without regions"] += 1
            continue
        for fault in check_row(row, number):
            raise RowError(fault)
        counts["rows"] += 1
        counts["regions"] += len(row["regions"])
        yield row


def write_rows(out: Path, rows: Iterable[dict]) -> None:
    """Write a JSONL file in one piece: if writing fails, an earlier file is unchanged.

    Raises:
        SettingError: the folder does not exist.
    """
    if not out.parent.is_dir():
        raise SettingError(f"{out}: there is no folder {out.parent}.")
    part = out.with_name(f"{out.name}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


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
) -> Iterator[dict]:
    """Yield a row for each image of a COCO instances file or, with a folder of PNG files, of a panoptic file."""
    index = CocoIndex.read(path, needed=("id",) if png_folder is None else ())
    index.check()
    for image_id, own in index.annotations.items():
        regions = []
        for segment in own if png_folder is None else _panoptic_segments(path, own, png_folder, counts):
            category = index.categories.get(segment.get("category_id"))
            caption = captions(image_id, segment["id"], category)
            if segment.get("iscrowd") and not crowds:
                counts["crowd regions"] += 1
            elif caption is None:
                counts["regions without a caption"] += 1
            else:
                shape = {key: segment[key] for key in ("segmentation", "bbox") if segment.get(key)}
                extra = {} if category is None else {"category": category}
                regions.append({"id": segment["id"], **shape, "caption": caption, **extra})
        if own:
            image = index.images[image_id]
            size = {key: image[key] for key in ("width", "height") if key in image}
            yield {"image": image["file_name"], "regions": regions, **size}


def _panoptic_segments(path: Path, annotations: list[dict], folder: Path, counts: Counter) -> Iterator[dict]:
    """Yield the segments of an image with their RLE instead of their box."""
    from pdlm_hf.regions.readers import from_panoptic

    for annotation in annotations:
        name, segments = annotation.get("file_name"), annotation.get("segments_info")
        if not isinstance(name, str) or not isinstance(segments, list):
            raise DataError(f"{path}: is no COCO panoptic file: an annotation lacks `file_name` or `segments_info`.")
        found = from_panoptic(folder / Path(name).name, segments)
        counts["segments without a pixel"] += len(segments) - len(found)
        yield from ({**segment, "bbox": None} for segment in found)


# ---------------------------------------------------------------------------------------------------- others


def dam_rows(path: Path, images: Path | None) -> Iterator[dict]:
    """Read an `annotations.json` of the Describe Anything data set, one row per image.

    The file is `{img_id: [{"ann_id", "image", "mask_rle", "caption", ...}]}`. Its images are in the tar files beside
    it. If the folder `images` has no file of the full name, the last part of the name and the name without leading
    zeros are tried.
    """
    data = _read_json(path)
    if not all(isinstance(regions, list) for regions in data.values()):
        raise DataError(f"{path}: expected {{img_id: [regions]}}, an annotations.json of describe-anything-dataset.")
    for image_id, own in data.items():
        try:
            regions = [
                {"id": r["ann_id"], "segmentation": _text_rle(r["mask_rle"]), "caption": r["caption"]} for r in own
            ]
            yield {"image": _find_image(own[0]["image"], images) if own else image_id, "regions": regions}
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: {image_id}: expected ann_id, image, mask_rle, caption ({error!r}).") from None


def _find_image(name: str, images: Path | None) -> str:
    last = Path(name).name
    short = Path(last).stem.lstrip("0") + Path(last).suffix
    for candidate in (name, last, short):
        if images is not None and (images / candidate).is_file():
            return candidate
    return name


def gar_rows(source: Source, counts: Counter) -> Iterator[dict]:
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
        masks = [None] * len(captions) if not masks else [masks] if isinstance(masks, dict) else masks
        if len(masks) != len(captions):
            got = f"{len(masks)} masks and {len(captions)} answers"
            raise RowError(Fault(number, "mask_rle", "wrong length", got, "one answer for each mask"))
        shapes = [{"bbox": WHOLE} if mask is None else {"segmentation": _text_rle(mask)} for mask in masks]
        pairs = enumerate(zip(shapes, captions, strict=True))
        yield {
            "image": raw.get("image"),
            "regions": [{"id": k, **shape, "caption": text} for k, (shape, text) in pairs],
        }


def reference_rows(source: Source) -> Iterator[dict]:
    """Read rows of the reference's training json, or of any source that [`~data.RegionDataset`] reads."""
    for number, raw in raw_rows(source):
        yield sound_row(raw, number)


def _text_rle(rle: dict) -> dict:
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def _read_json(path: Path) -> dict:
    data = load_json(path)
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(data).__name__}.")
    return data


# ---------------------------------------------------------------------------------------------------- split


def split(
    source: str | Path, train: Path, held_out: Path, share: float = 0.05, seed: int = 0, images: Path | None = None
) -> tuple[Counter, Counter]:
    """Split region data into two files without a common image. The rows are read twice.

    Args:
        source (`str` or `Path`): any data that [`~data.RegionDataset`] reads.
        train, held_out (`Path`): JSONL files to write.
        share (`float`): share of the images to hold out; at least one image, and not all of them.
        seed (`int`): the same images and seed give the same split, in whatever order the rows are.
        images (`Path`, *optional*): see [`convert`].

    Returns:
        numbers of "rows", "regions" and "images" in the two files.

    Raises:
        SettingError: the share is not possible, or two of the three files are the same.
        DataError: a row cannot be used, or there are fewer than two images.
    """
    if not 0 < share < 1:
        raise SettingError(f"The share to hold out must be between 0 and 1, got {share}.")
    found = find_source(source, images)
    if train.resolve() == held_out.resolve():
        raise SettingError(f"{train}: the two files must differ.")
    for out in (train, held_out):
        if found.path is not None and found.path.resolve() == out.resolve():
            raise SettingError(f"{out}: the split would read the file that it writes; choose another file.")
    counts: tuple[Counter, Counter] = (Counter(), Counter())
    keys = sorted({_image_key(row, found.folder) for row in reference_rows(found)})
    if len(keys) < 2:
        raise DataError(f"{source}: has {len(keys)} images; a split needs at least two.")
    random.Random(seed).shuffle(keys)
    number = min(max(1, round(share * len(keys))), len(keys) - 1)
    chosen = set(keys[:number])
    for out, count, wanted in ((train, counts[0], False), (held_out, counts[1], True)):
        rows = reference_rows(found)
        own = (row for row in rows if (_image_key(row, found.folder) in chosen) == wanted)
        write_rows(out, count_rows((relocated(row, found.own_folder, out.parent) for row in own), count))
        count["images"] = number if wanted else len(keys) - number
    return counts


def _image_key(row: dict, folder: Path | None) -> str:
    """A key of the image that does not depend on how its path is written."""
    image = row["image"]
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else base64.b64encode(image["bytes"]).decode()
    if image.startswith("data:") or folder is None:
        return image.removeprefix("data:base64,")
    return os.path.relpath(folder / image, folder)
