"""The page of `pdlm demo` without a browser: what it takes, what it refuses, what it shows, who sees what."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from demo_server import DemoServer, Visitor
from PIL import Image
from region_server import RegionCaptionServer
from tiny import make_image, tiny_sam
from typer.testing import CliRunner

from pdlm_hf import BASE_CHECKPOINT, CHECKPOINT, RegionCaptioner
from pdlm_hf.attributes import parse_schema
from pdlm_hf.cli.main import app
from pdlm_hf.client.captions import CaptionClient
from pdlm_hf.demo import handlers, limits, page, parts
from pdlm_hf.demo import session as sheet
from pdlm_hf.demo.backend import Draft, LocalBackend, ServerBackend, Written, follow, settings_of
from pdlm_hf.demo.gestures import ClickFinder, nudged_mask
from pdlm_hf.demo.limits import MAX_REGIONS, open_upload, read_uploads
from pdlm_hf.demo.session import Session
from pdlm_hf.errors_pdlm import CheckpointError, ServerError, SettingError
from pdlm_hf.regions import FoundRegion, RegionFinder
from pdlm_hf.regions.readers import read_region_file
from pdlm_hf.regions.region import Region, parse_regions
from pdlm_hf.regions.sam import Segmenter
from pdlm_hf.shapes import ShapesSegmenter
from pdlm_hf.shapes.scenes import draw_scene

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "shapes_quality.json"


def file_of(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def sent(name, data):
    return {"name": name, "data": base64.b64encode(data).decode()}


def grey(width=100, height=80):
    return Image.new("RGB", (width, height), (120, 120, 120))


def masks_of(sheet):
    return [region.mask for region in parse_regions(sheet.regions, *sheet.image.size)]


@pytest.fixture
def started():
    """A grey image of 100 x 80 pixels without regions."""
    own = Session()
    own.open("a.png", file_of(grey()))
    return own


# ---------------------------------------------------------------- uploads


def test_uploads_are_read():
    assert read_uploads([sent("a.png", b"x"), sent("../../b.json", b"yz")]) == [("a.png", b"x"), ("b.json", b"yz")]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "0 files"),
        ([sent("a", b"")] * (limits.MAX_FILES + 1), "61 files; at most 60"),
        ("a", "cannot be read"),
        (["a"], "cannot be read"),
        ([{"name": "a"}], "cannot be read"),
        ([{"name": "a", "data": "ä"}], "cannot be read"),
        ([{"name": "a", "data": 7}], "cannot be read"),
        ([sent("a", bytes(11 * 2**20)), sent("b", bytes(11 * 2**20))], "22.0 MB; at most 20 MB"),
    ],
)
def test_uploads_are_bounded(items, message):
    with pytest.raises(ValueError, match=message):
        read_uploads(items)


def test_a_large_image_is_refused_before_it_is_decoded(monkeypatch):
    data = file_of(Image.new("1", (6000, 6000)))
    assert len(data) < 10_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"a\.png: 6000 x 6000 pixels; at most 25 million"):
        open_upload("a.png", data)
    with pytest.raises(ValueError, match="6000 x 6000 pixels, but the image has 10 x 20"):
        monkeypatch.setattr(limits, "MAX_PIXELS", 10**8)
        open_upload("a.png", data, (10, 20))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        file_of(grey())[:-200],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",  # would start Ghostscript
        b"%PDF-1.4\n",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    ],
)
def test_what_is_no_image_is_refused_and_the_sheet_stays(started, data):
    started.mark({"kind": "box", "box": [0, 0, 0.5, 0.5]})
    before = started.version
    with pytest.raises(ValueError, match=r"b\.png: cannot be opened as an image"):
        started.open("b.png", data)
    assert (started.name, started.version, len(started.regions)) == ("a.png", before, 1)


def test_a_photograph_is_turned_as_it_is_meant_to_be_seen():
    exif = Image.Exif()
    exif[0x0112] = 6
    own = Session()
    own.open("a.jpg", file_of(grey(60, 40), "JPEG", exif=exif))
    assert own.image.size == (40, 60) and own.image.mode == "RGB"


# ---------------------------------------------------------------- marks


def test_a_box_from_any_corner(started):
    for k, box in enumerate(([0.1, 0.25, 0.5, 0.5], [0.5, 0.5, 0.1, 0.25])):
        started.mark({"kind": "box", "box": box})
        expected = np.zeros((80, 100), bool)
        expected[20:40, 10:50] = True
        assert (masks_of(started)[k] == expected).all()
    assert [region["id"] for region in started.regions] == [1, 2]


def test_a_stroke_begins_a_region_or_goes_on_with_one(started):
    stroke = {"kind": "brush", "points": [[0.2, 0.5], [0.6, 0.5]], "radius": 0.05}
    started.mark(stroke)
    (mask,) = masks_of(started)
    assert mask[40, 15:65].all() and mask[36:44, 40].all() and not mask[:33].any() and not mask[48:].any()
    started.mark({"kind": "brush", "points": [[0.5, 0.5], [0.5, 0.9]], "radius": 0.05})
    (grown,) = masks_of(started)
    assert (grown & mask == mask).all() and grown[72, 50] and len(started.regions) == 1
    started.mark({"kind": "brush", "points": [[0.1, 0.1]], "radius": 0.02})
    assert len(started.regions) == 2 and masks_of(started)[1][8, 10]
    started.mark({"kind": "box", "box": [0.7, 0.7, 1, 1]})
    started.mark({"kind": "brush", "points": [[0.8, 0.8]], "radius": 0.02})  # a box is not painted on
    assert len(started.regions) == 4
    started.undo()
    started.undo()
    assert [region["id"] for region in started.regions] == [1, 2]


@pytest.mark.parametrize(
    ("gesture", "message"),
    [
        ({}, "Mark a region"),
        ({"kind": "click", "point": [0.5, 0.5]}, "Mark a region"),  # nobody to ask
        ({"kind": "box"}, "cannot be read"),
        ({"kind": "box", "box": [1, 2, 3]}, "cannot be read"),
        ({"kind": "box", "box": "abcd"}, "cannot be read"),
        ({"kind": "box", "box": [0, 0, float("nan"), 1]}, "cannot be read"),
        ({"kind": "box", "box": [0.5, 0.5, 0.5, 0.9]}, "has no area"),
        ({"kind": "brush", "points": [], "radius": 0.1}, "cannot be read"),
        ({"kind": "brush", "points": [[0.5, 0.5]] * 10_001, "radius": 0.1}, "shorter stroke"),
        ({"kind": "brush", "points": [[0.5, 0.5]], "radius": None}, "cannot be read"),
    ],
)
def test_other_marks_are_refused(started, gesture, message):
    with pytest.raises(ValueError, match=message):
        started.mark(gesture)
    assert started.regions == [] and started.past == []


def test_places_outside_are_cut_off(started):
    started.mark({"kind": "box", "box": [-5, -5, 50, 50]})
    assert masks_of(started)[0].all()


def test_as_many_regions_as_a_server_takes(started, monkeypatch):
    started.load_masks([("a.json", json.dumps([{"bbox": [0, 0, 5, 5]}] * MAX_REGIONS).encode())])
    with pytest.raises(ValueError, match="61 regions; at most 60"):
        started.mark({"kind": "box", "box": [0, 0, 1, 1]})
    started.clear()
    monkeypatch.setattr(sheet, "MAX_MASK_PIXELS", 2 * 8000)
    for _ in range(2):
        started.mark({"kind": "box", "box": [0, 0, 1, 1]})
    with pytest.raises(ValueError, match="3 regions; at most 2 on an image of 100 x 80"):
        started.mark({"kind": "box", "box": [0, 0, 1, 1]})


def test_nothing_can_be_marked_without_a_image():
    for do in (lambda: Session().mark({"kind": "box", "box": [0, 0, 1, 1]}), Session().parsed, Session().coco):
        with pytest.raises(ValueError, match="Drop an image first"):
            do()
    assert Session().view() is None


# ---------------------------------------------------------------- masks from files


def label_map():
    labels = np.zeros((80, 100), np.uint8)
    labels[10:30, 10:40], labels[40:70, 50:90] = 3, 7
    return labels


@pytest.mark.parametrize("form", ["map", "palette", "masks", "coco", "labelme", "yolo"])
def test_masks_are_loaded(started, form):
    labels = label_map()
    masks = [labels == 3, labels == 7]
    boxes = [[10, 10, 30, 20], [50, 40, 40, 30]]
    image = Image.fromarray(labels)
    if form == "palette":
        image = image.convert("P")
        image.putpalette([0, 0, 0] * 8)  # colours that say nothing
    shapes = [{"shape_type": "rectangle", "points": [[x, y], [x + w, y + h]]} for x, y, w, h in boxes]
    data = {"images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 80}], "annotations": []}
    data["annotations"] = [{"id": 10 + k, "image_id": 1, "bbox": box} for k, box in enumerate(boxes)]
    lines = [f"0 {(x + w / 2) / 100} {(y + h / 2) / 80} {w / 100} {h / 80}\n" for x, y, w, h in boxes]
    started.load_masks(
        {
            "map": [("labels.png", file_of(image))],
            "palette": [("labels.png", file_of(image))],
            "masks": [(f"{k}.png", file_of(Image.fromarray(mask))) for k, mask in enumerate(masks)],
            "coco": [("coco.json", json.dumps(data).encode())],
            "labelme": [("a.json", json.dumps({"shapes": shapes}).encode())],
            "yolo": [("a.txt", "".join(lines).encode())],
        }[form]
    )
    assert [mask.tolist() for mask in masks_of(started)] == [mask.tolist() for mask in masks]
    ids = [region["id"] for region in started.regions]
    assert ids == {"map": [3, 7], "palette": [3, 7], "coco": [10, 11], "masks": [0, 1]}.get(form, [0, 1])


def test_ids_stay_apart(started):
    started.mark({"kind": "box", "box": [0, 0, 0.5, 0.5]})
    started.load_masks([("a.json", b'[{"id": 1, "bbox": [0, 0, 5, 5]}, {"id": "x", "bbox": [0, 0, 5, 5]}]')])
    assert [region["id"] for region in started.regions] == [1, 2, 3]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.json", b"{")], r"^a\.json: not valid JSON"),
        ([("a.json", b'[{"bbox": [0, 0, 5, 5]}, {"bbox": [500, 0, 5, 5]}]')], "region 1: the box"),
        ([("a.txt", b"0 5 5 5")], r"^a\.txt: line 1"),
        ([("a.png", file_of(grey(50, 50)))], "50 x 50 pixels, but the image has 100 x 80"),
        ([("a.png", file_of(Image.new("L", (100, 80))))], "holds no regions"),
        (
            [("a.png", file_of(Image.fromarray(np.arange(8000, dtype=np.uint8).reshape(80, 100))))],
            "more than 60 values",
        ),
        ([(name, file_of(Image.new("L", (100, 80), 9))) for name in ("a.png", "b.png")], "neither 0/1 nor 0/255"),
        ([("a.png", file_of(Image.new("1", (100, 80), 1))), ("b.png", b"hello")], r"b\.png: cannot be opened"),
        ([("a.json", json.dumps([{"bbox": [0, 0, 5, 5]}] * 61).encode())], "61 regions"),
    ],
)
def test_bad_masks_are_refused_as_a_whole(started, files, message):
    with pytest.raises(ValueError, match=message):
        started.load_masks(files)
    assert started.regions == []


def test_a_labelme_mask_starts_no_other_program(started):
    shape = {"shape_type": "mask", "points": [[0, 0], [9, 9]], "mask": base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n")}
    data = {"imageHeight": 80, "imageWidth": 100, "shapes": [{**shape, "mask": shape["mask"].decode()}]}
    with pytest.raises(ValueError, match="the mask cannot be read"):
        started.load_masks([("a.json", json.dumps(data).encode())])


# ---------------------------------------------------------------- what is dropped


def mask_file(left=10):
    mask = np.zeros((80, 100), np.uint8)
    mask[10:30, left : left + 20] = 255
    return file_of(Image.fromarray(mask))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_a_mask_that_is_dropped_is_added(started, mode):
    started.mark({"kind": "box", "box": [0, 0, 0.1, 0.1]})
    mask = Image.open(io.BytesIO(mask_file())).convert(mode)
    assert started.drop([("mask.png", file_of(mask))]) is None
    assert [int(mask.sum()) for mask in masks_of(started)] == [80, 400] and started.name == "a.png"


def test_files_of_regions_that_are_dropped_are_added(started):
    started.mark({"kind": "box", "box": [0, 0, 0.1, 0.1]})
    coco = {"images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 80}]}
    coco["annotations"] = [{"id": 5, "image_id": 1, "bbox": [0, 0, 9, 9]}]
    labelme = {"imagePath": "a.png", "imageHeight": 80, "imageWidth": 100, "flags": {}}
    labelme["shapes"] = [{"label": "x", "shape_type": "rectangle", "points": [[1, 1], [5, 5]]}]
    for name, data in (("coco.json", coco), ("a.json", labelme)):
        assert started.drop([(name, json.dumps(data).encode())]) is None
    assert [region["id"] for region in started.regions] == [1, 5, 0]
    assert started.drop([("m.png", mask_file(30)), ("n.png", mask_file(60))]) is None
    assert len(started.regions) == 5
    with pytest.raises(ValueError, match="62 regions; at most 60"):
        started.drop([("more.json", json.dumps([{"bbox": [0, 0, 5, 5]}] * 57).encode())])
    assert len(started.regions) == 5


def test_another_image_asks_before_it_replaces_regions(started):
    photo = file_of(Image.fromarray(make_image(0, 100, 80)[0]))
    started.mark({"kind": "box", "box": [0, 0, 0.1, 0.1]})
    before = started.version
    assert started.drop([("b.png", photo)]) == {"name": "b.png", "fits": True}
    assert started.drop([("c.png", file_of(grey(50, 50)))]) == {"name": "c.png", "fits": False}
    with pytest.raises(ValueError, match=r"d\.png: cannot be opened as an image"):
        started.drop([("d.png", b"hello")])
    with pytest.raises(ValueError, match="Drop the image alone first"):
        Session().drop([("b.png", photo), ("b.json", b"[]")])
    assert (started.version, started.name) == (before, "a.png")
    started.clear()
    assert started.drop([("b.png", photo)]) is None and started.name == "b.png"


def test_undo_brings_back_an_image_with_its_regions(started, monkeypatch):
    started.mark({"kind": "box", "box": [0, 0, 0.5, 0.5]})
    started.open("b.png", file_of(grey(50, 40)))
    started.mark({"kind": "box", "box": [0, 0, 1, 1]})
    started.undo()
    assert started.name == "b.png" and started.view()["undo"] and started.regions == []
    started.undo()
    assert started.name == "a.png" and masks_of(started)[0].sum() == 2000 and started.view()["size"] == (1000, 800)
    started.undo()
    assert started.regions == [] and not started.view()["undo"]
    monkeypatch.setattr(sheet, "MAX_PAST_PIXELS", 100 * 80)  # no room for two images
    for name in ("c.png", "d.png", "e.png"):
        started.open(name, file_of(grey()))
        started.mark({"kind": "box", "box": [0, 0, 0.5, 0.5]})
    assert {moment.name for moment in started.past} == {"e.png"}


def test_a_region_is_moved_and_a_box_resized_in_one_step_of_undo(started):
    started.mark({"kind": "box", "box": [0.1, 0.25, 0.5, 0.5]})
    for right, down, resize in ((3, -2, False), (1, 0, False), (-5, 10, True)):
        started.nudge(1, right, down, resize)
    assert parse_regions(started.regions, 100, 80)[0].bbox == [14, 18, 35, 30]
    started.nudge(1, 500, 500, False)  # as far as there is room
    assert parse_regions(started.regions, 100, 80)[0].bbox == [65, 50, 35, 30]
    started.nudge(1, -500, 500, True)
    assert parse_regions(started.regions, 100, 80)[0].bbox == [65, 50, 1, 30]
    started.undo()
    assert parse_regions(started.regions, 100, 80)[0].bbox == [10, 20, 40, 20]
    started.mark({"kind": "brush", "points": [[0.2, 0.5], [0.6, 0.5]], "radius": 0.05})
    area = masks_of(started)[1].sum()
    started.nudge(2, 0, 1, False)
    assert masks_of(started)[1].sum() == area and started.regions[1]["brushed"]
    for steps in ((0.5, 0), ("1", 0), (None, 0), (10**9, 0)):
        with pytest.raises(ValueError, match="cannot be read"):
            started.nudge(2, *steps, False)
    with pytest.raises(ValueError, match="Only boxes can be resized"):
        started.nudge(2, 1, 0, True)
    version = started.version
    started.nudge(7, 1, 0, False)  # deleted before
    assert started.version == version


def test_a_step_is_a_share_of_a_large_image():
    mask = np.zeros((1000, 2000), bool)
    mask[5:10, 5:10] = True
    assert Region(0, nudged_mask(mask, 1, 2, False)).bbox == [15, 25, 5, 5]


def test_a_click_takes_the_smallest_region_that_is_found(started):
    half, quarter = np.zeros((2, 80, 100), bool)
    half[:40], quarter[:40, :50] = True, True
    clicks = ClickFinder(lambda image: [FoundRegion.of_mask(half), FoundRegion.of_mask(quarter)])
    for x, y in ((0.2, 0.1), (0.9, 0.1)):
        started.mark({"kind": "click", "point": [x, y]}, clicks)
    assert [mask.sum() for mask in masks_of(started)] == [2000, 4000]
    with pytest.raises(ValueError, match="Nothing was found there"):
        started.mark({"kind": "click", "point": [0.5, 0.9]}, clicks)


# ---------------------------------------------------------------- what is shown and saved


def image_in(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_the_page_knows_which_region_a_pixel_is_of(started):
    started.mark({"kind": "box", "box": [0.4, 0.4, 0.6, 0.6]})
    started.mark({"kind": "box", "box": [0, 0, 0.8, 0.8]})
    view = started.view()
    labels = np.asarray(image_in(view["labels"]))
    assert view["size"] == (1000, 800) == image_in(view["image"]).size and labels.shape == (800, 1000)
    assert (labels[320:480, 400:600] == 1).all()  # the small one lies on the large one
    labels = labels.copy()
    labels[320:480, 400:600] = 2
    assert (labels[:640, :800] == 2).all() and not labels[640:].any() and not labels[:, 800:].any()
    assert [region["box"] for region in view["regions"]] == [[0.4, 0.4, 0.2, 0.2], [0, 0, 0.8, 0.8]]
    version = view["version"]
    started.undo()
    assert started.view()["version"] != version


def test_a_large_image_is_shown_small_and_kept_whole():
    own = Session()
    own.open("a.png", file_of(grey(3000, 2000)))
    own.load_masks([("a.json", b'[{"bbox": [600, 400, 900, 800]}, {"bbox": [2400, 1001, 1, 1]}]')])
    view = own.view()
    labels = np.asarray(image_in(view["labels"]))
    assert labels.shape == (667, 1000) and image_in(view["image"]).size == (1000, 667)
    assert (labels[135:399, 201:499] == 1).all() and (labels == 1).sum() < 302 * 269
    ((row, column),) = np.argwhere(labels == 2)  # it would fall between the pixels
    assert abs(row - 333.8) <= 1 and abs(column - 800) <= 1
    assert [int(mask.sum()) for mask in masks_of(own)] == [900 * 800, 1]


def test_export(started, tmp_path):
    started.load_masks([("labels.png", file_of(Image.fromarray(label_map())))])
    with pytest.raises(ValueError, match="no captions of these regions yet"):
        started.coco()
    started.captions = [page_caption("a <b>", 0.51234), page_caption("ü", 1.0)]
    path = tmp_path / "a.json"
    path.write_bytes(started.coco())
    rows = read_region_file(path, "a.png", 100, 80)
    assert [(row["id"], row["caption"], row["score"]) for row in rows] == [(3, "a <b>", 0.5123), (7, "ü", 1.0)]
    assert [row["bbox"] for row in rows] == [[10, 10, 30, 20], [50, 40, 40, 30]]
    found = parse_regions([{"id": row["id"], "segmentation": row["segmentation"]} for row in rows], 100, 80)
    assert [(region.mask == (label_map() == region.id)).all() for region in found] == [True, True]
    drawn = Image.open(io.BytesIO(started.drawing()))
    assert drawn.format == "PNG" and drawn.width == 500 and drawn.height == 400 + 12 + 2 * 24
    started.mark({"kind": "box", "box": [0, 0, 1, 1]})
    with pytest.raises(ValueError, match="no captions of these regions yet"):
        started.drawing()


def page_caption(text, score):
    from pdlm_hf import RegionCaption

    return RegionCaption(text, score)


def test_measured_effects_are_those_of_the_benchmark():
    rows = {
        name: (row["exact"], row["num_forwards"]) for name, row in json.loads(RESULTS.read_text())["settings"].items()
    }
    assert parts.measured_rows("fixed") == [(k, *rows[f"{k} steps"]) for k in (1, 2, 4, 8, 16, 32)]
    assert parts.measured_rows("fast") == [(k, *rows[f"entropy bound {k}"]) for k in (0.01, 0.1, 0.5)]
    thresholds = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    assert parts.measured_rows("adaptive") == [(k, *rows[f"threshold {k}"]) for k in thresholds]
    for mode, steps, threshold, chosen in (
        ("adaptive", 32, 0.68, "0.7"),
        ("fast", 32, 0.68, "0.1"),
        ("fixed", 13, 0.68, "16"),
    ):
        marked = re.findall(r'<tr class="chosen"><th>(.*?)</th>', parts.effect_html(mode, steps, threshold))
        assert marked == [chosen]


def words(page):
    """Text of a piece of HTML, with single spaces."""
    return " ".join(re.sub("<[^>]*>", " ", page).split())


class Counting:
    """A backend that needs two forward passes a group, and a second for every region, by its own clock."""

    name, modes, at_a_time = "counting", ("adaptive", "fast", "fixed"), 1

    def write(self, image, regions, settings, on_step):
        on_step(1, ["dr"] * len(regions))
        return [page_caption(f"{int(region.mask.sum())}" + "<" * (len(regions) == 1), 0.5) for region in regions], 2

    def attributes(self, image, regions, schema):
        raise ServerError("The server is gone.")


def test_a_comparison_leads_with_forward_passes_and_takes_medians():
    regions = parse_regions([[0, 0, 5, 2], [1, 1, 3, 3]], 100, 80)
    together, alone = parts.Lane("together", [regions]), parts.Lane("alone", [[region] for region in regions])
    seen = []
    for _ in range(3):
        for lane in (together, alone):
            seen.append([list(lane.texts) for _ in lane.follow(Counting(), grey(), {})])
    assert seen[0] == [["dr", "dr"], ["10", "9"], ["10", "9"]]
    assert seen[1] == [["dr", ""], ["10<", ""], ["10<", "dr"], ["10<", "9<"], ["10<", "9<"]]
    assert ["dr", "dr"] not in seen[2]  # drafts are shown once
    assert (together.forwards, alone.forwards, len(together.runs), len(alone.runs)) == (2, 4, 3, 3)
    together.runs, alone.runs = [2.0, 9.0, 1.0], [3.0, 5.0, 4.0]
    assert (together.median, alone.median) == (2.0, 4.0)
    html = parts.compare_html(together, alone, 3)
    shown = words(html)
    assert "10&lt;" in html and "width:50.0%" in html
    assert shown.index("4 forward passes") < shown.index("4.00 s, the median of 3 runs (3.00 to 5.00 s)")
    assert "took 2.0 times as many forward passes, each over fewer captions, and 2.0 times as long" in shown
    assert "0 of 2 captions are word for word the same. Medians of 3 runs each, in turn, on this machine." in shown
    alone.runs.pop()
    assert "as long" not in parts.compare_html(together, alone, 3)


def test_a_comparison_without_forward_passes():
    together, alone = (parts.Lane(name, [parse_regions([[0, 0, 5, 2]], 100, 80)]) for name in "ab")
    together.runs, alone.runs = [1.0], [2.0]
    shown = words(parts.compare_html(together, alone, 1))
    assert "forward pass" not in shown and "took 2.0 times as long; 1 of 1 caption is word for word" in shown


# ---------------------------------------------------------------- writing


@pytest.fixture(scope="module")
def writer():
    """The embedded checkpoint."""
    return LocalBackend(RegionCaptioner.from_pretrained(), "shapes")


def test_drafts_lead_to_the_captions(writer):
    image, masks = page.example(0)
    regions = parse_regions(masks, *image.size)
    news = list(follow(writer, image, regions, settings_of("fixed", 8, 0.8)))
    drafts, end = news[:-1], news[-1]
    assert [draft.step for draft in drafts] == list(range(1, 9)) and isinstance(end, Written) and end.forwards == 8
    assert all(len(draft.texts) == len(regions) for draft in drafts)
    assert [caption.text for caption in end.captions] == drafts[-1].texts
    expected = writer.captioner.caption(image, masks, max_denoising_steps=8, acceptance_threshold=None)
    assert [caption.text for caption in end.captions] == [caption.text for caption in expected]
    assert [caption.id for caption in end.captions] == [region.id for region in regions]
    assert sorted(draft.seconds for draft in drafts) == [draft.seconds for draft in drafts]


def test_modes(writer):
    image, masks = page.example(0)
    regions = parse_regions(masks, *image.size)
    ends = {}
    for mode, same in (
        ("adaptive", {"acceptance_threshold": 0.6}),
        ("fast", {"entropy_bound": 0.1, "trim_canvas": True}),
        ("fixed", {"acceptance_threshold": None}),
    ):
        *_, ends[mode] = follow(writer, image, regions, settings_of(mode, 20, 0.6))
        expected = writer.captioner.generate([(image, regions)], max_denoising_steps=20, **same)
        assert [c.text for c in ends[mode].captions] == [c.text for c in expected[0][0]]
        assert ends[mode].forwards == expected[1].num_forwards
    assert ends["adaptive"].forwards < ends["fixed"].forwards == 20
    with pytest.raises(ValueError, match="no mode 'other'"):
        settings_of("other", 8, 0.8)


def test_who_looks_away_stops_the_writing(writer):
    image, masks = page.example(0)
    regions = parse_regions(masks, *image.size)
    before = set(threading.enumerate())
    news = follow(writer, image, regions, settings_of("fixed", 32, 0.8))
    assert isinstance(next(news), Draft)
    (thread,) = set(threading.enumerate()) - before
    news.close()
    thread.join(30)
    assert not thread.is_alive()
    assert isinstance(list(follow(writer, image, regions, settings_of("fixed", 1, 0.8)))[-1], Written)


def test_faults_of_the_writer_are_told(writer):
    image, masks = page.example(0)
    with pytest.raises(ValueError, match="max_denoising_steps"):
        list(follow(writer, image, parse_regions(masks, *image.size), settings_of("fixed", 0, 0.8)))


def test_attributes_are_read_shown_and_saved(writer):
    does, own = handlers.Handlers(writer), Session()
    image, masks = page.example(1)
    own.start(image, "a.png", masks)
    html = does.read_attributes(own, "colour: red, green, blue, yellow\n\nsize: small, large\n")
    expected = writer.captioner.attributes(
        image, masks, {"colour": ["red", "green", "blue", "yellow"], "size": ["small", "large"]}
    )
    assert "1 forward pass for all regions" in html and html.count("<tr>") == len(masks) + 1
    values = re.findall(
        r"<span>(.*?)</span>\s*<small>(.*?)</small>\s*<div class=\"bar\"><i style=\"width:(.*?)%", html
    )
    assert values == [
        (value.value, f"{value.probability:.2f}", f"{100 * value.probability:.1f}")
        for row in expected
        for value in row.values()
    ]
    lines = own.table().decode().splitlines()
    assert lines[0] == "image,id,x,y,width,height,colour,colour probability,size,size probability"
    assert len(lines) == len(masks) + 1 and lines[1].startswith(f"a.png,1,{','.join(map(str, expected[0].bbox))},")
    own.captions = [page_caption("a", 0.5)] * len(masks)
    rows = json.loads(own.coco())["annotations"]
    assert [row["attributes"] for row in rows] == [{n: v.value for n, v in row.items()} for row in expected]
    own.delete(1)
    with pytest.raises(ValueError, match="press Read attributes"):
        own.table()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no attributes|at least one|empty"),
        ("colour red", "Line 1: expected a name and its choices"),
        ("a: x\na: y", "Line 2: there is an attribute &#39;a&#39; already"),
        ("colour: red, red", "attribute &#39;colour&#39;: the choices"),
        ('{"colour": []}', "attribute &#39;colour&#39;: the list of choices is empty"),
        ('{"colour": ', "not valid JSON"),
    ],
)
def test_faults_of_a_schema_are_told_in_the_panel(writer, text, message):
    own = Session()
    own.start(*page.example(0)[:1], "a.png", page.example(0)[1])
    html = handlers.Handlers(writer).read_attributes(own, text)
    assert html.startswith('<p class="fault" role="alert">') and re.search(message, html), html


def test_faults_of_reading_are_told_in_the_panel():
    does, own = handlers.Handlers(Counting()), Session()
    assert "Drop an image first" in does.read_attributes(own, "a: b, c")
    own.open("a.png", file_of(grey()))
    assert "Mark a region first" in does.read_attributes(own, "a: b, c")
    own.mark({"kind": "box", "box": [0, 0, 1, 1]})
    assert "The server is gone." in does.read_attributes(own, "a: b, c")


def test_a_checkpoint_says_what_it_needs_before_it_is_loaded(writer, tmp_path):
    opened = []

    def opener(name):
        if name != str(CHECKPOINT):
            raise CheckpointError(f"{name}: <damaged>.")
        opened.append(name)
        return Counting(), None

    does = handlers.Handlers(writer, finder=lambda image: [], opener=opener, stand_in=True)
    html, button = does.check(f" {CHECKPOINT} ")
    assert button["interactive"] and re.search(r"memory about [\d.]+ MiB for one image", words(html))
    assert words(html).endswith("whole yes")
    html, button = does.check(str(BASE_CHECKPOINT))
    assert not button["interactive"] and "it cannot describe regions" in html
    for name, message in ((tmp_path / "none", "no such folder"), (tmp_path, "config.json"), (" ", "folder or hub id")):
        html, button = does.check(str(name))
        assert not button["interactive"] and 'class="fault"' in html and message in html, html
    assert opened == []
    note, _, mode, _ = does.load(str(CHECKPOINT))
    assert str(note) == "Captions are written by counting." and mode == "fixed"
    assert does.backend.name == "counting"
    assert "other: &lt;damaged&gt;." in does.load("other")[1] and does.backend.name == "counting"
    for kind in ("everything", "click"):  # the finder of drawn shapes has gone with their checkpoint
        with pytest.raises(SettingError, match="knows no photographs. Start `pdlm demo` with --sam"):
            does._act(Session(), {"kind": kind, "point": [1, 1]})


def test_a_base_checkpoint_is_refused():
    with pytest.raises(ValueError, match="cannot caption regions"):
        RegionCaptioner.from_pretrained(BASE_CHECKPOINT)


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_a_server_is_followed_step_by_step(no_proxy):
    regions = parse_regions([[0, 0, 40, 30], [10, 10, 5, 5]], 100, 80)
    with RegionCaptionServer() as server:
        writer = ServerBackend(CaptionClient(server.url), max_new_tokens=16)
        assert writer.name == "served"
        news = list(follow(writer, grey(), regions, settings_of("adaptive", 9, 0.7)))
    assert [item.texts for item in news[:-1]] == [["1", "2"], ["12", "25"]]
    assert [(c.text, c.score, c.id, c.bbox) for c in news[-1].captions] == [
        ("1200 pixels", 0.5, 0, [0, 0, 40, 30]),
        ("25 pixels", 0.5, 1, [10, 10, 5, 5]),
    ]
    assert news[-1].forwards == 2
    body = server.bodies[-1]
    assert body["stream"] is True and body["max_denoising_steps"] == 9 and body["acceptance_threshold"] == 0.7
    assert body["max_new_tokens"] == 16 and body["model"] == "served"


def test_a_server_reads_attributes(no_proxy):
    regions = parse_regions([[0, 0, 40, 30], [10, 10, 5, 5]], 100, 80)
    with RegionCaptionServer() as server:
        client = CaptionClient(server.url, api_key="k")
        rows, forwards = ServerBackend(client).attributes(grey(), regions, parse_schema({"colour": ["red", "blue"]}))
        assert server.bodies[-1]["schema"] == {"attributes": {"colour": ["red", "blue"]}} and server.keys == {
            "Bearer k"
        }
    assert [(row["colour"].value, row.bbox) for row in rows] == [("red", [0, 0, 40, 30]), ("red", [10, 10, 5, 5])]
    assert forwards == 2


EVENT = b'data: {"pass": 0, "step": 1, "regions": [{"id": 0, "caption": "a", "score": 0.5}]}\n\n'


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (500, "writes no captions: .*fault 500"),
        (EVENT, "stopped before all captions"),
        (EVENT + b'data: {"error": {"message": "out of memory", "code": 500}}\n\n', "out of memory"),
        (b'data: {"regions": [{"id": 0}]}\n\n', "not one caption for each region"),
        (b'data: {"regions": [{"id": 5, "caption": "a", "score": 1}], "usage": {"a": 1}}\n\n', "not one caption"),
    ],
)
def test_a_server_that_fails_is_told(no_proxy, answer, message):
    with RegionCaptionServer(lambda number, body: answer if body.get("stream") else None) as server:
        writer = ServerBackend(CaptionClient(server.url, retries=0))
        with pytest.raises(ServerError, match=message):
            list(follow(writer, grey(), parse_regions([[0, 0, 9, 9]], 100, 80), settings_of("fixed", 9, 0.7)))


# ---------------------------------------------------------------- SAM 2


@pytest.fixture(scope="module")
def sam():
    return tiny_sam()


def test_a_click_marks_a_region(sam, tmp_path, monkeypatch):
    sam.save_pretrained(tmp_path)
    segmenter = Segmenter.from_pretrained(str(tmp_path), "cpu")
    calls = []
    encode = segmenter.model.get_image_embeddings
    monkeypatch.setattr(segmenter.model, "get_image_embeddings", lambda pixels: calls.append(pixels) or encode(pixels))
    own = Session()
    own.open("a.png", file_of(Image.fromarray(make_image(0, 100, 80)[0])))
    for place in ([0.2, 0.3], [0.9, 0.8]):
        own.mark({"kind": "click", "point": place}, segmenter)
    first, second = masks_of(own)
    assert first.shape == (80, 100) and first.any()
    assert len(calls) == 1  # the second click finds the image known
    # what SAM 2's own way through the model says
    (pixels,) = calls
    expected = np.asarray(own.image.resize((64, 64), Image.Resampling.BILINEAR), np.float32) / 255
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert torch.allclose(pixels[0].permute(1, 2, 0), torch.tensor(expected, dtype=torch.float32), atol=1e-5)
    with torch.no_grad():
        out = sam(pixel_values=pixels, input_points=torch.tensor([[[[20.5 * 0.64, 24.5 * 0.8]]]]))
    best = out.pred_masks[0, 0, out.iou_scores[0, 0].argmax()]
    grown = torch.nn.functional.interpolate(best[None, None], (80, 100), mode="bilinear")[0, 0] > 0
    assert (first == grown.numpy()).all()


def test_a_click_on_nothing_is_told(sam, monkeypatch):
    segmenter = Segmenter(sam)
    real = segmenter.model.forward

    def nothing(**inputs):
        out = real(**inputs)
        out.pred_masks = out.pred_masks * 0 - 1
        return out

    monkeypatch.setattr(segmenter.model, "forward", nothing)
    with pytest.raises(ValueError, match="finds nothing there"):
        segmenter.mask(grey(), 5, 5)


# ---------------------------------------------------------------- find everything


def test_everything_is_found_in_place_of_what_was_marked():
    drawn = draw_scene(np.random.default_rng(11))
    own, finder = Session(), RegionFinder(ShapesSegmenter())
    with pytest.raises(ValueError, match="Drop an image first"):
        own.find(finder)
    own.open("a.png", file_of(drawn.image))
    own.mark({"kind": "box", "box": [0, 0, 0.5, 0.5]})
    own.find(finder)
    found = finder(drawn.image)
    assert len(found) >= len(drawn.masks) and [row["id"] for row in own.regions] == list(range(1, len(found) + 1))
    assert all((mask == region.mask).all() for mask, region in zip(masks_of(own), found, strict=True))
    own.undo()
    assert len(own.regions) == 1


def test_found_regions_are_limited_and_nothing_is_said():
    own = Session()
    own.open("a.png", file_of(grey()))
    half = np.zeros((80, 100), bool)
    half[:40] = True
    own.find(lambda image: [FoundRegion.of_mask(half)] * 70)
    assert len(own.regions) == MAX_REGIONS
    with pytest.raises(ValueError, match="Nothing was found here; mark regions with a box or the brush"):
        own.find(lambda image: [])
    assert len(own.regions) == MAX_REGIONS


# ---------------------------------------------------------------- the page over HTTP


@pytest.fixture(scope="module")
def served(writer):
    """The page; what this process connected to meanwhile is looked at in the end."""
    addresses, connect = [], socket.socket.connect

    def watched(self, address):
        addresses.append(address)
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched)
        with DemoServer(writer) as server:
            yield server
    outside = {
        address for address in addresses if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1")
    }
    assert not outside


def test_a_visit(served):
    visitor = Visitor(served.url)
    image, masks = make_image(3, 96, 64, 2)
    view = visitor.act("image", **sent("a.png", file_of(Image.fromarray(image))))
    assert view["regions"] == [] and view["size"] == [1000, 667]
    assert visitor.send("act", event_data={"kind": "undo"})[-1][0] is None  # the sheet itself stays on the server
    files = [sent(f"{k}.png", file_of(Image.fromarray(mask))) for k, mask in enumerate(masks)]
    assert len(visitor.act("masks", files=files)["regions"]) == 2
    assert len(visitor.act("box", box=[0, 0, 0.5, 0.5])["regions"]) == 3
    assert len(visitor.act("undo")["regions"]) == 2
    ids = [region["id"] for region in visitor.act("box", box=[0, 0, 0.5, 0.5])["regions"]]
    assert [region["id"] for region in visitor.act("delete", id=ids[2])["regions"]] == ids[:2]
    assert [region["id"] for region in visitor.act("delete", id=ids[2])["regions"]] == ids[:2]  # gone already
    news = visitor.send("click", "describe", ["fixed", 6, 0.8])
    assert len(news) >= 7
    end = news[-1][1]["props"]["captions"]
    assert len(end["texts"]) == 2 and len(end["drafts"]) == 6 and end["passes"] == 6 and end["seconds"] > 0
    shown = visitor.send("click", "compare-button", ["adaptive", 32, 0.8])[-1][0]
    assert "times</b> as long" in shown and shown.count("<li>") == 4
    shown = visitor.send("click", "read-attributes", ["size: small, large"])[-1][0]
    assert shown.count("<td") == 2
    file = visitor.send("click", "save-csv")[-1][0]["props"]["file"]
    assert file["name"] == "a_attributes.csv" and base64.b64decode(file["data"]).count(b"\n") == 3
    file = visitor.send("click", "save-coco")[-1][0]["props"]["file"]
    assert file["name"] == "a_captions.json" and file["kind"] == "application/json"
    said = json.loads(base64.b64decode(file["data"]))["annotations"]
    assert [row["caption"] for row in said] == end["texts"]
    file = visitor.send("click", "save-image")[-1][0]["props"]["file"]
    assert file["name"] == "a_captions.png" and Image.open(io.BytesIO(base64.b64decode(file["data"]))).width == 480


def test_faults_are_told_in_one_line(served):
    visitor = Visitor(served.url)
    with pytest.raises(RuntimeError, match="Drop an image first"):
        visitor.send("click", "describe", ["adaptive", 32, 0.8])
    visitor.act("example", number=1)
    for event, message in (
        ({"kind": "image", **sent("b.png", b"hello")}, r"b\.png: cannot be opened as an image"),
        ({"kind": "example", "number": 77}, "Mark a region with a box"),
        ({"kind": "undo and more"}, "Mark a region with a box"),
        ([1, 2], "Mark a region with a box"),
        ({"kind": "masks", "files": None}, "cannot be read"),
    ):
        with pytest.raises(RuntimeError, match=message):
            visitor.send("act", event_data=event)
    for values in (["adaptive", 0, 0.8], ["adaptive", 32, 7.0], ["other", 32, 0.8]):
        with pytest.raises(RuntimeError):
            visitor.send("click", "describe", values)
    assert visitor.send("click", "describe", ["adaptive", 32, 0.8])[-1][1]["props"]["captions"]["scores"]


def test_a_mark_during_the_writing_makes_its_captions_old(writer):
    does, own = handlers.Handlers(writer), Session()
    image, masks = page.example(0)
    own.start(image, "a.png", masks)
    news = does.describe(own, "fixed", 4, 0.8)
    next(news)
    own.mark({"kind": "box", "box": [0, 0, 0.3, 0.3]})
    *_, (_, end) = news
    assert own.captions is None and end["captions"]["version"] != own.version


def test_a_drop_that_asks_changes_nothing(served):
    visitor = Visitor(served.url)
    visitor.act("example", number=0)
    other = sent("b.png", file_of(grey()))
    board = visitor.send("act", event_data={"kind": "drop", "files": [other]})[-1][1]
    assert {"name": "b.png", "fits": False}.items() <= board["props"]["question"].items() and "value" not in board
    assert len(visitor.act("nudge", id=1, right=1, down=0)["regions"]) == 6
    assert visitor.act("image", **other)["regions"] == []
    assert len(visitor.act("undo")["regions"]) == 6


def test_marks_made_quickly_are_all_there(served):
    visitor = Visitor(served.url)
    visitor.act("example", number=0)
    for k in range(6):
        visitor.join("act", event_data={"kind": "box", "box": [0, 0, 0.1 + 0.1 * k, 0.5]})
    visitor.listen(6)
    assert len(visitor.act("undo")["regions"]) == 6 + 6 - 1


def test_two_people_at_once_get_their_own(served, writer):
    def visit(number):
        visitor = Visitor(served.url)
        visitor.act("example", number=number)
        for _ in range(3):
            end = visitor.send("click", "describe", ["fixed", 8, 0.8])[-1][1]["props"]["captions"]
        file = visitor.send("click", "save-coco")[-1][0]["props"]["file"]
        return end["texts"], json.loads(base64.b64decode(file["data"]))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(visit, [0, 1, 2, 3]))
    for number, (texts, data) in enumerate(found):
        image, masks = page.example(number)
        *_, end = follow(writer, image, parse_regions(masks, *image.size), settings_of("fixed", 8, 0.8))
        assert texts == [caption.text for caption in end.captions] == [row["caption"] for row in data["annotations"]]
        assert data["images"][0]["file_name"] == f"example_{number + 1}.png"
        assert [row["area"] for row in data["annotations"]] == [int(mask.sum()) for mask in masks]


@pytest.mark.parametrize(
    "path",
    [
        *("file=/etc/passwd", "file=pyproject.toml", "file/etc/passwd", "file=http://127.0.0.1/", "proxy=http://a.b/"),
        *("upload", "component_server", "process_recording", "run/predict", "call/act", "api/act", "stream/a"),
        *("runs", "vibe-edit", "profiling/traces", "deep_link", "openapi.json", "upload_progress"),
    ],
)
def test_routes_that_are_not_needed_are_closed(served, path):
    for method in ("GET", "POST"):
        answer = httpx.request(method, f"{served.url}/gradio_api/{path}", trust_env=False)
        assert (answer.status_code, answer.text) == (404, "This page has no such route.")


def test_no_file_of_the_server_is_readable(served):
    for path in (
        *("/file=/etc/passwd", "/etc/passwd", "/docs", "/openapi.json", "/monitoring", "/custom_component/a/b/c/d"),
        *("/assets/../../../../../../etc/passwd", "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/blocks.py"),
        *("/static/..%2f..%2f..%2f..%2f..%2fetc%2fpasswd", "/svelte/../routes.py"),
    ):
        with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as line:
            line.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda line=line: line.recv(65536), b""))
        assert re.match(rb"HTTP/1\.1 40[034]", answer), (path, answer[:80])
        assert b"root:" not in answer and b"import " not in answer


def test_large_requests_are_cut_off(served):
    route = f"{served.url}/gradio_api/queue/join"

    def chunks():
        for _ in range(100):
            yield bytes(2**20)

    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as line:
        head = f"POST /gradio_api/queue/join HTTP/1.1\r\nHost: a\r\nContent-Length: {10**10}\r\n\r\n"
        line.sendall(head.encode())
        assert b"413" in line.recv(100).split(b"\r\n")[0]
    try:
        status = httpx.post(route, content=chunks(), trust_env=False, timeout=60).status_code
    except httpx.TransportError:  # cut off while it was still sending
        status = 413
    assert status == 413


def test_an_image_as_large_as_is_allowed_arrives(served):
    noise = np.random.default_rng(0).integers(0, 256, (2500, 2700, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(noise), "BMP")
    assert 19 * 2**20 < len(data) < limits.MAX_BYTES
    assert Visitor(served.url).act("image", **sent("a.bmp", data))["size"] == [1000, 926]


def test_the_page_needs_nothing_from_elsewhere(served):
    answer = httpx.get(served.url, trust_env=False)
    policy = answer.headers["content-security-policy"]
    assert "http" not in policy and policy.startswith("default-src 'self'")
    assert not re.search(r'(?:src|href)="(?:https?:)?//', answer.text)
    assert 'analytics_enabled":false' in answer.text
    script = httpx.get(f"{served.url}/board/board.js", trust_env=False)
    assert script.headers["cache-control"] == "no-cache" and "javascript" in script.headers["content-type"]
    config = httpx.get(f"{served.url}/config", trust_env=False).text
    assert str(Path(page.__file__).parents[3]) not in config + answer.text  # no paths of this machine
    assert httpx.get(f"{served.url}/gradio_api/info", trust_env=False).json()["named_endpoints"] == {}


# ---------------------------------------------------------------- the command


def command(*arguments):
    return CliRunner().invoke(app, ["demo", "--port", "0", *map(str, arguments)])


def test_wrong_calls_are_told_in_one_line(tmp_path, monkeypatch, no_proxy):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, message in (
            (["--port", taken.getsockname()[1]], "cannot be listened on"),
            (["--port", 70000, "--model", tmp_path / "none"], "cannot be listened on"),  # before anything is loaded
            (["--max-new-tokens", 0], "--max-new-tokens must be a positive integer"),
            (["--model", tmp_path / "none"], "none"),
            (["--sam", tmp_path / "none"], "none"),
            (["--server", "127.0.0.1:1"], "must start with http"),
        ):
            result = command(*arguments)
            assert result.exit_code == 2 and message in result.stderr, (arguments, result.output, result.stderr)
            assert result.stderr.count("\n") == 1
    result = command("--server", "http://127.0.0.1:1")
    assert result.exit_code == 1 and "does not answer" in result.stderr
    monkeypatch.setitem(sys.modules, "pdlm_hf.demo.page", None)
    result = command()
    assert result.exit_code == 2 and 'pip install "perceptiondlm[demo]"' in result.stderr


def test_it_listens_on_this_machine_only_and_ends_with_ctrl_c():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "pdlm_hf.cli.main", "demo", "--port", "0"]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[2])
    try:
        url = re.match(r"Open (http://127\.0\.0\.1:\d+) ", process.stdout.readline())[1]
        for _ in range(200):
            try:
                assert "PerceptionDLM" in httpx.get(url, trust_env=False).text
                break
            except httpx.TransportError:
                time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()


def test_the_page_says_what_the_checkpoint_knows(monkeypatch):
    """Above the upload. Checkpoints can be chosen by those who could start the page themselves."""
    pages = []

    def serve(page, host, port, started):
        pages.append({block.elem_id: block for block in page.blocks.values() if getattr(block, "elem_id", None)})

    monkeypatch.setattr("pdlm_hf.demo.page.serve", serve)
    for arguments in ([], ["--model", str(CHECKPOINT)], ["--host", "0.0.0.0"]):
        assert command(*arguments).exit_code == 0
    knows = "The embedded checkpoint knows drawn shapes only; for photographs"
    assert [str(blocks["note"].value) for blocks in pages] == [
        f"{knows} choose another checkpoint on the right, such as MSALab/PerceptionDLM.",
        f"Captions are written by {CHECKPOINT}.",
        f"{knows} start with --model MSALab/PerceptionDLM.",
    ]
    assert ["checkpoint" in blocks for blocks in pages] == [True, True, False]
    assert not any(blocks["speed"].open or blocks["attributes"].open for blocks in pages)
