"""Checksums of images and regions, by which a run that continues notices that they have changed."""

import marshal
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..regions.formats.facts import base_name

_PART = 4096  # bytes of a large file that are read in one place
_WHOLE = 2**17  # bytes of a file that is read whole; systems read as much ahead

# What the shape of a COCO annotation is in.
_SHAPES = ("id", "segmentation", "bbox", "file_name", "segments_info")


def checksum(shapes: Any) -> int:
    """A number of plain values, the same for equal ones."""
    return zlib.crc32(marshal.dumps(shapes, 2))  # version 2 writes no references, which depend on more than the values


def mark_of_annotations(annotations: Iterable[dict[str, Any]]) -> int:
    """The checksum of the annotations of an image in a COCO file."""
    return checksum([[entry.get(key) for key in _SHAPES] for entry in annotations])


def mark_of_panoptic(path: Path, annotations: list[dict[str, Any]]) -> int:
    """The checksum of the annotations of an image in a COCO panoptic file, and of their PNG files."""
    names = [base_name(str(entry.get("file_name"))) for entry in annotations]
    return checksum([mark_of_annotations(annotations), [look_of(path.with_suffix("") / name) for name in names]])


def mark_of_file(source: Path) -> int:
    """The checksum of a region file, or of the masks in a folder. Raises: OSError."""
    if source.is_dir():
        return checksum(sorted((path.name, look_of(path)) for path in source.iterdir()))
    return zlib.crc32(source.read_bytes())


def look_of(path: Path) -> list[int] | None:
    """What is compared of an image file, so that a million of them are compared quickly: its size, the checksum of its
    middle, and that of its end, or of all of a small file. None where it cannot be read.

    A compressed image whose pixels have changed has other bytes from there on, or at least another checksum of its own
    at its end.
    """
    with suppress(OSError), path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size // 2 - _PART // 2))
        middle = zlib.crc32(file.read(_PART))
        file.seek(0 if size <= _WHOLE else size - _PART)
        return [size, middle, zlib.crc32(file.read(_WHOLE))]
    return None


def is_same_look(before: list[int] | None, now: list[int] | None) -> bool:
    """Whether two results of [`look_of`] may be of the same file; earlier versions had fewer numbers."""
    return before is None or now is None or all(was == own for was, own in zip(before, now, strict=False))
