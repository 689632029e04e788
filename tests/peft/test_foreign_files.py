"""Files of annotation tools as people have them: several images in a task, tasks that were skipped, own attributes."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pdlm_evalkit.cli import app as evaluation
from pdlm_hf.cli.main import app
from pdlm_hf.errors_pdlm import RegionError
from pdlm_hf.regions.formats.facts import ImageFacts
from pdlm_hf.regions.readers import read_region_file
from pdlm_peft.cli import app as training
from pdlm_peft.conversion import convert
from pdlm_peft.data import RegionDataset

SIDES = {"original_width": 100, "original_height": 80}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("1.png", "2.png", "été b.png"):
        Image.new("RGB", (100, 80), "grey").save(folder / name)
    return folder


def result(own, text, on="image", x=10):
    box = {"x": x, "y": 10, "width": 20, "height": 20, "rotation": 0}
    fixed = {"id": own, "to_name": on, **SIDES}
    return [
        {**fixed, "type": "rectangle", "from_name": "box", "value": box},
        {**fixed, "type": "textarea", "from_name": "caption", "value": {"text": [text]}},
    ]


def task(number, data, *results, **more):
    return {"id": number, "data": data, "annotations": [{"id": 9, "result": sum(results, []), **more}]}


def rows_of(tmp_path, images, tasks):
    path, out = tmp_path / "tasks.json", tmp_path / "rows.jsonl"
    path.write_text(json.dumps(tasks))
    counts = convert(path, out, "label-studio", images=images)
    return [json.loads(line) for line in out.read_text().splitlines()], counts


def test_two_images_in_a_task(tmp_path, images):
    """Regions go to the image that they were drawn on, where the tags are called as the data."""
    data = {"before": "http://host/data/1.png", "after": "http://host/data/2.png"}
    both = task(1, data, result("a", "on the first", "before"), result("b", "on the second", "after", 40))
    rows, _ = rows_of(tmp_path, images, [both])
    assert {row["image"]: [r["caption"] for r in row["regions"]] for row in rows} == {
        "1.png": ["on the first"],
        "2.png": ["on the second"],
    }
    for name, x in (("1.png", 10.0), ("2.png", 40.0)):
        (found,) = read_region_file(tmp_path / "tasks.json", str(images / name), 100, 80)
        assert found["bbox"][0] == x


def test_two_images_in_a_task_and_nobody_says_which(tmp_path, images):
    data = {"before": "/data/1.png", "after": "/data/2.png"}
    tasks = [task(1, data, result("a", "first", "img1"), result("b", "second", "img2"))]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    message = "task 1: shows the images before, after, and a region is on 'img1', which is none of these names"
    with pytest.raises(RegionError, match=message):
        read_region_file(tmp_path / "tasks.json", str(images / "1.png"), 100, 80)
    with pytest.raises(RegionError, match=message):
        convert(tmp_path / "tasks.json", tmp_path / "rows.jsonl", "label-studio", images=images)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"text": "Mark the figures", "image": "/data/upload/1.png"}, "1.png"),
        ({"image": "/data/upload/3/12345678-%C3%A9t%C3%A9%20b.png"}, "été b.png"),
        ({"image": "http://host/%C3%A9t%C3%A9%20b.png?token=1"}, "été b.png"),
        ({"image": "s3://bucket/a/2.png", "url": "http://host/page.html"}, "2.png"),
        ({"thumb": "1.png", "image": "2.png"}, "2.png"),
    ],
)
def test_the_name_of_the_image(tmp_path, images, data, name):
    rows, _ = rows_of(tmp_path, images, [task(1, data, result("a", "x"))])
    assert [row["image"] for row in rows] == [name]


@pytest.mark.parametrize("tag", ["image", "picture"])
def test_a_second_address_that_no_region_is_on(tmp_path, images, tag):
    """The region is on the image that its tag is called as, or on "image", if there is one tag only."""
    tasks = [task(1, {"thumb": "1.png", "image": "2.png"}, result("a", "x", tag))]
    rows, counts = rows_of(tmp_path, images, tasks)
    assert [row["image"] for row in rows] == ["2.png"] and counts == {"rows": 1, "regions": 1}
    tasks = [task(1, {"before": "1.png", "after": "2.png"}, result("a", "x", "after"))]
    rows, counts = rows_of(tmp_path, images, tasks)
    assert [row["image"] for row in rows] == ["2.png"] and counts == {"rows": 1, "regions": 1}


def test_a_skipped_task_is_one_that_nobody_has_submitted(tmp_path, images):
    tasks = [
        task(1, {"image": "1.png"}, result("a", "kept")),
        task(2, {"image": "2.png"}, was_cancelled=True),
    ]
    rows, counts = rows_of(tmp_path, images, tasks)
    assert [row["image"] for row in rows] == ["1.png"]
    assert any("nobody has submitted" in reason for reason in counts)


def coco(tmp_path, attributes):
    path = tmp_path / "cvat.json"
    entry = {"id": 1, "image_id": 1, "bbox": [5, 5, 20, 20], "caption": "A grey square.", "attributes": attributes}
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "1.png"}], "annotations": [entry]}))
    return path


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"occluded": False, "rotation": 0.0}, {}),
        ({"occluded": True, "rotation": 12.5, "colour": "red", "age": 3}, {"colour": "red", "age": "3"}),
        ({"occluded": False, "track_id": 4, "keyframe": True, "damaged": True}, {"damaged": "yes"}),
        ({"occluded": True, "weight": 1.5}, {"occluded": "yes"}),
    ],
)
def test_attributes_of_other_tools_in_coco(tmp_path, images, given, kept):
    path = coco(tmp_path, given)
    (region,) = RegionDataset(path, images)[0]["regions"]
    assert region["caption"] == "A grey square." and (region.get("attributes") or {}) == kept
    done = CliRunner().invoke(training, ["validate", str(path), "--images", str(images)])
    assert done.exit_code == 0, done.output


def test_attributes_called_as_a_column_of_the_box(tmp_path, images):
    """The table of `pdlm batch` calls them otherwise, and the evaluation reads that column."""
    table, schema = tmp_path / "t.csv", tmp_path / "s.json"
    schema.write_text(json.dumps({"attributes": {"height": ["low", "high"], "width": ["narrow", "wide"]}}))
    header = "image,id,x,y,width,height,attribute height,attribute width"
    table.write_text(f"{header}\n1.png,1,5,5,20,20,low,wide\n2.png,2,5,5,9,9,high,\n")
    command = ["attributes", str(table), "--images", str(images), "--schema", str(schema), "--json"]
    done = CliRunner().invoke(evaluation, [*command, "--out", str(tmp_path / "o.jsonl")])
    assert done.exit_code == 0, done.output
    scores = json.loads(done.stdout)
    assert set(scores["attributes"]) == {"height", "width"}
    table.write_text("image,x,y,width,height\n1.png,5,5,20,20\n")
    done = CliRunner().invoke(evaluation, [*command, "--out", str(tmp_path / "p.jsonl")])
    assert done.exit_code == 2 and "there is no column 'attribute height'" in done.stderr


def test_a_mask_of_labelme_in_colour(tmp_path, images):
    mask = np.zeros((6, 8, 3), np.uint8)
    mask[2:4, 3:6] = 255
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    shape = {"label": "x", "shape_type": "mask", "points": [[10, 20], [18, 26]]}
    shape["mask"] = base64.b64encode(file.getvalue()).decode()
    path = tmp_path / "1.json"
    path.write_text(json.dumps({"imagePath": "1.png", "imageHeight": 80, "imageWidth": 100, "shapes": [shape]}))
    done = CliRunner().invoke(app, ["caption", str(images / "1.png"), "--regions", str(path), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["regions"][0]["bbox"] == [13, 22, 3, 2]


def test_sizes_as_text():
    """They are no sizes, and the message shows why."""
    with pytest.raises(RegionError, match="states an image of '100' x '80' pixels, a.png has 100 x 80"):
        ImageFacts("a.png", 100, 80).check_size("a file", "100", "80")
