"""The rows of `pdlm batch`: one for each captioned region."""

from collections.abc import Callable, Collection
from pathlib import Path
from types import NoneType
from typing import Any

from .files import read_rows


def result_fault(row: dict[str, Any]) -> str | None:
    """What is wrong with a row of results, as the end of a sentence that begins with its line; None if it is sound.

    Args:
        row (`dict`): `image_id`, `annotation_id`, `file_name`, `caption`, `score`, `bbox`, `segmentation`, and with a
            schema `attributes`.
    """
    for name, (is_sound, expected) in _FIELDS.items():
        if name not in row:
            return f"has no `{name}`, as rows of `pdlm batch` have"
        elif not is_sound(row[name]):
            return f"has {row[name]!r:.60} as `{name}`, expected {expected}"
    if not _are_read(row.get("attributes")):
        return f"has {row['attributes']!r:.60} as `attributes`, expected values by name"
    return None


def image_rows(
    path: Path,
    chosen: Collection[tuple[str, Any]] | None = None,
    damaged: Callable[[int, str], None] | None = None,
) -> list[list[dict[str, Any]]]:
    """The rows of a file of results, a list for each image, whatever order they were written in: images by name and
    id, the regions of an image by id. Of two rows about a region the later one counts.

    Args:
        path (`Path`): OUT.jsonl.
        chosen (*optional*): names and ids of the images to read; default: all.
        damaged (*optional*): see [`~pdlm_hf.regions.files.read_rows`].

    Raises:
        DataError: a line is damaged, and `damaged` is None.
    """
    groups: dict[tuple[str, Any], dict[Any, dict[str, Any]]] = {}
    for row in read_rows(path, check=result_fault, damaged=damaged):
        key = row["file_name"], row["image_id"]
        if chosen is None or key in chosen:
            groups.setdefault(key, {})[row["annotation_id"]] = row
    ordered = sorted(groups, key=lambda image: (image[0], str(image[1])))
    return [
        [groups[key][own] for own in sorted(groups[key], key=lambda own: (isinstance(own, str), own))]
        for key in ordered
    ]


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_score(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(number) in (int, float) for number in value)


def _is_rle(value: Any) -> bool:
    size = value.get("size") if isinstance(value, dict) else None
    whole = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    return whole and isinstance(value.get("counts"), (str, list))


def _are_read(values: Any) -> bool:
    """Whether these are attributes as `pdlm batch --schema` writes them; None, of captions, is right too."""
    if not isinstance(values, dict):
        return values is None
    return all(
        isinstance(one, dict)
        and isinstance(one.get("value", 0.5), (str, int, NoneType))
        and ("probability" not in one or _is_score(one["probability"]))
        and isinstance(one.get("probabilities"), (dict, NoneType))
        for one in values.values()
    )


_FIELDS = {
    "image_id": (_is_id, "a number or a text"),
    "annotation_id": (_is_id, "a number or a text"),
    "file_name": (lambda value: isinstance(value, str) and bool(value), "the name of an image"),
    "caption": (lambda value: isinstance(value, str), "a text"),
    "score": (_is_score, "a number from 0 to 1"),
    "bbox": (_is_box, "[x, y, width, height]"),
    "segmentation": (_is_rle, "an RLE with `size` and `counts`"),
}
