"""`pdlm attributes`, and `pdlm batch --schema`."""

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image
from region_server import RegionCaptionServer, captions_of
from tiny import make_image
from typer.testing import CliRunner

from pdlm_hf import RegionCaptioner
from pdlm_hf.attributes import parse_schema
from pdlm_hf.cli.main import app
from pdlm_hf.regions.files import read_rows, write_json

SCHEMA = {"size": ["small", "large"], "colour": ["red", "dark red"], "striped": [True, False]}


@pytest.fixture
def files(tmp_path):
    image, masks = make_image(1, 104, 64, 2)
    Image.fromarray(image).save(tmp_path / "image.png")
    for k, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / f"mask_{k}.png")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    annotations = [{"id": k, "image_id": 7, "bbox": [5, 5, 20 + k, 30]} for k in range(3)]
    write_json(tmp_path / "coco.json", {"images": [{"id": 7, "file_name": "image.png"}], "annotations": annotations})
    return tmp_path


@pytest.fixture
def read(files, tiny_checkpoint):
    def call(*options, schema="schema.json"):
        masks = ["--mask", files / "mask_0.png", files / "mask_1.png"]
        arguments = ["attributes", files / "image.png", *masks, "--model", tiny_checkpoint]
        arguments += ["--schema", files / schema, *options]
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call


def test_json_is_what_python_reads(read, files, tiny_checkpoint):
    result = read("--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["num_forwards"] == 1 and answer["image"] == str(files / "image.png")
    captioner = RegionCaptioner.from_pretrained(tiny_checkpoint, device="cpu")
    masks = [files / f"mask_{k}.png" for k in range(2)]
    assert answer["regions"] == [row.to_row() for row in captioner.attributes(files / "image.png", masks, SCHEMA)]
    assert "2 regions in 1 forward pass" in result.stderr


def test_lines_and_table(read):
    values = [
        [region["attributes"][name]["value"] for name in SCHEMA]
        for region in json.loads(read("--json").stdout)["regions"]
    ]
    lines = read().stdout.splitlines()
    for number, (line, (size, colour, striped)) in enumerate(zip(lines, values, strict=True), 1):
        assert line.startswith(f"{number}  size {size} (0.") and f"  colour {colour} (0." in line
        assert f"  striped {'yes' if striped else 'no'} (" in line
    table = list(csv.DictReader(io.StringIO(read("--csv").stdout)))
    assert [[row["size"], row["colour"], row["striped"] == "True"] for row in table] == values
    unknown = read("--unknown-below", "1").stdout
    assert unknown.count("unknown") == 6
    joint = read("--jointly", "--template", "A {size} {colour} {striped}", "--json")
    assert json.loads(joint.stdout)["num_forwards"] == 3


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        (["--json", "--csv"], None, "--json and --csv exclude each other"),
        ([], '{"a": []}', "attribute 'a': the list of choices is empty"),
        ([], '{"a": ["x", "x "]}', "both written 'x'"),
        ([], "{", "is not valid JSON"),
        (["--template", "A {size}"], None, "The template has no place for {colour}"),
        (["--template", "A {size} {colour} {striped} \udcff"], None, "bytes that are no UTF-8"),
        (["--question", "Wei\udcdf?"], None, "the question has half of a character"),
        (["--unknown-below", "3"], None, "unknown_below"),
        (["--unknown-below", "nan"], None, "unknown_below"),
    ],
)
def test_wrong_calls(read, files, options, text, message):
    if text is not None:
        (files / "schema.json").write_text(text)
    result = read(*options)
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr and len(result.stderr.splitlines()) <= 2


def test_wrong_files(read, files):
    assert "No such file" in read(schema="none.json").stderr
    result = CliRunner().invoke(app, ["attributes", str(files / "image.png")])
    assert result.exit_code == 2 and "No schema: give --schema" in result.stderr


def test_batch_is_resumed_with_the_same_schema_only(files, tiny_checkpoint):
    def batch(*options):
        arguments = ["batch", files / "coco.json", "--model", tiny_checkpoint, "--out", files / "out.jsonl"]
        return CliRunner().invoke(app, [str(argument) for argument in (*arguments, *options)])

    schema = ["--schema", files / "schema.json"]
    (files / "out.csv").write_text("name;price\n")
    foreign = batch(*schema)
    assert foreign.exit_code == 2 and "out.csv: is another table" in foreign.stderr
    (files / "out.csv").unlink()
    assert batch(*schema).exit_code == 0
    rows = list(read_rows(files / "out.jsonl"))
    assert [row["annotation_id"] for row in rows] == [0, 1, 2]
    assert rows[0]["attributes"].keys() == SCHEMA.keys()
    lines = (files / "out.jsonl").read_text().splitlines(keepends=True)
    (files / "out.jsonl").write_text("".join(lines[:1]))
    again = batch(*schema)
    assert again.exit_code == 0 and "1 region captioned before" in again.stderr
    assert list(read_rows(files / "out.jsonl")) == rows
    table = list(csv.DictReader(io.StringIO((files / "out.csv").read_text())))
    assert [row["id"] for row in table] == ["0", "1", "2"]
    assert [row["colour"] for row in table] == [row["attributes"]["colour"]["value"] for row in rows]
    lines[1] = json.dumps(rows[1] | {"attributes": {"size": {"value": "small", "probability": 1.0}}}) + "\n"
    (files / "out.jsonl").write_text("".join(lines))
    mended = batch(*schema)
    assert mended.exit_code == 0 and "line 2 has no value of the attribute 'colour'" in mended.stderr
    assert sorted(read_rows(files / "out.jsonl"), key=lambda row: row["annotation_id"]) == rows
    for option in (["--fast"], ["--steps", "4"], ["--max-new-tokens", "8"]):
        useless = batch(*schema, *option)
        assert useless.exit_code == 2 and f"{option[0]} is for captions; with --schema leave" in useless.stderr
    same = {name: SCHEMA[name] for name in reversed(SCHEMA)}  # read in another order, so with other probabilities
    for changed in (SCHEMA | {"size": ["little", "big"]}, same, SCHEMA | {"striped": ["yes", "no"]}):
        (files / "schema.json").write_text(json.dumps(changed))
        other = batch(*schema)
        assert other.exit_code == 2 and "other settings (schema was '{" in other.stderr
    assert batch().exit_code == 2


SERVED = {"striped": [True, False], "legs": [2, 4], "colour": ["red", "dark red"], "name": {"max_tokens": 3}}
VALUES = {"striped": True, "legs": 2, "colour": "red", "name": "3 tokens"}


def test_a_server_reads_the_attributes(files):
    (files / "schema.json").write_text(json.dumps({"attributes": SERVED, "jointly": True}))
    arguments = [files / "image.png", "--mask", files / "mask_0.png", files / "mask_1.png"]
    arguments += ["--schema", files / "schema.json", "--calibrate", "--question", "Which?", "--json"]
    with RegionCaptionServer() as server:
        result = CliRunner().invoke(app, ["attributes", *map(str, arguments), "--server", server.url])
        trial, body = server.bodies
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["model"], answer["num_forwards"], "note" in answer) == ("served", 2, False)
    for region in answer["regions"]:
        assert {name: value["value"] for name, value in region["attributes"].items()} == VALUES
        assert region["attributes"]["striped"]["probabilities"] == {"yes": 0.5, "no": 0.5}
        assert region["bbox"] != [0, 0, 1, 1]  # of the region that was given
    assert body["schema"] == {"attributes": SERVED, "jointly": True, "calibrate": True}
    assert parse_schema(body["schema"]) == parse_schema({"attributes": SERVED, "jointly": True}, calibrate=True)
    assert body["question"] == "Which?" and trial["schema"] == body["schema"]  # also of the small grey image


def test_batch_by_a_server_writes_the_same_tables(files):
    (files / "schema.json").write_text(json.dumps(SERVED))
    with RegionCaptionServer() as server:
        arguments = ["batch", files / "coco.json", "--server", server.url, "--out", files / "out.jsonl"]
        arguments += ["--schema", files / "schema.json"]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        again = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert again.exit_code == 0 and len(server.bodies) == 2  # the small grey image, and the image
    rows = list(read_rows(files / "out.jsonl"))
    assert [row["annotation_id"] for row in rows] == [0, 1, 2]
    assert [{name: one["value"] for name, one in row["attributes"].items()} for row in rows] == [VALUES] * 3
    table = list(csv.DictReader(io.StringIO((files / "out.csv").read_text())))
    assert [(row["colour"], row["legs"], row["name"]) for row in table] == [("red", "2", "3 tokens")] * 3


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.pop("attributes"),
        lambda row: row["attributes"].pop("legs"),
        lambda row: row["attributes"]["legs"].pop("probabilities"),
        lambda row: row["attributes"]["legs"].update(value=3),
        lambda row: row["attributes"]["name"].update(value=3),
        lambda row: row["attributes"]["striped"].update(probability="high"),
        lambda row: row["attributes"]["legs"].update(probability=1.5),
        lambda row: row["attributes"]["legs"]["probabilities"].update({"2": float("nan")}),
        lambda row: row["attributes"]["striped"].update(support=-1),
    ],
)
def test_an_answer_that_is_not_of_the_schema_is_none(files, change):
    (files / "schema.json").write_text(json.dumps(SERVED))

    def fault(number, body):
        answer = captions_of(body)
        change(answer["regions"][0])
        return answer

    with RegionCaptionServer(fault) as server:
        arguments = [files / "image.png", "--mask", files / "mask_0.png", "--schema", files / "schema.json"]
        result = CliRunner().invoke(app, ["attributes", *map(str, arguments), "--server", server.url])
    assert result.exit_code == 1 and "is not one set of attributes for each region" in result.stderr
