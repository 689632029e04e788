"""A run that continues notices images and regions that have changed since."""

import json

import pytest
from PIL import Image, ImageOps
from typer.testing import CliRunner

from pdlm_hf import RegionCaptioner
from pdlm_hf.batch import BatchFiles, open_data, run_batch
from pdlm_hf.batch.checksums import checksum, is_same_look, look_of
from pdlm_hf.batch.engines import ImageEngine, Outcome
from pdlm_hf.cli.main import app
from pdlm_hf.errors_pdlm import DataError
from pdlm_hf.processing_pdlm import RegionCaption
from pdlm_hf.regions.files import load_json, read_rows
from pdlm_hf.shapes import ShapesSegmenter
from pdlm_hf.shapes.evaluate import held_out_scene


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


def run(folder, name="coco.json", out="out.jsonl", shard=None):
    """Ids of the regions that a run captions."""
    engine = Counting()
    run_batch(open_data(folder / name, folder), lambda: engine, BatchFiles(folder / out, {}, shard), shard)
    return engine.asked


def changed(folder, coco):
    (folder / "coco.json").write_text(json.dumps(coco))


def test_a_region_with_another_shape(tmp_path, data):
    assert sorted(run(tmp_path)) == [1, 2, 3, 4] and run(tmp_path) == []
    rows = (tmp_path / "out.jsonl").read_bytes()
    first, second = data["annotations"][:2]
    first["bbox"], second["bbox"] = second["bbox"], first["bbox"]
    changed(tmp_path, data)
    message = r"out.jsonl: has results of the region 1 of a.png, the region 2 of a.png, which changed since"
    with pytest.raises(DataError, match=message):
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


@pytest.fixture
def folder(tmp_path):
    """Three drawings of the same size, in a folder of their own."""
    (tmp_path / "images").mkdir()
    for k in range(3):
        drawing(k).save(tmp_path / "images" / f"{k}.png")
    return tmp_path / "images"


def drawing(number):
    return held_out_scene(3, number).image.resize((200, 160))


def everything(folder):
    return CliRunner().invoke(app, ["batch", str(folder), "--everything", "--out", str(folder.parent / "out.jsonl")])


def masks_of(coco, name):
    ids = {image["id"] for image in coco["images"] if image["file_name"] == name}
    return [entry["segmentation"] for entry in coco["annotations"] if entry["image_id"] in ids]


def test_found_regions_of_an_image_that_was_replaced(folder, tmp_path, monkeypatch):
    """It is refused before anything is loaded; once its captions are deleted, its regions are found again."""
    assert everything(folder).exit_code == 0
    out, before = tmp_path / "out.jsonl", load_json(tmp_path / "out.coco.json")
    rows = out.read_bytes()
    drawing(7).save(folder / "1.png")
    drawing(8).save(folder / "new.png")
    with monkeypatch.context() as patch:
        patch.setattr(RegionCaptioner, "from_pretrained", None)
        patch.setattr(ShapesSegmenter, "propose", None)
        again = everything(folder)
    message = "out.jsonl: has results of the image 1.png, which changed since. Delete their lines there"
    assert again.exit_code == 2 and message in again.stderr.replace("\n", " ") and out.read_bytes() == rows
    kept = [line for line in rows.decode().splitlines(True) if json.loads(line)["file_name"] != "1.png"]
    out.write_text("".join(kept))
    assert everything(folder).exit_code == 0
    after = load_json(tmp_path / "out.coco.json")
    expected = RegionCaptioner.from_pretrained().everything(folder / "1.png")
    assert [row["caption"] for row in read_rows(out) if row["file_name"] == "1.png"] == [c.text for c in expected]
    assert len(masks_of(after, "1.png")) == len(expected) and masks_of(after, "1.png") != masks_of(before, "1.png")
    assert all(masks_of(after, name) == masks_of(before, name) for name in ("0.png", "2.png"))
    assert [image["id"] for image in after["images"]] == [1, 2, 3, 4]
    assert out.read_text().startswith("".join(kept)) and everything(folder).exit_code == 0


@pytest.mark.parametrize("noted", ["in the row", "with the captions", "nowhere"])
def test_an_image_that_was_replaced_before_it_was_captioned(folder, tmp_path, noted):
    assert everything(folder).exit_code == 0
    before = load_json(tmp_path / "out.coco.json")
    found = list(read_rows(tmp_path / "out.found.jsonl"))
    (tmp_path / "out.jsonl").unlink()
    if noted != "in the row":
        rows = [{key: value for key, value in row.items() if key != "file"} for row in found]
        (tmp_path / "out.found.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if noted != "with the captions":
        (tmp_path / "out.sources.jsonl").unlink()
    drawing(7).save(folder / "1.png")
    assert everything(folder).exit_code == 0
    after = load_json(tmp_path / "out.coco.json")
    assert (masks_of(after, "1.png") == masks_of(before, "1.png")) == (noted == "nowhere")
    assert masks_of(after, "2.png") == masks_of(before, "2.png")


def test_shards_hand_over_what_images_were(tmp_path, data):
    for number in (1, 2):
        run(tmp_path, shard=(number, 2))
    Image.effect_noise((40, 30), 20).convert("RGB").save(tmp_path / "b.png")
    with pytest.raises(DataError, match="the image b.png, which changed since"):
        run(tmp_path)
    for path in tmp_path.glob("out.*-of-2.*"):
        path.unlink()
    with pytest.raises(DataError, match="the image b.png, which changed since"):
        run(tmp_path)


def test_what_an_image_was_is_written_before_its_rows(tmp_path, data, monkeypatch):
    """So that no row is without it, wherever a run stops."""
    written = []
    monkeypatch.setattr(BatchFiles, "add", lambda self, rows: written.append(self.sources_path.read_text()))
    run(tmp_path)
    assert ['"image_id": 1' in text for text in written] == [True, True]
    monkeypatch.undo()
    data["annotations"][0]["bbox"] = [1, 1, 5, 5]  # nothing was captioned, so this is no change
    changed(tmp_path, data)
    assert sorted(run(tmp_path)) == [1, 2, 3, 4] and run(tmp_path) == []


@pytest.mark.parametrize("size", [1000, 300_000])
def test_a_file_that_changed_somewhere(tmp_path, size):
    """In the last bytes too, where a compressed image has its checksum; of a small file, anywhere."""
    content, path = bytes(k * 7 % 251 for k in range(size)), tmp_path / "image.png"
    path.write_bytes(content)
    was = look_of(path)
    assert is_same_look(was, look_of(path)) and is_same_look(was[:2], was) and is_same_look(None, was)
    for place in {size // 2, size - 1, size - 12} | ({0, 1, size // 5} if size == 1000 else set()):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert not is_same_look(was, look_of(path))
    path.write_bytes(content + b"1")
    assert not is_same_look(was, look_of(path))
    assert look_of(tmp_path / "absent.png") is None


def test_a_mask_file_that_changed(tmp_path, data):
    """In a folder of masks, to one of the same name and size."""
    (tmp_path / "coco.json").unlink()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        mask(0, tmp_path / name / "one.bmp")
    assert run(tmp_path, "") == ["a.png#one", "b.png#one"]
    mask(9, tmp_path / "b" / "one.bmp")
    with pytest.raises(DataError, match="has results of the region 'b.png#one' of b.png, which changed since"):
        run(tmp_path, "")


def mask(top, path):
    image = Image.new("L", (40, 30))
    image.paste(255, (5, top, 15, top + 10))
    image.save(path)


def test_a_panoptic_file_that_changed(tmp_path, data):
    (tmp_path / "coco").mkdir()
    segments = [{"id": 5, "category_id": 1}]
    data["annotations"] = [
        {"image_id": k, "file_name": f"{name}.png", "segments_info": segments} for k, name in ((1, "a"), (2, "b"))
    ]
    changed(tmp_path, data)

    def panoptic(top, name):
        image = Image.new("RGB", (40, 30))
        image.paste((5, 0, 0), (5, top, 15, top + 10))
        image.save(tmp_path / "coco" / name)

    panoptic(0, "a.png")
    panoptic(0, "b.png")
    assert run(tmp_path) == [5, 5] and run(tmp_path) == []
    panoptic(9, "b.png")
    with pytest.raises(DataError, match="has results of the region 5 of b.png, which changed since"):
        run(tmp_path)


def test_many_changes(tmp_path, data):
    """The first ten are named."""
    data["annotations"] = [{"id": k, "image_id": 1, "bbox": [k, 2, 5, 5]} for k in range(1, 14)]
    changed(tmp_path, data)
    run(tmp_path)
    for entry in data["annotations"]:
        entry["bbox"][1] = 9
    changed(tmp_path, data)
    with pytest.raises(DataError, match="the region 9 of a.png, the region 10 of a.png and 3 others, which changed"):
        run(tmp_path)


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
