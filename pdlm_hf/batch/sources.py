"""What the images and regions of a run were, so that a run that continues notices what has changed since.

OUT.sources.jsonl has a line for every image: its id, size and checksum of its file, and a checksum of its regions. The
file's is of a few bytes in its middle: of a million images nobody wants to wait for more, and the bytes of a
compressed image that has changed are others from there on.
"""

import json
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors_pdlm import DataError
from ..regions.files import read_rows, replacing
from ..regions.region import Region, parse_region
from ..render.text import pluralize
from .dataset import Entry

_MIDDLE = 4096  # bytes


def check_sources(out: Path, entries: list[Entry], done: Callable[[Entry], Collection[Any]]) -> None:
    """Compare images and regions that have results with what they are now, and write down what all of them are.

    A region that has another mask than its row is found by its mask, which is looked at only where the checksum of the
    image's regions has changed: other keys of an annotation, and regions that were added or removed, are no change.

    Args:
        out (`Path`): OUT.jsonl.
        entries (`list[Entry]`): all images of the data set.
        done: returns the ids of the regions of an image that have a row.

    Raises:
        DataError: an image or a region with a row has changed.
    """
    path, by_id = out.with_suffix(".sources.jsonl"), {entry.id: entry for entry in entries}
    changed, others = [], {}
    for image_id, was, mark in _lines(path):
        entry = by_id.get(image_id)
        if entry is None or not done(entry):
            continue
        now = _look_of(entry)
        if None not in (was, now) and was != now:
            changed.append(f"the image {entry.file_name}")
        elif mark != _mark(entry):
            others[image_id] = entry
    changed += _other_masks(out, others)
    if changed:
        more = f" and {pluralize(len(changed) - 1, 'other')}" if len(changed) > 1 else ""
        raise DataError(
            f"{out}: has results of {changed[0]}{more}, which changed since. Delete their lines there to do them "
            "again, or choose another file."
        )
    with replacing(path) as file:
        file.writelines(json.dumps([entry.id, _look_of(entry), _mark(entry)]) + "\n" for entry in entries)


def _mark(entry: Entry) -> int | None:
    with suppress(OSError, ValueError):
        return None if entry.mark is None else entry.mark()
    return None


def _look_of(entry: Entry) -> list[int] | None:
    """Size of the image's file, and checksum of its middle; None where it cannot be read."""
    if entry.path is None:
        return None
    with suppress(OSError), entry.path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size // 2 - _MIDDLE // 2))
        return [size, zlib.crc32(file.read(_MIDDLE))]
    return None


def _lines(path: Path) -> Iterator[list[Any]]:
    """The lines of an earlier run; none where the file is missing, without those that are damaged."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, list) and len(found) == 3 and isinstance(found[0], (int, str)):
                    yield found


def _other_masks(out: Path, entries: dict[Any, Entry]) -> Iterator[str]:
    """The regions of these images whose rows have another mask."""
    if not entries:
        return
    values: dict[Any, dict[Any, Any]] = {}
    for row in read_rows(out):
        if (entry := entries.get(row["image_id"])) is None:
            continue
        if entry.id not in values:
            values[entry.id] = _regions_of(entry)
        own, shape = row["annotation_id"], row["segmentation"]
        if own in values[entry.id]:
            height, width = shape["size"]
            with suppress(ValueError, OSError):
                if Region(own, parse_region(values[entry.id][own], width, height, own).mask).segmentation == shape:
                    continue
            yield f"the region {own!r} of {entry.file_name}"


def _regions_of(entry: Entry) -> dict[Any, Any]:
    """The regions of an image by id; none where they cannot be read, which is a fault of the run."""
    with suppress(ValueError, OSError):
        return dict(entry.read())
    return {}
