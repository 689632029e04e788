"""Schemas of attributes: every form that is read, and what is refused."""

import csv
import io
import json
import time

import pytest

from pdlm_hf.attributes import (
    AttributeValue,
    RegionAttributes,
    csv_fields,
    csv_row,
    parse_schema,
    parse_schema_text,
    read_schema_file,
)
from pdlm_hf.attributes.results import values_of, write_csv
from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.readings_pdlm import AttributeReading

COLOURS = ["red", "dark blue"]


@pytest.mark.parametrize(
    ("value", "choices", "lengths"),
    [
        ({"colour": COLOURS}, {"colour": COLOURS}, {}),
        ({"colour": tuple(COLOURS)}, {"colour": COLOURS}, {}),
        ({"damaged": [True, False]}, {"damaged": ["yes", "no"]}, {}),
        ({"legs": [2, 4]}, {"legs": ["2", "4"]}, {}),
        ({"one": ["only"]}, {"one": ["only"]}, {}),
        ({"name": None}, {"name": []}, {"name": 8}),
        ({"name": {"max_tokens": 3}}, {"name": []}, {"name": 3}),
        ({"colour": {"choices": COLOURS}}, {"colour": COLOURS}, {}),
        ({"colour": {"enum": COLOURS, "description": "of the paint"}}, {"colour": COLOURS}, {}),
        ({"colour": {"type": "string", "enum": COLOURS}}, {"colour": COLOURS}, {}),
        ({"damaged": {"type": "boolean"}}, {"damaged": ["yes", "no"]}, {}),
        ({"kind": {"const": "x", "enum": ["x", "y"], "type": "string", "title": "Kind"}}, {"kind": ["x"]}, {}),
        ({"legs": {"type": "integer", "minimum": 1, "maximum": 3}}, {"legs": ["1", "2", "3"]}, {}),
        ({"name": {"type": "string", "maxLength": 5}}, {"name": []}, {"name": 5}),
        ({"name": {"type": "string", "maxLength": 500}}, {"name": []}, {"name": 64}),
        ({"name": {"type": "string"}}, {"name": []}, {"name": 8}),
        (
            {"type": "object", "properties": {"colour": {"enum": COLOURS}}, "required": ["colour"], "title": "t"},
            {"colour": COLOURS},
            {},
        ),
        ({"attributes": {"colour": COLOURS}, "jointly": True}, {"colour": COLOURS}, {}),
        ({"type": ["cat", "dog"], "properties": None}, {"type": ["cat", "dog"], "properties": []}, {"properties": 8}),
        ({"farbe": ["rot", "grün", "橙色"]}, {"farbe": ["rot", "grün", "橙色"]}, {}),
    ],
)
def test_forms(value, choices, lengths):
    schema = parse_schema(value)
    assert schema.choices == choices and schema.lengths == lengths
    assert parse_schema(schema) is schema
    assert parse_schema(json.loads(json.dumps(schema.to_json()))) == schema


HOSTILE = [
    (None, "expected an object of attributes, got None"),
    ([], "expected an object"),
    ("colour", "expected an object"),
    ({}, "there are no attributes"),
    ({"type": "object"}, "there are no attributes"),
    ({"colour": []}, "attribute 'colour': .*the list of choices is empty"),
    ({"colour": "red"}, "attribute 'colour': expected a list of choices"),
    ({"colour": 3}, "attribute 'colour': expected a list of choices"),
    ({"colour": True}, "attribute 'colour': expected a list of choices"),
    ({"colour": [None]}, "must be a string, an integer or a boolean, got None"),
    ({"colour": [1.5]}, "must be a string, an integer or a boolean, got 1.5"),
    ({"colour": [["red"]]}, "must be a string"),
    ({"colour": [{"a": 1}]}, "must be a string"),
    ({"colour": ["red", "red"]}, "both written 'red'"),
    ({"colour": ["red", " red "]}, "both written 'red'"),
    ({"colour": ["yes", True]}, "both written 'yes'"),
    ({"colour": ["1", 1]}, "both written '1'"),
    ({"colour": [1, True]}, "equals another one"),
    ({"colour": [""]}, "is empty"),
    ({"colour": ["   "]}, "is empty"),
    ({"colour": ["a\nb"]}, "line break"),
    ({"colour": ["a\x00b"]}, "control character"),
    ({"colour": ["\ud800"]}, "half of a character"),
    ({"colour": ["a\u2028b"]}, "line break"),
    ({"colour": ["x" * 201]}, "201 characters, more than 200"),
    ({"colour": list(map(str, range(1001)))}, "1001 choices, more than the 1000"),
    ({f"a{k}": list(map(str, range(900))) for k in range(5)}, "4500 choices together"),
    ({f"a{k}": ["x"] for k in range(65)}, "65 attributes, more than the 64"),
    ({"": ["red"]}, "the name '' is empty"),
    ({"a{b": ["red"]}, "has a brace"),
    ({"a\nb": ["red"]}, "line break"),
    ({"x" * 201: ["red"]}, "201 characters"),
    ({1: ["red"]}, "must be a string, got 1"),
    ({"name": {"max_tokens": 0}}, "attribute 'name'.*greater than or equal to 1"),
    ({"name": {"max_tokens": 65}}, "less than or equal to 64"),
    ({"name": {"max_tokens": "8"}}, "valid integer"),
    ({"name": {"max_tokens": True}}, "valid integer"),
    ({"name": {"max_tokens": 8, "choices": ["a"]}}, "exclude each other"),
    ({"name": {"enum": []}}, "the list of choices is empty"),
    ({"name": {"enum": "red"}}, "expected a list of choices"),
    ({"name": {"enum": {"a": 1}}}, "expected a list of choices"),
    ({"name": {"type": "number"}}, "the type 'number' cannot be read"),
    ({"name": {"type": ["string", "null"]}}, "cannot be read"),
    ({"name": {"type": "array", "items": {}}}, "'items' is not read here"),
    ({"name": {"type": "object", "properties": {}}}, "'properties' is not read here"),
    ({"name": {"$ref": "#/a"}}, r"'\$ref' is not read here"),
    ({"name": {"anyOf": []}}, "'anyOf' is not read here"),
    ({"name": {"type": "string", "pattern": "a+"}}, "'pattern' is not read here"),
    ({"name": {"type": "string", "enum": [1]}}, "the choice 1 is not of the type string"),
    ({"name": {"type": "integer", "enum": [True]}}, "is not of the type integer"),
    ({"name": {"type": "integer"}}, "needs integers as minimum and maximum"),
    ({"name": {"type": "integer", "minimum": 3, "maximum": 1}}, "are none, or more than"),
    ({"name": {"type": "integer", "minimum": 0, "maximum": 10**30}}, "are none, or more than"),
    ({"name": {"type": "string", "maxLength": 0}}, "maxLength must be a positive integer"),
    ({"name": {"type": "string", "maxLength": True}}, "maxLength must be a positive integer"),
    ({"type": "object", "properties": {"a": ["x"]}, "$defs": {}}, r"'\$defs' is not read here"),
    ({"type": "object", "properties": []}, "there are no attributes|properties"),
    ({"type": "object", "properties": [1]}, r"expected an object of attributes, got \[1\]"),
    ({"type": "object", "properties": "abc"}, "expected an object of attributes, got 'abc'"),
    ({f"a{k}": {"type": "integer", "minimum": 0, "maximum": 999} for k in range(5)}, "5000 choices together"),
    ({f"a{k}": {"enum": list(range(900))} for k in range(5)}, "4500 choices together"),
    ({"a": {"properties": {"b": {"$ref": "#/properties/a"}}}}, "attribute 'a': 'properties' is not read here"),
    ({"a": {"$ref": "#", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, r"attribute 'a': '\$ref' is not read here"),
    ({"attributes": {"a": ["x"]}, "jointly": "yes"}, "jointly"),
    ({"attributes": {"a": ["x"]}, "unknown_below": 2}, "unknown_below"),
    ({"attributes": {"a": ["x"]}, "unknown_below": float("nan")}, "unknown_below"),
    ({"attributes": {"a": ["x"]}, "template": "no place"}, "no {name} place"),
    ({"attributes": {"a": ["x"]}, "template": ["{a}"] * 9}, "9 templates, more than 8"),
    ({"attributes": {"a": ["x"]}, "template": "x" * 5000 + "{a}"}, "a template of 5003 characters"),
    ({"attributes": {"a": ["x"]}, "template": [3]}, "valid string"),
    ({"attributes": {"a": ["x"], "b": ["y"]}, "template": "A {a}"}, "The template has no place for {b}: A {a}.$"),
    ({"attributes": {"a": ["x"]}, "template": ["{a}", "{a} {b}"]}, "a place {b}, which the schema does not have"),
    ({"attributes": {"a": ["x"]}, "template": "\ud800 {a}"}, "half of a character"),
    ({"attributes": {"a": ["x"]}, "templates": "A {a}"}, "'templates' is no setting beside attributes"),
    ({"a": ["x"], "template": "A {a}"}, "a template stands beside the attributes"),
    ({"a": ["x"], "template": ["A {a}", "The {a}"]}, "a template stands beside the attributes"),
    ({"a": ["caf\u00e9", "cafe\u0301"]}, "are both written"),
    ({"a": ["\u200b"]}, "is empty"),
    ({"\u200e \u200f": ["x"]}, "is empty"),
    ({"a": {"type": "integer", "enum": [1, 2, 3], "maximum": 2}}, "'maximum' is not read beside enum"),
    ({"a": {"enum": ["x", "y"], "const": "z"}}, "the const 'z' is none of the enum"),
    ({"a": {"const": "x", "maxLength": 3}}, "'maxLength' is not read beside const"),
    ({"a": {"type": "boolean", "minimum": 0}}, "'minimum' is not read beside the type boolean"),
    ({"a": {"type": "string", "maximum": 3}}, "'maximum' is not read beside the type string"),
    ({"a": {"minimum": 0, "maximum": 3}}, "attribute 'a': expected a list of choices"),
]


@pytest.mark.parametrize(("value", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_schemas(value, message):
    start = time.process_time()
    with pytest.raises(SettingError, match=message) as caught:
        parse_schema(value)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value) and "pydantic" not in str(caught.value)
    assert time.process_time() - start < 5  # none takes long; a choice of thousands is refused by its number


def test_settings_of_a_call_replace_those_of_the_schema():
    schema = parse_schema({"attributes": {"a": ["x"]}, "template": "A {a}", "unknown_below": 0.5})
    assert parse_schema(schema, jointly=None, template=None) is schema
    changed = parse_schema(schema, template="Some {a}", jointly=True)
    assert (changed.template, changed.jointly, changed.unknown_below) == (["Some {a}"], True, 0.5)
    with pytest.raises(SettingError, match="unknown_below"):
        parse_schema(schema, unknown_below=-1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ["x"], "a": ["y"]}', "The name 'a' stands twice"),
        ('{"a": [NaN]}', "NaN is no number of JSON"),
        ("", "is not valid JSON"),
        ('{"a": ["x"]', "is not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (" " * 4_000_001, "larger than 4000000 bytes"),
        ('{"a": []}', "attribute 'a': the list of choices is empty"),
    ],
)
def test_damaged_files(tmp_path, text, message):
    path = tmp_path / "schema.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingError, match=message) as caught:
        read_schema_file(path)
    assert str(caught.value).startswith(str(path))


def test_a_file(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text("\ufeff" + json.dumps({"colour": COLOURS}), encoding="utf-8")
    assert read_schema_file(path).choices == {"colour": COLOURS}


def test_a_table_is_read_back_as_it_was():
    rows = [["a\rb", "c\nd", 'e"f', "g,h", "=1+1", " \u2028", ""], ["caf\u00e9", True, 0.25, -1, "\r", "", "x"]]
    file = io.StringIO()
    write_csv(file, rows)
    assert list(csv.reader(io.StringIO(file.getvalue(), newline=""))) == [[str(cell) for cell in row] for row in rows]


def test_typed_schemas():
    typed = parse_schema_text("\n colour : red,dark blue \n\nname:\ntime: 10:30, 11:00\n")
    assert typed.choices == {"colour": COLOURS, "name": [], "time": ["10:30", "11:00"]}
    assert parse_schema_text(' {"colour": ["red", "dark blue"]}') == parse_schema({"colour": COLOURS})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n", "there are no attributes"),
        ("a: x\ncolour red", "Line 2: expected a name and its choices, like `colour: red, blue`, got 'colour red'"),
        (": red", "Line 1: expected a name"),
        ("a: x\na: y", "Line 2: there is an attribute 'a' already"),
        ("a: x,", "attribute 'a': the choice '' is empty"),
        ("a: " + ", ".join(map(str, range(1001))), "attribute 'a': 1001 choices"),
        ('{"a": [}', "The schema is not valid JSON"),
        ("a" * 4_000_001, "longer than 4000000 characters"),
    ],
)
def test_damaged_typed_schemas(text, message):
    with pytest.raises(SettingError, match=message):
        parse_schema_text(text)


def test_values_and_rows():
    schema = parse_schema({"damaged": [True, False], "legs": [2, 4], "name": {"type": "string", "maxLength": 3}})
    reading = AttributeReading(
        {"damaged": [0.25, 0.75], "legs": [0.5, 0.5]}, {"damaged": 0.9, "legs": 0.1}, {}, {"name": 0.8}
    )
    values = values_of(schema, reading, {"name": "abcdef"})
    assert values["damaged"] == AttributeValue(False, 0.75, {True: 0.25, False: 0.75}, 0.9)
    assert values["legs"].value == 2 and values["name"] == AttributeValue("abc", 0.8)
    region = RegionAttributes(values, "r1", (1, 2, 3, 4))
    assert region.to_row() == {
        "id": "r1",
        "bbox": [1, 2, 3, 4],
        "attributes": {
            "damaged": {
                "value": False,
                "probability": 0.75,
                "probabilities": {"yes": 0.25, "no": 0.75},
                "support": 0.9,
            },
            "legs": {"value": 2, "probability": 0.5, "probabilities": {"2": 0.5, "4": 0.5}, "support": 0.1},
            "name": {"value": "abc", "probability": 0.8},
        },
    }
    assert csv_fields(values)[4:8] == ["width", "height", "damaged", "damaged probability"]
    assert csv_row("a.png", region) == ["a.png", "r1", 1, 2, 3, 4, False, 0.75, 2, 0.5, "abc", 0.8]
    assert csv_fields(["width", "a", "a probability"])[6:] == [
        "attribute width",
        "attribute width probability",
        "a",
        "a probability",
        "attribute a probability",
        "attribute a probability probability",
    ]
    unsure = values_of(parse_schema(schema, unknown_below=0.6), reading, {"name": "a"})
    assert (unsure["damaged"].value, unsure["legs"].value, unsure["legs"].probability) == (False, None, 0.5)
