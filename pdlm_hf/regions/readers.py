"""Read the regions of an image from a file, whatever tool wrote it.

The format is the one that the file's own content shows, or the one that is named; each has its module in `formats`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..errors_pdlm import RegionError, SettingError
from .coco import regions_in
from .files import load_json
from .formats.cvat import from_cvat
from .formats.detections import from_sam, from_supervision
from .formats.dota import from_dota, is_dota
from .formats.facts import ImageFacts
from .formats.fiftyone import from_fiftyone, is_fiftyone
from .formats.label_map import from_label_map, from_panoptic, mask_files
from .formats.label_studio import from_label_studio, is_label_studio
from .formats.labelme import from_labelme
from .formats.via import from_via, is_via
from .formats.xml import from_labelme_xml, from_voc, read_xml
from .formats.yolo import FORMS, from_yolo
from .limits import check_mask_pixels
from .region import Region

__all__ = [
    "FORMATS",
    "from_label_map",
    "from_labelme",
    "from_panoptic",
    "from_sam",
    "from_supervision",
    "from_yolo",
    "read_region_file",
    "region_id",
]

_MOST_PIXELS = 2**31  # of the masks of an image together
_LOSSLESS = {".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}  # which keep labels intact
_Reader = Callable[[Path, ImageFacts], list[Any]]


def read_region_file(
    path: Path, image_name: str, width: int, height: int, format: str | None = None, image_bytes: int | None = None
) -> list[Any]:
    """Read the regions of one image from a file or folder of any of the [`FORMATS`].

    What the file states about the image, its name and its size, is compared. A file of several images gives the
    regions of this one.

    Args:
        path (`Path`): the file; or a folder of masks, one image file for each region.
        image_name (`str`): name of the image, perhaps with folders.
        width, height (`int`): of the image, in pixels.
        format (`str`, *optional*): a key of [`FORMATS`]; default: what the content shows.
        image_bytes (`int`, *optional*): size of the image's file, which VIA states.

    Returns:
        regions for [`~pdlm_hf.regions.parse_regions`]. A dict has "id", "segmentation" or "bbox", and where the format
        has them "category", "caption" and "score".

    Raises:
        DataError: the file does not exist or is not valid JSON.
        ImageError: a label map cannot be opened.
        RegionError: the file is of no known form or can be read in several ways, states another image or another size,
            or holds no regions for the image, or more than can be masks.
        SettingError: there is no such format.
    """
    image = ImageFacts(image_name, width, height, image_bytes)
    found = (_read_any if format is None else format_reader(format))(Path(path), image)
    check_mask_pixels(width, height, len(found), _MOST_PIXELS)
    return found


def _read_any(path: Path, image: ImageFacts) -> list[Any]:
    """Read a file of the format that its ending and its content show."""
    ending = path.suffix.lower()
    if path.is_dir():
        return mask_files(path)
    if ending == ".txt":
        return from_dota(path) if is_dota(path) else from_yolo(path, image.width, image.height)
    if ending == ".xml":
        return _read_xml(path, image)
    if ending in _LOSSLESS:
        return from_label_map(path, image=image)
    if ending in (".jpg", ".jpeg"):
        raise RegionError(f"{path}: JPEG changes the labels; save the label map as PNG, or give a mask with --mask.")
    if ending in (".csv", ".tsv", ".zip"):
        raise RegionError(
            f"{path}: {ending[1:].upper()} is not read; export JSON, XML or YOLO's text files, unpacked."
        )
    return _read_json(path, image)


def _read_json(path: Path, image: ImageFacts) -> list[Any]:
    data = load_json(path)
    if isinstance(data, dict) and isinstance(data.get("shapes"), list):
        return from_labelme(data, str(path), image)
    if is_via(data):
        return from_via(data, str(path), image)
    if is_fiftyone(data):
        return from_fiftyone(data, str(path), image)
    if is_label_studio(data):
        return from_label_studio(data, str(path), image)
    return regions_in(data, path, image)


def _read_xml(path: Path, image: ImageFacts) -> list[Any]:
    root = read_xml(path)
    if root.tag == "annotations":
        return from_cvat(root, str(path), image)
    if root.tag == "annotation":
        is_labelme = root.find("imagesize") is not None or root.find("object/polygon/pt") is not None
        return (from_labelme_xml if is_labelme else from_voc)(root, str(path), image)
    raise RegionError(
        f"{path}: expected <annotations> (CVAT for images) or <annotation> (PASCAL VOC), got <{root.tag:.40}>."
    )


def _read_yolo(path: Path, image: ImageFacts, form: str) -> list[Any]:
    return from_yolo(path, image.width, image.height, form)


FORMATS: dict[str, _Reader] = {
    "coco": lambda path, image: regions_in(load_json(path), path, image),
    "labelme": lambda path, image: from_labelme(path, image=image),
    "via": lambda path, image: from_via(load_json(path), str(path), image),
    "via-resaved": lambda path, image: from_via(load_json(path), str(path), image, resaved=True),
    "label-studio": lambda path, image: from_label_studio(load_json(path), str(path), image),
    "cvat": lambda path, image: from_cvat(read_xml(path), str(path), image),
    "fiftyone": lambda path, image: from_fiftyone(load_json(path), str(path), image),
    "dota": lambda path, image: from_dota(path),
    "labelme-xml": lambda path, image: from_labelme_xml(read_xml(path), str(path), image),
    "voc": lambda path, image: from_voc(read_xml(path), str(path), image, corners=False),
    "voc-corners": lambda path, image: from_voc(read_xml(path), str(path), image, corners=True),
    "label-map": lambda path, image: from_label_map(path, every=True, image=image),
    "masks": lambda path, image: mask_files(path),
    **{name: partial(_read_yolo, form=name) for name in FORMS},
}


def format_reader(name: str) -> _Reader:
    """The reader of a format. Raises: SettingError if there is none of this name."""
    if name not in FORMATS:
        raise SettingError(f"--format {name}: expected one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def region_id(value: Any, position: int) -> Any:
    """The id that a value of [`read_region_file`] has: its own, the name of a mask file, or else its position."""
    if isinstance(value, Path):
        return value.stem
    own = value.id if isinstance(value, Region) else value.get("id") if isinstance(value, dict) else None
    return position if own is None else own
