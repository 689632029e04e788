"""`pdlm batch FOLDER --everything`: from a folder of images to a COCO file of masks, boxes, captions and scores."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from tiny import make_image, tiny_sam
from typer.testing import CliRunner

from pdlm_hf import BASE_CHECKPOINT, RegionCaptioner
from pdlm_hf.cli.main import app
from pdlm_hf.regions import Segmenter
from pdlm_hf.regions.files import load_json, read_rows
from pdlm_hf.shapes import ShapesSegmenter
from pdlm_hf.shapes.evaluate import held_out_scene


def batch(*arguments):
    return CliRunner().invoke(app, ["batch", *(str(argument) for argument in arguments)])


@pytest.fixture
def folder(tmp_path):
    """Three drawings, one of them in a folder below."""
    for k, name in enumerate(["a.png", "b.png", "more/c.png"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        held_out_scene(3, k).image.save(path)
    return tmp_path / "images"


def test_a_folder_of_drawings(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    result = batch(folder, "--everything", "--out", out)
    assert result.exit_code == 0, result.output
    coco = load_json(tmp_path / "out.coco.json")
    captioner = RegionCaptioner.from_pretrained()
    assert [image["file_name"] for image in coco["images"]] == ["a.png", "b.png", "more/c.png"]
    for image in coco["images"]:
        rows = [row for row in coco["annotations"] if row["image_id"] == image["id"]]
        expected = captioner.everything(folder / image["file_name"])
        assert [row["caption"] for row in rows] == [caption.text for caption in expected]
        for row, caption in zip(rows, expected, strict=True):
            assert row["bbox"] == caption.bbox and row["mask_score"] == round(caption.mask_score, 4)
            assert np.array_equal(coco_mask.decode(row["segmentation"]).astype(bool), caption.mask)
            assert row["area"] == caption.mask.sum() and 0 < row["score"] <= 1 and row["category_id"] == 1
    assert coco["categories"] == [{"id": 1, "name": "region"}]
    assert len(list(read_rows(out))) == len(coco["annotations"])
    read = COCO(str(tmp_path / "out.coco.json"))  # pycocotools reads it
    assert read.annToMask(read.anns[coco["annotations"][0]["id"]]).sum() == coco["annotations"][0]["area"]


def test_names_become_categories(folder, tmp_path):
    result = batch(folder, "--find", "circle", "--find", "red", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    coco = load_json(tmp_path / "out.coco.json")
    names = {row["id"]: row["name"] for row in coco["categories"]}
    assert set(names.values()) <= {"circle", "red"} and len(coco["images"]) == 3
    assert all(row["name"] == names[row["category_id"]] for row in coco["annotations"])
    for row in coco["annotations"]:
        assert row["name"] in row["caption"] or row["name"] == "circle" and "disc" in row["caption"]


def test_a_stopped_run_goes_on(folder, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert batch(folder, "--everything", "--out", whole).exit_code == 0
    searched, propose = [], ShapesSegmenter.propose

    def counting(self, image, names, settings):
        if len(searched) == 2:
            raise KeyboardInterrupt
        searched.append(image.size)
        return propose(self, image, names, settings)

    monkeypatch.setattr(ShapesSegmenter, "propose", counting)
    result = batch(folder, "--everything", "--out", out)
    assert result.exit_code == 130 and "run the same command to go on" in result.stderr
    assert len(list(read_rows(tmp_path / "out.found.jsonl"))) == 2 and not out.exists()
    searched[:] = searched[:1]  # one more image is to be searched
    assert batch(folder, "--everything", "--out", out).exit_code == 0
    assert list(read_rows(out)) == list(read_rows(whole))
    assert load_json(tmp_path / "out.coco.json") == load_json(tmp_path / "whole.coco.json")
    # nothing is searched or captioned again; a new image is, and keeps the ids of the others
    monkeypatch.setattr(RegionCaptioner, "from_pretrained", None)
    searched[:] = [None, None]
    assert batch(folder, "--everything", "--out", out).exit_code == 0
    monkeypatch.undo()
    shutil.copy(folder / "b.png", folder / "aa.png")
    assert batch(folder, "--everything", "--out", out).exit_code == 0
    before, after = list(read_rows(whole)), list(read_rows(out))
    assert after[: len(before)] == before and {row["image_id"] for row in after[len(before) :]} == {4}


def test_other_settings_are_refused(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    assert batch(folder, "--everything", "--out", out).exit_code == 0
    result = batch(folder, "--everything", "--max-regions", "2", "--out", out)
    assert result.exit_code == 2 and "max_regions was 64, now 2" in result.stderr
    out.unlink()  # without captions the regions are still those of the other settings
    result = batch(folder, "--everything", "--max-regions", "2", "--out", out)
    assert result.exit_code == 2 and "max_regions was 64, now 2" in result.stderr


def test_images_that_cannot_be_searched(folder, tmp_path):
    (folder / "b.png").write_bytes(b"no image")
    Image.fromarray(make_image(0)[0]).save(folder / "noise.png")
    result = batch(folder, "--everything", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 1 and "2 images cannot be read" in result.stderr
    faults = {row["file_name"]: row["reason"] for row in read_rows(tmp_path / "out.faults.jsonl")}
    assert "cannot be opened as an image" in faults["b.png"] and "this image has none" in faults["noise.png"]
    assert {row["file_name"] for row in read_rows(tmp_path / "out.jsonl")} == {"a.png", "more/c.png"}


def test_nothing_is_found(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(tmp_path / "images" / "grey.png")
    result = batch(tmp_path / "images", "--everything", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    assert "nothing was found in 1 of 1 images, grey.png for example" in result.stderr
    coco = load_json(tmp_path / "out.coco.json")
    assert coco["annotations"] == [] and [image["file_name"] for image in coco["images"]] == ["grey.png"]


def test_with_models(tiny_checkpoint, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Segmenter, "points_per_side", 2)
    tiny_sam().save_pretrained(tmp_path / "sam")
    devices, load = [], Segmenter.from_pretrained
    monkeypatch.setattr(
        Segmenter, "from_pretrained", lambda path, device: devices.append(device) or load(path, device)
    )
    rest = ["--model", tiny_checkpoint, "--max-new-tokens", 4, "--steps", 2, "--max-regions", 3, "--parts"]
    rest += [f"--select={s}" for s in ("min_score=0", "min_stability=0", "max_area=1", "max_overlap=1", "min_area=0")]
    finder = ["--everything", "--segmenter", tmp_path / "sam", "--segmenter-device", "cpu"]
    result = batch(folder, *finder, *rest, "--out", tmp_path / "out.jsonl")
    assert result.exit_code in (0, 1) and "9 regions of 3 images captioned" in result.stderr, result.output
    assert devices == ["cpu"] and len(load_json(tmp_path / "out.coco.json")["annotations"]) == 9


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--everything", "--shard", "1/2"], "--shard: not where regions are found"),
        (["--everything", "--images", "x"], "--images: not where regions are found; give the folder of the images"),
        (["--parts"], "--parts is for --everything"),
        (["--everything", "--find", "red"], "--everything and --find exclude each other"),
        (["--find", "dog"], "knows the colours red"),
        (["--everything", "--model", "./none"], "./none: there is no such folder"),
        (["--everything", "--model", BASE_CHECKPOINT], "it cannot caption regions"),
    ],
)
def test_wrong_calls(folder, tmp_path, arguments, message):
    result = batch(folder, *arguments, "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "out.found.jsonl").exists()
    result = batch(tmp_path / "none", "--everything", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 2 and "to find regions, a folder of images is needed" in result.stderr


def test_the_rows_are_json(folder, tmp_path):
    assert batch(folder, "--everything", "--out", tmp_path / "out.jsonl").exit_code == 0
    for line in (tmp_path / "out.found.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == {"id", "file_name", "width", "height", "regions", "file"}
