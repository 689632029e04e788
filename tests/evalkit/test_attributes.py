"""pdlm-eval attributes: tables and drawn images as benchmarks, their scores, and what is wrong with a table."""

import csv
import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from pdlm_evalkit import attributes_cli
from pdlm_evalkit.attribute_scores import score_rows
from pdlm_evalkit.cli import app
from pdlm_evalkit.labels import labelled_shapes, read_labels
from pdlm_hf.attributes import parse_schema
from pdlm_hf.errors_pdlm import PdlmError
from pdlm_hf.shapes.scenes import read as read_caption

HEADER = ["image", "id", "x", "y", "width", "height", "colour", "colour probability", "damaged"]
ROWS = [
    ["a.png", "7", "1", "1", "5", "5", "red", "0.9", "yes"],
    ["a.png", "8", "-2", "0.5", "9", "9", "dark blue", "0.3", "no"],
    ["b.png", "7", "0", "0", "40", "40", "red", "", ""],
]


@pytest.fixture
def table(tmp_path):
    for name in "ab":
        Image.new("RGB", (20, 10)).save(tmp_path / f"{name}.png")

    def write(rows=ROWS, header=HEADER, name="labels.csv"):
        path = tmp_path / name
        with open(path, "w", newline="") as file:
            csv.writer(file, delimiter="\t" if name.endswith("tsv") else ",").writerows([header, *rows])
        return path

    return write


def changed(row, **cells):
    return [cells.get(name, value) for name, value in zip(HEADER, ROWS[row], strict=True)]


@pytest.mark.parametrize("name", ["labels.csv", "labels.tsv"])
def test_a_table_is_read(table, name):
    found = read_labels(table(name=name))
    assert found.schema.to_json() == {"attributes": {"colour": ["red", "dark blue"], "damaged": ["yes", "no"]}}
    assert found.truth == {
        ("a.png", 7): {"colour": "red", "damaged": "yes"},
        ("a.png", 8): {"colour": "dark blue", "damaged": "no"},
        ("b.png", 7): {"colour": "red"},
    }
    assert [(entry.file_name, entry.ids, entry.size) for entry in found.data.entries] == [
        ("a.png", (7, 8), (20, 10)),
        ("b.png", (7,), (20, 10)),
    ]
    assert found.data.entries[0].read()[1] == (8, {"bbox": [-2.0, 0.5, 9.0, 9.0]})
    assert found.fingerprint != read_labels(table([*ROWS[:2], changed(2, colour="dark blue")])).fingerprint


def test_a_schema_sets_the_choices(table):
    schema = parse_schema({"damaged": [True, False], "colour": ["red", "dark blue", "pink"], "name": None})
    rows = [changed(0, damaged="True"), changed(1, damaged="no")]
    found = read_labels(table(rows), names=["damaged"], schema=schema)
    assert list(found.schema.attributes) == ["damaged"]
    assert [values for values in found.truth.values()] == [{"damaged": "yes"}, {"damaged": "no"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([changed(0, x="left")], "row 1, column x: got 'left', expected a number of pixels"),
        ([ROWS[0], changed(1, height="")], "row 2, column height: got '', expected a number"),
        ([changed(0, width="nan")], "row 1, column width: got 'nan', expected a number"),
        ([changed(0, height="-5")], "row 1, column height: got '-5', expected more than 0"),
        ([changed(0, x="20")], "row 1, column x: got '20', expected a box inside the image of 20 x 10"),
        ([changed(0, y="-5")], "row 1, column y: got '-5', expected a box inside the image"),
        ([changed(0, image="")], "row 1, column image: got '', expected the path of an image"),
        ([ROWS[0], changed(1, image="c.png")], "row 2, column image: got 'c.png', expected an image in"),
        ([ROWS[0], ROWS[0]], "row 2, column id: got '7', expected an id of its own"),
        ([ROWS[0][:-1]], "row 1, column damaged: the row has 8 cells, expected 9"),
        ([[*ROWS[0], "x"]], "row 1, column damaged: the row has 10 cells, expected 9"),
        (
            [ROWS[0], changed(1, colour="a\nb")],
            "row 2, column colour: got 'a\\nb', expected a text in one line; it has a line",
        ),
        ([ROWS[0], changed(2, colour="red")], "column 'colour': got 1 value, expected at least two"),
        ([], "has no rows below its header"),
    ],
)
def test_what_is_wrong_is_named_before_a_model_is_loaded(table, tmp_path, monkeypatch, rows, message):
    monkeypatch.setattr(attributes_cli, "make_engine", lambda *args: pytest.fail("loaded"))
    done = CliRunner().invoke(app, ["attributes", str(table(rows)), "--out", str(tmp_path / "out.jsonl")])
    assert done.exit_code == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (["image", "id", "x", "y", "w", "height", "colour", "b", "damaged"], "no column 'width'; the columns are"),
        (["image", "id", "x", "y", "width", "height", "x", "b", "c"], "column 7: got the name 'x' again"),
        (["image", "id", "x", "y", "width", "height", "", "b", "c"], "column 7: got the name '', expected its own"),
    ],
)
def test_headers(table, header, message):
    with pytest.raises(PdlmError, match=message):
        read_labels(table(header=header))


def test_files_that_are_no_tables(table, tmp_path):
    schema = parse_schema({"colour": ["red", "blue"]})
    with pytest.raises(PdlmError, match="row 2, column colour: got 'dark blue', expected one of red, blue"):
        read_labels(table(), schema=schema)
    (tmp_path / "bytes.csv").write_bytes(b"image,x\xff\n")
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "place.csv").write_text("image,x,y,width,height\na.png,1,1,5,5\n")
    for name, message in [
        ("bytes.csv", "cannot be read as a table in UTF-8"),
        ("empty.csv", "is empty; expected a header"),
        ("place.csv", "there is no column of an attribute"),
        ("none.csv", "no such file"),
    ]:
        with pytest.raises(PdlmError, match=message):
            read_labels(tmp_path / name)


def row(image, region, **values):
    read = {name: {"value": value, "probability": p} for name, (value, p) in values.items()}
    return {"image_id": image, "annotation_id": region, "attributes": read}


def test_the_scores(table):
    labels = read_labels(table())
    rows = [
        row("a.png", 7, colour=("red", 0.9), damaged=("yes", 0.6)),
        row("a.png", 8, colour=("red", 0.7), damaged=(None, 0.4)),
    ]
    scores = score_rows(labels, rows)
    assert (scores["n_images"], scores["n_regions"], scores["n_missing"]) == (2, 3, 1)
    assert scores["all_right"] == 0.3333 and scores["interval"] == [0.0, 0.5]
    colour, damaged = scores["attributes"]["colour"], scores["attributes"]["damaged"]
    assert (colour["n"], colour["accuracy"], colour["majority"]) == (3, 0.3333, 0.6667)
    assert colour["mean_probability"] == 0.8
    assert colour["ece"] == pytest.approx(0.4)  # (0.1 + 0.7) / 2
    assert colour["confusion"] == {"dark blue": {"red": 1}, "red": {"no answer": 1, "red": 1}}
    assert (damaged["n"], damaged["accuracy"], damaged["ece"]) == (2, 0.5, 0.4)
    assert damaged["confusion"] == {"no": {"unknown": 1}, "yes": {"yes": 1}}
    assert scores["ece"] == pytest.approx((0.1 + 0.7 + 0.4) / 3, abs=1e-4)


def test_shapes_are_a_benchmark_and_a_stopped_run_goes_on(tmp_path, monkeypatch):
    out = tmp_path / "answers.jsonl"

    def run(*options):
        arguments = ["attributes", "shapes", "--seed", "5", "--count", "2", "--out", str(out), "--json", *options]
        return CliRunner().invoke(app, arguments)

    done = run()
    assert done.exit_code == 0, done.stderr
    scores = json.loads(done.stdout)
    labels = labelled_shapes(5, 2)
    assert scores["n_regions"] == len(labels.truth) and scores["n_missing"] == 0
    assert list(scores["attributes"]) == ["size", "colour", "texture", "shape"] and scores["all_right"] >= 0.8
    lines = out.read_text().splitlines(keepends=True)
    for line in map(json.loads, lines):
        figure = {name: value["value"] for name, value in line["attributes"].items()}
        assert read_caption("A {size} {colour} {texture} {shape}".format(**figure)) is not None
    with monkeypatch.context() as patch:
        patch.setattr(attributes_cli, "make_engine", lambda *args: pytest.fail("loaded"))
        assert json.loads(run().stdout) == scores  # nothing is left to read
    other = run("--jointly")
    assert other.exit_code == 2 and "was begun with other settings" in other.stderr
    half = json.loads(lines[1])
    del half["attributes"]["shape"]  # such a row is left out, and its region read again
    out.write_text(lines[0] + json.dumps(half) + "\n")
    assert json.loads(run().stdout) == scores


def test_other_images_are_noticed(tmp_path, monkeypatch):
    """In another folder, of the same names and sizes."""
    for folder, shade in (("images", 90), ("others", 160)):
        (tmp_path / folder).mkdir()
        for name in ("a.png", "b.png"):
            same = name == "a.png"
            Image.new("RGB", (60, 60), (90 if same else shade,) * 3).save(tmp_path / folder / name)
    table, out = tmp_path / "d.csv", tmp_path / "answers.jsonl"
    table.write_text("image,x,y,width,height,colour\na.png,5,5,30,30,red\nb.png,9,9,30,30,blue\n")

    def run(folder):
        arguments = ["attributes", str(table), "--images", str(tmp_path / folder), "--out", str(out), "--json"]
        return CliRunner().invoke(app, arguments)

    done = run("images")
    assert done.exit_code == 0, done.stderr
    before = out.read_bytes()
    monkeypatch.setattr(attributes_cli, "make_engine", lambda *args: pytest.fail("loaded"))
    other = run("others")
    assert other.exit_code == 2 and "has results of the image b.png, which changed since" in other.stderr
    assert other.stdout == "" and out.read_bytes() == before
    (tmp_path / "images").rename(tmp_path / "moved")
    assert json.loads(run("moved").stdout) == json.loads(done.stdout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["shapes", "--attribute", "size"], "--attribute: not for shapes"),
        (["shapes", "--count", "0"], "--count must be a positive integer"),
        (["nowhere.csv"], "nowhere.csv: no such file"),
    ],
)
def test_wrong_calls(tmp_path, options, message):
    done = CliRunner().invoke(app, ["attributes", *options, "--out", str(tmp_path / "out.jsonl")])
    assert done.exit_code == 2 and message in done.stderr
