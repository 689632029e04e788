"""Files for annotation tools hold what was captioned, bit for bit; in tests/formats the tools read them."""

import base64
import io
import json
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pdlm_hf.cli.main import app
from pdlm_hf.errors_pdlm import DataError, RegionError, SettingError
from pdlm_hf.regions import read_region_file
from pdlm_hf.regions.exports import export_captions
from pdlm_hf.regions.files import append_rows, load_json
from pdlm_hf.regions.formats.label_studio import brush_code
from pdlm_hf.regions.region import Region, parse_regions
from pdlm_peft.conversion import convert
from pdlm_peft.data import RegionDataset

WIDTH, HEIGHT = 97, 71
FILES = {"label-studio": "tasks.json", "cvat": "images.xml", "fiftyone": "dataset"}
# "A & <B>", two lines, a character that XML does not have
CAPTIONS = ["a red kite", 'two\nlines & <b> "quoted"', "eine \u00dcbung \u4e2d\u6587", "x\x01y"]


def masks():
    """The whole image but a hole, one pixel in the corner, two parts with a wavy edge, noise."""
    rng = np.random.default_rng(3)
    found = np.zeros((4, HEIGHT, WIDTH), bool)
    found[0] = True
    found[0, 20:30, 40:50] = False
    found[1, -1, -1] = True
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    found[2] = np.abs(columns - 30 - 9 * np.sin(rows / 5)) < 8
    found[2, 30:36] = False
    found[3] = rng.random((HEIGHT, WIDTH)) < 0.3
    return found


@pytest.fixture
def rows(tmp_path):
    """OUT.jsonl of two images, one of them in a folder with a space in its name."""
    lines = []
    for number, name in enumerate(("b.png", "a street/1.png")):
        for k, mask in enumerate(masks()[number:]):
            region = Region(10 * number + k, mask)
            place = {"image_id": number, "annotation_id": region.id, "file_name": name}
            text = {"caption": CAPTIONS[number + k], "score": 0.5 + 0.1 * k}
            lines.append({**place, **text, "bbox": region.bbox, "segmentation": region.segmentation})
    append_rows(tmp_path / "out.jsonl", lines)
    return tmp_path / "out.jsonl"


def exported(rows, form):
    out = rows.with_name(FILES[form])
    images, regions, files = export_captions(rows, out, form)
    assert (images, regions) == (2, 7) and all(path.is_file() for path in files)
    return files[0]


@pytest.mark.parametrize("form", FILES)
def test_our_readers_read_them(rows, form):
    path = exported(rows, form)
    for number, name in enumerate(("b.png", "a street/1.png")):
        found = read_region_file(path, name, WIDTH, HEIGHT)
        regions = parse_regions(found, WIDTH, HEIGHT)
        for region, mask in zip(regions, masks()[number:], strict=True):
            np.testing.assert_array_equal(region.mask, mask)
        expected = CAPTIONS[number:] if form != "cvat" else [text.replace("\x01", "") for text in CAPTIONS[number:]]
        assert [region["caption"] for region in found] == expected
        assert {region["category"] for region in found} == {"region"}
        if form != "cvat":
            assert [region["score"] for region in found] == pytest.approx([0.5, 0.6, 0.7, 0.8][: len(found)])
    with pytest.raises(RegionError, match="states an image of 97 x 71"):
        read_region_file(path, "b.png", WIDTH + 1, HEIGHT)
    with pytest.raises(RegionError, match="0 of them named c.png"):
        read_region_file(path, "c.png", WIDTH, HEIGHT)


def test_a_task_of_label_studio(rows):
    path = exported(rows, "label-studio")
    first, second = load_json(path)
    assert first["data"] == {"image": "/data/local-files/?d=a%20street/1.png", "file_name": "a street/1.png"}
    (prediction,) = second["predictions"]
    assert prediction["score"] == 0.5 and prediction["model_version"] == "pdlm"
    brush, text = prediction["result"][:2]
    assert brush["id"] == text["id"] == "0" and text["value"] == {"text": ["a red kite"]}
    assert brush["value"]["brushlabels"] == ["region"]
    for name in ("brushlabels", "textarea"):
        assert {r["from_name"] for r in prediction["result"] if r["type"] == name} == {
            "label" if name == "brushlabels" else "caption"
        }
    config = path.with_suffix(".config.xml").read_text()
    assert 'perRegion="true"' in config and '<Label value="region" />' in config
    export_captions(rows, path, "label-studio", "s3://bucket/")
    assert load_json(path)[1]["data"]["image"] == "s3://bucket/b.png"


def test_the_image_of_a_task_and_its_damaged_results(tmp_path):
    result = {"id": "r", "original_width": 8, "original_height": 6}
    box = {**result, "value": {"x": 0, "y": 0, "width": 50, "height": 50}}
    text = {**result, "value": {"text": ["of two", "parts"]}}

    def read(address, *results):
        task = {"id": 1, "data": {"image": address}, "annotations": [{"id": 2, "result": results}]}
        (tmp_path / "a.json").write_text(json.dumps([task]))
        return read_region_file(tmp_path / "a.json", "street/1.png", 8, 6)

    for address in (
        "/data/local-files/?d=photos/street/1.png",
        "/data/upload/3/0a1b2c3d-1.png",
        "s3://b/street/1.png",
    ):
        assert read(address, text, box) == [{"id": "r", "bbox": [0, 0, 4, 3], "caption": "of two parts"}]
    for results in ([{**result, "value": [1]}], [text], [box, {**result, "value": 3}]):
        with pytest.raises(RegionError, match="task 1: result r"):
            read("http://[/local-files/?d=1.png", *results)


def test_long_and_short_blocks_of_a_brush_mark():
    """70,000 equal pixels are two blocks, of 65536 and 14464 + 200,000 values; one pixel is four values."""
    mask = np.zeros((1, 70_002), bool)
    mask[0, 70_000] = True
    code = brush_code(mask)
    assert code[:4] == list((4 * 70_002).to_bytes(4, "big"))
    blocks = [65536] * 4 + [4 * 70_000 - 4 * 65536, 4, 4]
    sizes = [16] * 5 + [3, 3]
    bits = "00111" + "0010001101111111"
    for count, size, value in zip(blocks, sizes, [0] * 5 + [255, 0], strict=True):
        bits += "1" + f"{(3, 4, 8, 16).index(size):02b}" + f"{count - 1:0{size}b}" + f"{value:08b}"
    written = "".join(f"{byte:08b}" for byte in code[4:])
    assert written.startswith(bits) and set(written[len(bits) :]) <= {"0"} and len(written) - len(bits) < 8


def test_the_mask_of_an_image_of_cvat(rows):
    text = exported(rows, "cvat").read_text()
    # one pixel: nothing outside, one inside
    assert 'rle="0, 1" left="96" top="70" width="1" height="1"' in text
    assert load_json(rows.with_name("images.labels.json")) == [
        {
            "name": "region",
            "type": "mask",
            "attributes": [
                {"name": "caption", "mutable": False, "input_type": "text", "default_value": "", "values": [""]}
            ],
        }
    ]
    assert '<attribute name="caption">two\nlines &amp; &lt;b&gt; "quoted"</attribute>' in text


ATTRIBUTES = {"how big": ["small", "large & wide"], "wet": ["yes", "no"], "note": []}
READ = [
    {"how big": "large & wide", "wet": "yes", "note": 'a "red" one'},
    {"how big": "small", "wet": "no", "note": None},
    {"how big": None, "wet": "yes", "note": "x"},
    {"how big": "small", "wet": None, "note": "y"},
]


def with_attributes(rows, names=tuple(ATTRIBUTES)):
    """The rows as `pdlm batch --schema` writes them: the second attribute is a boolean, the third a free text."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for k, line in enumerate(lines):
        line["attributes"] = {}
        for name, text in READ[k % 4].items():
            value = {"value": {"yes": True, "no": False}.get(text, text), "probability": 0.5}
            if ATTRIBUTES[name]:
                value |= {"probabilities": dict.fromkeys(ATTRIBUTES[name], 0.5), "support": 1}
            line["attributes"][names[list(ATTRIBUTES).index(name)]] = value
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("form", FILES)
def test_attributes_come_back(tmp_path, rows, form):
    """In place of the sentence that a row has as its caption; what is not known is not there."""
    with_attributes(rows)
    path = exported(rows, form)
    for name, first in (("b.png", 0), ("a street/1.png", 4)):
        for k, region in enumerate(read_region_file(path, name, WIDTH, HEIGHT)):
            assert "caption" not in region
            assert region["attributes"] == {n: text for n, text in READ[(first + k) % 4].items() if text is not None}
    source = path.parent if form == "fiftyone" else path
    if form == "label-studio":  # as if a person had submitted the predictions
        tasks = [task | {"annotations": task.pop("predictions")} for task in load_json(path)]
        source.write_text(json.dumps(tasks))
    for name in ("b.png", "a street/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / name)
    counts = convert(source, tmp_path / "corrected.jsonl", form, tmp_path)
    assert counts["regions"] == 7 and counts["rows"] == 2
    taught = [
        [r["attributes"] for r in row["regions"]] for row in RegionDataset(tmp_path / "corrected.jsonl", tmp_path)
    ]
    assert sorted(map(len, taught)) == [3, 4]
    assert {"how big": "large & wide", "wet": "yes", "note": 'a "red" one'} in sum(taught, [])


def test_what_is_chosen_in_the_tools(rows):
    """Choices, one of them for what is not known, a text where there are none; no caption."""
    with_attributes(rows)
    text = exported(rows, "cvat").read_text()
    labels = load_json(rows.with_name("images.labels.json"))[0]["attributes"]
    assert [(one["name"], one["input_type"], one["values"]) for one in labels] == [
        ("how big", "select", ["__undefined__", "small", "large & wide"]),
        ("wet", "select", ["__undefined__", "yes", "no"]),
        ("note", "text", [""]),
    ]
    assert '<attribute name="how big">__undefined__</attribute>' in text and "red kite" not in text
    root = ElementTree.fromstring(exported(rows, "label-studio").with_suffix(".config.xml").read_text())
    assert [choice.get("value") for choice in root.iter("Choice")] == ["small", "large & wide", "yes", "no"]
    assert [area.get("name") for area in root.iter("TextArea")] == ["attribute note"]
    for form, name in (("fiftyone", "mask"), ("fiftyone", "a.b"), ("cvat", "caption"), ("label-studio", "caption")):
        with_attributes(rows, ["how big", name, "note"])
        with pytest.raises(SettingError, match=f"{form} cannot have an attribute '{name}'; name it otherwise"):
            export_captions(rows, rows.with_name(FILES[form]), form)
    lines = rows.read_text()
    for value in ([], {"a": 3}, {"a": {"value": 0.5, "probability": 1}}, {"a": {"value": "x", "probability": 2}}):
        rows.write_text(json.dumps(json.loads(lines.splitlines()[0]) | {"attributes": value}) + "\n")
        with pytest.raises(DataError, match="as `attributes`, expected values by name"):
            export_captions(rows, rows.with_name("images.xml"), "cvat")


def test_captions_beside_attributes_and_a_choice_that_the_model_did_not_have(rows):
    """Where rows of two runs stand in one file, and a value was edited."""
    with_attributes(rows)
    first, second, *others = [json.loads(line) for line in rows.read_text().splitlines()]
    first.pop("attributes")
    second["attributes"]["how big"]["value"] = "huge"
    rows.write_text("".join(json.dumps(line) + "\n" for line in (first, second, *others)))
    for form, path in ((form, exported(rows, form)) for form in FILES):
        found = read_region_file(path, "b.png", WIDTH, HEIGHT)
        assert found[0]["caption"] == "a red kite" and "attributes" not in found[0], form
        assert found[1]["attributes"] == {"how big": "huge", "wet": "no"} and "caption" not in found[1]
    labels = load_json(rows.with_name("images.labels.json"))[0]["attributes"]
    assert [one["name"] for one in labels] == ["caption", "how big", "wet", "note"]
    assert labels[1]["values"] == ["__undefined__", "small", "large & wide", "huge"]
    config = ElementTree.fromstring(rows.with_name("tasks.config.xml").read_text())
    assert [area.get("name") for area in config.iter("TextArea")] == ["caption", "attribute note"]
    assert "huge" in [choice.get("value") for choice in config.iter("Choice")]


def test_attributes_that_a_person_wrote_otherwise(tmp_path):
    """Several lines become one; what cannot be taught is left out and counted."""
    shape = '<box label="x" xtl="1" ytl="1" xbr="5" ybr="5">{}</box>'
    values = ["<attribute name='a'>of two\nlines</attribute>", f"<attribute name='b'>{'x' * 300}</attribute>"]
    image = (
        f'<image id="0" name="b.png" width="{WIDTH}" height="{HEIGHT}">{"".join(map(shape.format, values))}</image>'
    )
    (tmp_path / "a.xml").write_text(f"<annotations>{image}</annotations>")
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "b.png")
    counts = convert(tmp_path / "a.xml", tmp_path / "a.jsonl", "cvat", tmp_path)
    left = {
        "regions without a caption": 1,
        "values of the attribute 'b', too long or of a form that cannot be taught": 1,
    }
    assert {name: count for name, count in counts.items() if name not in ("rows", "regions", "images")} == left
    assert json.loads((tmp_path / "a.jsonl").read_text())["regions"][0]["attributes"] == {"a": "of two lines"}


def test_a_mask_of_fiftyone_in_other_forms(rows):
    """As text, as extended JSON of either kind, of another size than its box, damaged; a box without a mask."""
    path = exported(rows, "fiftyone")
    data = load_json(path)
    (sample,) = (one for one in data["samples"] if one["filepath"] == "b.png")
    detections = sample["regions"]["detections"]
    code = detections[0]["mask"]["$binary"]["base64"]

    def read(change):
        path.write_text(json.dumps({"samples": [{**sample, **change}]}))
        return read_region_file(path, "b.png", WIDTH, HEIGHT)

    for mask in (code, {"$binary": code, "$type": "00"}):
        (region,) = read({"regions": {"_cls": "Detections", "detections": [{**detections[0], "mask": mask}]}})
        np.testing.assert_array_equal(parse_regions([region], WIDTH, HEIGHT)[0].mask, masks()[0])
    half = {**detections[0], "bounding_box": [0, 0, 2, 1]}
    with pytest.raises(RegionError, match="leaves the image"):
        read({"regions": {"_cls": "Detections", "detections": [half]}})
    tall = {**detections[1], "bounding_box": [10 / WIDTH, 0, 4 / WIDTH, 8 / HEIGHT]}
    (region,) = read({"regions": {"_cls": "Detections", "detections": [tall]}})
    assert parse_regions([region], WIDTH, HEIGHT)[0].bbox == [10, 0, 4, 8]
    (region,) = read({"regions": {"_cls": "Detections", "detections": [{**tall, "mask": None}]}})
    assert region["bbox"] == pytest.approx([10, 0, 4, 8])
    header = {"descr": "|b1", "fortran_order": False, "shape": (10**9, 10**9)}  # would take all memory
    large = io.BytesIO()
    np.lib.format.write_array_header_1_0(large, header)
    bomb = base64.b64encode(zlib.compress(large.getvalue())).decode()
    for mask in (code[:40], "nonsense", 3, {"$binary": 5}, bomb):
        with pytest.raises(RegionError, match="detection 0: the mask is damaged"):
            read({"regions": {"_cls": "Detections", "detections": [{**detections[0], "mask": mask}]}})
    with pytest.raises(RegionError, match="several fields of detections"):
        read({"regions": None, "a": sample["regions"], "b": sample["regions"]})
    assert len(read({"regions": None, "a": sample["regions"]})) == 4


def test_the_command(tmp_path, rows):
    def run(*arguments):
        result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
        return result.exit_code, result.stderr

    code, said = run(rows, tmp_path / "tasks.json", "--to", "label-studio")
    assert code == 0 and said == f"2 images, 7 regions: {tmp_path / 'tasks.json'}, {tmp_path / 'tasks.config.xml'}\n"
    for arguments, message in (
        ((rows, tmp_path / "a.json", "--to", "coco"), "expected one of label-studio, cvat, fiftyone"),
        ((rows, tmp_path / "a.json", "--to", "cvat"), "cvat is written to a .xml file"),
        ((rows, tmp_path / "a.json", "--to", "fiftyone"), "fiftyone is written to a folder"),
        ((rows, tmp_path / "none" / "a.xml", "--to", "cvat"), "there is no folder"),
        ((rows, tmp_path / "a.xml", "--to", "cvat", "--address", "x"), "--address is for --to label-studio"),
        ((tmp_path / "none.jsonl", tmp_path / "a.xml", "--to", "cvat"), "no such file"),
    ):
        code, said = run(*arguments)
        assert code == 2 and message in said and said.count("\n") == 1
    with open(rows, "a") as file:
        file.write("{}\n")
    code, said = run(rows, tmp_path / "a.xml", "--to", "cvat")
    assert code == 1 and "line 8 has no `image_id`" in said and "2 images, 7 regions" in said


def test_damaged_masks_are_named(tmp_path, rows):
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[1]["segmentation"]["size"] = [71, 98]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"out.jsonl: b.png: region 1: .*71, 98"):
        export_captions(rows, tmp_path / "a.xml", "cvat")
    assert not (tmp_path / "a.xml").exists()
