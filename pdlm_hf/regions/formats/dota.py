"""Text files of DOTA: the corners of turned boxes in pixels, the class, and whether the object is difficult."""

import re
from pathlib import Path
from typing import Any

from ...errors_pdlm import NoRegionsError, RegionError
from .geometry import number

_HEADER = re.compile(r"(imagesource|gsd|acquisition dates):.*")
_LAYOUT = "x0 y0 x1 y1 x2 y2 x3 y3 class difficult"


def is_dota(path: Path) -> bool:
    """Whether the first line of a text file is one of DOTA: a header, or eight numbers and a class that is none."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            first = next((line.strip() for line in file if line.strip()), "")
    except (OSError, UnicodeDecodeError):
        return False  # the reader of YOLO says what is wrong
    words = first.split()
    return bool(_HEADER.fullmatch(first)) or (len(words) in (9, 10) and not _is_number(words[8]))


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def from_dota(path: Path) -> list[dict[str, Any]]:
    """Read the turned boxes of a text file of DOTA.

    Args:
        path (`Path`): the file.

    Returns:
        regions with "id" (the position), "category" and "segmentation".

    Raises:
        RegionError: the file holds no regions, or a line has another form; the message has its number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RegionError(f"{path}: cannot be read ({error}).") from None
    regions: list[dict[str, Any]] = []
    for place, line in enumerate(lines, 1):
        words = line.split()
        if not words or _HEADER.fullmatch(line.strip()):
            continue
        if len(words) not in (9, 10) or words[9:] not in ([], ["0"], ["1"], ["2"]):
            raise RegionError(f"{path}: line {place}: expected `{_LAYOUT}`, got {line!r:.60}.")
        points = [number(word, f"{path}: line {place}") for word in words[:8]]
        regions.append({"id": len(regions), "category": words[8], "segmentation": [points]})
    if not regions:
        raise NoRegionsError(f"{path}: holds no regions.")
    return regions
