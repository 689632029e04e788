"""One geometry for images and region masks: both are cut into the same tiles."""

from typing import Any

import numpy as np
from PIL import Image

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
    """
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
    columns, rows = grid
    resized = np.asarray(resize(image, (tile_size * columns, tile_size * rows)))
    tiles = resized.reshape(rows, tile_size, columns, tile_size, *resized.shape[2:]).swapaxes(1, 2)
    tiles = tiles.reshape(rows * columns, tile_size, tile_size, *resized.shape[2:])
    if len(tiles) > 1:
        thumbnail = np.asarray(resize(image, (tile_size, tile_size)))
        tiles = np.concatenate([tiles, thumbnail[None]])
    return tiles


def region_patches(
    mask: np.ndarray, prompt_id: int, grid: tuple[int, int], tile_size: int, patch_size: int
) -> np.ndarray:
    """Patches that carry the region's prompt embedding, per tile.

    As the reference: the mask becomes an image (prompt id inside, 255 outside), goes through the same bicubic resize
    as the image, and a patch is active if its top-left pixel is no longer 255, so a region grows by up to two source
    pixels. A mask so small that no patch is active anywhere would go without its prompt there; here the patches that
    hold most of it are switched on instead.

    Args:
        mask (`np.ndarray` of shape `(H, W)`): bool, not empty.
        prompt_id (`int`): index of the region prompt.
        grid (`tuple[int, int]`): columns, rows.
        tile_size, patch_size (`int`): in pixels.

    Returns:
        `np.ndarray` of shape `(num_tiles, tile_size // patch_size, tile_size // patch_size)`, bool.
    """
    mask = np.ascontiguousarray(mask)  # numpy lets other threads run while it copies, Pillow does not
    carrier = Image.fromarray(np.where(mask, np.uint8(prompt_id), np.uint8(OUTSIDE)))
    active = tile(carrier, grid, tile_size)[:, ::patch_size, ::patch_size] != OUTSIDE
    if not active.any():
        side = tile_size // patch_size
        for tiles, (columns, rows) in ((active[: grid[0] * grid[1]], grid), (active[grid[0] * grid[1] :], (1, 1))):
            if len(tiles):
                row, column = _heaviest_cell(mask, columns * side, rows * side)
                tiles[row // side * columns + column // side, row % side, column % side] = True
    return active


def _heaviest_cell(mask: np.ndarray, columns: int, rows: int) -> tuple[int, int]:
    """Cell (row, column) of a rows x columns raster over the mask that holds most of its pixels."""
    y, x = np.nonzero(mask)
    cell = (y * rows // mask.shape[0]) * columns + x * columns // mask.shape[1]
    return divmod(int(np.bincount(cell).argmax()), columns)
