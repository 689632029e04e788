"""What the images and regions of a run were, so that a run that continues notices what has changed since.

OUT.sources.jsonl gets a row for every image before its captions are written: size and checksums of its file, and a
checksum of its regions.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors_pdlm import DataError
from ..regions.files import append_rows, read_rows
from ..regions.region import Region, parse_region
from ..render.text import list_some
from .checksums import is_same_look, look_of
from .dataset import Entry


def add_source(path: Path, entry: Entry) -> None:
    """Write down what an image and its regions are.

    Args:
        path (`Path`): OUT.sources.jsonl.
        entry (`Entry`): the image.
    """
    append_rows(path, [{"image_id": entry.id, "file": _look_of(entry), "regions": _mark(entry)}])


def take_sources(path: Path, source: Path, images: Collection[Any]) -> None:
    """Take over what images were in another run.

    Args:
        path, source (`Path`): OUT.sources.jsonl of this run and of the other.
        images: ids of the images.
    """
    append_rows(path, [row for row in _read(source) if row["image_id"] in images])


def looks_before(path: Path) -> dict[Any, list[int] | None]:
    """What the image files were, by the id of the image, see [`look_of`].

    Args:
        path (`Path`): OUT.sources.jsonl.
    """
    return {row["image_id"]: row["file"] for row in _read(path)}


def refuse_changed(out: Path, what: list[str]) -> None:
    """Raises: DataError: there are images or regions that have changed; the message names ten of them at most."""
    if what:
        raise DataError(
            f"{out}: has results of {list_some(what)}, which changed since. Delete their lines there to do them "
            "again, or choose another file."
        )


def check_sources(path: Path, out: Path, entries: list[Entry], done: Callable[[Entry], Collection[Any]]) -> None:
    """Compare images and regions that have results with what they are now.

    A region that has another mask than its row is found by its mask, which is looked at only where the checksum of the
    image's regions has changed: other keys of an annotation, and regions that were added or removed, are no change.

    Args:
        path, out (`Path`): OUT.sources.jsonl and OUT.jsonl.
        entries (`list[Entry]`): all images of the data set.
        done: returns the ids of the regions of an image that have a row.

    Raises:
        DataError: an image or a region with a row has changed.
    """
    by_id = {entry.id: entry for entry in entries}
    changed: dict[Any, Entry] = {}  # by the last row of each image
    others: dict[Any, Entry] = {}
    for row in _read(path):
        entry = by_id.get(row["image_id"])
        if entry is None or not done(entry):
            continue
        look = _look_of(entry)
        for found, differs in (
            (changed, not is_same_look(row["file"], look)),
            (others, row["regions"] != _mark(entry)),
        ):
            if differs:
                found[entry.id] = entry
            else:
                found.pop(entry.id, None)
    what = [f"the image {entry.file_name}" for entry in changed.values()]
    what += _other_masks(out, {key: entry for key, entry in others.items() if key not in changed})
    refuse_changed(out, what)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of OUT.sources.jsonl, without damaged ones."""
    return read_rows(path, True, _fault, lambda number, reason: None)


def _fault(row: dict[str, Any]) -> str | None:
    sound = row.keys() >= {"image_id", "file", "regions"} and isinstance(row["image_id"], (int, str))
    return None if sound and isinstance(row["file"], (list, type(None))) else "is no row about an image"


def _mark(entry: Entry) -> int | None:
    with suppress(OSError, ValueError):
        return None if entry.mark is None else entry.mark()
    return None


def _look_of(entry: Entry) -> list[int] | None:
    return None if entry.path is None else look_of(entry.path)


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
