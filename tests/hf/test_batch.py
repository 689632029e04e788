"""pdlm batch: what is captioned, what is listed, and that a run goes on after any stop."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from region_server import RegionCaptionServer, captions_of
from tiny import make_image
from typer.testing import CliRunner

from pdlm_hf import RegionCaption, RegionCaptioner
from pdlm_hf.batch.dataset import open_data
from pdlm_hf.batch.engines import ImageEngine, LocalEngine, Outcome, prefetch
from pdlm_hf.batch.run import BatchFiles, BatchProgress, Counts, parse_shard, run_batch
from pdlm_hf.captioning.captioner import PreparedBatch
from pdlm_hf.cli.main import app
from pdlm_hf.errors_pdlm import DataError, SettingError
from pdlm_hf.regions.files import read_rows
from pdlm_hf.regions.hints import load_pair
from pdlm_hf.regions.region import Region

ROOT = Path(__file__).parents[2]
SETTINGS = {"model": "counter"}


def write_coco(folder, count=5, regions=3):
    """Noise images of two shapes with rectangular regions: RLE, polygon, box in turn."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for k in range(count):
        image, masks = make_image(k, 104 if k % 2 else 64, 64, regions)
        Image.fromarray(image).save(folder / "images" / f"{k}.png")
        images.append({"id": k, "file_name": f"{k}.png", "width": image.shape[1], "height": image.shape[0]})
        for n, mask in enumerate(masks):
            region = Region(0, mask)
            x, y, w, h = region.bbox
            shape = [
                {"segmentation": region.segmentation},
                {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]},
                {"bbox": [x, y, w, h]},
            ][n % 3]
            annotations.append({"id": 10 * k + n, "image_id": k, "category_id": 1, **shape})
    data = {"info": {"year": 2026}, "images": images, "annotations": annotations, "categories": [{"id": 1}]}
    (folder / "coco.json").write_text(json.dumps(data))
    return data


def change(folder, edit):
    """Edit the COCO file."""
    data = json.loads((folder / "coco.json").read_text())
    edit(data)
    (folder / "coco.json").write_text(json.dumps(data))


class Counter(ImageEngine):
    """An engine that says how many pixels a region has; after some images it stops."""

    ahead = 2

    def __init__(self, stop_after=None, empty=False):
        self.stop_after, self.empty, self.seen = stop_after, empty, []

    def run(self, works):
        for work in works:
            if len(self.seen) == self.stop_after:
                raise OSError("stopped")
            self.seen.append(work.entry.file_name)
            said = [RegionCaption("" if self.empty else f"{r.mask.sum()} pixels", 0.25) for r in work.regions]
            yield Outcome(work, work.regions, said)


def caption_all(folder, out="out.jsonl", engine=None, shard=None, data="coco.json", settings=SETTINGS):
    engine = engine or Counter()
    files = BatchFiles(folder / out, settings, shard)
    counts = run_batch(open_data(folder / data, folder / "images"), lambda: engine, files, shard)
    return counts, list(read_rows(files.out))


def regions_of(pairs):
    """The regions of what a captioner gets: prepared, or pairs of images and regions."""
    if isinstance(pairs, PreparedBatch):
        return pairs.regions
    return [load_pair(image, regions)[1] for image, regions in pairs]


def sizes_of(pairs):
    return [regions[0].mask.shape[::-1] for regions in regions_of(pairs)]


def faults_of(folder, name="out.faults.jsonl"):
    return list(read_rows(folder / name))


# ---------------------------------------------------------------- what is written


def test_rows_and_coco(tmp_path):
    data = write_coco(tmp_path)
    counts, rows = caption_all(tmp_path)
    assert (counts.images, counts.regions, counts.before, counts.whole) == (5, 15, 0, True)
    fields = ["image_id", "annotation_id", "file_name", "caption", "score", "bbox", "segmentation"]
    assert all(list(row) == fields for row in rows)
    assert [(row["image_id"], row["annotation_id"]) for row in rows] == [
        (a["image_id"], a["id"]) for a in data["annotations"]
    ]
    areas = [make_image(0, 64, 64, 3)[1][n].sum() for n in range(3)]
    assert [row["caption"] for row in rows[:3]] == [f"{area} pixels" for area in areas]
    assert {row["score"] for row in rows} == {0.25} and rows[2]["bbox"] == data["annotations"][2]["bbox"]
    written = json.loads((tmp_path / "out.coco.json").read_text())
    said = {(row["image_id"], row["annotation_id"]): row["caption"] for row in rows}
    expected = [{**a, "caption": said[a["image_id"], a["id"]], "score": 0.25} for a in data["annotations"]]
    assert written == {**data, "annotations": expected}
    assert not (tmp_path / "out.faults.jsonl").exists()


def test_captions_are_the_captioners(tmp_path, isolated_model, processor):
    """Batched by size, and still those of one image at a time."""
    write_coco(tmp_path, 5, 3)
    captioner = RegionCaptioner(isolated_model, processor)
    settings = {"max_new_tokens": 5, "max_denoising_steps": 3}
    batches = []
    generate = captioner.generate

    def noting(pairs, *args, **kwargs):
        batches.append(sizes_of(pairs))
        return generate(pairs, *args, **kwargs)

    captioner.generate = noting
    _, rows = caption_all(tmp_path, engine=LocalEngine(captioner, 2, **settings))
    captioner.generate = generate
    assert batches[1:] == [[(104, 64)] * 2, [(64, 64)] * 2, [(64, 64)]]  # the first is the trial
    for k in range(5):
        image = tmp_path / "images" / f"{k}.png"
        own = [row for row in rows if row["image_id"] == k]
        found = captioner.caption(image, [row["segmentation"] for row in own], **settings)
        assert [row["caption"] for row in own] == [caption.text for caption in found]
        assert [row["score"] for row in own] == pytest.approx([caption.score for caption in found], abs=1e-4)


def test_an_image_with_very_many_regions_goes_in_parts(tmp_path, isolated_model, processor):
    image, _ = make_image(0, 64, 104)
    (tmp_path / "images").mkdir()
    Image.fromarray(image).save(tmp_path / "images" / "a.png")
    annotations = [{"id": k, "image_id": 1, "bbox": [k, 2 * k, 20, 15]} for k in range(29)]
    data = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": annotations}
    (tmp_path / "coco.json").write_text(json.dumps(data))
    captioner = RegionCaptioner(isolated_model, processor)
    settings = {"max_new_tokens": 3, "max_denoising_steps": 2}
    sizes = []
    generate = captioner.generate

    def noting(pairs, *args, **kwargs):
        sizes.append([len(regions) for regions in regions_of(pairs)])
        return generate(pairs, *args, **kwargs)

    captioner.generate = noting
    counts, rows = caption_all(tmp_path, engine=LocalEngine(captioner, 2, **settings))
    captioner.generate = generate
    limit = isolated_model.config.num_region_prompts
    assert sizes[1:] == [[2 * limit]] * (29 // (2 * limit)) + [[29 % (2 * limit)]]
    assert (counts.images, counts.regions) == (1, 29)
    found = captioner.caption(image, [a["bbox"] for a in annotations], **settings)
    assert [row["caption"] for row in rows] == [caption.text for caption in found]


def test_a_batch_that_fails_is_halved(tmp_path, isolated_model, processor, monkeypatch):
    write_coco(tmp_path, 4, 1)
    captioner = RegionCaptioner(isolated_model, processor)
    generate, sizes = captioner.generate, []

    def tight(pairs, *args, **kwargs):
        sizes.append(len(sizes_of(pairs)))
        if (104, 64) in sizes_of(pairs) and sizes[-1] > 1:
            raise ValueError("too much")
        if len(sizes) > 1 and regions_of(pairs)[0][0].id == 30:
            raise ValueError("this one never")
        return generate(pairs, *args, **kwargs)

    captioner.generate = tight
    engine = LocalEngine(captioner, 4, max_new_tokens=3, max_denoising_steps=2)
    counts, rows = caption_all(tmp_path, engine=engine)
    assert sizes == [1, 4, 2, 1, 1, 2]
    assert (counts.regions, counts.failed, counts.whole) == (3, 1, False)
    assert faults_of(tmp_path) == [
        {"image_id": 3, "annotation_id": 30, "file_name": "3.png", "reason": "this one never"}
    ]
    # tried again, and found
    captioner.generate = generate
    counts, rows = caption_all(tmp_path, engine=engine)
    assert (counts.before, counts.regions, counts.whole) == (3, 1, True) and len(rows) == 4
    assert not (tmp_path / "out.faults.jsonl").exists()


def test_a_batch_is_prepared_while_the_model_computes(tmp_path, isolated_model, processor, monkeypatch):
    """The trace: no batch but the last one is captioned before the next one is begun. With the same captions."""
    write_coco(tmp_path, 3)
    captioner, settings = RegionCaptioner(isolated_model, processor), {"max_new_tokens": 5, "max_denoising_steps": 3}
    engine, begun, trace = LocalEngine(captioner, 1, **settings), [threading.Event() for _ in range(3)], []
    prepare, generate = captioner.prepare, captioner.generate

    def prepared(pairs, question):
        place = sum(event.is_set() for event in begun)
        begun[place].set()
        trace.append(("prepare", place, threading.current_thread() is threading.main_thread()))
        return prepare(pairs, question)

    def generated(pairs, question, **own):
        place = sum(kind == "generate" for kind, *_ in trace)
        assert place == 2 or begun[place + 1].wait(60)
        trace.append(("generate", place, threading.current_thread() is threading.main_thread()))
        return generate(pairs, question, **own)

    monkeypatch.setattr(captioner, "prepare", prepared)
    monkeypatch.setattr(captioner, "generate", generated)
    _, rows = caption_all(tmp_path, engine=engine)
    monkeypatch.undo()
    for k in range(3):
        own = [row for row in rows if row["image_id"] == k]
        image = tmp_path / "images" / f"{k}.png"
        found = captioner.caption(image, [row["segmentation"] for row in own], **settings)
        assert [row["caption"] for row in own] == [caption.text for caption in found]
    assert {(kind, main) for kind, _, main in trace} == {("prepare", False), ("generate", True)}


def test_wrong_settings_are_found_before_the_work(isolated_model, processor):
    captioner = RegionCaptioner(isolated_model, processor)
    with pytest.raises(ValueError, match="max_new_tokens"):
        LocalEngine(captioner, 8, max_new_tokens=0)
    with pytest.raises(ValueError, match="batch_size"):
        LocalEngine(captioner, 0)
    with pytest.raises(ValueError, match="special tokens"):
        LocalEngine(captioner, 1, "<|eot_id|>", max_new_tokens=2)


# ---------------------------------------------------------------- what cannot be read


def test_bad_images_and_regions_are_listed_and_the_rest_goes_on(tmp_path):
    write_coco(tmp_path)

    def damage(data):
        data["images"][3]["file_name"] = None
        data["annotations"][0]["segmentation"]["counts"] = "x"
        data["annotations"][2]["bbox"] = [500, 1, 3, 3]
        data["annotations"] += [
            {"id": 90, "image_id": 77, "bbox": [0, 0, 3, 3]},
            {"id": 20, "image_id": 2, "bbox": [0, 0, 3, 3]},
            {"image_id": 2, "bbox": [0, 0, 3, 3]},
            {"id": 91, "image_id": 4},
            7,
        ]

    change(tmp_path, damage)
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    counts, rows = caption_all(tmp_path)
    assert (counts.bad_images, counts.bad_regions, counts.regions) == (2, 7, 7)
    found = {(f["image_id"], f["annotation_id"]): f["reason"] for f in faults_of(tmp_path)}
    assert "is damaged" in found[0, 0] and "lies outside" in found[0, 2]
    assert "cannot be opened as an image" in found[1, None]
    assert "annotations[15].image_id (id 90): got 77, expected the id of one of `images`" == found[77, 90]
    assert "annotations[16].id (image 2): got 20, expected an id that no earlier entry has" == found[2, 20]
    assert "annotations[19].image_id: got 7, expected a number or a text" == found[None, None]
    assert "images[3].file_name (id 3): got None, expected the name" in found[3, None]
    assert "needs `segmentation`" in found[4, 91]
    # repaired: only what is missing is written
    change(tmp_path, lambda data: data["images"][3].update(file_name="3.png"))
    engine = Counter()
    counts, rows = caption_all(tmp_path, engine=engine)
    assert engine.seen == ["3.png"] and counts.regions == 3 and counts.before == 7
    assert len(rows) == len({(r["image_id"], r["annotation_id"]) for r in rows}) == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "perhaps cut short"),
        ("[]", "expected a COCO file"),
        ('{"images": [{"id": [1]}], "annotations": []}', "images[0].id: got [1], expected a number or a text"),
        (
            '{"images": [{"id": 1}, {"id": 1}], "annotations": []}',
            "images[1].id: got 1, expected an id that no earlier",
        ),
        ('{"images": [], "annotations": []}', "no image"),
        (
            '{"images": [{"id": 1, "file_name": "x.png"}], "annotations": [{"id": 1, "image_id": 1}]}',
            "has none of the 1 images",
        ),
    ],
)
def test_a_file_that_is_no_data_set(tmp_path, content, message):
    if content is not None:
        (tmp_path / "coco.json").write_text(content)
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError) as error:
        open_data(tmp_path / "coco.json", tmp_path / "images")
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["cvat.xml", "via.json", "regions.csv"])
def test_a_file_of_several_images_in_another_format(tmp_path, name):
    """Its images go into a folder, a file for each; it is not taken for damaged JSON."""
    project = {"_via_img_metadata": {"a": {"filename": "a.png", "size": -1, "regions": []}}}
    (tmp_path / name).write_text(json.dumps(project) if name.endswith("json") else "<annotations/>")
    with pytest.raises(DataError, match=r"expected a COCO file.* from a folder with one file for each.* export them"):
        open_data(tmp_path / name, tmp_path)


def test_empty_captions_are_told_also_by_the_next_run(tmp_path):
    write_coco(tmp_path, 1)
    for _ in range(2):
        counts, _ = caption_all(tmp_path, engine=Counter(empty=True))
        assert counts.empty == 3 and not counts.whole


# ---------------------------------------------------------------- folders


def test_folder_of_images_with_masks(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    for folder in (images / "a", masks / "a" / "2"):
        folder.mkdir(parents=True)
    pixels, (first, second) = make_image(0, 60, 40)
    for name in ("a/1.jpg", "a/2.png", "3.png", "4.png", "5.png", "6.png"):
        Image.fromarray(pixels).save(images / name)
    Image.fromarray(first * np.uint8(1) + second * np.uint8(2)).save(masks / "a" / "1.png")
    Image.fromarray(first).save(masks / "a" / "2" / "left.png")
    Image.fromarray(second).save(masks / "a" / "2" / "right.png")
    (masks / "3.txt").write_text("0 0.5 0.5 0.2 0.5\n")
    (masks / "4.json").write_text(json.dumps([{"id": "x", "bbox": [0, 0, 5, 4]}, {"bbox": [0, 0, 2, 1]}]))
    (masks / "5.json").write_text("[")
    counts, rows = caption_all(tmp_path, data="masks")
    found = {row["annotation_id"]: row["caption"] for row in rows}
    both, alone = (first & second).sum(), (first & ~second).sum()
    assert found == {
        "3.png#0": "240 pixels",
        "4.png#x": "20 pixels",
        "4.png#1": "2 pixels",
        "a/1.jpg#1": f"{alone} pixels",
        "a/1.jpg#2": f"{(second & ~first).sum()} pixels",
        "a/2.png#left": f"{first.sum()} pixels",
        "a/2.png#right": f"{second.sum()} pixels",
    } | ({"a/1.jpg#3": f"{both} pixels"} if both else {})
    assert (counts.bad_images, counts.regions) == (1, len(found))
    assert "perhaps cut short" in faults_of(tmp_path)[0]["reason"]
    data = json.loads((tmp_path / "out.coco.json").read_text())
    assert {image["file_name"] for image in data["images"]} == {"3.png", "4.png", "a/1.jpg", "a/2.png"}
    assert all(image["width"] == 60 and image["height"] == 40 for image in data["images"])
    assert {a["id"]: a["caption"] for a in data["annotations"]} == found
    assert open_data(tmp_path / "out.coco.json", images).entries  # and is a data set again
    engine = Counter()
    counts, _ = caption_all(tmp_path, data="masks", engine=engine)
    assert engine.seen == [] and counts.before == len(found)


def folder_of_images(tmp_path, *names, size=(60, 40)):
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "white").save(tmp_path / "images" / name)


def test_files_of_the_system_are_passed_over(tmp_path, caplog):
    """Folders as macOS, Windows and notebooks leave them, and SAM's table beside its masks."""
    folder_of_images(tmp_path, "a.png", ".ipynb_checkpoints/a.png", "b.png", "__MACOSX/a.png")
    for name in ("._a.png", ".DS_Store", "Thumbs.db"):
        (tmp_path / "images" / name).write_bytes(b"\0")
    masks = tmp_path / "masks" / "a"
    masks.mkdir(parents=True)
    Image.fromarray(make_image(0, 60, 40)[1][0]).save(masks / "7.png")
    for name in ("metadata.csv", ".DS_Store", "._7.png", "desktop.ini"):
        (masks / name).write_text("id,area\n")
    (tmp_path / "masks" / "classes.txt").write_text("cat\n")
    (tmp_path / "masks" / "b.txt").write_text("0 0.5 0.5 0.2 0.5\n")
    (tmp_path / "masks" / "c.txt").write_text("0 0.5 0.5 0.2 0.5\n")
    counts, rows = caption_all(tmp_path, data="masks")
    assert counts.whole and [row["annotation_id"] for row in rows] == ["a.png#7", "b.png#0"]
    assert "1 file of regions without an image" in caplog.text and "c.txt for example" in caplog.text


def test_paths_of_windows_are_understood(tmp_path):
    folder_of_images(tmp_path, "a/1.png", "2.png")
    names = ["a\\1.png", "D:\\work\\2.png", "a\\3.png"]
    images = [{"id": k, "file_name": name, "width": 60, "height": 40} for k, name in enumerate(names)]
    annotations = [{"id": k, "image_id": k, "bbox": [1, 2, 5, 4]} for k in range(3)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    counts, rows = caption_all(tmp_path)
    assert [row["file_name"] for row in rows] == ["a/1.png", "2.png"]
    assert counts.bad_images == 1 and "no such file" in faults_of(tmp_path)[0]["reason"]


def test_boxes_that_are_corners_are_faults(tmp_path):
    """One leaves its image as x, y, width, height; the others of the same file would be read wrongly in silence."""
    folder_of_images(tmp_path, "a.png")
    boxes = [[10, 5, 20, 15], [30, 20, 55, 38], [1, 1, 9, 9]]

    def write(boxes):
        data = {
            "images": [{"id": 1, "file_name": "a.png", "width": 60, "height": 40}],
            "annotations": [{"id": k, "image_id": 1, "bbox": box} for k, box in enumerate(boxes)],
        }
        (tmp_path / "coco.json").write_text(json.dumps(data))

    write(boxes)
    counts, _ = caption_all(tmp_path)
    assert (counts.regions, counts.bad_regions) == (0, 3)
    assert (
        "annotations[2].bbox (id 2, image 1): got [1, 1, 9, 9], expected [x, y, width, height]; boxes of this"
        in (faults_of(tmp_path)[2]["reason"])
    )
    write([[x, y, x1 - x, y1 - y] for x, y, x1, y1 in boxes])
    counts, rows = caption_all(tmp_path)
    assert counts.whole and [row["bbox"] for row in rows] == [[10, 5, 10, 10], [30, 20, 25, 18], [1, 1, 8, 8]]


def test_categories_with_the_same_id_are_a_fault(tmp_path):
    data = write_coco(tmp_path, 1)
    change(tmp_path, lambda data: data.update(categories=[{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]))
    counts, rows = caption_all(tmp_path)
    reason = "categories[1].id: got 1, expected an id that no earlier entry has"
    assert faults_of(tmp_path) == [{"image_id": None, "annotation_id": None, "file_name": None, "reason": reason}]
    assert not counts.whole and len(rows) == len(data["annotations"])


def test_panoptic_file(tmp_path):
    folder_of_images(tmp_path, "a.png")
    labels = np.zeros((40, 60, 3), np.uint8)
    labels[5:15, 10:30] = (7, 1, 0)
    labels[20:30, 10:20] = (9, 0, 0)
    segments = [{"id": 263, "category_id": 1}, {"id": 9, "category_id": 2}, {"id": 5, "category_id": 2}]
    data = {
        "images": [{"id": 1, "file_name": "a.png", "width": 60, "height": 40}],
        "annotations": [{"image_id": 1, "file_name": "a_pan.png", "segments_info": segments}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "sky"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(data))
    counts, _ = caption_all(tmp_path)
    reason = faults_of(tmp_path)[0]["reason"]
    assert counts.bad_images == 1 and "is a COCO panoptic file" in reason and "ln -s" in reason
    (tmp_path / "coco").mkdir()
    Image.fromarray(labels).save(tmp_path / "coco" / "a_pan.png")
    counts, rows = caption_all(tmp_path)
    assert counts.whole and {row["annotation_id"]: row["caption"] for row in rows} == {
        263: "200 pixels",
        9: "100 pixels",
    }
    written = json.loads((tmp_path / "out.coco.json").read_text())["annotations"][0]["segments_info"]
    assert [part.get("caption") for part in written] == ["200 pixels", "100 pixels", None]


def test_the_format_of_a_folder(tmp_path):
    folder_of_images(tmp_path, "a.png", "b.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 12 5 20 30")
    (tmp_path / "labels" / "b.txt").write_text("0 0.2 0.2 0.9 0.9")
    counts, _ = caption_all(tmp_path, data="labels")
    reasons = [fault["reason"] for fault in faults_of(tmp_path)]
    assert counts.bad_images == 2 and all("line 1" in reason and "--format" in reason for reason in reasons)
    with pytest.raises(ValueError, match="--format nothing: expected one of coco"):
        open_data(tmp_path / "labels", tmp_path / "images", "nothing")
    found = open_data(tmp_path / "labels", tmp_path / "images", "pixel-corners")
    assert found.entries[0].read() == [("a.png#0", {"id": 0, "category": "0", "bbox": [12, 5, 8, 25]})]
    (tmp_path / "coco.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(ValueError, match="--format coco: is about the files of a folder"):
        open_data(tmp_path / "coco.json", tmp_path / "images", "coco")


def test_what_the_files_of_a_folder_state_is_compared(tmp_path):
    folder_of_images(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "labels").mkdir()
    shape = {"label": "x", "shape_type": "rectangle", "points": [[1, 2], [6, 6]]}
    for stem, name, width in (("a", "a.png", 60), ("b", "other.png", 60), ("c", "c.png", 61)):
        content = {"imagePath": name, "imageWidth": width, "imageHeight": 40, "shapes": [shape]}
        (tmp_path / "labels" / f"{stem}.json").write_text(json.dumps(content))
    counts, rows = caption_all(tmp_path, data="labels")
    assert [row["bbox"] for row in rows] == [[1, 2, 5, 4]]
    reasons = [fault["reason"] for fault in faults_of(tmp_path)]
    assert "is about the image other.png, not b.png" in reasons[0]
    assert "states an image of 61 x 40 pixels, c.png has 60 x 40" in reasons[1]


# ---------------------------------------------------------------- stops


def test_a_stopped_run_goes_on(tmp_path):
    write_coco(tmp_path)
    _, whole = caption_all(tmp_path, "whole.jsonl")
    with pytest.raises(OSError, match="stopped"):
        caption_all(tmp_path, engine=Counter(stop_after=2))
    with open(tmp_path / "out.jsonl", "ab") as file:
        file.write(b'{"image_id": 2, "annot')  # killed while it wrote
    engine = Counter()
    counts, rows = caption_all(tmp_path, engine=engine)
    assert engine.seen == ["2.png", "3.png", "4.png"] and (counts.before, counts.regions) == (6, 9)
    assert rows == whole
    assert (tmp_path / "out.coco.json").read_text() == (tmp_path / "whole.coco.json").read_text()


def test_an_image_that_was_cut_in_two_is_captioned_whole_and_written_once(tmp_path):
    write_coco(tmp_path)
    _, whole = caption_all(tmp_path)
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(lines[:4]))  # one of three regions of image 1
    counts, rows = caption_all(tmp_path)
    assert counts.regions == 11 and rows == whole


def test_kill_9_loses_the_batch_in_flight_only(tmp_path, tiny_checkpoint):
    write_coco(tmp_path, 12, 2)
    arguments = f"batch coco.json --images images --model {tiny_checkpoint} --batch-size 2 --max-new-tokens 24"
    command = [sys.executable, "-m", "pdlm_hf.cli.main", *arguments.split(), "--steps", "24", "--out", "out.jsonl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    out = tmp_path / "out.jsonl"
    while run.poll() is None and (not out.exists() or out.stat().st_size == 0):
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    before = list(read_rows(out))
    assert 0 < len(before) < 24
    arguments = ["--model", str(tiny_checkpoint), "--batch-size", "2", "--max-new-tokens", "24", "--steps", "24"]
    where = [str(tmp_path / "coco.json"), "--images", str(tmp_path / "images"), "--out", str(out)]
    result = CliRunner().invoke(app, ["batch", *where, *arguments])
    assert result.exit_code in (0, 1), result.output  # random weights may say nothing
    after = list(read_rows(out))
    assert after[: len(before)] == before
    assert len({(row["image_id"], row["annotation_id"]) for row in after}) == len(after) == 24
    where[-1] = str(tmp_path / "whole.jsonl")
    CliRunner().invoke(app, ["batch", *where, *arguments])

    def by_key(rows):
        return {row["annotation_id"]: row["caption"] for row in rows}

    assert by_key(after) == by_key(read_rows(tmp_path / "whole.jsonl"))


def test_disk_full_stops_cleanly_and_goes_on(tmp_path):
    """A limit on the size of files stands for the disk: the write fails in the middle, as on a full disk."""
    write_coco(tmp_path, 6)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(OSError, match=r"\[Errno 27\].*out.jsonl"):
            caption_all(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    data = (tmp_path / "out.jsonl").read_bytes()
    assert data.endswith(b"}\n") and 0 < len(data) <= 1500
    before = len(data.splitlines())
    counts, rows = caption_all(tmp_path)
    assert counts.before == before and counts.whole and len(rows) == 18


def test_output_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    write_coco(tmp_path, 1)
    monkeypatch.setattr(RegionCaptioner, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    for out, message in (
        ("/proc/out.jsonl", "/proc/out"),
        (str(tmp_path / "nowhere" / "out.jsonl"), "there is no folder"),
        (str(tmp_path / "out.json"), "must end with .jsonl"),
        ("out.jsonl --batch-size 0", "--batch-size must be a positive integer, got 0"),
        ("out.jsonl --steps 0", "--steps must be a positive integer, got 0"),
        ("out.jsonl --shard 3/2", "--shard 3/2: expected i/n"),
        ("out.jsonl --server http://127.0.0.1:1 --fast", "--fast is not served"),
    ):
        arguments = ["batch", str(tmp_path / "coco.json"), "--images", str(tmp_path / "images"), "--out", *out.split()]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("pdlm: ")


# ---------------------------------------------------------------- settings, parts


def test_a_run_goes_on_with_the_same_settings_and_data_only(tmp_path):
    write_coco(tmp_path)
    caption_all(tmp_path)
    with pytest.raises(ValueError, match="model was 'counter', now 'other'"):
        caption_all(tmp_path, settings={"model": "other"})
    change(tmp_path, lambda data: data["images"][0].update(file_name="1.png"))
    with pytest.raises(ValueError, match="begun with another data set: the image 0 was 0.png, now 1.png"):
        caption_all(tmp_path)


def test_parts_together_are_the_whole(tmp_path):
    write_coco(tmp_path)
    _, whole = caption_all(tmp_path, "whole.jsonl")
    seen = []
    for number in (1, 2, 3):
        engine = Counter()
        caption_all(tmp_path, engine=engine, shard=(number, 3))
        seen.append(engine.seen)
    assert seen == [["0.png", "3.png"], ["1.png", "4.png"], ["2.png"]]
    assert not (tmp_path / "out.jsonl").exists() and not list(tmp_path.glob("out.*.coco.json"))
    (tmp_path / "out.2-of-3.jsonl").write_bytes(
        b"".join((tmp_path / "out.2-of-3.jsonl").read_bytes().splitlines(keepends=True)[:3])
    )
    engine = Counter()
    counts, rows = caption_all(tmp_path, engine=engine)
    assert engine.seen == ["4.png"] and counts.before == 12
    assert sorted(rows, key=lambda row: row["annotation_id"]) == whole
    assert (tmp_path / "out.coco.json").read_text() == (tmp_path / "whole.coco.json").read_text()


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3"])
def test_parse_shard(text):
    assert parse_shard("2/3") == (2, 3) and parse_shard(None) is None
    with pytest.raises(ValueError, match="expected i/n"):
        parse_shard(text)


def test_progress(capsys):
    from rich.console import Console

    console = Console(width=120, force_terminal=True, no_color=True)
    with BatchProgress(4, console) as progress:
        progress(2, Counts(images=2, regions=6, bad_regions=1, seconds=4.0))
    said = capsys.readouterr().out
    assert "2/4 images" in said and "0.50 images/s, 1.50 regions/s" in said and "1 faults" in said
    line = str(Counts(2, 6, 3, 1, 0, 0, 2, 4.0))
    assert line == (
        "6 regions of 2 images captioned (0.50 images/s, 1.50 regions/s); 3 regions captioned before; "
        "1 image cannot be read; 2 empty captions"
    )


def test_prefetch_keeps_the_order_and_does_not_run_away():
    started = []

    def items():
        for k in range(50):
            started.append(k)
            yield k

    found = prefetch(lambda k: k * k, items(), 4)
    assert [next(found) for _ in range(3)] == [0, 1, 4]
    assert len(started) <= 8
    found.close()
    assert list(prefetch(lambda k: k * k, range(5), 2)) == [0, 1, 4, 9, 16]


# ---------------------------------------------------------------- a server


def serve(folder, server, *arguments, code=0):
    where = [str(folder / "coco.json"), "--images", str(folder / "images"), "--out", str(folder / "out.jsonl")]
    result = CliRunner().invoke(app, ["batch", *where, "--server", server.url, *arguments])
    assert result.exit_code == code, (result.output, result.stderr)
    return result, list(read_rows(folder / "out.jsonl"))


@pytest.fixture
def near(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("pdlm_hf.client.server._BACKOFF", 0.001)


def test_an_image_of_another_size_and_one_with_odd_exif(tmp_path):
    """Regions of another size would lie elsewhere; EXIF that cannot be read costs nothing."""
    write_coco(tmp_path, 3)
    change(tmp_path, lambda data: data["images"][1].update(width=128, height=32))
    tags = b"II*\0\x08\0\0\0\x02\0" + b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + b"\x1a\x01\x02\0\x04\0\0\0abc\0"
    odd = tmp_path / "images" / "2.png"
    Image.open(odd).transpose(Image.Transpose.ROTATE_90).save(odd, exif=tags + b"\0\0\0\0")
    _, rows = caption_all(tmp_path)
    assert {row["image_id"] for row in rows} == {0, 2}
    (found,) = faults_of(tmp_path)
    assert found["image_id"] == 1
    assert "the data set says 128 x 32 pixels, the image has 104 x 64" in found["reason"]


def test_of_two_annotations_with_one_id_the_first_has_the_caption(tmp_path):
    data = write_coco(tmp_path, 1)
    twice = {**data["annotations"][1], "id": data["annotations"][0]["id"]}
    change(tmp_path, lambda data: data["annotations"].append(twice))
    whole = open_data(tmp_path / "coco.json", tmp_path / "images")
    rows = [{"image_id": 0, "annotation_id": twice["id"], "caption": "a", "score": 1.0}]
    said = [a.get("caption") for a in whole.with_captions(rows)["annotations"]]
    assert said == ["a", None, None, None]


def test_the_data_set_is_not_replaced(tmp_path):
    write_coco(tmp_path, 1)
    source = (tmp_path / "coco.json").rename(tmp_path / "mine.coco.json")
    with pytest.raises(SettingError, match="would replace the data set .*mine.coco.json; choose another name"):
        BatchFiles(tmp_path / "mine.jsonl", {}, source=source)
    assert sorted(path.name for path in tmp_path.glob("mine*")) == ["mine.coco.json"]


def test_attributes_that_an_annotation_has_already_stay(tmp_path):
    write_coco(tmp_path, 1)
    change(tmp_path, lambda data: data["annotations"][0].update(attributes={"occluded": True, "size": "?"}))
    whole = open_data(tmp_path / "coco.json", tmp_path / "images")
    value = {"value": "small", "probability": 1.0}
    rows = [
        {"image_id": 0, "annotation_id": a["id"], "caption": "a", "score": 1.0, "attributes": {"size": value}}
        for a in whole.coco["annotations"]
    ]
    first, *others = whole.with_captions(rows)["annotations"]
    assert first["attributes"] == {"occluded": True, "size": "small"}
    assert [a["attributes"] for a in others] == [{"size": "small"}] * len(others)


def test_server(tmp_path, near, monkeypatch):
    write_coco(tmp_path, 12)
    _, whole = caption_all(tmp_path, "whole.jsonl")
    image = Image.open(tmp_path / "images" / "1.png")
    exif = image.getexif()
    exif[0x0112] = 6  # turned: the server is sent what we see
    image.save(tmp_path / "images" / "1.png", exif=exif)
    change(tmp_path, lambda data: data["images"][1].update(width=64, height=104))
    change(tmp_path, lambda data: data["annotations"].__delitem__(slice(3, 6)))
    change(tmp_path, lambda data: data["annotations"].append({"id": 1, "image_id": 1, "bbox": [0, 0, 104, 104]}))
    monkeypatch.setenv("SERVER_KEY", "secret")
    faults = {3: 500, 4: b"<html>", 5: {"regions": []}, 6: {"regions": [{"id": 0}]}, 7: 429}

    def slow_and_bad(number, body):
        time.sleep(0.02)
        return faults.get(number)

    with RegionCaptionServer(slow_and_bad) as server:
        options = ["--question", "What?", "--steps", "4", "--concurrency", "6", "--key-env", "SERVER_KEY"]
        result, rows = serve(tmp_path, server, *options)
    assert {row["caption"] for row in rows if row["image_id"] == 1} == {f"{104 * 64} pixels"}
    rest = [row for row in rows if row["image_id"] != 1]
    said = {row["annotation_id"]: row["caption"] for row in whole}
    assert len(rest) == 33 and all(row["caption"] == said[row["annotation_id"]] for row in rest)
    assert {row["score"] for row in rows} == {0.5}
    assert server.most_at_a_time > 1 and server.keys == {"Bearer secret"}
    assert len(server.bodies) == 1 + 12 + len(faults)
    for body in server.bodies:
        sent = {name: body[name] for name in ("model", "question", "max_new_tokens", "max_denoising_steps")}
        assert sent == {"model": "served", "question": "What?", "max_new_tokens": 32, "max_denoising_steps": 4}
    assert "secret" not in "".join(path.read_text() for path in tmp_path.glob("out*")) + result.output


def test_rows_of_captions_that_were_cut_say_so(tmp_path, near):
    write_coco(tmp_path, 4, 3)

    def first_cut(number, body):
        answer = captions_of(body)
        answer["regions"][0]["truncated"] = True
        return answer

    with RegionCaptionServer(first_cut) as server:
        _, rows = serve(tmp_path, server)
    assert {row.get("truncated", False) for row in rows} == {True, False}
    first = {row["image_id"]: row for row in reversed(rows)}
    assert all(row["truncated"] for row in first.values())


def test_a_server_that_gives_up_and_one_that_refuses(tmp_path, near):
    write_coco(tmp_path, 30, 1)
    with RegionCaptionServer(lambda number, body: 400 if number in (2, 3) else None) as server:
        result, rows = serve(tmp_path, server, code=1)
    assert len(rows) == 28 and len(faults_of(tmp_path)) == 2
    assert "fault 400" in faults_of(tmp_path)[0]["reason"] and "2 regions failed" in result.stderr
    with RegionCaptionServer() as server:
        _, rows = serve(tmp_path, server)
    assert len(rows) == 30 and len(server.bodies) == 3
    (tmp_path / "out.jsonl").unlink()
    with RegionCaptionServer(lambda number, body: 400 if number > 4 else None) as server:
        result, rows = serve(tmp_path, server, code=1)
        assert "run again to resume" in result.stderr and len(rows) >= 4
    for fault, message in (
        (404, "does not know"),
        (401, "wants a key"),
        (400, "refuses even a small request: Error code: 400"),
    ):
        with RegionCaptionServer(lambda number, body, fault=fault: fault) as server:
            result, _ = serve(tmp_path, server, code=2)
            assert message in result.stderr and "Traceback" not in result.output
    with RegionCaptionServer(model="another") as server:
        result, _ = serve(tmp_path, server, code=2)
        assert "model was 'served', now 'another'" in result.stderr
        result, _ = serve(tmp_path, server, "--model", "served", code=2)
        assert "has no model 'served', but another" in result.stderr
    result, _ = serve(tmp_path, server, code=1)
    assert "does not answer: no connection" in result.stderr
    result, _ = serve(tmp_path, server, "--fast", code=2)
    assert "--fast is not served" in result.stderr


def test_a_request_has_at_most_60_regions(tmp_path, near):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (200, 100), "red").save(tmp_path / "images" / "a.jpg")
    annotations = [{"id": k, "image_id": 1, "bbox": [k, 0, 1 + k % 3, 9]} for k in range(130)]
    data = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": annotations}
    (tmp_path / "coco.json").write_text(json.dumps(data))
    with RegionCaptionServer() as server:
        _, rows = serve(tmp_path, server)
    assert sorted(len(body["regions"]) for body in server.bodies) == [1, 10, 60, 60]
    assert server.bodies[-1]["image"].startswith("data:image/jpeg;base64,")
    assert {row["annotation_id"]: row["caption"] for row in rows} == {
        k: f"{9 + 9 * (k % 3)} pixels" for k in range(130)
    }


# ---------------------------------------------------------------- damaged results, two runs at once


DAMAGED = [
    ({"caption": None}, "has None as `caption`, expected a text"),
    ({"image_id": [1]}, "has [1] as `image_id`, expected a number or a text"),
    ({"annotation_id": {"a": 1}}, "has {'a': 1} as `annotation_id`"),
    ({"file_name": ["0.png"]}, "has ['0.png'] as `file_name`, expected the name of an image"),
    ({"score": None}, "has None as `score`, expected a number from 0 to 1"),
    ({"segmentation": "x"}, "has 'x' as `segmentation`"),
    ("[1, 2]", "is not a JSON object"),
    ('{"caption": ', "is damaged ("),
    ("[" * 100_000, "is damaged ("),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_a_damaged_row_is_named_and_captioned_again(tmp_path, change, message):
    write_coco(tmp_path)
    _, rows = caption_all(tmp_path)
    out = tmp_path / "out.jsonl"
    lines = out.read_text().splitlines()
    lines[2] = change if isinstance(change, str) else json.dumps(rows[2] | change)
    out.write_text("\n".join(lines) + "\n")
    files = BatchFiles(out, SETTINGS)
    (said,) = files.damaged
    assert said.startswith(f"{out}: line 3 {message}")
    assert said.endswith("; moved to out.damaged.jsonl; its region is captioned again unless another line has it.")
    engine = Counter()
    counts = run_batch(open_data(tmp_path / "coco.json", tmp_path / "images"), lambda: engine, files)
    assert counts.whole and engine.seen == ["0.png"] and counts.regions == 1
    assert (tmp_path / "out.damaged.jsonl").read_text() == lines[2] + "\n"
    found = list(read_rows(out))
    by_id = lambda row: row["annotation_id"]  # noqa: E731
    assert sorted(found, key=by_id) == sorted(rows, key=by_id)
    again = BatchFiles(out, SETTINGS)
    assert again.damaged == []
    again.close()


def test_a_file_of_other_rows_is_not_taken_for_damaged(tmp_path):
    write_coco(tmp_path)
    caption_all(tmp_path)
    (tmp_path / "out.jsonl").write_text('{"image": "a.png", "regions": []}\n' * 2)
    with pytest.raises(DataError, match=r"has no row of `pdlm batch` \(line 1 has no `image_id`.*choose another file"):
        BatchFiles(tmp_path / "out.jsonl", SETTINGS)
    assert not (tmp_path / "out.damaged.jsonl").exists() and not (tmp_path / "out.lock").exists()


def test_damaged_rows_of_a_shard_are_left_out(tmp_path):
    write_coco(tmp_path)
    _, rows = caption_all(tmp_path, shard=(1, 2))
    part = tmp_path / "out.1-of-2.jsonl"
    lines = part.read_text().splitlines()
    lines[1] = "{}"
    part.write_text("\n".join(lines) + "\n")
    files = BatchFiles(tmp_path / "out.jsonl", SETTINGS)
    assert len(list(read_rows(files.out))) == len(rows) - 1 and part.read_text().splitlines() == lines
    assert [said.split(":", 1)[1] for said in files.damaged] == [
        " line 2 has no `image_id`, as rows of `pdlm batch` have; its region is captioned again unless another line "
        "has it."
    ]
    files.close()


def test_one_run_at_a_time(tmp_path):
    write_coco(tmp_path)
    files = BatchFiles(tmp_path / "out.jsonl", SETTINGS)
    holder = f"process {os.getpid()} on "
    with pytest.raises(
        SettingError, match=rf"out\.jsonl: {holder}.*, is writing it\. Wait until that run has ended, or"
    ):
        BatchFiles(tmp_path / "out.jsonl", SETTINGS)
    other = BatchFiles(tmp_path / "other.jsonl", SETTINGS)
    shard = BatchFiles(tmp_path / "out.jsonl", SETTINGS, (1, 2))  # has a file of its own
    for held in (other, shard):
        held.close()
    data = open_data(tmp_path / "coco.json", tmp_path / "images")
    assert run_batch(data, Counter, files).regions == 15
    assert files.closed and not (tmp_path / "out.lock").exists()
    assert run_batch(data, Counter, files).regions == 0  # locks anew
    with pytest.raises(OSError, match="stopped"):
        caption_all(tmp_path, "stopped.jsonl", Counter(stop_after=1))
    assert caption_all(tmp_path, "stopped.jsonl")[0].before == 3


def test_the_second_command_is_refused(tmp_path):
    write_coco(tmp_path)
    files = BatchFiles(tmp_path / "out.jsonl", SETTINGS)
    command = ["batch", tmp_path / "coco.json", "--images", tmp_path / "images", "--out", tmp_path / "out.jsonl"]
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert f"out.jsonl: process {os.getpid()} on " in result.stderr
    files.close()
