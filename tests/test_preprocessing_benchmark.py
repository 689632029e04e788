"""Tiles and region prompts, bit for bit what whole arrays and Pillow alone make of an image and its masks."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks.preprocessing import SIZES, drawn, plain, plain_patches, plain_tiles
from pdlm_hf.image_processing_pdlm import PdlmImageProcessorPil, _normalized_on
from pdlm_hf.tiling_pdlm import region_patches, resized_corners, tile_views

TILE, PATCH = 64, 8


@pytest.mark.parametrize(
    ("width", "height"),
    [(128, 64), (130, 97), (64, 64), (63, 65), (640, 480), (41, 300), (300, 41), (1000, 9), (192, 128), (7, 500)],
)
def test_pixels_and_region_prompts(width, height):
    image, masks = drawn(width, height)
    processor = PdlmImageProcessorPil(size={"height": TILE, "width": TILE}, patch_size=PATCH, num_region_prompts=4)
    found = processor(images=[image], segmentation_maps=[masks], return_tensors="np")
    pixels, planes = plain(image, masks, processor.grid(width, height), TILE, PATCH, 4)
    assert found["pixel_values"].dtype == np.float32 and np.array_equal(found["pixel_values"], pixels)
    assert np.array_equal(found["region_masks"], planes)


@pytest.mark.parametrize("seed", range(8))
def test_masks_of_any_shape(seed):
    """Noise, single pixels, stripes; grids and prompts of all kinds; masks that are not contiguous."""
    rng = np.random.default_rng(seed)
    for _ in range(12):
        height, width = rng.integers(1, 260, 2)
        mask = rng.random((height, width)) < rng.choice([0.01, 0.5, 0.99])
        if rng.random() < 0.3:
            mask = np.zeros((width, height), bool).T
            mask[rng.integers(height)] = True
        mask[rng.integers(height), rng.integers(width)] = True
        grid, prompt = [(1, 1), (3, 2), (1, 4), (2, 2)][rng.integers(4)], int(rng.integers(6))
        expected = plain_patches(mask, prompt, grid, TILE, PATCH)
        if expected.any():
            assert np.array_equal(region_patches(mask, prompt, grid, TILE, PATCH), expected)


def test_an_empty_mask_is_outside_everywhere():
    assert (resized_corners(np.zeros((50, 40), bool), 3, (64, 128), 8) == 255).all()


def test_other_means_and_deviations_round_as_whole_arrays_do():
    image, _ = drawn(100, 70)
    processor = PdlmImageProcessorPil(size={"height": TILE, "width": TILE}, patch_size=PATCH)
    mean, std = [0.48, 0.45, 0.4], [0.26, 0.27, 0.28]
    raw = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    found = processor(image, image_mean=mean, image_std=std, return_tensors="np")["pixel_values"]
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (mean, std))
    assert np.array_equal(found, (raw / np.float32(255) - mean) / std)
    other = processor(image, rescale_factor=1 / 127, do_normalize=False, return_tensors="np")["pixel_values"]
    assert np.array_equal(other, raw * np.float32(1 / 127))


def test_another_device_gives_the_same_bits():
    image, _ = drawn(150, 70)
    processor = PdlmImageProcessorPil(size={"height": TILE, "width": TILE}, patch_size=PATCH)
    other = {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.27, 0.28], "rescale_factor": 1 / 254}
    for settings in ({}, other, {"do_normalize": False}, {"do_rescale": False, "do_normalize": False}):
        expected = processor(image, return_tensors="pt", **settings)["pixel_values"]
        tiles = list(plain_tiles(image, processor.grid(*image.size), TILE))
        found = _normalized_on(torch.device("cpu"), tiles, processor._settings(settings))
        assert torch.equal(found, expected) and found.stride() == expected.stride()
    moved = processor(image, return_tensors="pt", device="meta")
    assert (moved["pixel_values"].device.type, moved["pixel_values"].shape) == ("meta", (3, 3, TILE, TILE))
    assert moved["image_grids"].device.type == "cpu"


def test_an_image_of_several_passes_is_resized_once(processor, monkeypatch):
    """More regions than prompts: the inputs are those of the passes one by one."""
    image, ellipses = drawn(150, 70)
    masks = [turned for mask in ellipses for turned in (mask, mask[::-1], mask[:, ::-1])][:8]
    limit, seen = processor.image_processor.num_region_prompts, []

    def counted(*args):
        seen.append(args)
        return tile_views(*args)

    parts = [processor(images=[image], segmentation_maps=[masks[k : k + limit]]) for k in range(0, 8, limit)]
    monkeypatch.setattr("pdlm_hf.image_processing_pdlm.tile_views", counted)
    found = processor(images=[image, image.copy()], segmentation_maps=[masks, masks[:2]])
    assert len(seen) == 2 and found["image_index"].tolist() == [0, 0, 1]
    for name in ("pixel_values", "region_masks", "region_boxes", "original_sizes", "image_grids"):
        assert torch.equal(found[name][: -len(found[name]) // 3 or None], torch.cat([part[name] for part in parts]))
    assert found["region_order"][:2].tolist() == [
        parts[0]["region_order"][0].tolist(),
        [k + limit if k >= 0 else -1 for k in parts[1]["region_order"][0].tolist()],
    ]


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.preprocessing", "--turns", "1", "--json", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    record = json.loads(file.read_text())
    assert [row["size"] for row in record["rows"]] == [list(size) for size in SIZES]
    assert all(row["tiles"] == 7 and row["ours_ms"] > 0 for row in record["rows"])
