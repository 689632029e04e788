"""The same pixels with every supported Pillow, whose resize goes about its two axes in another order in every version.

The digests are those of Pillow 11.0.0, the reference's, whose one call resizes the width first, always. They were
recorded with `image.resize(size)`, one call, as the reference does it: `python tests/hf/test_resizing.py`.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from pdlm_hf.tiling_pdlm import best_grid, region_patches, resize, tile

FILE = Path(__file__).with_name("resizing.json")
TILE, PATCH = 64, 8
SIZES = [(640, 480), (480, 640), (1, 300), (300, 1), (3, 900), (2, 1000), (1000, 2), (5000, 7), (7, 5000), (37, 4100)]
SIZES += [(17, 23), (1, 1), (1200, 1600), (64, 64), (64, 900), (900, 64), (130, 13100), (333, 334)]
SIZES += [(60, 100), (100, 300), (20, 300), (300, 900)]  # where Pillow 13 differs and 12 does not
CASES = [f"{width}x{height} {mode}" for width, height in SIZES for mode in ("RGB", "L")]


def drawn(case: str) -> Image.Image:
    """An image without a library's random numbers: waves, and edges as of a mask."""
    size, mode = case.split()
    width, height = map(int, size.split("x"))
    y, x = np.mgrid[:height, :width]
    channels = [(7 * x + 13 * y + x * y // (3 + c) + 29 * c) % 256 for c in range(3)]
    edges = np.where((x * 5 // width + y * 7 // height) % 2 == 0, 255, 0)
    array = np.stack(channels, -1) if mode == "RGB" else edges
    return Image.fromarray(array.astype(np.uint8))


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def grid_of(image: Image.Image) -> tuple[int, int]:
    return best_grid(*image.size, TILE, 1, 6)


def in_one_call(image: Image.Image) -> str:
    """Digest of what the reference computes: the whole image in its grid, and the thumbnail."""
    columns, rows = grid_of(image)
    sizes = [(TILE * columns, TILE * rows), (TILE, TILE)]
    return digest(np.concatenate([np.asarray(image.resize(s, Image.Resampling.BICUBIC)).ravel() for s in sizes]))


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_pillow_11(case):
    image = drawn(case)
    columns, rows = grid_of(image)
    sizes = [(TILE * columns, TILE * rows), (TILE, TILE)]
    found = np.concatenate([np.asarray(resize(image, s)).ravel() for s in sizes])
    assert digest(found) == json.loads(FILE.read_text())["resized"][case]


@pytest.mark.parametrize("case", CASES[::2])
def test_tiles_are_cut_from_them(case):
    image = drawn(case)
    grid = grid_of(image)
    tiles = tile(image, grid, TILE)
    whole = np.asarray(resize(image, (TILE * grid[0], TILE * grid[1])))
    assert np.array_equal(tiles[0], whole[:TILE, :TILE])
    if len(tiles) > 1:
        assert np.array_equal(tiles[-2], whole[-TILE:, -TILE:])
        assert np.array_equal(tiles[-1], np.asarray(resize(image, (TILE, TILE))))


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("L")])
def test_region_prompts_are_those_of_pillow_11(case):
    mask = np.asarray(drawn(case)) > 0
    found = region_patches(mask, 2, grid_of(drawn(case)), TILE, PATCH)
    assert digest(found) == json.loads(FILE.read_text())["patches"][case]


@pytest.mark.parametrize("size", [(2, 2), (34, 46), (17, 46), (34, 23), (17, 23)])
@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_one_call_and_two_are_the_same_where_pillow_starts_with_the_width(size, resample):
    image = drawn("17x23 RGB")
    assert np.array_equal(np.asarray(resize(image, size, resample)), np.asarray(image.resize(size, resample)))


if __name__ == "__main__":
    assert PIL.__version__ == "11.0.0", PIL.__version__
    patches = {
        case: digest(region_patches(np.asarray(drawn(case)) > 0, 2, grid_of(drawn(case)), TILE, PATCH))
        for case in CASES
        if case.endswith("L")
    }
    record = {"resized": {case: in_one_call(drawn(case)) for case in CASES}, "patches": patches}
    FILE.write_text(json.dumps(record, indent=1) + "\n")
