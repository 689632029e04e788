"""COCO's compressed run lengths."""

import numpy as np


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
    damaged[np.repeat(np.arange(len(texts)), lengths)[count > 12]] = True  # more bits than an integer has
    runs = (digits[starts] & 31).astype(np.int64)
    for place in range(1, min(int(count.max()), 12)):  # most runs have one or two characters
        longer = np.flatnonzero(count > place)
        runs[longer] |= (digits[starts[longer] + place] & 31).astype(np.int64) << (5 * place)
    runs -= np.where(digits[ends] & 16, np.int64(1) << (5 * np.minimum(count, 12)), 0)
    number = np.arange(len(runs)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # of each run in its text
    # sums over every second run of a text; the first run is not part of them
    for parity in (0, 1):
        chosen = np.flatnonzero((number % 2 == parity) & (number > 0))
        sums = np.cumsum(runs[chosen])
        first = np.flatnonzero(number[chosen] <= 2)
        before = sums[first] - runs[chosen][first]
        runs[chosen] = sums - np.repeat(before, np.diff(np.append(first, len(chosen))))
    return runs, lengths, damaged
