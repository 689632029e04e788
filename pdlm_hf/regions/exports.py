"""Captions and attributes of `pdlm batch` for annotation tools, in which a person corrects them: Label Studio, CVAT,
FiftyOne."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..errors_pdlm import DataError, RegionError, SettingError
from ..templates_pdlm import text_of
from .files import replacing, write_json, write_json_lists
from .formats.cvat import cvat_head, cvat_image, cvat_labels
from .formats.facts import CAPTION, ImageFacts
from .formats.fiftyone import DETECTION, fiftyone_sample
from .formats.label_studio import label_studio_config, label_studio_task
from .region import parse_region
from .results import image_rows

LOCAL_FILES = "/data/local-files/?d="  # the address of images that Label Studio serves from its own disk

# An image and its regions: "id", "mask", "bbox", "score", and "values", texts by name (None: unknown).
_Images = Iterable[tuple[ImageFacts, list[dict[str, Any]]]]
# What regions have values of, with its choices; free texts, of which the caption is one, have none.
Fields = dict[str, list[str]]


def export_captions(
    rows: Path, out: Path, form: str, address: str = LOCAL_FILES, damaged: Callable[[int, str], None] | None = None
) -> tuple[int, int, list[Path]]:
    """Write captions as a file that an annotation tool imports. Masks keep every pixel. Regions whose attributes were
    read have these instead: their captions are only a sentence of them.

    Args:
        rows (`Path`): OUT.jsonl of `pdlm batch`.
        out (`Path`): the file; for "fiftyone" a folder.
        form (`str`): one of [`EXPORTS`].
        address (`str`): of the images in Label Studio, before their names.
        damaged (*optional*): called with number and fault of a damaged row, which is left out; see
            [`~pdlm_hf.regions.files.read_rows`].

    Returns:
        numbers of images and regions, and the files written.

    Raises:
        DataError: no rows, or a damaged one, or the masks of an image have different sizes.
        SettingError: there is no such form, or the name or folder of `out` cannot be used.
        OSError: a file cannot be written.
    """
    if form not in EXPORTS:
        raise SettingError(f"--to {form}: expected one of {', '.join(EXPORTS)}.")
    ending, write = EXPORTS[form]
    if out.suffix.lower() != ending:
        raise SettingError(f"{out}: {form} is written to {f'a {ending} file' if ending else 'a folder'}.")
    if not out.parent.is_dir():
        raise SettingError(f"{out}: there is no folder {out.parent}.")
    if not rows.is_file():
        raise DataError(f"{rows}: no such file.")
    groups = image_rows(rows, damaged=damaged)
    if not groups:
        raise DataError(f"{rows}: has no rows of `pdlm batch`.")
    attributes = _attributes(groups)
    if taken := [name for name in attributes if _is_taken(name, form)]:
        raise SettingError(
            f"{rows}: {form} cannot have an attribute {taken[0]!r:.60}; name it otherwise in the schema."
        )
    captions: Fields = {} if all(row.get("attributes") for group in groups for row in group) else {CAPTION: []}
    files = write(_images(rows, groups), out, address, captions | attributes)
    return len(groups), sum(map(len, groups)), files


def _is_taken(name: str, form: str) -> bool:
    """Whether a name cannot be that of an attribute, since it has a meaning of its own."""
    return name == CAPTION or (form == "fiftyone" and (name in DETECTION or name[:1] in "_$" or "." in name))


def _attributes(groups: list[list[dict[str, Any]]]) -> Fields:
    """The attributes of the rows with their choices, in the order of the schema."""
    found: dict[str, dict[str | None, None]] = {}
    for row in (row for group in groups for row in group):
        for name, read in (row.get("attributes") or {}).items():
            choices = found.setdefault(name, {})
            if read.get("probabilities"):
                choices.update(dict.fromkeys([*read["probabilities"], _text(read["value"])]))
    return {name: [choice for choice in choices if choice is not None] for name, choices in found.items()}


def _text(value: Any) -> str | None:
    return None if value is None else text_of(value)


def _images(path: Path, groups: list[list[dict[str, Any]]]) -> _Images:
    for group in groups:
        height, width = group[0]["segmentation"]["size"]
        image = ImageFacts(group[0]["file_name"], width, height)
        regions = []
        for row in group:
            try:
                region = parse_region(row["segmentation"], width, height, row["annotation_id"])
            except RegionError as error:
                raise DataError(f"{path}: {image.name}: {error}") from None
            read = row.get("attributes") or {CAPTION: {"value": row["caption"]}}
            values = {name: _text(one["value"]) for name, one in read.items()}
            own = {"id": region.id, "mask": region.mask, "bbox": region.bbox, "score": row["score"]}
            regions.append(own | {"values": values})
        yield image, regions


def _label_studio(images: _Images, out: Path, address: str, fields: Fields) -> list[Path]:
    config = out.with_suffix(".config.xml")
    tasks = [label_studio_task(image, regions, address, fields) for image, regions in images]
    config.write_text(label_studio_config(fields), encoding="utf-8")
    write_json(out, tasks)
    return [out, config]


def _cvat(images: _Images, out: Path, address: str, fields: Fields) -> list[Path]:
    labels = out.with_suffix(".labels.json")
    with replacing(out) as file:
        file.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n')
        for element in _cvat_elements(images, fields):
            ElementTree.indent(element)
            file.write(ElementTree.tostring(element, "unicode") + "\n")
        file.write("</annotations>\n")
    write_json(labels, cvat_labels(fields))
    return [out, labels]


def _cvat_elements(images: _Images, fields: Fields) -> Iterator[ElementTree.Element]:
    yield cvat_head(fields)
    for number, (image, regions) in enumerate(images):
        yield cvat_image(number, image, regions)


def _fiftyone(images: _Images, out: Path, address: str, fields: Fields) -> list[Path]:
    out.mkdir(exist_ok=True)
    samples, metadata = out / "samples.json", out / "metadata.json"
    write_json_lists(samples, {"samples": (fiftyone_sample(image, regions) for image, regions in images)})
    write_json(metadata, {"media_type": "image"})
    return [samples, metadata]


# Forms, each with the ending of its file and the function that writes it.
EXPORTS: dict[str, tuple[str, Callable[[_Images, Path, str, Fields], list[Path]]]] = {
    "label-studio": (".json", _label_studio),
    "cvat": (".xml", _cvat),
    "fiftyone": ("", _fiftyone),
}
