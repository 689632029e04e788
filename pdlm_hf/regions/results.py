"""The rows of `pdlm batch`: one for each captioned region."""

from typing import Any


def result_fault(row: dict[str, Any]) -> str | None:
    """What is wrong with a row of results, as the end of a sentence that begins with its line; None if it is sound.

    Args:
        row (`dict`): `image_id`, `annotation_id`, `file_name`, `caption`, `score`, `bbox`, `segmentation`.
    """
    for name, (is_sound, expected) in _FIELDS.items():
        if name not in row:
            return f"has no `{name}`, as rows of `pdlm batch` have"
        elif not is_sound(row[name]):
            return f"has {row[name]!r:.60} as `{name}`, expected {expected}"
    return None


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


_FIELDS = {
    "image_id": (_is_id, "a number or a text"),
    "annotation_id": (_is_id, "a number or a text"),
    "file_name": (lambda value: isinstance(value, str) and bool(value), "the name of an image"),
    "caption": (lambda value: isinstance(value, str), "a text"),
    "score": (_is_score, "a number from 0 to 1"),
    "bbox": (_is_box, "[x, y, width, height]"),
    "segmentation": (_is_rle, "an RLE with `size` and `counts`"),
}
