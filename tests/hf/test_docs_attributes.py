"""docs/attributes.md: from a folder of images and boxes to a table."""

import csv
import json
from pathlib import Path

from pages import Page
from region_server import RegionCaptionServer

from pdlm_hf.regions.files import load_json, read_rows

ELSEWHERE = {
    "pdlm-eval attributes shapes": "tests/evalkit/test_attributes.py::"
    "test_shapes_are_a_benchmark_and_a_stopped_run_goes_on: 300 images",
}
SMALL = ["max_steps=1", "per_device_train_batch_size=2", "dataloader_num_workers=0", "logging_steps=1", "save_steps=1"]


def test_the_page(here):
    def change(text):
        text = text.replace("http://127.0.0.1:8000", server.url)
        small = " ".join(f"training.{setting}" for setting in SMALL)
        return f"{text} {small}" if text.startswith("pdlm-peft train attributes_shapes") else text

    with RegionCaptionServer() as server:
        ran = Page("attributes.md", ELSEWHERE).run(change)
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
    scores = json.loads(next(r.stdout for r in ran if "two.jsonl" in r.command))
    assert list(scores["attributes"]) == ["colour", "shape"] and scores["all_right"] >= 0.8
    assert (scores["n_regions"], scores["n_missing"]) == (len(rows), 0)
    taught = load_json(Path("runs/attributes/attributes.json"))["attributes"]
    assert taught == {**schema, "tone": ["bright", "dim"]}
    assert " bright " in ran[-1].stdout or " dim " in ran[-1].stdout
