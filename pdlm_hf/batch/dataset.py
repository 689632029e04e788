"""Data sets of regions: a COCO file, or a folder with a file of regions for each image."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from PIL import Image

from ..errors_pdlm import DataError, ImageError, NoRegionsError, SettingError
from ..regions.coco import CocoFault, CocoIndex, is_coco, is_panoptic, panoptic_segments
from ..regions.files import load_json
from ..regions.formats.facts import find_image, note
from ..regions.formats.label_map import is_hidden
from ..regions.images import orientation_of
from ..regions.readers import format_reader, read_region_file, region_id
from ..render.text import pluralize
from .checksums import mark_of_annotations, mark_of_file, mark_of_panoptic

# Endings of region files, in the order of preference.
_REGION_FILES = (".json", ".xml", ".txt", ".png", ".bmp", ".tif", ".tiff")

# Identifies a region in a data set: the id of its image and its own id.
Key = tuple[int | str, int | str]


@dataclass(frozen=True, slots=True)
class Entry:
    """An image of a data set.

    Args:
        id: id of the image in the data set.
        file_name (`str`): path of the image below the folder of images.
        path (`Path`, *optional*): path of the file; None for an image in object storage.
        read: returns the regions as pairs of id and a value for [`~pdlm_hf.regions.parse_region`]; raises PdlmError
            if they cannot be read.
        ids (`tuple`, *optional*): ids of the regions, if they are known without reading the regions.
        size (`tuple[int, int]`, *optional*): width and height in pixels, if the data set has them.
        data (`bytes`, *optional*): content of the file, once it has been read.
        mark (*optional*): returns a checksum of the regions, to notice that they have changed.
    """

    id: int | str
    file_name: str
    path: Path | None
    read: Callable[[], list[tuple[int | str, Any]]]
    ids: tuple[int | str, ...] | None = None
    size: tuple[int, int] | None = None
    data: bytes | None = None
    mark: Callable[[], int] | None = None


@dataclass(frozen=True)
class DataSet:
    """Images with regions.

    Args:
        entries (`list[Entry]`): the images that have regions.
        faults (`list[dict]`): faults of the file, see [`fault`].
        coco (`dict`, *optional*): content of the COCO file, if it is one.
    """

    entries: list[Entry]
    faults: list[dict[str, Any]]
    coco: dict[str, Any] | None = None

    def with_captions(self, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Make a COCO file with `caption` and `score` on every annotation that has a row, and with the values of its
        `attributes`. The COCO file of a folder has only these annotations. Its lists are iterators, to be read once
        and in order, see [`~pdlm_hf.regions.files.write_json_lists`].

        Args:
            rows: rows of captions, as [`run_batch`] writes them.
        """
        if self.coco is not None:
            said = {
                (row["image_id"], row["annotation_id"]): {"caption": row["caption"], "score": row["score"]}
                | _values(row)
                for row in rows
            }
            return {**self.coco, "annotations": (_captioned(entry, said) for entry in self.coco["annotations"])}
        shown: dict[Any, dict] = {}

        def annotations() -> Iterator[dict[str, Any]]:
            for row in rows:
                height, width = row["segmentation"]["size"]
                image = {"id": row["image_id"], "file_name": row["file_name"], "width": width, "height": height}
                shown.setdefault(row["image_id"], image)
                fields = {name: row[name] for name in ("image_id", "segmentation", "bbox", "caption", "score")}
                yield {"id": row["annotation_id"], **fields, **_values(row)}

        def images() -> Iterator[dict[str, Any]]:
            yield from shown.values()  # all of them are known when the annotations have been read

        return {"annotations": annotations(), "images": images(), "categories": []}


def _values(row: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a row, by name; nothing if it has none."""
    found = row.get("attributes")
    return {"attributes": {name: value["value"] for name, value in found.items()}} if found else {}


def _captioned(annotation: Any, said: dict[Key, dict[str, Any]]) -> Any:
    """The annotation with its caption; of two with the same ids only the first was captioned."""
    try:
        if "segments_info" in annotation:
            own = annotation["image_id"]
            segments = [_joined(part, said.pop((own, part["id"]), {})) for part in annotation["segments_info"]]
            return {**annotation, "segments_info": segments}
        return _joined(annotation, said.pop((annotation["image_id"], annotation["id"])))
    except (TypeError, LookupError):  # its ids are a fault, or it has no caption
        return annotation


def _joined(annotation: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The annotation with what was found; attributes that it has already, as those of CVAT, stay beside new ones."""
    own = annotation.get("attributes")
    joined = {"attributes": own | found["attributes"]} if isinstance(own, dict) and "attributes" in found else {}
    return {**annotation, **found, **joined}


def is_url(images: str | Path | None) -> TypeGuard[str]:
    """Whether images are in object storage, for example `s3://bucket/folder`."""
    return isinstance(images, str) and "://" in images


def open_data(data: Path, images: Path | str | None = None, format: str | None = None) -> DataSet:
    """Read a data set, without opening its images.

    Args:
        data (`Path`): a COCO file (also a panoptic one, with its PNG files), or a folder that has for an image
            `a/b.jpg` a file that [`~pdlm_hf.regions.read_region_file`] reads: `a/b.json`, `a/b.xml`, `a/b.txt` or
            `a/b.png`; or mask images `a/b/*`.
        images (`Path` or `str`, *optional*): folder of the images, or the URL of a folder in object storage (only
            with a COCO file; the images are not looked for). Default: the folder of the data.
        format (`str`, *optional*): of the files in a folder, a key of [`~pdlm_hf.regions.FORMATS`].

    Raises:
        DataError: a file or folder does not exist, the file is not a COCO file, or no image has regions.
        SettingError: there is no such format, or the data is no folder.
    """
    if format is not None:
        format_reader(format)
        if not data.is_dir():
            raise SettingError(f"--format {format}: is about the files of a folder; {data} is read as COCO.")
    if is_url(images):
        return _open_stored(data, images)
    folder = Path(images) if images else (data if data.is_dir() else data.parent)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder of images.")
    found = _open_folder(data, folder, format) if data.is_dir() else _open_coco(data, folder)
    if not found.entries and not found.faults:
        raise DataError(f"{data}: no image in {folder} has regions here.")
    if found.entries and not any(entry.path is not None and entry.path.is_file() for entry in found.entries):
        first, count = found.entries[0], len(found.entries)
        raise DataError(f"{folder}: has none of the {count} images, {first.file_name} for example; see --images.")
    return found


def _open_stored(data: Path, images: str) -> DataSet:
    if data.is_dir():
        raise DataError(f"{data}: for images in object storage the data must be a COCO file, not a folder.")
    found = _open_coco(data, Path())
    if not found.entries and not found.faults:
        raise DataError(f"{data}: has no image with regions.")
    return replace(found, entries=[replace(entry, path=None) for entry in found.entries])


def image_size(path: Path) -> tuple[int, int]:
    """Read width and height of an image file from its header, with the EXIF orientation applied.

    Raises:
        ImageError: the file cannot be opened.
    """
    try:
        with Image.open(path) as image:
            return image.size[::-1] if orientation_of(image) >= 5 else image.size
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: cannot be opened as an image ({error}).") from None


def _open_coco(path: Path, folder: Path) -> DataSet:
    known = path.suffix.lower() not in (".xml", ".txt", ".csv")
    data = load_json(path) if known else None
    if not is_coco(data):
        raise DataError(
            f'{path}: expected a COCO file, {{"images": [...], "annotations": [...]}}. The images of another format '
            "are read from a folder with one file for each, a/b.json or a/b.xml for a/b.jpg; or export them as COCO."
        )
    panoptic = is_panoptic(data)  # its annotations have no ids, its segments have
    index = CocoIndex(data, path, needed=() if panoptic else ("id",))
    faults = []
    for found in index.faults:
        if found.part == "images" and found.key != "file_name":
            raise DataError(f"{path}: {found}.")  # without its id an image has no annotations
        faults.append(_coco_fault(found, index))
    entries = []
    for image_id, image in index.images.items():
        name, annotations = image.get("file_name"), index.annotations[image_id]
        if annotations and isinstance(name, str) and name:
            name = find_image(folder, name)
            read: Callable[[], list[tuple[int | str, Any]]]
            if panoptic:
                read, ids = partial(_read_panoptic, path, annotations), None
                mark = partial(mark_of_panoptic, path, annotations)
            else:
                read, ids = partial(_pairs, annotations), tuple(annotation["id"] for annotation in annotations)
                mark = partial(mark_of_annotations, annotations)
            entries.append(Entry(image_id, name, folder / name, read, ids, _size_of(image), mark=mark))
    return DataSet(entries, faults, index.data)


def _pairs(annotations: list[dict[str, Any]]) -> list[tuple[int | str, Any]]:
    return [(annotation["id"], annotation) for annotation in annotations]


def _read_panoptic(path: Path, annotations: list[dict[str, Any]]) -> list[tuple[int | str, Any]]:
    return [(segment["id"], segment) for entry in annotations for segment in panoptic_segments(path, entry)]


def _coco_fault(found: CocoFault, index: CocoIndex) -> dict[str, Any]:
    entry = found.entry if isinstance(found.entry, dict) else {}
    if found.part == "images":
        return fault(entry["id"], None, None, found)
    image_id, own = entry.get("image_id"), entry.get("id")
    if not isinstance(image_id, (int, str)) or not isinstance(own, (int, str)):
        return fault(None, None, None, found)  # an image's id without a region's means the whole image
    return fault(image_id, own, index.images.get(image_id, {}).get("file_name"), found)


def _size_of(image: dict[str, Any]) -> tuple[int, int] | None:
    """Width and height of an image, if the data set has them."""
    width, height = image.get("width"), image.get("height")
    if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
        return width, height
    return None


def fault(image_id: Any, annotation_id: Any, file_name: str | None, reason: Any) -> dict[str, Any]:
    """Make a row about a region without caption, or with `annotation_id` None about a whole image."""
    return {"image_id": image_id, "annotation_id": annotation_id, "file_name": file_name, "reason": str(reason)}


def image_paths(folder: Path) -> list[Path]:
    """The images in a folder and below it, by their endings, without hidden ones."""
    Image.init()
    endings = {ending for ending, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())
    names = [path.relative_to(folder) for path in paths]
    hidden = [any(map(is_hidden, (name, *name.parents[:-1]))) for name in names]
    return [path for path, skip in zip(paths, hidden, strict=True) if not skip]


def _open_folder(data: Path, folder: Path, format: str | None) -> DataSet:
    entries, used = [], set()
    for path in image_paths(folder):
        name = path.relative_to(folder)
        source = _region_source(data / name, path)
        if source is not None:
            used.add(source)
            read = partial(_read_source, source, path, name, format)
            mark = partial(mark_of_file, source)
            entries.append(Entry(name.as_posix(), name.as_posix(), path, read, mark=mark))
    if others := _without_image(used):
        shown = f"{others[0].relative_to(data)} for example"
        note(
            f"no image {data}",
            f"{data}: {pluralize(len(others), 'file')} of regions without an image in {folder}, {shown}",
        )
    return DataSet(entries, [])


def _without_image(used: set[Path]) -> list[Path]:
    """Region files beside those that are used, that belong to no image. `classes.txt` lists the names of YOLO."""
    known = {source.with_suffix("") for source in used}
    return [
        path
        for folder in sorted({source.parent for source in used})
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in (".json", ".xml", ".txt") and path.with_suffix("") not in known
        if not is_hidden(path) and path.name != "classes.txt" and path.is_file()
    ]


def _region_source(place: Path, image: Path) -> Path | None:
    """Find the file or folder with the regions of an image."""
    for ending in _REGION_FILES:
        path = place.with_suffix(ending)
        if path != image and path.is_file():
            return path
    folder = place.with_suffix("")
    return folder if folder.is_dir() else None


def _read_source(source: Path, image: Path, name: Path, format: str | None) -> list[tuple[int | str, Any]]:
    try:
        found = read_region_file(source, name.as_posix(), *image_size(image), format, image.stat().st_size)
    except NoRegionsError:  # an image of the background, say
        return []
    # here an id is unique within its image, COCO's ids are unique within the data set
    values: list[tuple[int | str, Any]] = []
    seen: dict[str, int] = {}
    for position, value in enumerate(found):
        given = region_id(value, position)
        own = f"{name.as_posix()}#{given}"
        if own in seen:
            raise DataError(f"{source}: the regions {seen[own]} and {position} have the same id {given!r:.40}.")
        seen[own] = position
        values.append((own, value))
    return values
