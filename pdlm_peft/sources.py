"""The rows of any data source, one after the other: COCO, JSONL, JSON lists, `datasets` folders, the hub."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from pdlm_hf.errors_pdlm import DataError, MissingPackageError
from pdlm_hf.regions.coco import CocoIndex, is_coco
from pdlm_hf.regions.files import hash_file, load_json

from .rows import REGION_KEYS, Fault, RowError

_OF_CVAT = {"occluded", "rotation", "track_id", "keyframe"}  # attributes of every shape
_CHUNK = 1 << 20  # characters read at a time
_BETWEEN = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*")  # two rows of a list


@dataclass(frozen=True)
class Source:
    """A data source, as [`find_source`] recognized it.

    Args:
        kind (`str`): "jsonl", "list" (a JSON list), "coco", "table" (a saved `datasets` folder) or "hub".
        path (`Path`, *optional*): file or folder; None for data on the hub.
        name (`str`): the source as the user wrote it.
        images (`Path`, *optional*): folder of images that the user gave.
    """

    kind: str
    path: Path | None
    name: str
    images: Path | None

    @property
    def file(self) -> Path:
        """The file or folder on this machine.

        Raises:
            DataError: the data is on the hub.
        """
        if self.path is None:
            raise DataError(f"{self.name}: the data is on the hub, not in a file.")
        return self.path

    @property
    def own_folder(self) -> Path | None:
        """The source's own folder if relative paths start from it; None if the user gave a folder of images."""
        return None if self.images is not None or self.path is None else self.path.parent

    @property
    def folder(self) -> Path | None:
        """Folder that relative paths of images start from."""
        return self.images if self.images is not None else self.own_folder


def find_source(source: str | Path, images: str | Path | None = None) -> Source:
    """Recognize the kind of a data source, by its ending and its first character.

    Args:
        source (`str` or `Path`): COCO json, JSONL, a JSON list of rows, a folder written by `save_to_disk` of
            `datasets`, or `hf:NAME[:CONFIG][@SPLIT]`.
        images (`str` or `Path`, *optional*): folder of the images; default: the folder of the file.

    Raises:
        DataError: the source does not exist, or is of no known kind.
    """
    name = str(source)
    folder = None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images.")
    if name.startswith("hf:"):
        return Source("hub", None, name, folder)
    path = Path(source)
    if path.is_dir():
        if not any((path / file).exists() for file in ("dataset_info.json", "dataset_dict.json")):
            raise DataError(f"{path}: a folder, but not one that `save_to_disk` of `datasets` wrote.")
        return Source("table", path, name, folder)
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    with open(path, "rb") as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if path.suffix in (".jsonl", ".ndjson"):
        return Source("jsonl", path, name, folder)
    if start[:1] == b"[":
        return Source("list", path, name, folder)
    if start[:1] == b"{":
        return Source("coco" if _is_one_object(path) else "jsonl", path, name, folder)
    raise DataError(f"{path}: expected a COCO json, a JSON list of rows, or JSONL (one row per line).")


def content_of(source: str | None) -> str | None:
    """Hash a data source, by which a run that is resumed notices that it has changed.

    None for data on the hub, and for a file that does not exist.

    Args:
        source (`str`, *optional*): as for [`find_source`].
    """
    if source is None or source.startswith("hf:"):
        return None
    digest, path = hashlib.blake2b(digest_size=16), Path(source)
    if path.is_file():
        return hash_file(path, digest)
    if not path.is_dir():
        return None
    for file in sorted(path.rglob("*.arrow")):
        if not file.name.startswith("cache-"):  # what `datasets` has computed from the others
            digest.update(hash_file(file, hashlib.blake2b()).encode())
    return digest.hexdigest()


def _is_one_object(path: Path) -> bool:
    """Whether a file that starts with { is one JSON object, not one per line."""
    with open(path, encoding="utf-8", errors="replace") as file:
        first, second = file.readline(), file.readline()
    try:
        return not (json.loads(first) and second.strip())
    except (ValueError, RecursionError):
        return True


def raw_rows(source: Source) -> Iterator[tuple[int, Any]]:
    """Read the rows unchanged, one after the other. Of JSONL, lists and hub data nothing is kept in memory.

    Yields:
        number (from 1) and row; in place of a row that is not JSON, a [`RowError`].

    Raises:
        DataError: the source as a whole cannot be read.
    """
    if source.kind == "jsonl":
        with open(source.file, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, parse_line(line, number)
    elif source.kind == "list":
        yield from _list_rows(source.file)
    elif source.kind == "coco":
        yield from _coco_rows(source.file)
    else:
        table = open_table(source, streaming=source.kind == "hub")
        yield from enumerate(table, 1)


def parse_line(line: bytes, number: int) -> Any:
    """Parse a line of a JSONL file; a [`RowError`] is returned if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        where = (
            f"line {number}, column {error.colno}: {error.msg}"
            if isinstance(error, json.JSONDecodeError)
            else f"{error}"
        )
        return RowError(Fault(number, "row", "broken JSON", where, "one whole JSON object per line"))


def _list_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a JSON list, read chunk by chunk."""
    number = 0
    try:
        for number, row in _decoded_rows(path):
            yield number, row
    except UnicodeDecodeError as error:
        got = f"{error}, after {number} whole rows"
        yield number + 1, RowError(Fault(number + 1, "row", "broken JSON", got, "a JSON list in UTF-8"))


def _decoded_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """As [`_list_rows`]. Raises: UnicodeDecodeError: the file is not UTF-8."""
    decoder, number, text, place, more = json.JSONDecoder(), 0, "", 0, True
    with open(path, encoding="utf-8-sig") as file:
        while file.read(1) != "[":  # `find_source` has seen it
            pass
        while True:
            start = next(_BETWEEN.finditer(text, place)).end()  # it can be empty, so there is one at `place`
            if text.startswith("]", start):
                return
            try:
                row, place = decoder.raw_decode(text, start)
                if place == len(text) and more:  # a number may continue in the next chunk
                    raise json.JSONDecodeError("cut", text, place)
            except (ValueError, RecursionError) as error:
                if isinstance(error, json.JSONDecodeError) and more:
                    chunk = file.read(max(_CHUNK, len(text) - start))
                    text, place, more = text[start:] + chunk, 0, bool(chunk)
                    continue
                got = f"{getattr(error, 'msg', error)}, after {number} whole rows"
                yield number + 1, RowError(Fault(number + 1, "row", "broken JSON", got, "a whole JSON list"))
                return
            number += 1
            yield number, row


def _coco_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield a row for each image of a COCO file that has annotations, numbered by its position among the images."""
    try:
        data = load_json(path)
    except DataError as error:
        yield 1, RowError(Fault(1, "file", "broken JSON", str(error), "one whole JSON object"))
        return
    if not is_coco(data):
        got = f"an object with {', '.join(sorted(data)[:5])}"
        yield 1, RowError(Fault(1, "file", "wrong type", got, "COCO's lists `images` and `annotations`"))
        return
    index = CocoIndex(data, path)
    for fault in index.faults:
        number = fault.number + 1
        yield number, RowError(Fault(number, fault.place, fault.kind, fault.got, fault.expected))
    data["annotations"].clear()  # each is let go with its row
    for image_id, image in index.images.items():
        own = index.annotations.pop(image_id)
        if own and "file_name" in image:
            row = {"image": image["file_name"], "regions": [_coco_region(entry, index.categories) for entry in own]}
            size = {name: image[name] for name in ("width", "height") if name in image}
            yield index.positions[image_id] + 1, row | size


def _coco_region(annotation: dict, names: dict) -> dict:
    """COCO files of all kinds have their own keys; only known ones are kept. So have their `attributes`: values that
    are no text, whole number, true or false are left out, and those that CVAT gives every shape."""
    region = {name: value for name, value in annotation.items() if name in REGION_KEYS}
    if isinstance(given := region.get("attributes"), dict):
        others = _OF_CVAT if "occluded" in given and _OF_CVAT & {*given} - {"occluded"} else set()
        kept = {
            name: value
            for name, value in given.items()
            if name not in others and isinstance(value, (str, int, NoneType))
        }
        region = {**region, "attributes": kept} if kept else {k: v for k, v in region.items() if k != "attributes"}
    if isinstance(names.get(annotation.get("category_id")), str):
        region.setdefault("category", names[annotation["category_id"]])
    return region


def open_table(source: Source, streaming: bool = False) -> Any:
    """Open a `datasets` table, with its images left encoded.

    Raises:
        DataError: `datasets` cannot read it, or it has splits and none is called "train".
        MissingPackageError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise MissingPackageError("datasets", "peft") from None
    try:
        if source.kind == "table":
            table = datasets.load_from_disk(str(source.file))
        else:
            name, _, split = source.name.removeprefix("hf:").partition("@")
            name, _, config = name.partition(":")
            table = datasets.load_dataset(name, config or None, split=split or "train", streaming=streaming)
    except Exception as error:  # its readers raise errors of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{source.name}: `datasets` cannot read it ({reason}).") from None
    if isinstance(table, datasets.DatasetDict):
        if "train" not in table:
            raise DataError(f"{source.name}: the splits are {', '.join(table)}; give the folder of one of them.")
        table = table["train"]
    for name, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table
