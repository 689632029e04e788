"""The regions of a folder of images that nobody has marked, found before they are captioned; a stopped run is resumed.

OUT.found.jsonl gets a row for every image as soon as its regions are found, OUT.found.run.json has the settings. At
the end OUT.found.json is a COCO file of all images and regions, which is captioned as any other. The regions of an
image that was replaced are found again; if they have captions, the run is refused first.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors_pdlm import DataError, PdlmError, SettingError
from ..regions.files import append_rows, check_same_settings, load_json, read_rows, write_json
from ..regions.finding.finder import RegionFinder
from ..regions.finding.selection import FoundRegion
from ..regions.images import load_image
from .checksums import is_same_look, look_of
from .dataset import DataSet, fault, image_paths, open_data
from .engines import prefetch
from .sources import looks_before, refuse_changed

_AHEAD = 8  # images opened in advance
_MOST = 1000  # more than an image has regions: makes the ids of regions of the ids of images


def find_data(
    folder: Path,
    open_finder: Callable[[], RegionFinder],
    settings: dict[str, Any],
    out: Path,
    progress: Callable[[int, int], None] | None = None,
    captioned: Collection[Any] = (),
) -> DataSet:
    """Find the regions of all images of a folder.

    Args:
        folder (`Path`): images, also in folders below it.
        open_finder: loads what finds regions; called only if images are left.
        settings (`dict`): what the regions depend on; a run is resumed only with the same.
        out (`Path`): OUT.jsonl of the captions.
        progress (*optional*): called with the number of images that are done, and of all.
        captioned (*optional*): ids of the images that have captions in OUT.jsonl.

    Returns:
        a data set with these regions; images that cannot be opened are its faults.

    Raises:
        CheckpointError: a model is missing.
        DataError: there is no such folder, or no image in it; or an image that has captions was replaced.
        SettingError: regions were found with other settings before.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: to find regions, a folder of images is needed.")
    rows_path, report = out.with_suffix(".found.jsonl"), progress or (lambda done, of: None)
    names = [path.relative_to(folder).as_posix() for path in image_paths(folder)]
    if not names:
        raise DataError(f"{folder}: has no images.")
    if rows_path.exists() and rows_path.stat().st_size:
        check_same_settings(load_json(out.with_suffix(".found.run.json")), settings, rows_path)
    rows = {row["file_name"]: row for row in read_rows(rows_path, repair=True)}
    replaced = _replaced(folder, rows, out, set(names), captioned)
    write_json(out.with_suffix(".found.run.json"), settings)
    faults = []
    left = [name for name in names if name not in rows or name in replaced]
    finder = open_finder() if left else None
    number = max((row["id"] for row in rows.values()), default=0)
    report(len(names) - len(left), len(names))
    for done, (name, image) in enumerate(prefetch(lambda name: _open(folder, name), left, _AHEAD), 1):
        try:
            if isinstance(image, Exception):
                raise image
            found = finder(image) if finder is not None else []
        except SettingError:  # of words that this model does not know: no image can be searched
            raise
        except (PdlmError, OSError) as error:
            faults.append(fault(name, None, name, error))
            rows.pop(name, None)  # of what the image was
        else:
            number += name not in rows
            own = rows[name]["id"] if name in rows else number
            rows[name] = _row(own, name, image, found) | {"file": look_of(folder / name)}
            append_rows(rows_path, [rows[name]])
        report(len(names) - len(left) + done, len(names))
    path = out.with_suffix(".found.json")
    write_json(path, coco := _as_coco([rows[name] for name in names if name in rows]))
    if not coco["annotations"]:
        return DataSet([], faults, coco)
    data = open_data(path, folder)
    return replace(data, faults=[*data.faults, *faults])


def _replaced(
    folder: Path, rows: dict[str, dict[str, Any]], out: Path, names: set[str], captioned: Collection[Any]
) -> set[str]:
    """Names of images that were replaced after their regions were found. Raises: DataError: one has captions."""
    before = looks_before(out.with_suffix(".sources.jsonl"))  # rows of earlier versions have no "file"
    found = {}
    for name, row in rows.items():
        was = row.get("file") or before.get(row["id"])
        if name in names and not is_same_look(was, look_of(folder / name)):
            found[name] = row["id"]
    refuse_changed(out, [f"the image {name}" for name, own in found.items() if own in captioned])
    return set(found)


def _open(folder: Path, name: str) -> tuple[str, Image.Image | Exception]:
    """The image, or why it cannot be opened."""
    try:
        return name, load_image(folder / name)
    except (PdlmError, OSError) as error:
        return name, error


def _row(number: int, name: str, image: Image.Image, found: list[FoundRegion]) -> dict[str, Any]:
    regions = [
        {"segmentation": region.segmentation, "mask_score": round(region.score, 4)}
        | ({} if region.name is None else {"name": region.name})
        for region in found
    ]
    return {"id": number, "file_name": name, "width": image.width, "height": image.height, "regions": regions}


def _as_coco(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A COCO file of found regions. Their names are its categories; regions without a name are of the category
    "region"."""
    names = {region.get("name", "region"): None for row in rows for region in row["regions"]}
    categories = {name: k for k, name in enumerate(names, 1)}
    annotations = []
    for row in rows:
        for k, shape in enumerate(row["regions"]):
            region = FoundRegion(shape["segmentation"])
            place = {"id": row["id"] * _MOST + k, "image_id": row["id"], "bbox": region.as_region(k).bbox}
            size = {"area": region.area, "iscrowd": 0, "category_id": categories[shape.get("name", "region")]}
            annotations.append({**place, **size, **shape})
    return {
        "images": [{key: row[key] for key in ("id", "file_name", "width", "height")} for row in rows],
        "annotations": annotations,
        "categories": [{"id": k, "name": name} for name, k in categories.items()],
    }
