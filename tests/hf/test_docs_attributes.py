"""docs/attributes.md: from a folder of images and boxes to a table."""

import csv
from pathlib import Path

from pages import Page
from region_server import RegionCaptionServer

from pdlm_hf.regions.files import load_json, read_rows


def test_the_page(here):
    with RegionCaptionServer() as server:
        ran = Page("attributes.md").run(lambda text: text.replace("http://127.0.0.1:8000", server.url))
    rows = list(read_rows(Path("attributes.jsonl")))
    data = load_json(Path("coco.json"))
    schema = load_json(Path("schema.json"))["attributes"]
    assert [row["annotation_id"] for row in rows] == [a["id"] for a in data["annotations"]]
    with open("attributes.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["colour"] for row in table] == [row["attributes"]["colour"]["value"] for row in rows]
    captioned = load_json(Path("attributes.coco.json"))["annotations"]
    for annotation, row in zip(captioned, rows, strict=True):
        values = annotation["attributes"]
        assert values.keys() == schema.keys() and all(values[name] in schema[name] for name in schema)
        assert row["caption"] == "A {size} {colour} {texture} {shape}".format(**values)
        assert row["score"] == min(value["probability"] for value in row["attributes"].values())
    served = list(read_rows(Path("served.jsonl")))
    assert sorted(row["annotation_id"] for row in served) == sorted(row["annotation_id"] for row in rows)
    firsts = {name: choices[0] for name, choices in schema.items()}
    assert all({name: one["value"] for name, one in row["attributes"].items()} == firsts for row in served)
    first = next(r.stdout for r in ran if r.command.endswith("--csv")).splitlines()
    assert first[1].split(",")[2:] == ",".join(table[0].values()).split(",")[2:]
