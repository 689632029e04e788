"""Captions and attributes that a person has corrected in Label Studio, CVAT or FiftyOne, as region data."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdlm_hf.regions.files import load_json
from pdlm_hf.regions.formats.cvat import cvat_images
from pdlm_hf.regions.formats.facts import LABEL
from pdlm_hf.regions.formats.fiftyone import fiftyone_images
from pdlm_hf.regions.formats.label_studio import corrected_tasks
from pdlm_hf.regions.formats.xml import read_xml

from .rows import attribute_faults

CORRECTED = ("label-studio", "cvat", "fiftyone")

# A row, and where it is in the source: in messages, before the fault.
PlacedRow = tuple[str, dict[str, Any]]


def corrected_rows(path: Path, form: str, counts: Counter) -> Iterator[PlacedRow]:
    """Yield a row for each image of an annotation tool's export, with the regions that have a caption or attributes.

    Args:
        path (`Path`): the file that the tool exported; of FiftyOne the folder.
        form (`str`): one of [`CORRECTED`].
        counts (`Counter`): what is left out is counted here.

    Raises:
        DataError: the file does not exist, or is not valid JSON.
        RegionError: the file is another one, or a region cannot be read.
    """
    for place, image, found in _images(path, form):
        if found is None:
            counts["images that nobody has submitted"] += 1
            continue
        regions = []
        for region in found:
            caption = " ".join(region.get("caption", "").split())
            attributes = dict(_attributes(region.get("attributes", {}), counts))
            if not caption and not attributes:
                counts["regions without a caption"] += 1
                continue
            names: tuple[str, ...] = ("id", "segmentation", "bbox", "category")
            kept = {key: region[key] for key in names if key in region}
            if kept.get("category") in (None, LABEL):
                kept.pop("category", None)
            taught = {"caption": caption, "attributes": attributes}
            regions.append(kept | {key: value for key, value in taught.items() if value})
        size = {"width": image.width, "height": image.height} if image.width else {}
        yield place, {"image": image.name, "regions": regions} | size


def _attributes(given: dict[str, Any], counts: Counter) -> Iterator[tuple[str, Any]]:
    """Names and values of the attributes that can be taught, each in one line."""
    for name, value in given.items():
        value = " ".join(value.splitlines()).strip() if isinstance(value, str) else value
        if any(attribute_faults({name: value}, "", 0)):
            counts[f"values of the attribute {name!r:.60}, too long or of a form that cannot be taught"] += 1
        else:
            yield name, value


def _images(path: Path, form: str) -> Iterator[tuple[str, Any, list[dict[str, Any]] | None]]:
    if form == "label-studio":
        return corrected_tasks(load_json(path), str(path))
    if form == "cvat":
        return cvat_images(read_xml(path), str(path))
    path = path / "samples.json" if path.is_dir() else path
    return fiftyone_images(load_json(path), str(path))
