"""COCO's compressed run lengths."""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask `(H, W)` as COCO's compressed RLE, with counts as text, ready for JSON."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def run_lengths(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode COCO's compressed counts: 5 bits per character, from the third run on relative to the one before last.

    Args:
        texts: counts of any number of masks, so that array operations decode a whole data set.

    Returns:
        the runs of all texts in one array, the number of runs in each text, and which texts are damaged.
    """
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    digits = np.frombuffer(b"".join(texts), dtype=np.uint8) - np.uint8(48)  # others than digits become large
    damaged = sizes == 0
    if len(digits) and digits.max() > 63:
        damaged |= np.bincount(np.repeat(np.arange(len(texts)), sizes), digits > 63, len(texts)) > 0
    last = (digits & 32) == 0  # the last character of its run
    filled = np.flatnonzero(sizes)
    text_ends = np.cumsum(sizes)[filled] - 1
    damaged[filled] |= ~last[text_ends]
    last[text_ends] = True  # a text cut short must not run into the next one
    ends = np.flatnonzero(last)
    lengths = np.zeros(len(texts), np.int64)
    if not len(ends):
        return np.zeros(0, np.int64), lengths, damaged
    lengths[filled] = np.diff(np.searchsorted(ends, text_ends, "right"), prepend=0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    count = ends - starts + 1  # characters of each run
    longest = int(count.max())
    if longest > 12:  # more bits than an integer has
        damaged[np.repeat(np.arange(len(texts)), lengths)[count > 12]] = True
    runs = (digits[starts] & 31).astype(np.int64)
    for place in range(1, min(longest, 12)):  # most runs have one or two characters
        longer = np.flatnonzero(count > place)
        runs[longer] |= (digits[starts[longer] + place] & 31).astype(np.int64) << (5 * place)
    negative = np.flatnonzero(digits[ends] & 16)
    runs[negative] -= np.int64(1) << (5 * np.minimum(count[negative], 12))
    return _summed(runs, lengths[filled]), lengths, damaged


def _summed(runs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sums over every second run of a text. The first run is not part of them.

    The sums run through all texts at first. What they have too much is a number for each of the first three runs of a
    text and for those that follow every second one, so that summing the changes of this number takes it away again.

    Args:
        runs (`np.ndarray`): relative runs of all texts.
        lengths (`np.ndarray`): number of runs in each text, at least 1.
    """
    pairs = np.zeros((len(runs) + 3) // 2 * 2, np.int64)  # two zeros before the first text
    pairs[2 : len(runs) + 2] = runs
    sums = pairs.reshape(-1, 2).cumsum(axis=0).ravel()
    starts = np.cumsum(lengths) - lengths + 2

    def surplus(places: np.ndarray) -> np.ndarray:
        start = starts[np.maximum(np.searchsorted(starts, places, "right") - 1, 0)]
        own = places - start
        return sums[np.where(own <= 0, np.maximum(places - 2, 0), start - own % 2)]

    places = (starts[:, None] + np.arange(3))[np.arange(3) < lengths[:, None]]
    pairs[places] += surplus(places - 2) - surplus(places)
    return pairs.reshape(-1, 2).cumsum(axis=0).ravel()[2 : len(runs) + 2]
