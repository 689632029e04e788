"""Regions of other tools become the same masks."""

import base64
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pdlm_hf.cli.main import app
from pdlm_hf.errors_pdlm import RegionError
from pdlm_hf.regions.readers import (
    from_label_map,
    from_labelme,
    from_panoptic,
    from_sam,
    from_supervision,
    from_yolo,
    read_region_file,
)
from pdlm_hf.regions.region import Region, parse_regions

WIDTH, HEIGHT = 40, 30


def box_mask(x, y, w, h):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + h, x : x + w] = True
    return mask


MASKS = np.stack([box_mask(2, 3, 10, 5), box_mask(20, 10, 6, 12)])


def parsed(values):
    return parse_regions(values, WIDTH, HEIGHT)


def check(values, masks=MASKS, ids=None):
    regions = parsed(values)
    assert [region.id for region in regions] == (list(range(len(masks))) if ids is None else ids)
    for region, mask in zip(regions, masks, strict=True):
        np.testing.assert_array_equal(region.mask, mask)


# ---------------------------------------------------------------- supervision


def test_supervision():
    sv = pytest.importorskip("supervision")
    corners = np.array([[2, 3, 12, 8], [20, 10, 26, 22]], dtype=float)
    check(from_supervision(sv.Detections(xyxy=corners, mask=MASKS)))
    check(from_supervision(sv.Detections(xyxy=corners)))
    check(from_supervision(sv.Detections(xyxy=corners, mask=MASKS, tracker_id=np.array([7, 5]))), ids=[7, 5])
    with pytest.raises(ValueError, match="from_supervision"):
        parse_regions(sv.Detections(xyxy=corners), 100, 100)
    compact = sv.Detections(xyxy=corners, mask=MASKS)[np.array([1])]
    check(from_supervision(compact), MASKS[1:])
    assert from_supervision(sv.Detections.empty()) == []


def test_supervision_compact_masks():
    sv = pytest.importorskip("supervision")
    if not hasattr(sv, "CompactMask"):
        pytest.skip("this supervision has none")
    corners = np.array([[2, 3, 12, 8], [20, 10, 26, 22]], dtype=float)
    compact = sv.CompactMask.from_dense(MASKS, corners, (HEIGHT, WIDTH))
    check(from_supervision(sv.Detections(xyxy=corners, mask=compact)))


# ---------------------------------------------------------------- SAM


def test_sam_automatic_generator():
    rle = [Region(0, mask).segmentation for mask in MASKS]
    runs = [{"size": [HEIGHT, WIDTH], "counts": np.diff(np.flatnonzero(np.diff(
        np.concatenate([[-1], mask.T.ravel().astype(int), [-1]])))).tolist()} for mask in MASKS]  # fmt: skip
    assert all(sum(r["counts"]) == HEIGHT * WIDTH for r in runs)
    for shapes in (MASKS, rle, runs):
        found = [{"segmentation": s, "area": 50, "bbox": [0, 0, 1, 1], "predicted_iou": 0.9} for s in shapes]
        check(from_sam(found))


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_sam_masks(make):
    check(from_sam(make(MASKS)))
    check(from_sam(make(MASKS[:, None])))
    check(from_sam(make(np.where(MASKS, 3.5, -2.0).astype(np.float32)[:, None])))
    assert len(from_sam(make(MASKS[:0]))) == 0
    with pytest.raises(ValueError, match=r"3 masks for each prompt.*choose one"):
        from_sam(make(np.repeat(MASKS[:, None], 3, 1)))
    with pytest.raises(ValueError, match="expected masks of shape"):
        from_sam(make(MASKS[0]))


def test_sam_bfloat16():
    check(from_sam(torch.where(torch.from_numpy(MASKS), 1.0, -1.0).to(torch.bfloat16)))


# ---------------------------------------------------------------- LabelMe


def shape(kind, points, **fields):
    return {"label": "cat", "points": points, "shape_type": kind, "group_id": None, **fields}


def labelme(*shapes):
    return {"imagePath": "a.png", "imageHeight": HEIGHT, "imageWidth": WIDTH, "shapes": list(shapes)}


def test_labelme_polygons_and_rectangles(tmp_path):
    data = labelme(
        shape("polygon", [[2, 3], [12, 3], [12, 8], [2, 8]]),
        shape("rectangle", [[26, 22], [20, 10]]),  # from any corner
    )
    check(from_labelme(data))
    (tmp_path / "a.json").write_text(json.dumps(data))
    check(from_labelme(tmp_path / "a.json"))
    check(read_region_file(tmp_path / "a.json", "a.png", WIDTH, HEIGHT))
    assert [region["category"] for region in from_labelme(data)] == ["cat", "cat"]


def test_labelme_groups_are_one_region():
    first, second = ([[2, 3], [12, 3], [12, 8], [2, 8]], [[20, 10], [26, 10], [26, 22], [20, 22]])
    together = labelme(shape("polygon", first, group_id=1), shape("polygon", second, group_id=1))
    check(from_labelme(together), [MASKS.any(0)])
    apart = labelme(shape("polygon", first, group_id=1), {**shape("polygon", second, group_id=1), "label": "dog"})
    check(from_labelme(apart))


def test_labelme_circle():
    (region,) = parsed(from_labelme(labelme(shape("circle", [[20, 15], [26, 15]]))))
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    circle = (x - 20) ** 2 + (y - 15) ** 2 <= 36
    assert (region.mask ^ circle).sum() <= 0.1 * circle.sum()
    assert abs(region.mask.sum() - np.pi * 36) < 8


def test_labelme_mask():
    buffer = io.BytesIO()
    Image.fromarray(np.full((5, 10), 255, np.uint8)).save(buffer, format="PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    check(from_labelme(labelme(shape("mask", [[2, 3], [11, 7]], mask=text))), MASKS[:1])
    part = shape("mask", [[2, 3], [11, 7]], mask=text, group_id=1)
    other = shape("polygon", [[20, 10], [26, 10], [26, 22], [20, 22]], group_id=1)
    for together in ((part, other), (other, part), (part, other, part)):
        check(from_labelme(labelme(*together)), [MASKS.any(0)])
    with pytest.raises(ValueError, match=r"shapes\[0\]: the mask cannot be read"):
        from_labelme(labelme(shape("mask", [[2, 3], [11, 7]], mask="AAAA")))
    with pytest.raises(ValueError, match=r"shapes\[0\]: a mask of 10 x 5 pixels at \(38, 3\) leaves the image"):
        from_labelme(labelme(shape("mask", [[38, 3], [47, 7]], mask=text)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "has no `shapes`"),
        (labelme(), "holds no regions, its `shapes` are empty"),
        (labelme(7), r"shapes\[0\]: expected an object"),
        (labelme(shape("line", [[1, 2], [3, 4]])), r"shapes\[0\]: a line of 2 points has no area"),
        (labelme(shape("point", [[1, 2]])), "a point of 1 points has no area"),
        (labelme(shape("polygon", [[1, 2], [3]])), "`points` must be a list"),
        (labelme(shape("polygon", [[1, 2], [float("nan"), 4], [5, 6]])), "`points` must be a list"),
        (labelme({"shape_type": "polygon"}), "`points` must be a list"),
    ],
)
def test_labelme_that_is_none(data, message):
    with pytest.raises(ValueError, match=message):
        from_labelme(data)


# ---------------------------------------------------------------- YOLO


def test_yolo(tmp_path):
    path = tmp_path / "a.txt"
    first = f"0 {7 / WIDTH} {5.5 / HEIGHT} {10 / WIDTH} {5 / HEIGHT}"
    corners = [(20, 10), (26, 10), (26, 22), (20, 22)]
    second = "3 " + " ".join(f"{x / WIDTH} {y / HEIGHT}" for x, y in corners)
    path.write_text(f"{first}\n\n{second}\n")
    check(from_yolo(path, WIDTH, HEIGHT))
    assert [region["category"] for region in from_yolo(path, WIDTH, HEIGHT)] == ["0", "3"]
    path.write_text(f"{first} 0.87\n")  # with confidence
    check(read_region_file(path, "a.png", WIDTH, HEIGHT), MASKS[:1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no regions"),
        ("0 0.1 0.2 0.3", "line 1: expected"),
        ("0 0.5 0.5 0.2 0.2\n0 a b c d", "line 2: expected"),
        ("0 0.1 0.2 0.3 0.4 0.5 0.6 1.7", "line 1: expected .*got 7 numbers"),
        ("0 nan 0.2 0.3 0.4", "line 1: expected"),
        ("0 12 40 30 20", r"line 1: expected fractions of the image.*pixels"),
    ],
)
def test_yolo_that_is_none(tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        from_yolo(tmp_path / "a.txt", WIDTH, HEIGHT)


# ---------------------------------------------------------------- label maps


@pytest.mark.parametrize("kind", ["L", "P", "I;16", "RGB", "array"])
def test_label_map(tmp_path, kind):
    labels = (3 * MASKS[0] + 200 * MASKS[1]).astype(np.uint8)
    ids = [3, 200]
    if kind == "array":
        return check(from_label_map(labels.astype(np.int32)), ids=ids)
    image = Image.fromarray(labels)
    if kind == "P":
        image = Image.fromarray(labels, "L").convert("P")
        image.putpalette([k // 3 for k in range(768)])
    elif kind == "I;16":
        image, ids = Image.fromarray(labels.astype(np.uint16) * 300), [900, 60000]
    elif kind == "RGB":  # COCO's panoptic images
        image, ids = Image.fromarray(np.stack([labels, labels, labels * 0], -1)), [3 * 257, 200 * 257]
    image.save(tmp_path / "a.png")
    check(from_label_map(tmp_path / "a.png"), ids=ids)
    check(read_region_file(tmp_path / "a.png", "a.jpg", WIDTH, HEIGHT), ids=ids)


def test_label_map_that_is_none(tmp_path):
    for value, message in (
        (np.zeros((4, 4), np.uint8), "every pixel is 0"),
        (np.zeros((4, 4)), "has integers of shape"),
        (np.zeros((4, 4, 4), np.uint8), "has integers of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            from_label_map(value)
    with pytest.raises(ValueError, match="JPEG changes the labels"):
        read_region_file(tmp_path / "a.jpg", "a.jpg", WIDTH, HEIGHT)
    with pytest.raises(ValueError, match="no such file"):
        read_region_file(tmp_path / "a.png", "a.jpg", WIDTH, HEIGHT)


def test_panoptic(tmp_path):
    ids = [7, 70000, 9]  # the last one has no pixel
    labels = 7 * MASKS[0].astype(int) + 70000 * MASKS[1]
    colours = np.stack([labels % 256, labels // 256 % 256, labels // 65536], -1)
    Image.fromarray(colours.astype(np.uint8)).save(tmp_path / "a.png")
    segments = [{"id": k, "category_id": 2} for k in ids]
    found = from_panoptic(tmp_path / "a.png", segments)
    assert [(segment["id"], segment["category_id"]) for segment in found] == [(7, 2), (70000, 2)]
    check(found, ids=ids[:2])
    with pytest.raises(RegionError, match="a.png: each of `segments_info` must be an object with an `id`"):
        from_panoptic(tmp_path / "a.png", [{}])


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("name", ["labels.png", "labelme.json", "yolo.txt"])
def test_caption_takes_the_files(tmp_path, tiny_checkpoint, name):
    Image.new("RGB", (WIDTH, HEIGHT), "white").save(tmp_path / "a.png")
    Image.fromarray((MASKS[0] + 2 * MASKS[1]).astype(np.uint8)).save(tmp_path / "labels.png")
    rectangles = [shape("rectangle", [[2, 3], [12, 8]]), shape("rectangle", [[20, 10], [26, 22]])]
    (tmp_path / "labelme.json").write_text(json.dumps(labelme(*rectangles)))
    centres = [(7, 5.5, 10, 5), (23, 16, 6, 12)]
    lines = [f"0 {x / WIDTH} {y / HEIGHT} {w / WIDTH} {h / HEIGHT}\n" for x, y, w, h in centres]
    (tmp_path / "yolo.txt").write_text("".join(lines))
    arguments = ["--model", tiny_checkpoint, "--steps", 2, "--max-new-tokens", 4, "--json"]
    command = ["caption", tmp_path / "a.png", "--regions", tmp_path / name, *arguments]
    result = CliRunner().invoke(app, [str(part) for part in command])
    found = json.loads(result.stdout)["regions"]
    assert [region["bbox"] for region in found] == [[2, 3, 10, 5], [20, 10, 6, 12]]


def test_readers_need_none_of_the_tools():
    """Duck typing: whatever has boxes and masks."""
    found = SimpleNamespace(xyxy=[[2, 3, 12, 8]], mask=None, tracker_id=None, __len__=None)
    found = type("Found", (), {**vars(found), "__len__": lambda self: 1})()
    check(from_supervision(found), MASKS[:1])
