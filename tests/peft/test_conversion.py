"""Converted files hold what was drawn; a split keeps images apart."""

import base64
import csv
import json
import os

import numpy as np
import pytest
from drawn import as_coco, drawn_rows, read_jsonl, write_jsonl
from PIL import Image
from typer.testing import CliRunner

from pdlm_peft import splitting
from pdlm_peft.cli import app
from pdlm_peft.data import RegionDataset


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def domain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("domain")
    return folder, *drawn_rows(folder / "images")


def masks_of(path, images=None):
    return [{r["id"]: r["mask"] for r in row["regions"]} for row in RegionDataset(path, images)]


def test_coco_instances_with_captions_from_a_file(domain, tmp_path):
    root, rows, images = domain
    data = as_coco(rows, images)
    data["annotations"][0]["iscrowd"] = 1
    source = tmp_path / "instances.json"
    source.write_text(json.dumps(data))
    texts = {r["id"]: r["caption"] for row in rows for r in row["regions"]}
    missing = data["annotations"][1]["id"]
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "caption"])
        writer.writeheader()
        writer.writerows({"id": key, "caption": text} for key, text in texts.items() if key != missing)
    out = tmp_path / "out.jsonl"
    result = run(
        "convert",
        source,
        out,
        "--from",
        "coco-instances",
        "--images",
        root / "images",
        "--captions",
        tmp_path / "captions.csv",
    )
    assert result.exit_code == 0, result.output
    assert "1 crowd regions left out; 1 regions without a caption left out" in result.output
    found = read_jsonl(out)
    left = {r["id"]: r["caption"] for row in found for r in row["regions"]}
    assert left == {key: text for key, text in texts.items() if key not in (missing, data["annotations"][0]["id"])}
    assert (found[-1]["width"], found[-1]["height"]) == images[-1].image.size
    masks = {key: mask for row in masks_of(out, root / "images") for key, mask in row.items()}
    for row, image in zip(rows, images, strict=True):
        for region, mask in zip(row["regions"], image.masks, strict=True):
            assert region["id"] not in masks or np.array_equal(masks[region["id"]], mask)


def test_coco_panoptic(domain, tmp_path):
    """Colours of the PNG files are the ids; later figures hide earlier ones, as they do in the drawing."""
    root, rows, images = domain
    data = as_coco(rows, images)
    (tmp_path / "panoptic").mkdir()
    annotations = []
    for k, image in enumerate(images):
        colours = np.zeros((image.image.height, image.image.width, 3), np.uint8)
        segments = []
        for n, mask in enumerate(image.masks):
            colour = (7 + n, 3 * n, n)
            colours[mask] = colour
            segments.append(
                {"id": colour[0] + 256 * colour[1] + 65536 * colour[2], "category_id": n % 5, "iscrowd": 0}
            )
        segments.append({"id": 250, "category_id": 0})
        Image.fromarray(colours).save(tmp_path / "panoptic" / f"{k}.png")
        annotations.append({"image_id": k + 1, "file_name": f"{k}.png", "segments_info": segments})
    (tmp_path / "panoptic.json").write_text(json.dumps({**data, "annotations": annotations}))
    out = tmp_path / "out.jsonl"
    result = run(
        *("convert", tmp_path / "panoptic.json", out, "--from", "coco-panoptic", "--images", root / "images"),
        *("--category-captions", "A {}."),
    )
    assert result.exit_code == 0 and f"{len(rows)} segments without a pixel left out" in result.output, result.output
    for found, row, image in zip(masks_of(out, root / "images"), read_jsonl(out), images, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(found.values(), image.masks, strict=True))
        names = [entry["name"] for entry in data["categories"]]
        assert [r["caption"] for r in row["regions"]] == [f"A {names[n % 5]}." for n in range(len(image.masks))]
    result = run(
        "convert",
        tmp_path / "panoptic.json",
        out,
        "--from",
        "coco-panoptic",
        "--category-captions",
        "{}",
        "--masks",
        tmp_path / "no",
    )
    assert result.exit_code == 2 and "no such folder of panoptic PNG files" in result.stderr


def test_describe_anything(domain, tmp_path):
    """Images may be named without the leading zeros that the annotations have."""
    root, rows, images = domain
    data = {}
    for k, (row, image) in enumerate(zip(rows, images, strict=True), 1):
        image.image.save(tmp_path / f"{k}.png")
        data[f"img{k}"] = [
            {
                "ann_id": r["id"],
                "img_id": f"img{k}",
                "image": f"train/{k:06}.png",
                "tar_file": "0.tar",
                "mask_rle": r["segmentation"],
                "caption": r["caption"],
            }
            for r in row["regions"]
        ]
    source = tmp_path / "annotations.json"
    source.write_text(json.dumps(data))
    result = run("convert", source, tmp_path / "out.jsonl", "--from", "dam", "--images", tmp_path)
    assert result.exit_code == 0, result.output
    assert [row["regions"] for row in read_jsonl(tmp_path / "out.jsonl")] == [row["regions"] for row in rows]
    assert np.array_equal(next(iter(masks_of(tmp_path / "out.jsonl", tmp_path)[1].values())), images[1].masks[0])


def test_grasp_any_region(domain, tmp_path):
    root, rows, images = domain
    data = []
    for row in rows[:2]:
        turns = []
        for region in row["regions"]:
            turns += [{"from": "human", "value": "Describe."}, {"from": "gpt", "value": region["caption"]}]
        data.append(
            {"image": row["image"], "mask_rle": [r["segmentation"] for r in row["regions"]], "conversations": turns}
        )
    data[0]["image"] = "data:base64," + base64.b64encode((root / "images" / "0.png").read_bytes()).decode()
    turns = [{"from": "human", "value": "What do <Prompt0> and <Prompt1> do?"}, {"from": "gpt", "value": "Touch."}]
    data.append({"image": "1.png", "mask_rle": data[1]["mask_rle"], "conversations": turns})
    data.append({"image": "2.png", "mask_rle": None, "conversations": [{"from": "gpt", "value": "All."}]})
    (root / "images" / "gar.json").write_text(json.dumps(data))
    (tmp_path / "deep").mkdir()
    out = tmp_path / "deep" / "out.jsonl"
    result = run("convert", root / "images" / "gar.json", out, "--from", "gar")
    assert result.exit_code == 0 and "1 rows about relations left out" in result.output, result.output
    found = list(RegionDataset(out))  # paths were turned to start from the new file
    captions = [[[r["caption"] for r in row["regions"]] for row in side[:2]] for side in (found, rows)]
    assert captions[0] == captions[1]
    assert np.array_equal(found[0]["regions"][0]["mask"], images[0].masks[0])
    assert found[2]["regions"][0]["mask"].all()


def test_tables_bring_their_images_along(domain, tmp_path):
    datasets = pytest.importorskip("datasets")
    root, rows, images = domain
    values = [
        {
            "image": {"bytes": (root / "images" / row["image"]).read_bytes(), "path": None},
            "mask_rles": [r["segmentation"] for r in row["regions"]],
            "captions": [r["caption"] for r in row["regions"]],
        }
        for row in rows
    ]
    table = datasets.Dataset.from_list(values).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "table")
    assert run("convert", tmp_path / "table", tmp_path / "out.jsonl", "--from", "reference").exit_code == 0
    for row, image in zip(RegionDataset(tmp_path / "out.jsonl"), images, strict=True):
        assert np.array_equal(np.asarray(row["image"]), np.asarray(image.image))
        assert all(np.array_equal(r["mask"], mask) for r, mask in zip(row["regions"], image.masks, strict=True))


def test_nothing_is_written_if_something_is_wrong(domain, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("before")
    source = write_jsonl(tmp_path / "rows.jsonl", [domain[1][0], {"image": "a.png", "regions": [{"caption": "x"}]}])
    result = run("convert", source, out, "--from", "reference")
    assert result.exit_code == 2 and "row 2: regions[0]: got no shape" in result.stderr
    assert out.read_text() == "before" and sorted(os.listdir(tmp_path)) == ["out.jsonl", "rows.jsonl"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--from", "yolo"), "must be one of"),
        (("--from", "coco-instances"), "no captions"),
        (("--from", "coco-instances", "--category-captions", "x"), "needs {}"),
        (("--from", "coco-instances", "--captions", "none.csv"), "no such file"),
        (("--from", "dam"), "not valid JSON"),
    ],
)
def test_wrong_calls(domain, tmp_path, arguments, message):
    source = write_jsonl(tmp_path / "rows.json", [{"a": 1}, {"a": 2}])
    result = run("convert", source, tmp_path / "out.jsonl", *arguments)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_split_keeps_images_apart(tmp_path):
    """Rows of the same image, however its path is written, stay together; the same seed, the same split."""
    region = {"bbox": [0, 0, 5, 5], "caption": "x"}
    rows = [{"image": f"{k % 40}.png", "regions": [region | {"id": k}]} for k in range(100)]
    rows += [{"image": f"./{k}.png", "regions": [region | {"id": 1000 + k}]} for k in range(40)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    train, held = tmp_path / "train.jsonl", tmp_path / "sub" / "held.jsonl"
    held.parent.mkdir()
    result = run("split", source, train, held, "--held-out", "0.1", "--seed", "3")
    assert result.exit_code == 0 and "4 images" in result.output, result.output
    sides = [read_jsonl(train), read_jsonl(held)]
    names = [{os.path.basename(row["image"]) for row in side} for side in sides]
    assert len(names[1]) == 4 and len(names[0]) == 36 and not names[0] & names[1]
    assert sorted(r["id"] for side in sides for row in side for r in row["regions"]) == sorted(
        r["id"] for row in rows for r in row["regions"]
    )
    assert sides[1][0]["image"].startswith("../")
    again = splitting.split(write_jsonl(tmp_path / "other.jsonl", rows[::-1]), tmp_path / "a", tmp_path / "b", 0.1, 3)
    assert {os.path.basename(row["image"]) for row in read_jsonl(tmp_path / "b")} == names[1]
    assert again[1]["images"] == 4
    splitting.split(source, tmp_path / "a", tmp_path / "b", 0.1, 4)
    assert {os.path.basename(row["image"]) for row in read_jsonl(tmp_path / "b")} != names[1]
    assert run("split", source, train, train).exit_code == 2
    before = source.read_bytes()
    for outputs in ((source, held), (train, tmp_path / "sub" / ".." / "rows.jsonl")):
        result = run("split", source, *outputs)
        assert result.exit_code == 2 and "would read the file that it writes" in result.stderr
    assert source.read_bytes() == before
    assert run("split", source, train, held, "--held-out", "1").exit_code == 2


STARTS = ("data:base64,", "data:image/png;base64,")
SHAPE = {"size": [10, 20], "counts": [20, 10, 170]}


def coco(**changes):
    """Two images; the first has two annotations."""
    images = [{"id": 7, "file_name": "a.png"}, {"id": "x", "file_name": "b.png"}]
    annotations = [
        {"id": 70, "image_id": 7, "category_id": 1, "bbox": [1, 1, 5, 5]},
        {"id": 77, "image_id": 7, "category_id": 1, "bbox": [2, 2, 5, 5]},
        {"id": 78, "image_id": "x", "category_id": 2, "bbox": [3, 3, 5, 5]},
    ]
    annotations[1] |= changes
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "box"}, {"id": 2}]}


def convert(folder, value, form):
    source = folder / "source.json"
    source.write_text(json.dumps(value))
    captions = ["--category-captions", "A {}."] * form.startswith("coco")
    return source, run("convert", source, folder / "out.jsonl", "--from", form, *captions)


@pytest.mark.parametrize("shape", [{"bbox": []}, {"bbox": None}, {"bbox": [], "segmentation": []}])
def test_annotations_without_a_shape_are_counted(tmp_path, shape):
    _, result = convert(tmp_path, coco(**shape), "coco-instances")
    assert result.exit_code == 0
    assert (
        "1 rows; 1 regions; 1 regions without a shape left out; 1 regions without a caption left out" in result.stdout
    )
    (row,) = read_jsonl(tmp_path / "out.jsonl")
    assert [region["id"] for region in row["regions"]] == [70]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [1, 2, 3]}, "images[0] (id 7, a.png): region 77: bbox: got [1, 2, 3] (list), expected [x, y, width"),
        ({"segmentation": 5}, "images[0] (id 7, a.png): region 77: segmentation: got 5 (int), expected an RLE or"),
        ({"segmentation": {"size": [1]}}, "images[0] (id 7, a.png): region 77: segmentation: got {'size': [1]}"),
        ({"id": "\ud800"}, r"images[0] (id 7, a.png): region '\ud800': id: got '\ud800' (str), expected a text of"),
    ],
)
def test_a_fault_of_coco_is_named_by_its_ids(tmp_path, changes, message):
    source, result = convert(tmp_path, coco(**changes), "coco-instances")
    assert result.exit_code == 2 and f"{source}: {message}" in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"][1].update(id=7), "images[1].id: got 7, expected an id that no earlier entry has"),
        (
            lambda d: d["categories"][1].update(id=1),
            "categories[1].id: got 1, expected an id that no earlier entry has",
        ),
        (
            lambda d: d["annotations"][2].update(id=77, image_id=7),
            "annotations[2].id (image 7): got 77, expected an id that",
        ),
        (
            lambda d: d["annotations"][1].update(image_id=8),
            "annotations[1].image_id (id 77): got 8, expected the id",
        ),
    ],
)
def test_ids_that_occur_twice_are_refused(tmp_path, change, message):
    data = coco()
    change(data)
    source, result = convert(tmp_path, data, "coco-instances")
    assert result.exit_code == 2 and f"{source}: {message}" in result.stderr


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (5, "row 2: mask_rle[0]: got 5, expected an RLE with `size` and `counts`"),
        ([{"size": [1, 2]}], "row 2: mask_rle[0]: got {'size': [1, 2]}, expected an RLE"),
        ([{"counts": "ab"}], "row 2: mask_rle[0]: got {'counts': 'ab'}"),
        ([{"size": 3, "counts": "ab"}], "row 2: mask_rle[0]: got"),
        (["ab"], "row 2: mask_rle[0]: got 'ab'"),
        ([SHAPE, SHAPE], "row 2: mask_rle: got 2 masks and 1 answers"),
    ],
)
def test_faults_of_grasp_any_region(tmp_path, masks, message):
    row = {"image": "a.png", "mask_rle": [SHAPE], "conversations": [{"from": "gpt", "value": "A box"}]}
    _, result = convert(tmp_path, [row, row | {"mask_rle": masks}], "gar")
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize("change", [{"mask_rle": 5}, {"mask_rle": {"size": [1, 2]}}, {"image": 3}, {"ann_id": ...}])
def test_faults_of_describe_anything(tmp_path, change):
    region = {"ann_id": 1, "image": "a.png", "mask_rle": SHAPE, "caption": "A box"}
    wrong = {key: value for key, value in (region | change).items() if value is not ...}
    source, result = convert(tmp_path, {"img1": [region], "img2": [region, wrong]}, "dam")
    assert (
        result.exit_code == 2
        and f"{source}: img2[1]: got {{" in result.stderr
        and "expected an object" in result.stderr
    )


def test_a_split_keeps_hashes_of_encoded_images(tmp_path):
    """Not the images themselves; however one is encoded, its rows stay together."""
    region = {"bbox": [0, 0, 5, 5], "caption": "x"}
    texts = [base64.b64encode(bytes([k]) * 3000).decode() for k in range(20)]
    rows = [{"image": start + text, "regions": [region]} for text in texts for start in STARTS]
    keys = [splitting.image_key(row, tmp_path) for row in rows]
    assert len(set(keys)) == 20 and max(map(len, keys)) < 50
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    counts = splitting.split(source, tmp_path / "a", tmp_path / "b", 0.25)
    assert [(count["rows"], count["images"]) for count in counts] == [(30, 15), (10, 5)]
    sides = [{row["image"].partition("base64,")[2] for row in read_jsonl(tmp_path / name)} for name in "ab"]
    assert not sides[0] & sides[1] and len(sides[1]) == 5


@pytest.mark.parametrize("content", [b"[\xdd", b'[{"image": "a\x80.png"}]', b'[{"image": "a.png"}, "\xff"]'])
def test_a_list_that_is_not_utf_8_is_a_fault_with_its_row(tmp_path, content):
    (tmp_path / "rows.json").write_bytes(content)
    for form in ("gar", "reference"):
        done = run("convert", tmp_path / "rows.json", tmp_path / "out.jsonl", "--from", form)
        assert done.exit_code == 2 and "row 1" in done.stderr and "expected a JSON list in UTF-8" in done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "out.jsonl").exists()
    found = json.loads(run("validate", tmp_path / "rows.json", "--json").stdout)
    assert found["faults"][-1]["expected"] == "a JSON list in UTF-8"
