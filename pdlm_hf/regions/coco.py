"""COCO files: the images, the annotations of each image, and the faults of the file."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors_pdlm import DataError, NoRegionsError, RegionError
from .files import load_json
from .formats.facts import ImageFacts, base_name


@dataclass(frozen=True)
class CocoFault:
    """A fault in a COCO file.

    Args:
        part (`str`): the list: "images", "annotations" or "categories".
        number (`int`): position in this list, from 0.
        key (`str`): the field of the entry.
        kind (`str`): "missing field", "wrong type", "duplicate id", "unknown image", "unknown category" or "corners".
        got, expected (`str`): the value, and the expected one.
        entry: the entry itself.
    """

    part: str
    number: int
    key: str
    kind: str
    got: str
    expected: str
    entry: Any

    @property
    def place(self) -> str:
        """The field within the file: `annotations[3].image_id`."""
        return f"{self.part}[{self.number}].{self.key}"

    def __str__(self) -> str:
        ids = [(name, self.entry.get(key)) for name, key in (("id", "id"), ("image", "image_id"))
               if isinstance(self.entry, dict) and key != self.key]  # fmt: skip
        known = ", ".join(f"{name} {value!r:.40}" for name, value in ids if isinstance(value, (int, str)))
        return f"{self.place}{f' ({known})' if known else ''}: got {self.got}, expected {self.expected}"


class CocoIndex:
    """A COCO file, indexed and checked. Entries with a fault in their ids are left out of the index.

    Args:
        data (`dict`): the content of the file; see [`is_coco`].
        name: the file, for messages.
        needed (`Collection[str]`): fields that every annotation must have, besides `image_id`.

    Attributes:
        data (`dict`): the whole content.
        images (`dict`): images by id, in the order of the file.
        positions (`dict`): positions of these images in the file, from 0, by id.
        annotations (`dict`): for the id of every image the list of its annotations, possibly empty.
        categories (`dict`): names by id.
        faults (`list[CocoFault]`): in the order images, annotations, categories.

    Raises:
        DataError: the content has no lists `images` and `annotations`.
    """

    def __init__(self, data: Any, name: Any = "COCO", needed: Collection[str] = ()):
        if not is_coco(data):
            raise DataError(f'{name}: expected a COCO file, {{"images": [...], "annotations": [...]}}.')
        self.data, self.name = data, name
        self.faults: list[CocoFault] = []
        self.images: dict[Any, dict[str, Any]] = {}
        self.positions: dict[Any, int] = {}
        for number, image in self._sound("images", ("id",)):
            self.images[image["id"]], self.positions[image["id"]] = image, number
            if not isinstance(image.get("file_name"), str) or not image["file_name"]:
                self._fault("images", number, "file_name", "missing field", "the name of the image file")
        self.categories = {entry["id"]: entry.get("name") for _, entry in self._sound("categories", ("id",))}
        self.annotations: dict[Any, list[dict[str, Any]]] = {key: [] for key in self.images}
        is_listed = bool(self.categories) and all(fault.part != "categories" for fault in self.faults)
        corners = self._are_corners()
        for number, annotation in self._sound("annotations", ("image_id", *needed)):
            category = annotation.get("category_id")
            if annotation["image_id"] not in self.images:
                self._fault("annotations", number, "image_id", "unknown image", "the id of one of `images`")
            elif is_listed and category is not None and category not in self.categories:
                self._fault("annotations", number, "category_id", "unknown category", "the id of one of `categories`")
            elif corners and _box_of(annotation) is not None:
                expected = "[x, y, width, height]; boxes of this file are corners [x0, y0, x1, y1]"
                self._fault("annotations", number, "bbox", "corners", expected)
            else:
                self.annotations[annotation["image_id"]].append(annotation)
        order = ("images", "annotations", "categories")
        self.faults.sort(key=lambda fault: order.index(fault.part))

    def _are_corners(self) -> bool:
        """Whether the boxes are two corners: all can be, and as sides some leave their image by more than a pixel."""
        leaves = False
        for annotation in self.data["annotations"]:
            box = _box_of(annotation)
            if box is None:
                continue
            x, y, w, h = box
            own = annotation.get("image_id")
            image = self.images.get(own, {}) if isinstance(own, (int, str)) else {}
            width, height = (
                side if isinstance(side, (int, float)) else float("inf")
                for side in (image.get("width"), image.get("height"))
            )
            if not (x < w <= width and y < h <= height):
                return False
            leaves = leaves or x + w > width + 1 or y + h > height + 1
        return leaves

    @classmethod
    def read(cls, path: Path, needed: Collection[str] = ()) -> "CocoIndex":
        """Read a COCO file.

        Raises:
            DataError: the file does not exist, is not valid JSON, or is not a COCO file.
        """
        return cls(load_json(path), path, needed)

    def check(self) -> None:
        """Insist on a file without faults.

        Raises:
            DataError: the file has a fault; the message names the first one.
        """
        if self.faults:
            raise DataError(f"{self.name}: {self.faults[0]}.")

    def named(self, file_name: str) -> dict[str, Any]:
        """The image with a file name; of several, the one that shares most folders with it. An image that was
        converted may have another ending.

        Raises:
            RegionError: the file has no such image, or several.
        """
        images = list(self.images.values())
        try:
            return images[ImageFacts(file_name, 0, 0).choose(self.name, [image.get("file_name") for image in images])]
        except RegionError as error:
            raise RegionError(f"{error} ({self.faults[0]})" if self.faults else f"{error}") from None

    def _sound(self, part: str, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and entry of those whose ids are usable; the others become faults."""
        entries = self.data.get(part)
        seen: dict[Any, dict[Any, None]] = {}  # ids by image: some tools begin to count annotations anew in each one
        for number, entry in enumerate(entries if isinstance(entries, list) else []):
            fields = entry if isinstance(entry, dict) else {}
            ids = {key: fields.get(key) for key in (*needed, "id", "category_id")}
            wrong = [key for key, value in ids.items() if value is not None and not isinstance(value, (int, str))]
            missing = [key for key in needed if ids[key] is None]
            if missing or wrong:
                kind = "missing field" if missing else "wrong type"
                self._fault(part, number, (missing or wrong)[0], kind, "a number or a text")
                continue
            known = seen.setdefault(ids.get("image_id"), {})
            if ids["id"] is not None and ids["id"] in known:
                self._fault(part, number, "id", "duplicate id", "an id that no earlier entry has")
            else:
                known[ids["id"]] = None
                yield number, entry

    def _fault(self, part: str, number: int, key: str, kind: str, expected: str) -> None:
        entry = self.data[part][number]
        got = entry[key] if isinstance(entry, dict) and key in entry else entry
        self.faults.append(CocoFault(part, number, key, kind, f"{got!r:.60}", expected, entry))


def is_coco(data: Any) -> bool:
    """Whether a JSON value has the two lists of a COCO file."""
    return isinstance(data, dict) and all(isinstance(data.get(key), list) for key in ("images", "annotations"))


def _box_of(annotation: Any) -> tuple[float, float, float, float] | None:
    """The box of an annotation that has no other shape, if it is four numbers."""
    box = annotation.get("bbox") if isinstance(annotation, dict) and not annotation.get("segmentation") else None
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        return None
    if not all(isinstance(side, (int, float)) and abs(side) < 1e9 for side in box):
        return None
    return box[0], box[1], box[2], box[3]


def is_panoptic(data: Any) -> bool:
    """Whether a COCO file is a panoptic one, whose regions are in PNG files."""
    return is_coco(data) and any(isinstance(entry, dict) and "segments_info" in entry for entry in data["annotations"])


def panoptic_segments(path: Path, annotation: dict[str, Any]) -> list[dict[str, Any]]:
    """The segments of an image of a panoptic file, from the PNG file of its annotation. The folder of these files is
    called as the file, without its ending.

    Raises:
        ImageError: the PNG file cannot be opened.
        RegionError: there is no such folder, or the annotation lacks `file_name` or `segments_info`.
    """
    from .formats.label_map import from_panoptic  # reads images, and so imports torch; commands list without it

    folder = path.with_suffix("")
    name, segments = annotation.get("file_name"), annotation.get("segments_info")
    if not isinstance(name, str) or not isinstance(segments, list):
        raise RegionError(
            f"{path}: is a COCO panoptic file, but the annotation of image {annotation.get('image_id')!r:.40} lacks "
            "`file_name` or `segments_info`."
        )
    if not folder.is_dir():
        raise RegionError(
            f"{path}: is a COCO panoptic file; its regions are in PNG files like {base_name(name)}, expected in the "
            f"folder {folder}. Put them there: ln -s FOLDER_OF_THE_PNG_FILES {folder}"
        )
    return from_panoptic(folder / base_name(name), segments)


def regions_in(data: Any, path: Path, image: ImageFacts) -> list[dict[str, Any]]:
    """The regions of one image, from the content of a JSON file.

    Args:
        data: a COCO file (also a panoptic one), COCO's list of results, a list of regions, `{"regions": [...]}`, or
            `{"annotations": [...]}` as SA-1B has it.
        path (`Path`): the file, for messages.
        image (`ImageFacts`): the image; its name and size are compared with what the file states.

    Raises:
        ImageError: the PNG file of a panoptic file cannot be opened.
        RegionError: the content is of another form, has no such image, states another size, or has no regions for it.
    """
    if is_coco(data):
        regions: Any = _of_image(CocoIndex(data, path), path, image)
    elif isinstance(data, dict):
        regions = data.get("regions", data.get("annotations"))
        stated = data["image"] if isinstance(data.get("image"), dict) else data
        name = data["image"] if isinstance(data.get("image"), str) else stated.get("file_name")
        image.check_name(path, None if isinstance(name, str) and name.startswith("data:") else name)
        image.check_size(path, stated.get("width"), stated.get("height"))
    else:
        regions = data
    if not isinstance(regions, list) or not all(isinstance(region, dict) for region in regions):
        raise RegionError(
            f"{path}: expected a COCO file or a list of regions with `segmentation` or `bbox`, LabelMe, VIA 2 or "
            f"Label Studio; got {_described(data)}."
        )
    regions = _results(regions, path, image) if not isinstance(data, dict) else regions
    if not regions:
        raise NoRegionsError(f"{path}: holds no regions for {image.name}.")
    return regions


def _described(data: Any) -> str:
    if isinstance(data, dict):
        return f"an object with the keys {', '.join(sorted(map(str, data))[:5])}"[:120]
    return f"{data!r:.60}"


def _of_image(index: CocoIndex, path: Path, image: ImageFacts) -> list[dict[str, Any]]:
    entry = index.named(image.name)
    for fault in index.faults:  # those of other images do not matter here
        fields = fault.entry if isinstance(fault.entry, dict) else {}
        own = fields.get("id" if fault.part == "images" else "image_id")
        if fault.part == "categories" or own == entry["id"]:
            raise RegionError(f"{path}: {fault}.")
    number = index.positions[entry["id"]]
    image.check_size(f"{path}: images[{number}] (id {entry['id']!r:.40})", entry.get("width"), entry.get("height"))
    found = index.annotations[entry["id"]]
    if is_panoptic(index.data):
        return [segment for annotation in found for segment in panoptic_segments(path, annotation)]
    return found


def _results(regions: list[dict[str, Any]], path: Path, image: ImageFacts) -> list[dict[str, Any]]:
    """Of COCO's results, those of one image: the only one, or that with the number or the name of the file as id."""
    ids = {region.get("image_id") if isinstance(region.get("image_id"), (int, str)) else None for region in regions}
    if len(ids) <= 1:
        return regions
    stem = Path(base_name(image.name)).stem
    digits = stem[len(stem.rstrip("0123456789")) :]
    wanted = {stem, base_name(image.name), digits.lstrip("0") or digits}
    found = [own for own in ids if own is not None and str(own) in wanted]
    if len(found) != 1:
        shown = ", ".join(sorted(map(str, ids))[:5])
        raise RegionError(
            f"{path}: holds results of {len(ids)} images (image_id {shown}{', ...' if len(ids) > 5 else ''}), "
            f"{len(found)} of them {base_name(image.name)} by its number or name. Name the one: --image-name IMAGE_ID"
        )
    return [region for region in regions if region.get("image_id") == found[0]]
