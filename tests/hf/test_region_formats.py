"""Region files of many tools: the same masks from each of them, and files that would be read wrongly are refused."""

import json
from xml.sax.saxutils import quoteattr

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pdlm_hf.cli.main import app
from pdlm_hf.errors_pdlm import PdlmError, RegionError, SettingError
from pdlm_hf.regions.formats import facts
from pdlm_hf.regions.formats.yolo import FORMS
from pdlm_hf.regions.readers import FORMATS, from_supervision, read_region_file
from pdlm_hf.regions.region import Region, _box_pixels, parse_region, parse_regions

WIDTH, HEIGHT = 64, 48
NAME = "street/a.png"


@pytest.fixture(autouse=True)
def nothing_said():
    facts._said.clear()


def block(*boxes):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for x, y, w, h in boxes:
        mask[y : y + h, x : x + w] = True
    return mask


def bent(x, y, w, h):
    """An L: the corners of its outline, and its mask."""
    corners = [(x, y), (x + w, y), (x + w, y + h // 2), (x + w // 2, y + h // 2), (x + w // 2, y + h), (x, y + h)]
    return corners, block((x, y, w, h // 2), (x, y, w // 2, h))


# Three regions whose sides lie between pixels: COCO's rasteriser fills such polygons exactly, so that every format can
# be compared bit for bit. A slanted side would depend on the rasteriser.
OUTLINES, MASKS = zip(bent(3, 2, 20, 12), bent(30, 8, 10, 30), bent(44, 20, 18, 22), strict=True)
BOXES = [Region(0, mask).bbox for mask in MASKS]
HOLLOW = block((3, 2, 20, 12)) & ~block((8, 5, 6, 4)) | block((40, 30, 5, 7))  # a hole and a second part
ALL = np.stack(MASKS)
RING = [*OUTLINES[0]]


def flat(points):
    return [value for point in points for value in point]


def write(tmp_path, name, content):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def read(path, name=NAME, size=(WIDTH, HEIGHT), **options):
    return parse_regions(read_region_file(path, name, *size, **options), *size)


def boxes_of(path, **options):
    return [region.bbox for region in read(path, **options)]


# ---------------------------------------------------------------- writers, as the tools write


def coco(shapes, **image):
    images = [{"id": 139, "file_name": "a.png", "width": WIDTH, "height": HEIGHT} | image]
    annotations = [{"id": 7 + k, "image_id": 139, "category_id": 1, **shape} for k, shape in enumerate(shapes)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "figure"}]}


def labelme(shapes, **fields):
    shapes = [{"label": "figure", "group_id": None, "flags": {}, **shape} for shape in shapes]
    stated = {"imagePath": "a.png", "imageWidth": WIDTH, "imageHeight": HEIGHT, "imageData": None}
    return {"version": "5.4.1", "shapes": shapes, **stated, **fields}


def via(shapes, size=1234, name="a.png"):
    regions = [{"shape_attributes": shape, "region_attributes": {"kind": "figure"}} for shape in shapes]
    entry = {"filename": name, "size": size, "regions": regions, "file_attributes": {}}
    return {"_via_settings": {}, "_via_img_metadata": {f"{name}{size}": entry}, "_via_attributes": {}}


def cvat(shapes, width=None, height=None, name=NAME):
    width, height = width or WIDTH, height or HEIGHT
    image = f'<image id="0" name={quoteattr(name)} width="{width}" height="{height}">{"".join(shapes)}</image>'
    return f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>{image}</annotations>'


def voc(boxes, width=None, height=None, database="The VOC2012 Database", name="a.png"):
    width, height = width or WIDTH, height or HEIGHT
    objects = "".join(
        f"<object><name>figure</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
        "</bndbox></object>"
        for x0, y0, x1, y1 in boxes
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    source = f"<source><database>{database}</database></source>"
    return f"<annotation><filename>{name}</filename>{source}{size}{objects}</annotation>"


def labelme_xml(outlines, width=None, height=None, name="a.png", deleted=0):
    objects = "".join(
        f"<object><name>figure</name><deleted>{deleted}</deleted><polygon>"
        + "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in points)
        + "</polygon></object>"
        for points in outlines
    )
    size = f"<imagesize><nrows>{height or HEIGHT}</nrows><ncols>{width or WIDTH}</ncols></imagesize>"
    return f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"


def json_min(values, width=None, height=None, name="a.png"):
    (task,) = label_studio(values, width, height, name)
    sides = {"original_width": width or WIDTH, "original_height": height or HEIGHT}
    label = [{**result["value"], **sides} for result in task["annotations"][0]["result"]]
    return [{"id": 5, "image": task["data"]["image"], "label": label, "annotator": 1, "annotation_id": 9}]


def label_studio(values, width=None, height=None, name="a.png"):
    width, height = width or WIDTH, height or HEIGHT
    results = [
        {"id": f"r{k}", "type": "x", "original_width": width, "original_height": height, "value": value}
        for k, value in enumerate(values)
    ]
    task = {
        "id": 5,
        "data": {"image": f"/data/upload/1/0a1b2c3d-{name}"},
        "annotations": [{"id": 9, "result": results}],
    }
    return [task]


def brush(mask):
    """Label Studio's run lengths, with the shortest blocks: 8-bit values, lengths of 3, 4, 8 or 16 bits."""
    values = np.repeat(mask.ravel() * 255, 4)
    bits = f"{values.size:032b}{7:05b}" + "".join(f"{n - 1:04b}" for n in (3, 4, 8, 16))
    ends = [*(np.flatnonzero(np.diff(values)) + 1).tolist(), values.size]
    start = 0
    for end in ends:
        bits += f"1{3:02b}{end - start - 1:016b}{values[start]:08b}" if end - start > 4 else ""
        bits += "" if end - start > 4 else f"0{0:02b}{end - start - 1:03b}" + f"{values[start]:08b}" * (end - start)
        start = end
    bits += "0" * (-len(bits) % 8)
    return [int(bits[k : k + 8], 2) for k in range(0, len(bits), 8)]


def runs_of(mask):
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask.ravel(), [not mask.ravel()[-1]]])))
    return np.diff(np.concatenate([[0], edges])).tolist()


def yolo_lines(shapes):
    return "\n".join(f"{k} " + " ".join(f"{value:.6f}" for value in shape) for k, shape in enumerate(shapes))


def scaled(points):
    return flat([(x / WIDTH, y / HEIGHT) for x, y in points])


def write_panoptic(tmp_path):
    labels = sum((70000 + k) * mask.astype(np.int64) for k, mask in enumerate(MASKS))
    colours = np.stack([labels % 256, labels // 256 % 256, labels // 65536], -1).astype(np.uint8)
    (tmp_path / "pan").mkdir()
    Image.fromarray(colours).save(tmp_path / "pan" / "a.png")
    segments = [{"id": 70000 + k, "category_id": 1} for k in range(3)]
    content = coco([])
    content["annotations"] = [{"image_id": 139, "file_name": "a.png", "segments_info": segments}]
    return write(tmp_path, "pan.json", content)


def write_label_map(tmp_path):
    Image.fromarray((ALL * np.arange(1, 4)[:, None, None]).sum(0).astype(np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def write_palette_map(tmp_path):
    labels = (ALL * np.arange(1, 4)[:, None, None]).sum(0).astype(np.uint8)
    labels[:2] = 255
    image = Image.fromarray(labels).convert("L").convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette(list(range(256)) * 3)
    image.save(tmp_path / "a.png")
    return tmp_path / "a.png"


def write_masks(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    for k, mask in enumerate(MASKS):
        Image.fromarray(mask).save(folder / f"{k}.png")
    for name in ("metadata.csv", ".DS_Store", "Thumbs.db", "._0.png", "desktop.ini", "notes.txt"):
        (folder / name).write_text("id,area\n")
    return folder


def cvat_mask(mask):
    x, y, w, h = Region(0, mask).bbox
    runs = ", ".join(map(str, runs_of(mask[y : y + h, x : x + w])))
    return f'<mask label="figure" rle="{runs}" left="{x}" top="{y}" width="{w}" height="{h}"/>'


POLYGONS = {
    "COCO polygons": ("coco.json", coco([{"segmentation": [flat(points)]} for points in OUTLINES])),
    "COCO RLE": ("coco.json", coco([{"segmentation": Region(0, mask).segmentation} for mask in MASKS])),
    "COCO results": (
        "results.json",
        [{"image_id": 139, "score": 0.5, "segmentation": Region(0, mask).segmentation} for mask in MASKS]
        + [{"image_id": 140, "score": 0.5, "segmentation": Region(0, MASKS[0]).segmentation}],
    ),
    "SA-1B": (
        "sa.json",
        {
            "image": {"file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            "annotations": [{"id": k, "segmentation": Region(0, mask).segmentation} for k, mask in enumerate(MASKS)],
        },
    ),
    "list": ("list.json", [{"segmentation": [flat(points)]} for points in OUTLINES]),
    "LabelMe": ("labelme.json", labelme([{"shape_type": "polygon", "points": points} for points in OUTLINES])),
    "YOLO": ("a.txt", yolo_lines([scaled(points) for points in OUTLINES])),
    "VIA": (
        "via.json",
        via([
            {"name": "polygon", "all_points_x": [x for x, _ in points], "all_points_y": [y for _, y in points]}
            for points in OUTLINES
        ]),
    ),
    "CVAT polygons": (
        "cvat.xml",
        cvat([
            '<polygon label="figure" points="' + ";".join(f"{x:.2f},{y:.2f}" for x, y in points) + '"/>'
            for points in OUTLINES
        ]),
    ),
    "CVAT masks": ("cvat.xml", cvat([cvat_mask(mask) for mask in MASKS])),
    "Label Studio": (
        "studio.json",
        label_studio([
            {"points": [[x * 100 / WIDTH, y * 100 / HEIGHT] for x, y in points], "polygonlabels": ["figure"]}
            for points in OUTLINES
        ]),
    ),
    "Label Studio JSON-MIN": ("min.json", json_min([{"format": "rle", "rle": brush(mask)} for mask in MASKS])),
    "LabelMe XML": ("labelme.xml", labelme_xml(OUTLINES)),
    "Label Studio brush": ("studio.json", label_studio([{"format": "rle", "rle": brush(mask)} for mask in MASKS])),
}  # fmt: skip
FOLDERS = {
    "panoptic": write_panoptic,
    "label map": write_label_map,
    "palette": write_palette_map,
    "masks": write_masks,
}


@pytest.mark.parametrize("kind", [*POLYGONS, *FOLDERS])
def test_three_regions_in_every_format_are_the_same_masks(tmp_path, kind):
    path = FOLDERS[kind](tmp_path) if kind in FOLDERS else write(tmp_path, *POLYGONS[kind])
    name = "COCO_val2014_000000000139.jpg" if kind == "COCO results" else NAME
    regions = read(path, name)
    expected = MASKS
    if kind == "palette":
        expected = [mask & (np.arange(HEIGHT) >= 2)[:, None] for mask in MASKS]
    assert len(regions) == 3
    for region, mask in zip(regions, expected, strict=True):
        np.testing.assert_array_equal(region.mask, mask)


def yolo_box(x, y, w, h, width=None, height=None, digits=6):
    width, height = width or WIDTH, height or HEIGHT
    return " ".join(
        f"{value:.{digits}f}" for value in ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
    )


def obb(x, y, w, h):
    return scaled([(x, y), (x + w, y), (x + w, y + h), (x, y + h)])


BOX_FILES = {
    "COCO": lambda boxes: ("coco.json", coco([{"bbox": box} for box in boxes])),
    "LabelMe": lambda boxes: (
        "labelme.json",
        labelme([{"shape_type": "rectangle", "points": [[x, y], [x + w, y + h]]} for x, y, w, h in boxes]),
    ),
    "VIA": lambda boxes: (
        "via.json", via([{"name": "rect", "x": x, "y": y, "width": w, "height": h} for x, y, w, h in boxes])
    ),
    "CVAT": lambda boxes: (
        "cvat.xml",
        cvat([
            f'<box label="figure" xtl="{x:.2f}" ytl="{y:.2f}" xbr="{x + w:.2f}" ybr="{y + h:.2f}" z_order="0"/>'
            for x, y, w, h in boxes
        ]),
    ),
    "VOC": lambda boxes: ("voc.xml", voc([(x + 1, y + 1, x + w, y + h) for x, y, w, h in boxes])),
    "labelImg": lambda boxes: (
        "voc.xml", voc([(x, y, x + w, y + h) for x, y, w, h in boxes], database="Unknown")
    ),
    "Label Studio": lambda boxes: (
        "studio.json",
        label_studio([
            {"x": x * 100 / WIDTH, "y": y * 100 / HEIGHT, "width": w * 100 / WIDTH, "height": h * 100 / HEIGHT,
             "rotation": 0, "rectanglelabels": ["figure"]}
            for x, y, w, h in boxes
        ]),
    ),
    "YOLO, 6 digits": lambda boxes: ("a.txt", "\n".join(f"0 {yolo_box(*box)}" for box in boxes)),
    "YOLO, 5 digits": lambda boxes: ("a.txt", "\n".join(f"0 {yolo_box(*box, digits=5)}" for box in boxes)),
    "YOLO oriented": lambda boxes: ("a.txt", yolo_lines([obb(*box) for box in boxes])),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOX_FILES)
def test_boxes_come_back_as_the_same_pixels(tmp_path, kind, monkeypatch):
    """10,000 boxes in whole pixels, in images of many sizes, with the digits that the tools write."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        width, height = (int(side) for side in rng.integers(40, 1500, 2))
        monkeypatch.setitem(globals(), "WIDTH", width)
        monkeypatch.setitem(globals(), "HEIGHT", height)
        x, y = rng.integers(0, width - 8, 200), rng.integers(0, height - 8, 200)
        w, h = rng.integers(8, width - x + 1), rng.integers(8, height - y + 1)
        boxes = np.stack([x, y, w, h], 1).tolist()
        name, content = BOX_FILES[kind](boxes)
        found = read_region_file(write(tmp_path, name, content), NAME, width, height)
        if "bbox" in found[0]:
            corners = [_box_pixels(region["bbox"], width, height, "box") for region in found]
        else:
            outlines = [np.reshape(region["segmentation"][0], (-1, 2)) for region in found]
            corners = [(*points.min(0), *points.max(0)) for points in outlines]
            assert all(points.shape == (4, 2) for points in outlines)
        assert [[a, b, c - a, d - b] for a, b, c, d in corners] == boxes


@pytest.mark.parametrize("digits", [3, 4])
def test_few_digits_of_a_large_image_are_read_to_the_nearest_pixel(tmp_path, digits):
    box = [101, 37, 250, 91]
    path = write(tmp_path, "a.txt", f"0 {yolo_box(*box, 640, 480, digits)}")
    assert np.abs(np.subtract(boxes_of(path, size=(640, 480))[0], box)).max() <= (digits == 3)


def test_a_hole_and_two_parts(tmp_path):
    as_coco = write(tmp_path, "a.json", coco([{"segmentation": Region(0, HOLLOW).segmentation}]))
    as_cvat = write(tmp_path, "a.xml", cvat([cvat_mask(HOLLOW)]))
    as_brush = write(tmp_path, "b.json", label_studio([{"rle": brush(HOLLOW)}]))
    Image.fromarray(HOLLOW.astype(np.uint8) * 9).save(tmp_path / "a.png")
    (tmp_path / "masks").mkdir()
    Image.fromarray(HOLLOW).save(tmp_path / "masks" / "x.png")
    for path in (as_coco, as_cvat, as_brush, tmp_path / "a.png", tmp_path / "masks"):
        (region,) = read(path)
        np.testing.assert_array_equal(region.mask, HOLLOW)


# ---------------------------------------------------------------- YOLO's forms

FIRST, SECOND = (20, 10, 16, 12), (40, 24, 12, 18)


def lines(*ends, start=""):
    return "\n".join(
        f"0 {start}{yolo_box(*box)} {end}".strip() for box, end in zip((FIRST, SECOND), ends, strict=False)
    )


@pytest.mark.parametrize(
    ("text", "scores", "ids"),
    [
        (lines("", ""), [None, None], [0, 1]),
        (lines("0.91", "0.88"), [0.91, 0.88], [0, 1]),
        (lines("1", "0.88"), [1.0, 0.88], [0, 1]),
        (lines("4", "9"), [None, None], [4, 9]),
        (lines("0.91 1", "0.88 2"), [0.91, 0.88], [1, 2]),
        (lines("0.91 17"), [0.91], [17]),
        (lines("0.91 1", "0.88"), [0.91, 0.88], [1, "line 2"]),  # the second is not tracked
    ],
)
def test_yolo_boxes_keep_what_their_columns_say(tmp_path, text, scores, ids):
    path = write(tmp_path, "a.txt", text)
    found = read_region_file(path, NAME, WIDTH, HEIGHT)
    assert boxes_of(path) == [list(box) for box in (FIRST, SECOND)[: len(found)]]
    assert [region.get("score") for region in found] == scores
    assert [region["id"] for region in found] == ids
    assert {region["category"] for region in found} == {"0"}


def test_yolo_polygons_keep_confidence_and_id(tmp_path):
    rows = [" ".join(f"{value:.6f}" for value in scaled(points)) for points in OUTLINES[:2]]
    for ends, extra in (
        (("0.5", "0.25"), [{"score": 0.5}, {"score": 0.25}]),
        (("0.5 3", "0.25 2"), [{"score": 0.5, "id": 3}, {"score": 0.25, "id": 2}]),
    ):
        path = write(tmp_path, "a.txt", "\n".join(f"1 {row} {end}" for row, end in zip(rows, ends, strict=True)))
        found = read_region_file(path, NAME, WIDTH, HEIGHT)
        assert [{key: region[key] for key in more} for region, more in zip(found, extra, strict=True)] == extra
        for region, mask in zip(parse_regions(found, WIDTH, HEIGHT), MASKS[:2], strict=True):
            np.testing.assert_array_equal(region.mask, mask)


def test_yolo_segments_and_boxes_in_one_file(tmp_path):
    text = f"0 {yolo_box(*FIRST)}\n" + yolo_lines([scaled(OUTLINES[1])])
    first, second = read(write(tmp_path, "a.txt", text))
    assert first.bbox == list(FIRST) and np.array_equal(second.mask, MASKS[1])


def test_yolo_keypoints_give_the_box(tmp_path):
    rng = np.random.default_rng(0)
    texts = []
    for x, y, w, h in (FIRST, SECOND):
        points = rng.uniform((x, y), (x + w, y + h), (17, 2)) / (WIDTH, HEIGHT)
        seen = " ".join(f"{a:.6f} {b:.6f} 2" for a, b in points[:-1]) + " 0 0 0"
        texts.append((f"0 {yolo_box(x, y, w, h)} {seen}", " ".join(f"{value:.6f}" for value in points.ravel())))
    path = write(tmp_path, "a.txt", "\n".join(text for text, _ in texts))
    assert boxes_of(path) == [list(FIRST), list(SECOND)]
    plain = "\n".join(f"0 {yolo_box(*box)} {text}" for box, (_, text) in zip((FIRST, SECOND), texts, strict=True))
    path = write(tmp_path, "b.txt", plain)
    with pytest.raises(RegionError, match=r"line 1: .*--format yolo-polygon\) or .*--format yolo-pose-2d\)"):
        read(path)
    assert boxes_of(path, format="yolo-pose-2d") == [list(FIRST), list(SECOND)]


@pytest.mark.parametrize("end", ["", "-conf", "-id", "-track"])
@pytest.mark.parametrize("count", [1, 3, 4, 17])
def test_yolo_keypoints_with_confidences(tmp_path, count, end):
    """What is predicted has a confidence for each keypoint; as an outline its numbers would cross each other."""
    rng = np.random.default_rng(count)
    texts = []
    for k, (x, y, w, h) in enumerate((FIRST, SECOND), 1):
        points = rng.uniform((x + 1, y + 1), (x + w - 1, y + h - 1), (count, 2)) / (WIDTH, HEIGHT)
        points[:2] = (np.array([[x + 1, y + 1], [x + w - 1, y + h - 1]]) / (WIDTH, HEIGHT))[:count]
        shown = " ".join(f"{a:.6f} {b:.6f} {c:.3f}" for (a, b), c in zip(points, rng.uniform(size=count), strict=True))
        last = {"": "", "-conf": " 0.5", "-id": f" {k}", "-track": f" 0.5 {k}"}[end]
        texts.append(f"0 {yolo_box(x, y, w, h)} {shown}{last}")
    path = write(tmp_path, "a.txt", "\n".join(texts))
    try:
        assert boxes_of(path) == [list(FIRST), list(SECOND)]
    except RegionError as error:
        assert f"--format yolo-keypoints{end}" in str(error)
    found = read_region_file(path, NAME, WIDTH, HEIGHT, f"yolo-keypoints{end}")
    assert [region["bbox"] for region in found] == [list(FIRST), list(SECOND)]
    assert [region["id"] for region in found] == ([1, 2] if end in ("-id", "-track") else [0, 1])
    assert [region.get("score") for region in found] == ([0.5, 0.5] if end in ("-conf", "-track") else [None, None])


def corners_of(*boxes, places="{:.6f}", scale=(WIDTH, HEIGHT), start="0 "):
    rows = [[x / scale[0], y / scale[1], (x + w) / scale[0], (y + h) / scale[1]] for x, y, w, h in boxes]
    return "\n".join(start + " ".join(places.format(value) for value in row) for row in rows)


@pytest.mark.parametrize(
    ("text", "forms"),
    [
        (corners_of(FIRST, SECOND), ["yolo-box", "yolo-corners"]),
        (lines("", "", start="0.9 "), ["yolo-conf", "yolo-conf-first"]),
        (lines("0.91 1"), ["yolo-track", "yolo-polygon"]),  # or a triangle
        (corners_of((4, 3, 30, 20), places="{:.0f}", scale=(1, 1)), ["pixel-corners", "pixel-boxes"]),
    ],
)
def test_yolo_lines_that_can_be_read_in_two_ways_are_refused(tmp_path, text, forms):
    path = write(tmp_path, "a.txt", text)
    with pytest.raises(RegionError, match="line 1") as error:
        read(path)
    for form in forms:
        assert f"--format {form}" in str(error.value)


def test_the_format_settles_it(tmp_path):
    both = [list(FIRST), list(SECOND)]
    assert boxes_of(write(tmp_path, "a.txt", corners_of(FIRST, SECOND)), format="yolo-corners") == both
    path = write(tmp_path, "b.txt", lines("", "", start="0.9 "))
    assert boxes_of(path, format="yolo-conf-first") == both
    assert [region["score"] for region in read_region_file(path, NAME, WIDTH, HEIGHT, "yolo-conf-first")] == [0.9, 0.9]
    track = write(tmp_path, "c.txt", lines("0.91 1"))
    assert boxes_of(track, format="yolo-track") == both[:1]
    assert read(track, format="yolo-polygon")[0].bbox != both[0]
    pixels = write(tmp_path, "d.txt", "car 20 10 16 12")
    assert boxes_of(pixels, format="pixel-boxes") == both[:1]
    assert boxes_of(pixels, format="pixel-centres") == [[12, 4, 16, 12]]
    with pytest.raises(RegionError, match="line 1: expected `class x0 y0 x1 y1"):
        boxes_of(pixels, format="pixel-corners")
    with pytest.raises(SettingError, match="--format yolo-nine: expected one of coco, labelme"):
        boxes_of(pixels, format="yolo-nine")
    assert FORMS.keys() <= FORMATS.keys()


def test_corners_in_pixels_are_read_where_nothing_else_fits(tmp_path):
    far = [(30, 20, 30, 25), (40, 24, 20, 18)]
    text = corners_of(*far, places="{:.0f}", scale=(1, 1))
    assert boxes_of(write(tmp_path, "a.txt", text)) == [list(box) for box in far]
    text = corners_of(*far, places="{:.0f}", scale=(1, 1), start="cat 0.75 ")
    path = write(tmp_path, "b.txt", text)
    assert boxes_of(path) == [list(box) for box in far]
    assert read_region_file(path, NAME, WIDTH, HEIGHT)[0]["score"] == 0.75


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines("0.9 3", "0.8 3"), "line 1: no form fits all 2 lines|line 1: expected"),  # an id twice
        (f"0 {yolo_box(*FIRST)}\n0 {yolo_box(*FIRST)} 0.5 7 8 9", "line 2: expected"),
        ("0,0.5,0.5,0.1,0.1", "line 1: expected numbers that spaces separate|line 1: expected"),
        ("12 40 30 20 10 plane 0", "line 1: expected"),
        ("0 0.5 0.5 0 0.1", "line 1: expected"),
        ("0 0.5 0.5 -0.2 0.1", "line 1: expected"),
        ("0 1e400 0.5 0.1 0.1", "line 1: expected"),
    ],
)
def test_yolo_lines_of_no_form(tmp_path, text, message):
    with pytest.raises(RegionError, match=message):
        read(write(tmp_path, "a.txt", text))


def test_a_small_yolo_box_keeps_its_pixel_and_one_that_leaves_the_image_is_cut(tmp_path):
    path = write(tmp_path, "a.txt", "0 0.5 0.5 0.001 0.001\n0 0.99 0.5 0.1 0.5\n")
    assert boxes_of(path) == [[31, 23, 2, 2], [60, 12, 4, 24]]


# ---------------------------------------------------------------- what a file states is compared

STATED = {
    "COCO": lambda w, h, n: ("a.json", coco([{"bbox": BOXES[0]}], width=w, height=h, file_name=n)),
    "LabelMe": lambda w, h, n: (
        "a.json",
        labelme([{"shape_type": "polygon", "points": RING}], imageWidth=w, imageHeight=h, imagePath=n),
    ),
    "CVAT": lambda w, h, n: ("a.xml", cvat(['<box xtl="1" ytl="1" xbr="9" ybr="9"/>'], w, h, n)),
    "VOC": lambda w, h, n: ("a.xml", voc([(1, 1, 9, 9)], w, h, name=n)),
    "Label Studio": lambda w, h, n: (
        "a.json", label_studio([{"x": 10, "y": 10, "width": 20, "height": 20, "rectanglelabels": ["x"]}], w, h, n)
    ),
    "SA-1B": lambda w, h, n: (
        "a.json",
        {"image": {"file_name": n, "width": w, "height": h}, "annotations": [{"bbox": BOXES[0]}]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", STATED)
def test_another_size_and_another_image_are_refused(tmp_path, kind):
    make = STATED[kind]
    assert len(read(write(tmp_path, *make(WIDTH, HEIGHT, "a.png")))) == 1
    assert len(read(write(tmp_path, *make(WIDTH, HEIGHT, "..\\x\\a.png")))) == 1  # written on Windows
    assert len(read(write(tmp_path, *make(WIDTH, HEIGHT, "a.jpg")))) == 1  # converted
    with pytest.raises(RegionError, match="states an image of 128 x 96 pixels, street/a.png has 64 x 48"):
        read(write(tmp_path, *make(128, 96, "a.png")))
    with pytest.raises(RegionError, match="sides are swapped: .* EXIF"):
        read(write(tmp_path, *make(HEIGHT, WIDTH, "a.png")))
    with pytest.raises(RegionError, match=r"--image-name"):
        read(write(tmp_path, *make(WIDTH, HEIGHT, "b.png")))


@pytest.mark.parametrize("side", [1e300, 10**400, -5, "64", 0, 2.5, [1]])
def test_a_stated_size_of_any_kind(tmp_path, side):
    """Z4: never a memory or overflow error."""
    crop = {"shape_type": "mask", "points": [[1, 1], [2, 2]], "mask": "AAAA"}
    for shape in (crop, {"shape_type": "polygon", "points": RING}):
        path = write(tmp_path, "a.json", labelme([shape], imageWidth=side))
        with pytest.raises(PdlmError, match="states an image of"):
            read(path)


def test_infinite_sizes(tmp_path):
    content = json.dumps(labelme([{"shape_type": "polygon", "points": RING}])).replace(
        '"imageWidth": 64', '"imageWidth": Infinity'
    )
    with pytest.raises(PdlmError, match="states an image of inf"):
        read(write(tmp_path, "a.json", content))


def test_via_states_the_bytes_of_the_file(tmp_path):
    path = write(tmp_path, "a.json", via([{"name": "rect", "x": 3, "y": 2, "width": 9, "height": 8}]))
    assert boxes_of(path, image_bytes=1234) == [[3, 2, 9, 8]]
    with pytest.raises(RegionError, match="a file of 1234 bytes, the image has 999: .*--format via-resaved"):
        boxes_of(path, image_bytes=999)
    assert boxes_of(path, image_bytes=999, format="via-resaved") == [[3, 2, 9, 8]]


def test_via_of_version_1_and_other_shapes(tmp_path):
    regions = {"0": {"shape_attributes": {"name": "circle", "cx": 30, "cy": 20, "r": 10}, "region_attributes": {}}}
    path = write(tmp_path, "a.json", {"a.png9": {"filename": "a.png", "size": 9, "regions": regions}})
    (region,) = read(path)
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    assert (region.mask ^ ((x - 30) ** 2 + (y - 20) ** 2 <= 100)).sum() < 12
    for shape in ({"name": "point", "cx": 1, "cy": 2}, {"name": "polyline", "all_points_x": [1], "all_points_y": [2]}):
        with pytest.raises(RegionError, match=r"a.png: regions\[0\]: a (point|polyline) has no area"):
            read(write(tmp_path, "b.json", via([shape])))


def test_turned_boxes(tmp_path):
    """CVAT turns about the centre, Label Studio about the first corner; clockwise on the screen both."""
    path = write(tmp_path, "a.xml", cvat(['<box xtl="20" ytl="10" xbr="40" ybr="20" rotation="90.00"/>']))
    assert boxes_of(path) == [[25, 5, 10, 20]]
    value = {"x": 20 / 0.64, "y": 10 / 0.48, "width": 20 / 0.64, "height": 10 / 0.48, "rotation": 90}
    path = write(tmp_path, "a.json", label_studio([{**value, "rectanglelabels": ["x"]}]))
    assert boxes_of(path) == [[10, 10, 10, 20]]


def test_older_files_of_labelme(tmp_path):
    for change in ({"width": 65}, {"name": "b.png"}):
        with pytest.raises(RegionError, match="states an image of 65 x 48|is about the image b.png"):
            read(write(tmp_path, "a.xml", labelme_xml(OUTLINES, **change)))
    with pytest.raises(RegionError, match="holds no regions"):
        read(write(tmp_path, "a.xml", labelme_xml(OUTLINES, deleted=1)))


def test_dota(tmp_path):
    lines = (
        "imagesource:GoogleEarth\ngsd:0.15\n3.0 2.0 23.0 2.0 23.0 14.0 3.0 14.0 ship 0\n30 8 40 8 40 38 30 38 tank 1\n"
    )
    path = write(tmp_path, "a.txt", lines)
    assert boxes_of(path) == [[3, 2, 20, 12], [30, 8, 10, 30]]
    assert [(region["id"], region["category"]) for region in read_region_file(path, NAME, WIDTH, HEIGHT)] == [
        (0, "ship"), (1, "tank")
    ]  # fmt: skip


def test_json_min_of_another_image(tmp_path):
    box = {"x": 50, "y": 25, "width": 25, "height": 50}
    path = write(tmp_path, "a.json", json_min([box]))
    assert boxes_of(path) == boxes_of(path, name="0a1b2c3d-a.png") == [[32, 12, 16, 24]]
    for change in ({"width": 65}, {"name": "b.png"}):
        with pytest.raises(RegionError, match="task 5.*65 x 48|0 of them named a.png"):
            read(write(tmp_path, "a.json", json_min([box], **change)))


def test_several_images_in_a_file(tmp_path):
    """The one whose folders agree; several of one name are refused."""
    one, other = (cvat([f'<box label="x" xtl="{x}" ytl="1" xbr="9" ybr="9"/>'], name=f"{folder}/a.png")
                  for folder, x in (("street", 2), ("park", 3)))  # fmt: skip
    both = one.replace("</annotations>", other.partition("</version>")[2])
    path = write(tmp_path, "a.xml", both)
    assert boxes_of(path, name="data/street/a.png") == [[2, 1, 7, 8]]
    assert boxes_of(path, name="park/a.png") == [[3, 1, 6, 8]]
    with pytest.raises(RegionError, match=r"2 images, 2 of them named a.png \(a.png, a.png\).*--image-name"):
        boxes_of(path, name="a.png")


def test_ids_that_are_there_twice_are_refused(tmp_path):
    content = coco([{"bbox": [3, 2, 20, 12]}])
    categories = [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]
    path = write(tmp_path, "a.json", content | {"categories": categories})
    with pytest.raises(
        RegionError, match=r"a.json: categories\[1\].id: got 1, expected an id that no earlier entry has"
    ):
        read(path)
    other = {**content["images"][0], "file_name": "b.png"}
    path = write(tmp_path, "a.json", content | {"images": [*content["images"], other]})
    with pytest.raises(RegionError, match=r"a.json: images\[1\].id: got 139"):
        read(path)
    apart = [*content["images"], {**other, "id": 7}, {**other, "id": 7, "file_name": "c.png"}]
    assert boxes_of(write(tmp_path, "a.json", content | {"images": apart})) == [[3, 2, 20, 12]]


def test_results_of_several_images(tmp_path):
    rows = [{"image_id": k, "bbox": BOXES[k], "score": 0.5} for k in range(3)]
    path = write(tmp_path, "a.json", rows)
    assert boxes_of(path, name="000000000001.jpg") == [BOXES[1]]
    with pytest.raises(RegionError, match=r"results of 3 images \(image_id 0, 1, 2\), 0 of them a.png"):
        boxes_of(path)
    assert boxes_of(path, name="2") == [BOXES[2]]
    assert boxes_of(write(tmp_path, "b.json", rows[:1])) == [BOXES[0]]
    with pytest.raises(RegionError, match="results of 2 images"):
        boxes_of(write(tmp_path, "c.json", [rows[0], {"bbox": BOXES[1]}]))


# ---------------------------------------------------------------- plausible boxes


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0.41, 0.62, 0.3, 0.32], "smaller than a pixel; .*26.24,29.76,19.2,15.36 in pixels"),
        ([0, 0, 1, 1], "smaller than a pixel"),
        ([5, 5, 0.5, 9], "smaller than a pixel"),
        ([30, 20, 60, 40], "leaves the image of 64 x 48 .* fits as two corners. .* 30,20,30,20"),
    ],
)
def test_boxes_in_fractions_and_corners(box, message):
    with pytest.raises(RegionError, match=message):
        parse_region(box, WIDTH, HEIGHT)


def test_polygons_in_fractions():
    for ring in ([0, 0, 1, 0, 1, 1, 0, 1], scaled(RING)):
        with pytest.raises(RegionError, match="polygon lies within the first pixel; pixels are expected"):
            parse_region([ring], WIDTH, HEIGHT)


def test_more_regions_than_can_be_masks(tmp_path):
    path = write(tmp_path, "a.json", [{"bbox": [1, 1, 5, 5]}] * 100)
    assert len(read_region_file(path, NAME, 4000, 3000)) == 100
    write(tmp_path, "a.json", [{"bbox": [1, 1, 5, 5]}] * 200)
    with pytest.raises(RegionError, match="200 regions of an image of 4000 x 3000"):
        read_region_file(path, NAME, 4000, 3000)


def test_boxes_that_nearly_are_whole():
    assert parse_region([2.9999999, 3.0000001, 10.0000004, 4.9999999], WIDTH, HEIGHT).bbox == [3, 3, 10, 5]
    assert parse_region(np.float32([0.1, 0.2, 10, 5]).tolist(), WIDTH, HEIGHT).bbox == [0, 0, 11, 6]
    assert parse_region([60, 40, 4.4, 8.3], WIDTH, HEIGHT).bbox == [60, 40, 4, 8]
    assert parse_region([3, 3, 0.9999999, 1], WIDTH, HEIGHT).bbox == [3, 3, 1, 1]


def test_voc_boxes(tmp_path, caplog):
    """PASCAL VOC's own numbers, corners from 0, and files that do not say which."""
    assert boxes_of(write(tmp_path, "a.xml", voc([(3, 3, 12, 8)]))) == [[2, 2, 10, 6]]
    assert boxes_of(write(tmp_path, "a.xml", voc([(0, 3, 12, 8)], database="x"))) == [[0, 3, 12, 5]]
    assert boxes_of(write(tmp_path, "a.xml", voc([(3.0, 3.0, 12.0, 8.0)], database="x"))) == [[3, 3, 9, 5]]
    path = write(tmp_path, "a.xml", voc([(3, 3, 12, 8)], database="x"))
    assert boxes_of(path) == [[2, 2, 10, 6]] and "--format voc-corners" in caplog.text
    assert boxes_of(path, format="voc-corners") == [[3, 3, 9, 5]]
    with pytest.raises(RegionError, match=r"object 0 \(figure\): the box .* leaves the image"):
        boxes_of(write(tmp_path, "a.xml", voc([(3, 3, 65, 8)])))
    with pytest.raises(RegionError, match="a corner at 0"):
        boxes_of(write(tmp_path, "a.xml", voc([(0, 3, 12, 8)])), format="voc")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xml", "<annotations>", "not valid XML, perhaps cut short"),
        ("a.xml", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "declares a document type"),
        ("a.xml", "<records/>", "expected <annotations> .* got <records>"),
        ("a.xml", '<annotations><track id="0"/></annotations>', "CVAT for video"),
        ("a.xml", cvat([]), "image 0 .*: holds no regions"),
        ("a.xml", cvat(['<points points="1,2"/>']), "points 0: a points has no area"),
        ("a.xml", cvat(['<mask rle="1,2" left="0" top="0" width="2" height="2"/>']), "runs of `rle`"),
        ("a.xml", cvat(['<box xtl="a" ytl="1" xbr="2" ybr="3"/>']), "box 0.xtl: expected a number, got 'a'"),
        ("a.xml", voc([]), "no `object`"),
        ("a.json", label_studio([{"x": 1, "y": 1, "width": 0.1, "keypointlabels": ["x"]}]), "result r0: has no area"),
        ("a.json", label_studio([{"rle": [0, 0, 0, 1, 2]}]), "result r0: the brush mark is damaged"),
        ("a.json", [label_studio([])[0] | {"annotations": [{"id": 1}, {"id": 2}]}], r"2 annotations \(1, 2\)"),
        ("a.json", {"nothing": 1}, "got an object with the keys nothing"),
        ("a.csv", "filename,region_count", "CSV is not read; export JSON"),
        ("a.xml", labelme_xml([[(1, 1), (9, 9)]]), r"object 0 \(figure\): is a line"),
        ("a.xml", labelme_xml([]).replace("</a", "<object><segm><mask>b.png</mask></segm></object></a"),
         "is a mask, b.png; caption with the folder of these"),
        ("a.xml", labelme_xml([[(1, 1), (9, "x"), (9, 9)]]), "expected a number, got 'x'"),
        ("a.txt", "gsd:1\n1 1 9 1 9 9 1 9 ship 7", "line 2: expected `x0 y0 x1 y1 x2 y2 x3 y3 class difficult`"),
        ("a.txt", "imagesource:GoogleEarth\ngsd:0.1\n", "holds no regions"),
        ("a.txt", "1 1 9 1 9 9 1 nine ship 0", "line 1: expected a number, got 'nine'"),
        ("pan.json", coco([]) | {"annotations": [{"image_id": 139, "file_name": "p.png", "segments_info": []}]},
         "is a COCO panoptic file; .*p.png.* ln -s"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    with pytest.raises(RegionError, match=message):
        read(write(tmp_path, name, content))


# ---------------------------------------------------------------- label maps


def test_void_of_palette_images(tmp_path, caplog):
    path = write_palette_map(tmp_path)
    assert [region.id for region in read(path)] == [1, 2, 3]
    assert "255 of a palette image is no region (void); --format label-map keeps it" in caplog.text
    assert [region.id for region in read(path, format="label-map")] == [1, 2, 3, 255]
    gray = Image.fromarray(np.asarray(Image.open(path)))
    gray.save(tmp_path / "gray.png")
    assert [region.id for region in read(tmp_path / "gray.png")] == [1, 2, 3, 255]


def test_photographs_are_no_label_maps(tmp_path):
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    smooth = (2 * x + y + rng.integers(0, 3, x.shape)).astype(np.uint8)  # a gradient with noise
    noise = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    drawn[10:20, 10:30] = 200
    drawn[10, 10:30] = np.arange(1, 21)  # soft edges
    for name, pixels, size in (
        ("s", smooth, (WIDTH, HEIGHT)),
        ("n", noise, (640, 480)),
        ("d", drawn, (WIDTH, HEIGHT)),
    ):
        path = tmp_path / f"{name}.png"
        Image.fromarray(pixels).save(path)
        with pytest.raises(RegionError, match="photograph"):
            read(path, size=size)
    assert len(read(tmp_path / "d.png", format="label-map")) == 21
    with pytest.raises(RegionError, match=r"values in 640 x 480 pixels, more than can be masks \(at most 1000\)"):
        read(tmp_path / "n.png", size=(640, 480), format="label-map")
    with pytest.raises(RegionError, match="states an image of 640 x 480"):
        read(tmp_path / "n.png")


def test_many_cells_are_a_label_map(tmp_path):
    cells = np.kron(np.arange(1, 193, dtype=np.uint8).reshape(12, 16), np.ones((4, 4), np.uint8))
    Image.fromarray(cells).save(tmp_path / "a.png")
    assert [region.bbox[2:] for region in read(tmp_path / "a.png")] == [[4, 4]] * 192


def test_masks_of_a_folder_are_named_by_their_files(tmp_path, caplog):
    folder = write_masks(tmp_path)
    assert [path.name for path in read_region_file(folder, NAME, WIDTH, HEIGHT)] == ["0.png", "1.png", "2.png"]
    read_region_file(folder, NAME, WIDTH, HEIGHT)
    assert caplog.text.count("passed over what is no mask image: .DS_Store, ._0.png, Thumbs.db, ...") == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(RegionError, match="holds no mask images"):
        read(tmp_path / "empty")


# ---------------------------------------------------------------- written by supervision, and the command


@pytest.mark.parametrize("kind", ["yolo", "voc", "coco", "oriented"])
def test_files_that_supervision_writes(tmp_path, kind):
    sv = pytest.importorskip("supervision")
    boxes = [[3, 2, 20, 12], [30, 8, 10, 30], [44, 20, 18, 22]]
    (tmp_path / "images").mkdir()
    image = str(tmp_path / "images" / "a.jpg")
    Image.new("RGB", (WIDTH, HEIGHT), "white").save(image)
    data = {"xyxyxyxy": np.array([np.reshape(obb(*box), (4, 2)) * (WIDTH, HEIGHT) for box in boxes], np.float32)}
    detections = sv.Detections(
        xyxy=np.array([[x, y, x + w, y + h] for x, y, w, h in boxes], dtype=float),
        class_id=np.array([0, 1, 0]),
        data=data if kind == "oriented" else {},
    )
    made = sv.DetectionDataset(classes=["cat", "dog"], images=[image], annotations={image: detections})
    if kind == "voc":
        made.as_pascal_voc(annotations_directory_path=str(tmp_path / "out"))
        path = tmp_path / "out" / "a.xml"
    elif kind == "coco":
        path = tmp_path / "out.json"
        made.as_coco(annotations_path=str(path))
    else:
        options = {"is_obb": True} if kind == "oriented" else {}
        made.as_yolo(annotations_directory_path=str(tmp_path / "out"), **options)
        path = tmp_path / "out" / "a.txt"
    assert boxes_of(path, name=image) == boxes


def test_detections_of_supervision_keep_what_they_carry():
    sv = pytest.importorskip("supervision")
    corners = np.array([[[20, 5], [35, 20], [20, 35], [5, 20]]], dtype=np.float32)
    found = from_supervision(
        sv.Detections(
            xyxy=np.array([[5.0, 5, 35, 35]]), confidence=np.array([0.5]), class_id=np.array([3]),
            data={"xyxyxyxy": corners, "class_name": np.array(["boat"])},
        )
    )  # fmt: skip
    assert found == [{"id": 0, "segmentation": [corners.ravel().tolist()], "category": "boat", "score": 0.5}]
    (region,) = parse_regions(found, WIDTH, HEIGHT)
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    assert (region.mask ^ (np.abs(x - 20) + np.abs(y - 20) <= 15)).sum() <= 40  # half of it would be 450 pixels off


def test_the_command(tmp_path, tiny_checkpoint):
    Image.new("RGB", (WIDTH, HEIGHT), "white").save(tmp_path / "b.png")
    shapes = [{"shape_type": "rectangle", "points": [[3, 2], [23, 14]]}]
    file = write(tmp_path, "a.json", labelme(shapes))

    def run(*arguments):
        fixed = ["--model", tiny_checkpoint, "--steps", 2, "--max-new-tokens", 4, "--json"]
        command = ["caption", tmp_path / "b.png", *arguments, *fixed]
        return CliRunner().invoke(app, [str(part) for part in command])

    refused = run("--regions", file)
    assert refused.exit_code == 2 and "is about the image a.png, not b.png" in refused.stderr
    found = json.loads(run("--regions", file, "--image-name", "a.png").stdout)["regions"]
    assert [region["bbox"] for region in found] == [[3, 2, 20, 12]]
    found = json.loads(run("--box", "1,1,5,5", "--regions", write_masks(tmp_path)).stdout)["regions"]
    assert [(region["id"], region["bbox"]) for region in found] == [
        (0, [1, 1, 5, 5]), *((str(k), box) for k, box in enumerate(BOXES))
    ]  # fmt: skip
    pixels = write(tmp_path, "a.txt", "car 20 10 16 12")
    assert (
        "(--format pixel-boxes) or `class x y w h (pixels)` (--format pixel-centres)"
        in run("--regions", pixels).stderr
    )
    found = json.loads(run("--regions", pixels, "--format", "pixel-centres").stdout)["regions"]
    assert [region["bbox"] for region in found] == [[12, 4, 16, 12]]
    assert "As fractions it would be 12.8,9.6,19.2,14.4 in pixels" in run("--box", "0.2,0.2,0.3,0.3").stderr


@pytest.mark.parametrize("value", [True, 5, "x", [1]])
def test_a_result_of_label_studio_whose_value_is_no_object(tmp_path, value):
    """Also where an earlier result of the same id, which makes one region with it, is sound."""
    (task,) = label_studio([{"x": 10, "y": 10, "width": 20, "height": 20, "rectanglelabels": ["x"]}])
    results = task["annotations"][0]["result"]
    results.append({**results[0], "value": value})
    with pytest.raises(RegionError, match=r"has no `value`, or one that is no object"):
        read(write(tmp_path, "a.json", [task]))
