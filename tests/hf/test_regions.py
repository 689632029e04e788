import json
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from pycocotools import mask as coco

from pdlm_hf import Region
from pdlm_hf.errors_pdlm import DataError, ImageError, RegionError
from pdlm_hf.regions import limits
from pdlm_hf.regions.coco import CocoIndex
from pdlm_hf.regions.hints import load_pair
from pdlm_hf.regions.images import load_image, orientation_of
from pdlm_hf.regions.readers import read_region_file
from pdlm_hf.regions.region import parse_region, parse_regions, region_areas
from pdlm_hf.regions.rle import run_lengths

WIDTH, HEIGHT = 30, 20
BLOB = np.zeros((HEIGHT, WIDTH), dtype=bool)
BLOB[4:9, 10:25] = BLOB[12, 3] = True
POLYGON = [2.5, 3.0, 20.0, 4.5, 12.0, 17.5]


def compressed(mask, text=True):
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return rle | {"counts": rle["counts"].decode()} if text else rle


def uncompressed(mask):
    values = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(values)) + 1
    runs = np.diff([0, *changes, len(values)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if values[0] else runs}


def box_mask(x0, y0, x1, y1):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (BLOB, BLOB),
        (BLOB.astype(np.uint8) * 255, BLOB),
        (torch.from_numpy(BLOB), BLOB),
        (Image.fromarray(BLOB), BLOB),
        (Region("x", BLOB), BLOB),
        (compressed(BLOB), BLOB),
        (compressed(BLOB, text=False), BLOB),
        (uncompressed(BLOB), BLOB),
        (compressed(~BLOB), ~BLOB),
        (uncompressed(~BLOB), ~BLOB),
        (compressed(np.ones_like(BLOB)), np.ones_like(BLOB)),
        ([3, 4, 5, 6], box_mask(3, 4, 8, 10)),
        ((3.0, 4.0, 5.0, 6.0), box_mask(3, 4, 8, 10)),
        ([3.4, 4.0, 1.2, 2.5], box_mask(3, 4, 5, 7)),  # every pixel it touches
        ([-5, -5, 8, 8], box_mask(0, 0, 3, 3)),  # cut at the border
        ([25, 15, 100, 100], box_mask(25, 15, 30, 20)),
        ([[0, 0, 10, 0, 10, 10, 0, 10]], box_mask(0, 0, 10, 10)),
        ([0, 0, 10, 0, 10, 10, 0, 10], box_mask(0, 0, 10, 10)),  # its only ring
        ([[0, 0], [10, 0], [10, 10], [0, 10]], box_mask(0, 0, 10, 10)),  # the points of its only ring
        ([[[0, 0], [10, 0], [10, 10], [0, 10]]], box_mask(0, 0, 10, 10)),
        ((0, 0.0, np.float32(10), 0, 10, 10, 0, 10), box_mask(0, 0, 10, 10)),
        (np.array([0, 0, 10, 0, 10, 10, 0, 10]), box_mask(0, 0, 10, 10)),
        ({"segmentation": [0, 0, 10, 0, 10, 10, 0, 10]}, box_mask(0, 0, 10, 10)),
        ({"segmentation": ((0, 0, 10, 0, 10, 10, 0, 10),)}, box_mask(0, 0, 10, 10)),
        ({"segmentation": BLOB, "bbox": [1, 1, 2, 2]}, BLOB),  # as SAM's mask generator has it
        ({"segmentation": torch.from_numpy(BLOB)}, BLOB),
        ({"segmentation": Image.fromarray(BLOB)}, BLOB),
        (np.array([3, 4, 5, 6]), box_mask(3, 4, 8, 10)),
        (list(torch.tensor([3, 4, 5, 6])), box_mask(3, 4, 8, 10)),
        (uncompressed(BLOB) | {"size": np.array([HEIGHT, WIDTH])}, BLOB),
        (
            [[0, 0, 4, 0, 4, 4, 0, 4], [10, 10, 14, 10, 14, 14, 10, 14]],
            box_mask(0, 0, 4, 4) | box_mask(10, 10, 14, 14),
        ),
        ({"segmentation": compressed(BLOB)}, BLOB),
        ({"segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]], "bbox": [1, 1, 1, 1]}, box_mask(0, 0, 10, 10)),
        ({"bbox": [3, 4, 5, 6]}, box_mask(3, 4, 8, 10)),
        ({"bbox": [3, 4, 5, 6], "segmentation": []}, box_mask(3, 4, 8, 10)),
        ({"bbox": [3, 4, 5, 6], "segmentation": None, "category_id": 3}, box_mask(3, 4, 8, 10)),
    ],
)
def test_forms_of_a_region(value, expected):
    region = parse_region(value, WIDTH, HEIGHT, 7)
    assert region.mask.dtype == bool
    assert np.array_equal(region.mask, expected)
    assert region.id == ("x" if isinstance(value, Region) else 7)
    x, y, w, h = coco.toBbox(compressed(expected)).tolist()
    assert region.bbox == [x, y, w, h]


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_agree_with_pycocotools(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 400, 2).tolist()
    mask = np.kron(rng.random((8, 8)) < rng.random(), np.ones((height // 8 + 1, width // 8 + 1)))[:height, :width] > 0
    mask[rng.integers(height), rng.integers(width)] = True
    for rle in (compressed(mask), compressed(mask, text=False), uncompressed(mask)):
        assert np.array_equal(parse_region(rle, width, height).mask, mask)
    counts = uncompressed(mask)["counts"]
    assert np.array_equal(
        coco.decode(coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)), mask
    )


HUGE = int("1" * 401)


@pytest.mark.parametrize("seed", range(30))
def test_random_polygons_partly_outside_agree_with_pycocotools(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 300, 2).tolist()
    for reach in (0.5, 2, 8):
        corners = [(rng.random((rng.integers(3, 30), 2)) - 0.5) * reach * 2 for _ in range(rng.integers(1, 4))]
        rings = [((ring + 0.5) * (width, height)).ravel().tolist() for ring in corners]
        expected = coco.decode(coco.merge(coco.frPyObjects(rings, height, width))).astype(bool)
        assert region_areas([{"segmentation": rings}], [(width, height)]) == [expected.sum()]
        if expected.any():
            assert np.array_equal(parse_region(rings, width, height).mask, expected)


def test_many_rings():
    rings = [[x, y, x + 1, y, x + 1, y + 1, x, y + 1] for y in range(0, HEIGHT, 2) for x in range(0, WIDTH, 2)]
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[::2, ::2] = True
    assert len(rings) == 150 and np.array_equal(parse_region(rings, WIDTH, HEIGHT).mask, mask)


def test_the_outline_of_a_polygon_is_bounded(monkeypatch):
    """Before pycocotools, which takes 40 bytes for every pixel of it, and dies where it gets none."""
    zigzag = [coordinate for k in range(60_000) for coordinate in (-16 * WIDTH if k % 2 else 16 * WIDTH, k % HEIGHT)]
    asked = []
    monkeypatch.setattr(coco, "frPyObjects", lambda *args: asked.append(args))
    for value in (zigzag, [zigzag], {"segmentation": [zigzag]}, [zigzag[k : k + 6] for k in range(0, 120_000, 6)]):
        with pytest.raises(RegionError, match="region 0: the outline of the polygon, of 60000 points, is .* long"):
            parse_region(value, WIDTH, HEIGHT)
    assert isinstance(region_areas([{"segmentation": [zigzag]}], [(WIDTH, HEIGHT)])[0], RegionError)
    monkeypatch.setattr(limits, "POLYGON_POINTS", 5)
    with pytest.raises(RegionError, match="region 0: the polygon has 6 points, at most 5 are read"):
        parse_region([POLYGON, POLYGON], WIDTH, HEIGHT)
    assert asked == []


def test_an_image_that_is_too_large_is_refused_before_a_mask_is_made():
    for value in ([1, 1, 2, 2], [POLYGON], {"size": [10**6, 10**6], "counts": [10**12]}, Region(0, BLOB)):
        with pytest.raises(ImageError, match="has 1000000 x 1000000 pixels, .* PDLM_IMAGE_PIXELS"):
            parse_region(value, 10**6, 10**6)
    limits.check_image_pixels(10, 10, limit=100)
    with pytest.raises(ImageError, match=r"a.png: has 10 x 11 pixels, 110 together; at most 100 are read"):
        limits.check_image_pixels(10, 11, "a.png", 100)
    limits.check_mask_pixels(10, 10, 3, limit=300)
    with pytest.raises(
        RegionError, match="4 regions of an image of 10 x 10 pixels are 400 pixels together, more than"
    ):
        limits.check_mask_pixels(10, 10, 4, limit=300)


@pytest.mark.parametrize(("value", "limit"), [("1000", 1000), (None, 178_956_970), ("0", None), ("1e6", None)])
def test_limits_are_set_by_the_environment(value, limit):
    environment = dict(os.environ) if value is None else {**os.environ, "PDLM_IMAGE_PIXELS": value}
    code = "from pdlm_hf.regions import limits; from PIL import Image; print(limits.IMAGE_PIXELS)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if limit is None:
        assert "SettingError: PDLM_IMAGE_PIXELS must be a positive integer" in done.stderr
    else:
        assert done.stdout == f"{limit}\n"


@pytest.mark.parametrize("rings", [[POLYGON], [POLYGON, [15, 2, 29, 2, 29, 18]], [[-5.0, -5, 50, -5, 50, 10]]])
def test_polygons_agree_with_pycocotools(rings):
    expected = coco.decode(coco.merge(coco.frPyObjects(rings, HEIGHT, WIDTH))).astype(bool)
    assert np.array_equal(parse_region(rings, WIDTH, HEIGHT).mask, expected)


def damaged(change):
    rle = compressed(BLOB)
    return rle | {"counts": change(rle["counts"])}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (damaged(lambda text: text[:-3]), "the RLE is damaged; its runs do not add up to the 600 pixels"),
        (damaged(lambda text: text + "0"), "the RLE is damaged"),
        (damaged(lambda text: text + "1"), "the RLE is damaged"),
        (damaged(lambda text: "é" + text), "the RLE is damaged"),
        (damaged(lambda text: " " + text), "the RLE is damaged"),
        (damaged(lambda text: ""), "the RLE is damaged"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 5]}, "the RLE is damaged"),
        ({"size": [HEIGHT, WIDTH], "counts": [-5, 605]}, "the RLE is damaged"),
        ({"size": [HEIGHT, WIDTH], "counts": []}, "the RLE is damaged"),
        ({"size": [HEIGHT, WIDTH], "counts": [float("nan"), 600]}, "holds NaN"),
        ({"size": [HEIGHT, WIDTH], "counts": ["a"]}, "expected numbers"),
        ({"size": [HEIGHT, WIDTH], "counts": [600]}, "is empty"),
        ({"size": [HEIGHT, WIDTH], "counts": [0.5, 600]}, "the RLE is damaged"),
        ({"size": [HEIGHT, WIDTH], "counts": [2**52] * 4096 + [600]}, "the RLE is damaged"),  # 2**64 + 600
        ({"size": [HEIGHT, WIDTH], "counts": [0, HUGE]}, "holds a number that is too large"),
        ({"size": [HEIGHT, HUGE], "counts": [600]}, "holds a number that is too large"),
        ({"size": [HEIGHT, [WIDTH]], "counts": [600]}, "expected numbers, got .20, .30.."),
        ([1, 2, HUGE, 5], "holds a number that is too large"),
        ([1e308, 2, 1e308, 5], "holds a number that is too large"),
        ({"bbox": [1, 2, 10**5000, 5]}, "holds a number that is too large"),
        ([[1, 2, 3, 4, HUGE, 5]], "holds a number that is too large"),
        ([1, 2, 3, 4, HUGE, 5], "holds a number that is too large"),
        ([1, 2, "a" * 10, 10**5000], "expected numbers, got list"),
        ({"id": 9, "bbox": {"x": 1}}, "region 9: expected numbers"),
        ({"id": 9, "bbox": torch.empty(4, device="meta")}, "region 9: expected numbers"),
        ({"id": 9, "segmentation": torch.from_numpy(BLOB).to_sparse()}, "region 9: the tensor cannot be read"),
        ({"id": 9, "segmentation": torch.empty(HEIGHT, WIDTH, device="meta")}, "region 9: the tensor cannot be read"),
        ({"id": 9, "segmentation": np.array([POLYGON])}, r"region 9: has size 6 x 1, but"),
        ({"id": 9, "segmentation": np.array(["a"])}, r"region 9: expected a mask of shape \(H, W\)"),
        ({"id": 10**5000, "bbox": [1, 2, 0, 0]}, "region int: .* has no area"),
        ({"id": 9, "segmentation": np.float32(3)}, "region 9: `segmentation` must be an RLE or polygons"),
        ({"id": 9, "segmentation": True}, "region 9: `segmentation` must be an RLE or polygons, got True"),
        (torch.empty(4, device="meta"), "region 3: the tensor cannot be read"),
        (BLOB[None].repeat(2, 0), r"got shape \(2, 20, 30\)"),
        (
            {"size": [WIDTH, HEIGHT], "counts": "abc"},
            r"the RLE is for size \[30, 20\] \(height, width\), .*\[20, 30\]",
        ),
        ({"counts": "abc"}, r"the RLE is for size \[\]"),
        ({"size": 600, "counts": "abc"}, r"the RLE is for size \[\]"),
        ({"size": [HEIGHT, WIDTH], "counts": [[600]]}, "the RLE is damaged"),
        ({"size": [HEIGHT, WIDTH], "counts": None}, "holds NaN"),
        ([1, 2, 0, 5], "has no area; it is .x, y, width, height., not two corners"),
        ([1, 2, -3, 5], "has no area"),
        ([100, 100, 5, 5], "lies outside the image of 30 x 20"),
        ([-10, 0, 5, 5], "lies outside the image"),
        ([1, 2, float("nan"), 5], "holds NaN or infinite"),
        ([1, 2, float("inf"), 5], "holds NaN or infinite"),
        ([1, 2, "a", 5], "expected numbers"),
        ([[1, 2, 3, 4]], "at least three points"),
        ([[1, 2, 3, 4, 5, 6, 7]], r"polygons are a list of rings \[\[x0, y0, x1, y1, ...\], ...\]"),
        ([1, 2, 3, 4, 5, 6, 7], "x and y of all points in turn.*got .*1, 2, 3"),
        ([[[0, 0], [9, 0], [9, 9]], [[2, 2], [4, 2], [4, 4]]], "without brackets around points; got .*0, 0"),
        ([[1, 2], [3, 4]], "at least three points x, y"),
        ([], "at least three points x, y"),
        ([1, 2, 3], "polygons are a list of rings"),
        ({"segmentation": [1, 2, 3, 4]}, "at least three points x, y"),
        ([[100, 100, 120, 100, 120, 120]], "is empty"),
        ([[0, 0, 1e12, 0, 1e12, 1e12]], "the polygon lies far outside the image of 30 x 20 pixels"),
        ([[float("nan"), 1, 2, 3, 4, 5]], "holds NaN"),
        (BLOB.T, "has size 20 x 30, but its image has 30 x 20"),
        (np.zeros_like(BLOB), "is empty"),
        (BLOB * np.nan, "holds NaN"),
        ({"id": "left", "bbox": [1, 2, 0, 0]}, "region left: .* has no area"),
        ({"id": 9, "bbox": [1, 2, 3]}, r"region 9: a box is \[x, y, width, height\], got \[1, 2, 3\]"),
        ({"id": 9, "bbox": "box"}, "region 9: expected numbers"),
        ({"id": 9, "segmentation": "poly"}, "region 9: `segmentation` must be an RLE or polygons"),
        ({"id": 9, "segmentation": {"size": [HEIGHT, WIDTH]}}, "region 9: the RLE has no `counts`"),
        ({"id": 9}, "region 9: needs `segmentation`"),
        ("missing.png", "missing.png: no such file"),
        (5, "expected a mask, box, polygon, RLE or COCO annotation, got int"),
        (None, "got NoneType"),
    ],
)
def test_bad_regions(value, message):
    for parse in (lambda: parse_region(value, WIDTH, HEIGHT, 3), lambda: parse_regions([BLOB] * 3 + [value], 30, 20)):
        with pytest.raises((RegionError, ImageError), match=message):
            parse()
    if isinstance(value, dict) and "counts" not in value:
        (area,) = region_areas([value], [(WIDTH, HEIGHT)])
        assert isinstance(area, RegionError) and re.search(message.replace("region 3", "region 0"), str(area))


def test_mask_from_a_file(tmp_path):
    for name in ("mask.png", "mask.jpg"):
        Image.fromarray(BLOB.astype(np.uint8) * 255).save(tmp_path / name, quality=95)
    assert np.array_equal(parse_region(tmp_path / "mask.png", WIDTH, HEIGHT).mask, BLOB)
    assert np.array_equal(parse_region(str(tmp_path / "mask.png"), WIDTH, HEIGHT).mask, BLOB)
    assert (parse_region(tmp_path / "mask.jpg", WIDTH, HEIGHT).mask != BLOB).mean() < 0.02
    Image.fromarray(BLOB).save(tmp_path / "one_bit.png")
    assert np.array_equal(parse_region(tmp_path / "one_bit.png", WIDTH, HEIGHT).mask, BLOB)
    Image.fromarray(BLOB.astype(np.uint8)).save(tmp_path / "zero_one.png")
    assert np.array_equal(parse_region(tmp_path / "zero_one.png", WIDTH, HEIGHT).mask, BLOB)


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        ([BLOB, {"id": "b", "bbox": [1, 1, 2, 2]}, [0, 0, 2, 2]], [0, "b", 2]),
        (np.stack([BLOB, ~BLOB]), [0, 1]),
        (torch.from_numpy(np.stack([BLOB, ~BLOB])), [0, 1]),
        (BLOB, [0]),
        (BLOB[..., None], [0]),
        (np.stack([BLOB, ~BLOB])[:, None], [0, 1]),
        (torch.from_numpy(BLOB)[None, None], [0]),
        (Image.fromarray(BLOB), [0]),
        (Region("x", BLOB), ["x"]),
        ([3, 4, 5, 6], [0]),
        (np.array([3, 4, 5, 6]), [0]),
        (torch.tensor([3, 4, 5, 6]), [0]),
        (POLYGON, [0]),
        ([POLYGON], [0]),
        ([[POLYGON]], [0]),
        ([POLYGON, [3, 4, 5, 6]], [0, 1]),
        ({"id": 4, "bbox": [1, 1, 2, 2]}, [4]),
        (compressed(BLOB), [0]),
        ((region for region in [BLOB, BLOB]), [0, 1]),
    ],
)
def test_regions_of_a_image(values, ids):
    assert [region.id for region in parse_regions(values, WIDTH, HEIGHT)] == ids


@pytest.mark.parametrize(
    "values", [5, None, np.float32(3), torch.tensor(3), torch.from_numpy(BLOB)[None].to_sparse(), BLOB.T[..., None]]
)
def test_no_list_of_regions(values):
    with pytest.raises(RegionError, match="expected a list of masks|cannot be read|the sides are swapped"):
        parse_regions(values, WIDTH, HEIGHT)


def test_the_region_is_a_copy_of_the_callers_array():
    for given in (BLOB.copy(), torch.from_numpy(BLOB.copy())):
        for value in (given, {"segmentation": given}):
            region = parse_region(value, WIDTH, HEIGHT)
            given[:] = False
            assert np.array_equal(region.mask, BLOB)
            given[:] = BLOB if isinstance(given, np.ndarray) else torch.from_numpy(BLOB)


@pytest.mark.parametrize("values", [[], (), np.zeros((0, HEIGHT, WIDTH))])
def test_no_regions(values):
    with pytest.raises(ValueError, match="No regions given"):
        parse_regions(values, WIDTH, HEIGHT)


# ---------------------------------------------------------------- COCO files

COCO = {
    "images": [{"id": 1, "file_name": "train/a.png"}, {"id": 2, "file_name": "b.png"}],
    "annotations": [
        {"id": 11, "image_id": 1, "bbox": [1, 1, 2, 2]},
        {"id": 12, "image_id": 2, "bbox": [2, 2, 2, 2]},
        {"id": 13, "image_id": 1, "bbox": [3, 3, 2, 2]},
    ],
}


def written(tmp_path, content):
    path = tmp_path / "regions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("content", "name", "ids"),
    [
        (COCO, "a.png", [11, 13]),
        (COCO, "some/folder/b.png", [12]),
        (COCO, "a.jpg", [11, 13]),  # converted
        ([{"id": 5, "bbox": [1, 1, 2, 2]}], "a.png", [5]),
        ({"regions": [{"id": 6, "bbox": [1, 1, 2, 2]}]}, "a.png", [6]),
        ({"annotations": [{"id": 7, "bbox": [1, 1, 2, 2]}]}, "a.png", [7]),
    ],
)
def test_read_regions(tmp_path, content, name, ids):
    assert [region["id"] for region in read_region_file(written(tmp_path, content), name, 9, 9)] == ids


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(COCO)[:-20], "not valid JSON, perhaps cut short"),
        ("", "not valid JSON"),
        (COCO | {"images": [COCO["images"][1], COCO["images"][1] | {"id": 9}]}, "has 2 images, 0 of them named a.png"),
        (COCO | {"images": [COCO["images"][0], COCO["images"][0] | {"id": 9}]}, "has 2 images, 2 of them named a.png"),
        (COCO | {"images": []}, "has 0 images"),
        (
            COCO | {"images": [COCO["images"][0] | {"file_name": "c.png"}]},
            "1 images, 0 of them named a.png .*--image-name",
        ),
        (COCO | {"annotations": []}, "holds no regions for a.png"),
        (
            COCO | {"images": [{"file_name": "a.png"}]},
            r"0 of them named a.png.*\(images\[0\].id: got .*, expected a number",
        ),
        (COCO | {"images": ["a.png"]}, r"images\[0\].id: got 'a.png', expected a number"),
        (COCO | {"annotations": {"id": 1}}, "expected a COCO file or a list of regions"),
        (COCO | {"annotations": [1]}, "holds no regions for a.png"),
        (
            COCO | {"annotations": COCO["annotations"][:1] * 2},
            r"annotations\[1\].id \(image 1\): got 11, expected an id that no",
        ),
        ([], "holds no regions"),
        ([1, 2], "expected a COCO file or a list of regions"),
        ({"regions": "all"}, "expected a COCO file or a list of regions"),
        ({}, "expected a COCO file or a list of regions"),
        ("5", "expected a COCO file or a list of regions"),
    ],
)
def test_bad_region_files(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_region_file(written(tmp_path, content), "a.png", 9, 9)


def test_coco_index():
    images = [{"id": 1, "file_name": "a.png"}, {"id": "b"}, {"id": 1, "file_name": "c.png"}, {"id": [2]}, 7]
    annotations = [
        {"id": 5, "image_id": 1},
        {"id": 5, "image_id": "b"},  # ids begin anew in each image
        {"id": 5, "image_id": 1},
        {"image_id": 1},
        {"image_id": 1},
        {"id": 6, "image_id": 2},
        {"id": 7},
        {"id": 8, "image_id": 1, "category_id": [3]},
    ]
    categories = [{"id": 3, "name": "box"}, {"name": "star"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    index = CocoIndex(data, "x.json")
    assert list(index.images) == [1, "b"] and index.positions == {1: 0, "b": 1}
    assert index.categories == {3: "box"} and index.data is data
    assert index.annotations == {1: [annotations[k] for k in (0, 3, 4)], "b": [annotations[1]]}
    assert [(fault.place, fault.kind, fault.got) for fault in index.faults] == [
        ("images[1].file_name", "missing field", "{'id': 'b'}"),
        ("images[2].id", "duplicate id", "1"),
        ("images[3].id", "wrong type", "[2]"),
        ("images[4].id", "missing field", "7"),
        ("annotations[2].id", "duplicate id", "5"),
        ("annotations[5].image_id", "unknown image", "2"),
        ("annotations[6].image_id", "missing field", "{'id': 7}"),
        ("annotations[7].category_id", "wrong type", "[3]"),
        ("categories[1].id", "missing field", "{'name': 'star'}"),
    ]
    assert str(index.faults[1]) == "images[2].id: got 1, expected an id that no earlier entry has"
    with pytest.raises(DataError, match=r"x.json: images\[1\].file_name \(id 'b'\): got .*, expected the name"):
        index.check()
    strict = CocoIndex(data, needed=("id",))
    assert {fault.place for fault in strict.faults} - {fault.place for fault in index.faults} == {
        "annotations[3].id",
        "annotations[4].id",
    }
    with pytest.raises(DataError, match="x.json: expected a COCO file"):
        CocoIndex([], "x.json")


def test_ids_and_categories_of_coco_files():
    """Ids of images and categories are there once; a category of an annotation is one of the list, if there is one."""
    images = [{"id": 1, "file_name": "a.png"}]
    annotations = [{"id": k, "image_id": 1, "category_id": own, "bbox": [1, 1, 5, 5]} for k, own in enumerate((3, 4))]
    categories = [{"id": 3, "name": "x"}]
    data = {"images": images * 2, "annotations": annotations, "categories": categories}
    assert [(fault.place, fault.kind) for fault in CocoIndex(data).faults] == [
        ("images[1].id", "duplicate id"),
        ("annotations[1].category_id", "unknown category"),
    ]
    data = {"images": images, "annotations": annotations, "categories": categories * 2}
    assert [(fault.place, fault.kind) for fault in CocoIndex(data).faults] == [("categories[1].id", "duplicate id")]
    assert CocoIndex(data | {"categories": []}).annotations == {1: annotations}


def test_missing_region_file(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json: no such file"):
        read_region_file(tmp_path / "nowhere.json", "a.png", 9, 9)


# ---------------------------------------------------------------- images


def test_load_image_forms(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    for source in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(array),
        array,
        torch.from_numpy(array),
    ):
        assert np.array_equal(np.asarray(load_image(source)), array)


@pytest.mark.parametrize(("orientation", "turned"), [(1, False), (3, False), (6, True), (8, True)])
def test_exif_orientation(tmp_path, orientation, turned):
    array = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    array[:5, :5] = 255  # top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    image = load_image(tmp_path / "a.png")
    assert image.size == ((HEIGHT, WIDTH) if turned else (WIDTH, HEIGHT))
    corner = {1: (0, 0), 3: (WIDTH - 1, HEIGHT - 1), 6: (HEIGHT - 1, 0), 8: (0, WIDTH - 1)}[orientation]
    assert image.getpixel(corner) == (255, 255, 255)
    with Image.open(tmp_path / "a.png") as opened:  # what is in memory is what the processor would take
        assert np.array_equal(np.asarray(load_image(opened)), array)


def test_bad_image_files(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, message in [
        ("cut.png", "cut.png: cannot be opened as an image"),
        ("text.png", "text.png: cannot be opened as an image"),
        ("empty.png", "empty.png: cannot be opened as an image"),
        ("nowhere.png", "nowhere.png: no such file"),
        (".", "is a folder, not an image"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_image(tmp_path / name)


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (64, 64)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="large.png: cannot be opened as an image"):
        load_image(tmp_path / "large.png")


def test_a_mask_with_a_meaningful_alpha_channel_is_refused(tmp_path):
    pixels = np.full((20, 30, 4), 255, np.uint8)
    pixels[..., 3] = 0
    pixels[5:10, 5:10, 3] = 255
    path = tmp_path / "mask.png"
    Image.fromarray(pixels).save(path)
    for value in (path, Image.fromarray(pixels)):
        with pytest.raises(ValueError, match="has an alpha channel"):
            parse_regions([value], 30, 20)
    alpha = Image.fromarray(pixels).getchannel("A")
    assert parse_regions([alpha], 30, 20)[0].bbox == [5, 5, 5, 5]
    opaque = Image.fromarray(np.dstack([pixels[..., 3]] * 3 + [np.full((20, 30), 255, np.uint8)]))
    assert parse_regions([opaque], 30, 20)[0].bbox == [5, 5, 5, 5]


def test_images_of_sixteen_bits(tmp_path):
    """Grey as colour: the upper byte. Values of 12 bits in a file of 16 would be black."""
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(path)
    assert load_image(path).getpixel((0, 0)) == (156, 156, 156)
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(path)
    with pytest.raises(ImageError, match="deep.png: has 16 bits per pixel, .* up to 4000 only. .* magick IN.png"):
        load_image(path)
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match=r"float.tif: expected integer values 0..255, got float32 \(32 bits\)"):
        load_image(tmp_path / "float.tif")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000", "DDS", "TGA", "ICO"])
def test_damaged_files_are_one_kind_of_error(tmp_path, kind):
    """Whatever Pillow's readers raise, the message has the name of the file."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(tmp_path / "whole", kind)
    whole, path, refused = (tmp_path / "whole").read_bytes(), tmp_path / "damaged", 0
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), rng.choice([40, 10**6])), rng.integers(1, 6)):
            data[place] = rng.integers(256)
        path.write_bytes(data[: rng.integers(len(data) // 2, len(data) + 1)])
        for read in (load_image, lambda mask: parse_region(mask, 48, 32)):
            try:
                read(path)
            except (ImageError, RegionError) as error:
                refused += str(error).startswith(str(path))
    assert refused > 50


@pytest.mark.parametrize("error", [ValueError, RuntimeError, IndexError, NotImplementedError, MemoryError, KeyError])
def test_errors_of_pillow(tmp_path, monkeypatch, error):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")

    def load(self):
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    for read in (load_image, lambda mask: parse_region(mask, 8, 8)):
        with pytest.raises(ImageError, match=f"a.png: cannot be opened as an image .*{error.__name__}"):
            read(tmp_path / "a.png")


def test_a_mask_is_a_file_of_one_image(tmp_path):
    frames = [Image.fromarray(mask.astype(np.uint8) * 255) for mask in (BLOB, ~BLOB, BLOB)]
    for name in ("a.gif", "a.tif", "a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        with pytest.raises(RegionError, match=f"{name}: holds 3 images, and a mask is a file of one. .*magick"):
            parse_region(tmp_path / name, WIDTH, HEIGHT)
        assert load_image(tmp_path / name).size == (WIDTH, HEIGHT)  # the first frame
    frames[0].convert("RGB").save(tmp_path / "a.mpo", save_all=True, append_images=frames[1:2], quality=100)
    assert (parse_region(tmp_path / "a.mpo", WIDTH, HEIGHT).mask != BLOB).mean() < 0.02  # a photo with previews


@pytest.mark.parametrize("orientation", range(1, 9))
def test_regions_of_the_pixels_as_stored_are_turned_with_the_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(BLOB.astype(np.uint8) * 255).convert("RGB").save(tmp_path / "photo.png", exif=exif)
    Image.fromarray(BLOB.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    Image.fromarray(box_mask(10, 4, 25, 9).astype(np.uint8) * 255).save(tmp_path / "box.png", exif=exif)
    shown, shown_box = (load_image(tmp_path / name) for name in ("photo.png", "box.png"))
    expected, expected_box = (np.asarray(image)[..., 0] > 0 for image in (shown, shown_box))
    assert orientation_of(tmp_path / "photo.png") == orientation
    for value, mask in [
        (BLOB, expected),
        (compressed(BLOB), expected),
        ({"id": 0, "segmentation": BLOB}, expected),
        (tmp_path / "mask.png", expected),
        (tmp_path / "photo.png", expected),  # its own orientation is not applied twice
        ([10, 4, 15, 5], expected_box),
        ([[10, 4, 25, 4, 25, 9, 10, 9]], expected_box),
        (Region(0, expected_box), expected_box),  # it is of the image as shown
    ]:
        assert np.array_equal(parse_region(value, *shown.size, 0, orientation).mask, mask)
        assert np.array_equal(parse_regions([value], *shown.size, orientation)[0].mask, mask)
    if orientation > 4:
        with pytest.raises(RegionError, match="mask.png: has size 30 x 20, .*sides are swapped.*EXIF.*stored"):
            parse_region(tmp_path / "mask.png", *shown.size)
    for bad in (0, 9, "stored"):
        with pytest.raises(RegionError, match="an EXIF orientation is 1 to 8"):
            parse_region(BLOB, *shown.size, 0, bad)


def warnings_of(image, regions):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened, found = load_pair(image, regions)
    assert opened.mode == "RGB" and all(isinstance(region, Region) for region in found)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_warning_of_an_image_that_is_turned_unseen(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path, unseen = tmp_path / "photo.png", 1 < orientation < 5  # otherwise the sides would not fit
    Image.new("RGB", (WIDTH, HEIGHT)).save(path, exif=exif)
    mask = BLOB if orientation < 5 else BLOB.T
    said = warnings_of(path, [mask])
    assert len(said) == unseen
    assert not said or f"photo.png: the EXIF orientation {orientation} is applied" in said[0]
    assert not said or f"parse_regions(..., orientation={orientation})" in said[0]
    assert warnings_of(path, [Region(0, mask)]) == []
    with Image.open(path) as image:
        said = warnings_of(image, BLOB)
    assert ["is not applied, because it is in memory" in text for text in said] == [True] * unseen
    Image.new("RGB", (20, 20)).save(path, exif=exif)
    assert len(warnings_of(path, [[1, 1, 5, 5]])) == (orientation > 1)


def test_warning_of_masks_that_are_white_or_inverted(tmp_path):
    white = np.ones_like(BLOB)
    Image.fromarray(~BLOB).save(tmp_path / "inverted.png")
    image = Image.new("RGB", (WIDTH, HEIGHT))
    for value in (white, [white], white[None], Image.fromarray(white), torch.from_numpy(white)):
        assert "region 0: 100% of the mask is white" in warnings_of(image, value)[0]
    assert "region 1: 87% of the mask is white" in warnings_of(image, [BLOB, tmp_path / "inverted.png"])[0]
    sky = box_mask(0, 0, WIDTH, 18)
    for value in (BLOB, sky, [0, 0, WIDTH, HEIGHT], {"bbox": [0, 0, WIDTH, HEIGHT]}, compressed(white)):
        assert warnings_of(image, value) == warnings_of(image, [Region(0, white)]) == []


def test_areas_in_bulk_are_those_of_the_masks():
    """Every form, of images of different sizes, in one call; damaged ones beside good ones change nothing."""
    rng = np.random.default_rng(5)
    annotations, sizes, expected = [], [], []
    for k in range(60):
        height, width = (int(side) for side in rng.integers(1, 90, 2))
        mask = rng.random((height, width)) < rng.random()
        rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        text = rle["counts"]
        if k % 4 == 1:
            text = text.decode()
        annotations.append({"id": k, "segmentation": {"size": [height, width], "counts": text}})
        sizes.append((width, height))
        expected.append(int(mask.sum()))
    broken = (
        b"",
        b"\xff\xff",
        b"0" * 400,
        b"PPPPPPPPPPPPPPPPPPPPPPP",
        b"oooo",
        annotations[3]["segmentation"]["counts"][:-1],
    )
    for k, text in enumerate(broken):
        annotations.insert(7 * k, {"segmentation": {"size": [9, 11], "counts": text}})
        sizes.insert(7 * k, (11, 9))
        expected.insert(7 * k, None)
    others = (
        ({"bbox": [-3, 2.5, 8, 4]}, 5 * 5),
        ({"segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]]}, 16),
        ({"segmentation": {"size": [9, 11], "counts": [5, 4, 80, 10]}}, 14),
        ({"segmentation": {"size": [9, 11], "counts": [99]}}, 0),
        ({"segmentation": {"size": [9, 12], "counts": [108]}}, None),
        ({"bbox": [11, 0, 5, 5]}, None),
        ({"id": 3}, None),
    )
    for annotation, area in others:
        annotations.append(annotation)
        sizes.append((11, 9))
        expected.append(area)
    areas = region_areas(annotations, sizes)
    assert [None if isinstance(area, ValueError) else area for area in areas] == expected
    for annotation, size, area in zip(annotations, sizes, areas, strict=True):
        if isinstance(area, ValueError):  # the words are those of the one region parser
            with pytest.raises(ValueError, match=re.escape(str(area).split(":", 1)[1])):
                parse_region(annotation, *size)
        elif area:
            assert parse_region(annotation, *size).mask.sum() == area
    assert region_areas([], []) == []


def plain_runs(text: bytes) -> list[int]:
    """Run lengths by COCO's definition, character by character."""
    runs, value, place = [], 0, 0
    for digit in (byte - 48 for byte in text):
        value |= (digit & 31) << (5 * place)
        place += 1
        if not digit & 32:
            value -= (1 << (5 * place)) if digit & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, place = 0, 0
    return runs


def test_run_lengths_of_many_texts_are_those_of_each():
    rng = np.random.default_rng(0)
    for _ in range(300):
        texts = []
        for count in rng.choice([0, 1, 2, 3, 4, 7, 40], rng.integers(1, 9)):  # runs
            digits = [[*rng.integers(32, 64, rng.integers(0, 3)), rng.integers(0, 32)] for _ in range(count)]
            texts.append(bytes(int(digit) + 48 for run in digits for digit in run))
        runs, lengths, damaged = run_lengths(texts)
        expected = [plain_runs(text) for text in texts]
        assert lengths.tolist() == [len(own) for own in expected]
        assert runs.tolist() == [run for own in expected for run in own]
        assert damaged.tolist() == [not text for text in texts]


def test_areas_of_many_masks_are_those_of_each():
    rng = np.random.default_rng(1)
    masks = [rng.random((9, 13)) < share for share in (0, 0.01, 0.3, 0.5, 0.99, 1) for _ in range(20)]
    annotations = [{"segmentation": Region(0, mask).segmentation} for mask in masks]
    broken = {"segmentation": {"size": [9, 13], "counts": "c3N"}}
    areas = region_areas([*annotations, broken, *annotations], [(13, 9)] * (2 * len(masks) + 1))
    assert areas[: len(masks)] == areas[len(masks) + 1 :] == [int(mask.sum()) for mask in masks]
    assert "its runs do not add up to the 117 pixels" in str(areas[len(masks)])
