"""Captions that a person corrects in an annotation tool are trained on, with the masks that were captioned."""

import copy
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from drawn import drawn_rows, read_jsonl
from typer.testing import CliRunner

from pdlm_hf.regions.exports import export_captions
from pdlm_hf.regions.files import append_rows, load_json
from pdlm_hf.regions.region import parse_region
from pdlm_peft.cli import app
from pdlm_peft.data import RegionDataset

NEW = "a caption by hand & <corrected>"


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Rows of `pdlm batch`, and the masks and captions of each image."""
    folder = tmp_path_factory.mktemp("captioned")
    rows, scenes = drawn_rows(folder / "images", count=3)
    for number, (row, scene) in enumerate(zip(rows, scenes, strict=True)):
        place = {"image_id": number, "file_name": row["image"], "score": 0.5}
        append_rows(
            folder / "captions.jsonl",
            [
                {**place, "annotation_id": r["id"], "caption": r["caption"], "segmentation": r["segmentation"]}
                | {"bbox": parse_region(r["segmentation"], *scene.image.size).bbox}
                for r in row["regions"]
            ],
        )
    return folder, {row["image"]: (scene.masks, [r["caption"] for r in row["regions"]])
                    for row, scene in zip(rows, scenes, strict=True)}  # fmt: skip


def submit(path):
    """As Label Studio exports when a person has corrected the first caption of each task, and left the last task."""
    tasks = load_json(path)
    for number, task in enumerate(tasks[:-1], 1):
        result = copy.deepcopy(task["predictions"][0]["result"])
        next(one for one in result if one["type"] == "textarea")["value"]["text"] = [NEW]
        task |= {"id": number, "annotations": [{"id": number, "was_cancelled": False, "result": result[::-1]}]}
    path.write_text(json.dumps(tasks))


def edit_xml(path):
    root = ElementTree.parse(path)
    for image in root.findall("image"):
        image.find("mask/attribute").text = NEW
    root.write(path)


def edit_samples(path):
    data = load_json(path / "samples.json")
    for sample in data["samples"]:
        sample["filepath"] = f"/elsewhere/{sample['filepath']}"  # FiftyOne makes them absolute
        sample["regions"]["detections"][0]["caption"] = NEW
    (path / "samples.json").write_text(json.dumps(data))


FORMS = [("label-studio", "tasks.json", submit), ("cvat", "images.xml", edit_xml), ("fiftyone", "set", edit_samples)]


@pytest.mark.parametrize(("form", "name", "correct"), FORMS)
def test_there_and_back(captioned, tmp_path, form, name, correct):
    folder, drawn = captioned
    export_captions(folder / "captions.jsonl", tmp_path / name, form)
    correct(tmp_path / name)
    convert = ["convert", tmp_path / name, tmp_path / "rows.jsonl", "--from", form, "--images", folder / "images"]
    result = CliRunner().invoke(app, list(map(str, convert)))
    assert result.exit_code == 0, result.output
    kept = list(drawn) if form != "label-studio" else list(drawn)[:-1]
    assert ("1 images that nobody has submitted left out" in result.output) == (form == "label-studio")
    assert [row["image"] for row in read_jsonl(tmp_path / "rows.jsonl")] == kept
    for row, image in zip(RegionDataset(tmp_path / "rows.jsonl", folder / "images"), kept, strict=True):
        masks, captions = drawn[image]
        found = row["regions"] if form != "label-studio" else row["regions"][::-1]  # as they were exported
        for region, mask in zip(found, masks, strict=True):
            np.testing.assert_array_equal(region["mask"], mask)
        assert [region["caption"] for region in found] == [NEW, *captions[1:]]
    validate = ["validate", tmp_path / "rows.jsonl", "--images", folder / "images"]
    result = CliRunner().invoke(app, list(map(str, validate)))
    assert result.exit_code == 0 and "faults: none" in result.output


def convert(path, form, out):
    result = CliRunner().invoke(app, ["convert", str(path), str(out), "--from", form])
    return result.exit_code, result.output


def test_regions_without_a_caption_are_counted(captioned, tmp_path):
    folder, drawn = captioned
    export_captions(folder / "captions.jsonl", tmp_path / "a.xml", "cvat")
    text = (tmp_path / "a.xml").read_text()
    first = f'<attribute name="caption">{next(iter(drawn.values()))[1][0]}</attribute>'
    assert text.count(first) == 1
    (tmp_path / "a.xml").write_text(text.replace(first, '<attribute name="caption"> </attribute>'))
    code, said = convert(tmp_path / "a.xml", "cvat", tmp_path / "rows.jsonl")
    regions = sum(len(masks) for masks, _ in drawn.values())
    assert code == 0 and f"{regions - 1} regions; 1 regions without a caption left out" in said


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        ("label-studio", "{}", "expected tasks with `data` and `annotations`"),
        ("label-studio", '[{"data": {}, "annotations": [{"id": 1}, {"id": 2}]}]', "has 2 annotations (1, 2)"),
        ("cvat", "<annotation/>", "expected <annotations> (CVAT for images)"),
        ("cvat", '<annotations><image name="a.png"/></annotations>', "image None (a.png).width"),
        ("fiftyone", '{"samples": [{}]}', "the samples.json of a FiftyOneDataset"),
        ("fiftyone", '{"samples": [{"filepath": "a.png"}]}', "dataset.compute_metadata()"),
        ("fiftyone", "[", "not valid JSON"),
    ],
)
def test_other_files_are_refused(tmp_path, form, text, message):
    (tmp_path / "source").write_text(text)
    code, said = convert(tmp_path / "source", form, tmp_path / "rows.jsonl")
    assert code == 2 and message in " ".join(said.split()) and not (tmp_path / "rows.jsonl").exists()
