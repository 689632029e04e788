"""Captions of `pdlm batch` for annotation tools, in which a person corrects them: Label Studio, CVAT, FiftyOne."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..errors_pdlm import DataError, RegionError, SettingError
from .files import replacing, write_json, write_json_lists
from .formats.cvat import cvat_head, cvat_image, cvat_labels
from .formats.facts import ImageFacts
from .formats.fiftyone import fiftyone_sample
from .formats.label_studio import CONFIG, label_studio_task
from .region import parse_region
from .results import image_rows

LOCAL_FILES = "/data/local-files/?d="  # the address of images that Label Studio serves from its own disk

# An image and its regions: "id", "mask", "bbox", "caption", "score".
_Images = Iterable[tuple[ImageFacts, list[dict[str, Any]]]]


def export_captions(
    rows: Path, out: Path, form: str, address: str = LOCAL_FILES, damaged: Callable[[int, str], None] | None = None
) -> tuple[int, int, list[Path]]:
    """Write captions as a file that an annotation tool imports. Masks keep every pixel.

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
    files = write(_images(rows, groups), out, address)
    return len(groups), sum(map(len, groups)), files


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
            own = {"id": region.id, "mask": region.mask, "bbox": region.bbox}
            regions.append(own | {"caption": row["caption"], "score": row["score"]})
        yield image, regions


def _label_studio(images: _Images, out: Path, address: str) -> list[Path]:
    config = out.with_suffix(".config.xml")
    config.write_text(CONFIG, encoding="utf-8")
    write_json(out, [label_studio_task(image, regions, address) for image, regions in images])
    return [out, config]


def _cvat(images: _Images, out: Path, address: str) -> list[Path]:
    labels = out.with_suffix(".labels.json")
    with replacing(out) as file:
        file.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n')
        for element in _cvat_elements(images):
            ElementTree.indent(element)
            file.write(ElementTree.tostring(element, "unicode") + "\n")
        file.write("</annotations>\n")
    write_json(labels, cvat_labels())
    return [out, labels]


def _cvat_elements(images: _Images) -> Iterator[ElementTree.Element]:
    yield cvat_head()
    for number, (image, regions) in enumerate(images):
        yield cvat_image(number, image, regions)


def _fiftyone(images: _Images, out: Path, address: str) -> list[Path]:
    out.mkdir(exist_ok=True)
    samples, metadata = out / "samples.json", out / "metadata.json"
    write_json_lists(samples, {"samples": (fiftyone_sample(image, regions) for image, regions in images)})
    write_json(metadata, {"media_type": "image"})
    return [samples, metadata]


# Forms, each with the ending of its file and the function that writes it.
EXPORTS: dict[str, tuple[str, Callable[[_Images, Path, str], list[Path]]]] = {
    "label-studio": (".json", _label_studio),
    "cvat": (".xml", _cvat),
    "fiftyone": ("", _fiftyone),
}
