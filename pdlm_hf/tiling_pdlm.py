"""One geometry for images and region masks: both are cut into the same tiles."""

from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
from PIL import Image

from .errors_pdlm import SettingError

MOST_TILES = 64  # of an image: candidate grids are tried one by one
OUTSIDE = 255  # value of a pixel outside the region, in the image that carries the region prompt


def num_tiles(columns: Any, rows: Any) -> Any:
    """Tiles of an image that is cut into a grid: its cells, and the thumbnail if there is more than one.

    Args:
        columns, rows (`int`, array or integer tensor): of the grid.

    Returns:
        of the same kind as the arguments.
    """
    cells = columns * rows
    return cells + (cells > 1)


def tile_grids(min_tiles: int, max_tiles: int) -> list[tuple[int, int]]:
    """Candidate grids (columns, rows) with min_tiles <= columns * rows <= max_tiles, by number of tiles.

    The order among equals decides ties in [`best_grid`]; the reference leaves it to the iteration order of a set of
    int pairs, which is fixed in CPython, so the set is filled the same way here.

    Raises:
        SettingError: there may be more than [`MOST_TILES`].
    """
    if max_tiles > MOST_TILES:
        raise SettingError(f"max_tiles must be at most {MOST_TILES}, got {max_tiles}; the released models have 6.")
    grids = {
        (columns, rows)
        for n in range(min_tiles, max_tiles + 1)
        for columns in range(1, n + 1)
        for rows in range(1, n + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


def best_grid(width: int, height: int, tile_size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Grid (columns, rows) whose aspect ratio is nearest to the image's.

    On a tie the later (larger) grid wins if the image has more than half of that grid's pixels.

    Args:
        width, height (`int`): image size in pixels.
        tile_size (`int`): side of a tile in pixels.
        min_tiles, max_tiles (`int`): bounds for columns * rows.
    """
    best, best_difference = (1, 1), float("inf")
    for columns, rows in tile_grids(min_tiles, max_tiles):
        difference = abs(width / height - columns / rows)
        tie = difference == best_difference and width * height > 0.5 * tile_size * tile_size * columns * rows
        if difference < best_difference or tie:
            best, best_difference = (columns, rows), difference
    return best


def resize(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Resize the width first and then the height, with the same pixels in every version of Pillow.

    One call of Pillow rounds to whole values between the two axes, and which axis comes first depends on its version:
    up to 11 always the width, as in the reference, later whichever is cheaper.

    Args:
        image (`PIL.Image.Image`): mode "RGB" or "L".
        size (`tuple[int, int]`): width, height in pixels.
        resample (`Image.Resampling`): filter.
    """
    return image.resize((size[0], image.height), resample).resize(size, resample)


def cut(whole: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Cut an array into the cells of a grid, row by row, without copying it.

    Args:
        whole (`np.ndarray` of shape `(rows * height, columns * width, ...)`)
        grid (`tuple[int, int]`): columns, rows.

    Returns:
        `np.ndarray` of shape `(rows, columns, height, width, ...)`, a view.
    """
    columns, rows = grid
    height, width = whole.shape[0] // rows, whole.shape[1] // columns
    return whole.reshape(rows, height, columns, width, *whole.shape[2:]).swapaxes(1, 2)


def tile_views(image: Image.Image, grid: tuple[int, int], tile_size: int) -> list[np.ndarray]:
    """The tiles of [`tile`] one by one, not copied out of the resized image; read-only."""
    columns, rows = grid
    whole = np.asarray(resize(image, (tile_size * columns, tile_size * rows)))
    tiles = [cell for row in cut(whole, grid) for cell in row]
    if len(tiles) > 1:
        tiles.append(np.asarray(resize(image, (tile_size, tile_size))))
    return tiles


def tile(image: Image.Image, grid: tuple[int, int], tile_size: int) -> np.ndarray:
    """Cut an image into tiles: row by row, and if there is more than one, a thumbnail of the whole image last.

    The whole image is resized to the grid (bicubic, aspect ratio not kept), as the reference does.

    Args:
        image (`PIL.Image.Image`): mode "RGB" or "L".
        grid (`tuple[int, int]`): columns, rows.
        tile_size (`int`): side of a tile in pixels.

    Returns:
        `np.ndarray` of shape `(num_tiles, tile_size, tile_size[, 3])`, uint8.
    """
    return np.stack(tile_views(image, grid, tile_size))


def region_patches(
    mask: np.ndarray, prompt_id: int, grid: tuple[int, int], tile_size: int, patch_size: int
) -> np.ndarray:
    """Patches that carry the region's prompt embedding, per tile.

    As the reference: the mask becomes an image (prompt id inside, 255 outside), goes through the same bicubic resize
    as the image, and a patch is active if its top-left pixel is no longer 255, so a region grows by up to two source
    pixels. Only those pixels are computed. A mask so small that no patch is active anywhere would go without its
    prompt there; here the patches that hold most of it are switched on instead.

    Args:
        mask (`np.ndarray` of shape `(H, W)`): bool, not empty.
        prompt_id (`int`): index of the region prompt.
        grid (`tuple[int, int]`): columns, rows.
        tile_size, patch_size (`int`): in pixels.

    Returns:
        `np.ndarray` of shape `(num_tiles, tile_size // patch_size, tile_size // patch_size)`, bool.
    """
    side, parts = tile_size // patch_size, []
    for columns, rows in dict.fromkeys([grid, (1, 1)]):  # the cells, the thumbnail
        pixels = resized_corners(mask, prompt_id, (tile_size * columns, tile_size * rows), patch_size)
        parts.append(cut(pixels != OUTSIDE, (columns, rows)).reshape(-1, side, side))
    if not any(part.any() for part in parts):
        for part, (columns, rows) in zip(parts, (grid, (1, 1)), strict=False):
            row, column = _heaviest_cell(mask, columns * side, rows * side)
            part[row // side * columns + column // side, row % side, column % side] = True
    return np.concatenate(parts)


def resized_corners(mask: np.ndarray, inside: int, size: tuple[int, int], step: int) -> np.ndarray:
    """Every `step`-th pixel of every `step`-th row of what [`resize`] makes of a mask, without the others.

    Pillow's arithmetic, in whole numbers as there: the width first, rounded to 8 bits, then the height.

    Args:
        mask (`np.ndarray` of shape `(H, W)`): bool.
        inside (`int`): value of a pixel inside the region; those outside have [`OUTSIDE`].
        size (`tuple[int, int]`): width, height of the resized mask.
        step (`int`): in pixels of the resized mask.

    Returns:
        `np.ndarray` of shape `(size[1] // step, size[0] // step)`, uint8.
    """
    (height, width), (new_width, new_height) = mask.shape, size
    used = np.flatnonzero(mask.any(1))
    rows = slice(used[0], used[-1] + 1) if len(used) else slice(0)  # elsewhere everything is outside
    narrow = np.full((height, new_width // step), OUTSIDE, np.uint8)
    if width == new_width:
        narrow[rows] = np.where(mask[rows, ::step], np.uint8(inside), np.uint8(OUTSIDE))
    else:
        columns = np.take(mask[rows], _weights(width, new_width, step)[0], axis=1)
        pixels = np.where(columns.T, np.uint8(inside), np.uint8(OUTSIDE))
        narrow[rows] = _resampled(pixels, width, new_width, step).T
    if height == new_height:
        return narrow[::step]
    return _resampled(narrow[_weights(height, new_height, step)[0]], height, new_height, step)


_BITS = 22  # of the fraction of Pillow's weights


def _resampled(pixels: np.ndarray, length: int, new_length: int, step: int) -> np.ndarray:
    """The first axis resized, of the pixels that [`_weights`] names; `(new_length // step, ...)` uint8."""
    _, places, weights = _weights(length, new_length, step)
    total = np.full((new_length // step, pixels.shape[1]), 1 << (_BITS - 1), np.int32)
    for place, weight in zip(places, weights, strict=True):
        total += pixels[place] * weight[:, None]
    return (total >> _BITS).clip(0, 255).astype(np.uint8)


@lru_cache(256)
def _weights(length: int, new_length: int, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a bicubic resize of an axis takes every `step`-th pixel from.

    Returns:
        the source pixels that count; and for every tap of every new pixel its place among them and its weight,
        `(taps, new_length // step)`, int32.
    """
    scale = length / new_length
    width = max(scale, 1.0)  # of the filter, in source pixels
    center = (np.arange(0, new_length, step) + 0.5) * scale
    first = (center - 2 * width + 0.5).astype(np.int32).clip(0)
    end = (center + 2 * width + 0.5).astype(np.int32).clip(max=length)
    taps = first + np.arange(2 * ceil(2 * width) + 1, dtype=np.int32)[:, None]
    x = np.abs((taps - center + 0.5) * (1 / width))
    near, far = ((1.5 * x - 2.5) * x) * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where((taps < end) & (x < 2), np.where(x < 1, near, far), 0.0)
    weights = weights / np.add.accumulate(weights)[-1]  # one after the other, as a loop adds
    fixed = np.where(weights < 0, weights * 2**_BITS - 0.5, weights * 2**_BITS + 0.5).astype(np.int32)
    used, places = np.unique(taps.clip(max=length - 1), return_inverse=True)
    return used, places.reshape(taps.shape), fixed


def _heaviest_cell(mask: np.ndarray, columns: int, rows: int) -> tuple[int, int]:
    """Cell (row, column) of a rows x columns raster over the mask that holds most of its pixels."""
    y, x = np.nonzero(mask)
    cell = (y * rows // mask.shape[0]) * columns + x * columns // mask.shape[1]
    return divmod(int(np.bincount(cell).argmax()), columns)
