"""COCO files: the images, the annotations of each image, and the faults of the file."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors_pdlm import DataError, RegionError
from .files import load_json


@dataclass(frozen=True)
class CocoFault:
    """A fault in a COCO file.

    Args:
        part (`str`): the list: "images", "annotations" or "categories".
        number (`int`): position in this list, from 0.
        key (`str`): the field of the entry.
        kind (`str`): "missing field", "wrong type", "duplicate id" or "unknown image".
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
        return f"{self.place}: got {self.got}, expected {self.expected}"


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
        self.annotations: dict[Any, list[dict[str, Any]]] = {key: [] for key in self.images}
        for number, annotation in self._sound("annotations", ("image_id", *needed)):
            if annotation["image_id"] in self.images:
                self.annotations[annotation["image_id"]].append(annotation)
            else:
                self._fault("annotations", number, "image_id", "unknown image", "the id of one of `images`")
        self.categories = {entry["id"]: entry.get("name") for _, entry in self._sound("categories", ("id",))}

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
        """The image with a file name, compared without folders; or the only image of the file, whatever its name.

        Raises:
            RegionError: the file has no such image, or several.
        """
        wanted = Path(file_name).name
        found = [image for image in self.images.values() if Path(str(image.get("file_name", ""))).name == wanted]
        if not found and len(self.images) == 1:
            found = list(self.images.values())
        if len(found) != 1:
            reason = f" ({self.faults[0]})" if self.faults else ""
            raise RegionError(
                f"{self.name}: has {len(self.images)} images, {len(found)} of them named {wanted}{reason}."
            )
        return found[0]

    def _sound(self, part: str, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and entry of those whose ids are usable; the others become faults."""
        entries = self.data.get(part)
        seen: set[tuple] = set()
        for number, entry in enumerate(entries if isinstance(entries, list) else []):
            fields = entry if isinstance(entry, dict) else {}
            ids = {key: fields.get(key) for key in (*needed, "id", "category_id")}
            wrong = [key for key, value in ids.items() if value is not None and not isinstance(value, (int, str))]
            missing = [key for key in needed if ids[key] is None]
            known_as = (ids.get("image_id"), ids["id"])  # some tools begin to count annotations anew in each image
            if missing or wrong:
                kind = "missing field" if missing else "wrong type"
                self._fault(part, number, (missing or wrong)[0], kind, "a number or a text")
            elif ids["id"] is not None and known_as in seen:
                self._fault(part, number, "id", "duplicate id", "an id that no earlier entry has")
            else:
                seen.add(known_as)
                yield number, entry

    def _fault(self, part: str, number: int, key: str, kind: str, expected: str) -> None:
        entry = self.data[part][number]
        got = entry[key] if isinstance(entry, dict) and key in entry else entry
        self.faults.append(CocoFault(part, number, key, kind, f"{got!r:.60}", expected, entry))


def is_coco(data: Any) -> bool:
    """Whether a JSON value has the two lists of a COCO file."""
    return isinstance(data, dict) and all(isinstance(data.get(key), list) for key in ("images", "annotations"))


def regions_in(data: Any, path: Path, image_name: str) -> list[dict[str, Any]]:
    """The regions of one image, from the content of a JSON file.

    Args:
        data: a COCO file, a list of regions, or `{"regions": [...]}`.
        path (`Path`): the file, for messages.
        image_name (`str`): the image in a COCO file; not needed if the file has one image.

    Raises:
        RegionError: the content is of another form, has no such image, or no regions for it.
    """
    if is_coco(data):
        index = CocoIndex(data, path)
        image = index.named(image_name)
        for fault in index.faults:  # those of other images do not matter here
            if isinstance(fault.entry, dict) and fault.entry.get("image_id") == image["id"]:
                raise RegionError(f"{path}: {fault}.")
        regions: Any = index.annotations[image["id"]]
    else:
        regions = data.get("regions", data.get("annotations")) if isinstance(data, dict) else data
    if not isinstance(regions, list) or not all(isinstance(region, dict) for region in regions):
        raise RegionError(f"{path}: expected a COCO file or a list of regions with `segmentation` or `bbox`.")
    if not regions:
        raise RegionError(f"{path}: holds no regions for {image_name}.")
    return regions
