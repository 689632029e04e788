"""A run that continues notices images and regions that have changed since."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageOps
from typer.testing import CliRunner

from pdlm_hf.batch import BatchFiles, open_data, run_batch
from pdlm_hf.batch.dataset import checksum
from pdlm_hf.batch.engines import ImageEngine, Outcome
from pdlm_hf.cli.main import app
from pdlm_hf.errors_pdlm import DataError
from pdlm_hf.processing_pdlm import RegionCaption

EXAMPLES = Path(__file__).parents[2] / "examples"


class Counting(ImageEngine):
    """Captions regions by the sum of their pixels, and counts."""

    ahead = 1

    def __init__(self):
        self.asked = []

    def run(self, works):
        for work in works:
            self.asked += [region.id for region in work.regions]
            said = [RegionCaption(f"{int(r.mask.sum())} pixels", 0.5, r.id) for r in work.regions]
            yield Outcome(work, work.regions, said)


@pytest.fixture
def data(tmp_path):
    """Two images with two boxes each."""
    for name in ("a.png", "b.png"):
        Image.effect_noise((40, 30), 90).convert("RGB").save(tmp_path / name)
    boxes = {1: [2, 3, 10, 8], 2: [20, 5, 6, 6], 3: [0, 0, 12, 30], 4: [30, 20, 5, 5]}
    coco = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [{"id": k, "image_id": 1 if k < 3 else 2, "bbox": box} for k, box in boxes.items()],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    return coco


def run(folder, name="coco.json", out="out.jsonl"):
    """Ids of the regions that a run captions."""
    engine = Counting()
    run_batch(open_data(folder / name, folder), lambda: engine, BatchFiles(folder / out, {}))
    return engine.asked


def changed(folder, coco):
    (folder / "coco.json").write_text(json.dumps(coco))


def test_a_region_with_another_shape(tmp_path, data):
    assert sorted(run(tmp_path)) == [1, 2, 3, 4] and run(tmp_path) == []
    rows = (tmp_path / "out.jsonl").read_bytes()
    first, second = data["annotations"][:2]
    first["bbox"], second["bbox"] = second["bbox"], first["bbox"]
    changed(tmp_path, data)
    with pytest.raises(DataError, match=r"out.jsonl: has results of the region 1 of a.png and 1 other, which changed"):
        run(tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes() == rows
    kept = [line for line in rows.decode().splitlines() if json.loads(line)["image_id"] != 1]
    (tmp_path / "out.jsonl").write_text("\n".join(kept) + "\n")
    assert sorted(run(tmp_path)) == [1, 2]
    found = {a["id"]: a["caption"] for a in json.loads((tmp_path / "out.coco.json").read_text())["annotations"]}
    assert found == {1: "36 pixels", 2: "80 pixels", 3: "360 pixels", 4: "25 pixels"}


def test_what_is_no_change(tmp_path, data):
    """Other keys, the same shape in another form, regions that come and go."""
    run(tmp_path)
    first, second, third, _ = data["annotations"]
    first |= {"category_id": 5, "caption": "by hand"}
    x, y, width, height = second.pop("bbox")
    second["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    third["id"] = 9
    data["annotations"].append({"id": 5, "image_id": 1, "bbox": [1, 1, 4, 4]})
    changed(tmp_path, data)
    assert {5, 9} <= set(run(tmp_path)) and run(tmp_path) == []


@pytest.mark.parametrize("ending", ["png", "bmp"])
def test_an_image_that_was_replaced(tmp_path, data, ending):
    """By one of the same size in bytes too."""
    for image in data["images"]:
        Image.open(tmp_path / image["file_name"]).save(tmp_path / f"{image['id']}.{ending}")
        image["file_name"] = f"{image['id']}.{ending}"
    changed(tmp_path, data)
    run(tmp_path)
    with Image.open(tmp_path / f"2.{ending}") as image:
        ImageOps.invert(image).save(tmp_path / f"2.{ending}")
    with pytest.raises(
        DataError, match=rf"has results of the image 2.{ending}, which changed since. Delete their lines"
    ):
        run(tmp_path)


def test_a_folder_of_region_files(tmp_path, data):
    for name, box in (("a", "0 0.5 0.5 0.25 0.4"), ("b", "0 0.3 0.3 0.2 0.2")):
        (tmp_path / f"{name}.txt").write_text(box + "\n")
    (tmp_path / "coco.json").unlink()
    assert len(run(tmp_path, "")) == 2
    (tmp_path / "b.txt").write_text("0 0.3 0.3 0.2 0.2\n0 0.7 0.7 0.2 0.2\n")
    assert len(run(tmp_path, "")) == 2  # the image again, for the region that was added
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.25 0.2\n")
    with pytest.raises(DataError, match="has results of the region 'a.png#0' of a.png, which changed since"):
        run(tmp_path, "")


def test_runs_from_before_there_were_checksums(tmp_path, data):
    run(tmp_path)
    row = '{"image_id": 2, "file": [5, 1], "regions": null}'
    (tmp_path / "out.sources.jsonl").write_text(f'damaged\n[1]\n{row}\n{{"id": 1}}\n{{"cut')
    with pytest.raises(DataError, match="the image b.png"):
        run(tmp_path)
    (tmp_path / "out.sources.jsonl").unlink()
    assert run(tmp_path) == []


def test_checksums_are_of_values():
    """Not of what Python has in memory more than once."""
    point = 1.5
    assert checksum([[point, point], "a" + "b"]) == checksum([[1.5, float("1.5")], "ab"])
    assert checksum([1]) != checksum([2])


def test_another_format_is_another_run(tmp_path, data):
    (tmp_path / "coco.json").unlink()
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("0 10 10 8 6\n")
    command = ["batch", str(tmp_path), "--out", str(tmp_path / "out.jsonl"), "--format"]
    assert CliRunner().invoke(app, [*command, "pixel-centres"]).exit_code == 0
    again = CliRunner().invoke(app, [*command, "pixel-boxes"])
    assert again.exit_code == 2 and "format was 'pixel-centres', now 'pixel-boxes'" in again.stderr.replace("\n", " ")


def test_found_regions_of_an_image_that_was_replaced(tmp_path, data):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(EXAMPLES / "shapes.png", tmp_path / "images" / name)
    command = ["batch", str(tmp_path / "images"), "--everything", "--out", str(tmp_path / "out.jsonl")]
    assert CliRunner().invoke(app, command).exit_code == 0
    shutil.copy(EXAMPLES / "two_shapes.png", tmp_path / "images" / "b.png")
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2 and "the image b.png" in again.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        ("txt", "\n"),
        ("json", '{"imagePath": "b.png", "imageWidth": 40, "imageHeight": 30, "shapes": []}'),
        (
            "xml",
            "<annotation><filename>b.png</filename><size><width>40</width><height>30</height></size></annotation>",
        ),
    ],
)
def test_an_image_without_regions_is_no_fault(tmp_path, data, ending, text):
    """An image of the background, as tools export it."""
    (tmp_path / "coco.json").unlink()
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.25 0.4\n")
    (tmp_path / f"b.{ending}").write_text(text)
    assert run(tmp_path, "") == ["a.png#0"]
    assert not (tmp_path / "out.faults.jsonl").exists()
    done = CliRunner().invoke(app, ["caption", str(tmp_path / "b.png"), "--regions", str(tmp_path / f"b.{ending}")])
    assert done.exit_code == 2 and "holds no regions" in done.stderr
