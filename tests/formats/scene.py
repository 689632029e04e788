"""One image with regions: `write.py` gives them to the tools, `test_formats.py` reads what the tools wrote."""

import numpy as np

WIDTH, HEIGHT = 97, 71  # neither fractions nor per cent of them are short
NAME = "street.png"
UPLOADED = f"0a1b2c3d-{NAME}"  # as Label Studio names it
CLASSES = ["cat", "dog"]
LABELS = ["cat", "dog", "cat"]
SCORE = 0.75
# The third touches the edges of the image.
BOXES = [[5, 4, 31, 22], [41, 9, 17, 45], [64, 33, 33, 38]]


def bent(x: int, y: int, w: int, h: int) -> list[tuple[int, int]]:
    """The corners of an L in a box."""
    return [(x, y), (x + w, y), (x + w, y + h // 2), (x + w // 2, y + h // 2), (x + w // 2, y + h), (x, y + h)]


def corners(x: int, y: int, w: int, h: int) -> list[tuple[int, int]]:
    """The corners of a box."""
    return [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]


def block(x: int, y: int, w: int, h: int) -> np.ndarray:
    """The mask of a box, `(H, W)`."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + h, x : x + w] = True
    return mask


# All sides lie between pixels, so that every rasteriser fills the outlines alike.
OUTLINES = [bent(*box) for box in BOXES]
MASKS = [block(x, y, w, h // 2) | block(x, y, w // 2, h) for x, y, w, h in BOXES]
# Of this one each makes its own mask: what a file keeps are the points.
SLANTED = [(12.375, 40.84), (33.21, 47.5), (20.64, 66.127)]
