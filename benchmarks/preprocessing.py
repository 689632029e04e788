"""What one image costs before the model: tiles and region prompts, beside the same by Pillow and NumPy alone.

    python benchmarks/preprocessing.py [--turns 15] [--json benchmarks/results/preprocessing.json]

Images of 7 tiles with three masks. Both ways give the same bits, which is checked first; then they are timed in turn,
by the time of one core that the process gets, so that others on the machine count little. Medians.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from pdlm_hf.image_processing_pdlm import PdlmImageProcessorPil
from pdlm_hf.tiling_pdlm import OUTSIDE, resize

SIZES = [(1536, 1024), (1600, 1200), (4000, 3000)]  # the first is the grid's own size, and is not resized


def plain_tiles(image: Image.Image, grid: tuple[int, int], size: int) -> np.ndarray:
    """Tiles as Pillow makes them of a whole image or mask, the thumbnail last."""
    columns, rows = grid
    resized = np.asarray(resize(image, (size * columns, size * rows)))
    tiles = resized.reshape(rows, size, columns, size, *resized.shape[2:]).swapaxes(1, 2)
    tiles = tiles.reshape(rows * columns, size, size, *resized.shape[2:])
    return tiles if len(tiles) == 1 else np.concatenate([tiles, np.asarray(resize(image, (size, size)))[None]])


def plain_patches(mask: np.ndarray, prompt_id: int, grid: tuple[int, int], size: int, patch: int) -> np.ndarray:
    """Patches of a region whose resized mask reaches a patch's corner, from the whole resized mask."""
    carrier = Image.fromarray(np.where(mask, np.uint8(prompt_id), np.uint8(OUTSIDE)))
    return plain_tiles(carrier, grid, size)[:, ::patch, ::patch] != OUTSIDE


def plain(image: Image.Image, masks: list[np.ndarray], grid: tuple[int, int], size: int, patch: int, prompts: int):
    """Pixels and region masks of an image by whole arrays, one operation after the other."""
    pixels = plain_tiles(image, grid, size).astype(np.float32) / 255
    half = np.array([0.5] * 3, np.float32)
    pixels = ((pixels - half) / half).transpose(0, 3, 1, 2)
    planes = np.zeros((len(pixels), prompts, size // patch, size // patch), np.uint8)
    for k, mask in enumerate(masks):
        planes[:, k] = plain_patches(mask, k, grid, size, patch)
    return pixels, planes


def drawn(width: int, height: int, regions: int = 3) -> tuple[Image.Image, list[np.ndarray]]:
    """A smooth image, and masks of ellipses that overlap."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / 37 + channel) * np.cos(y / 29) for channel in range(3)]
    image = Image.fromarray(np.stack(waves, -1).astype(np.uint8))
    u, v = x / width, y / height
    masks = [
        ((u - 0.25 - 0.2 * k) / (0.39 - 0.03 * k)) ** 2 + ((v - 0.4 - 0.05 * k) / (0.5 - 0.04 * k)) ** 2 < 0.5
        for k in range(regions)
    ]
    return image, masks


def milliseconds(ways: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Median of each, called in turn after a warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if turn:
                taken[name].append(1000 * (time.process_time() - start))
    return {name: round(statistics.median(times), 1) for name, times in taken.items()}


def measure(width: int, height: int, turns: int) -> dict[str, Any]:
    """One row of the table. Raises: SystemExit if the two ways differ in a bit."""
    image, masks = drawn(width, height)
    processor = PdlmImageProcessorPil()
    grid, size, patch = processor.grid(width, height), processor.size["height"], processor.patch_size

    def ours():
        return processor(images=[image], segmentation_maps=[masks], return_tensors="np")

    def before():
        return plain(image, masks, grid, size, patch, processor.num_region_prompts)

    found, (pixels, planes) = ours(), before()
    if not (np.array_equal(found["pixel_values"], pixels) and np.array_equal(found["region_masks"], planes)):
        raise SystemExit(f"{width} x {height}: the two ways differ.")
    ways = {
        "before": before,
        "ours": ours,
        "resize": lambda: (resize(image, (size * grid[0], size * grid[1])), resize(image, (size, size))),
    }
    taken = milliseconds(ways, turns)
    return {"size": [width, height], "tiles": len(pixels)} | {f"{name}_ms": ms for name, ms in taken.items()}


def main() -> None:
    """Measure, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [measure(*size, options.turns) for size in SIZES]
    record = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "numpy": np.__version__,
        "turns": options.turns,
        "rows": rows,
    }
    for row in rows:
        sys.stdout.write(f"{row}\n")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
