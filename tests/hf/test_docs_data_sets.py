"""Every command and Python block of docs/data-sets.md runs, in the order of the page, on files that the page makes."""

from pathlib import Path

import pytest
from pages import Page
from region_server import RegionCaptionServer

from pdlm_hf.regions.files import load_json, read_rows

RAY = "tests/hf/test_ray.py::test_the_same_as_the_local_engine: starting Ray takes longer than the rest of the page"

SUBMITTED = "tests/peft/test_corrected.py::test_there_and_back: a person submits the tasks"
FIFTYONE = "tests/formats/test_corrections.py::test_the_tools_import_correct_and_export: needs FiftyOne"


def captions_of(path):
    return {row["annotation_id"]: row["caption"] for row in read_rows(Path(path))}


def test_the_page(here):
    pytest.importorskip("openai")
    pytest.importorskip("supervision")
    elsewhere = {"pdlm-peft convert label-studio.json": SUBMITTED, "import fiftyone": FIFTYONE}
    page = Page("data-sets.md", {"pdlm batch coco.json --images s3://": RAY} | elsewhere)
    with RegionCaptionServer() as server:
        ran = page.run(lambda text: text.replace("http://127.0.0.1:8000", server.url))
    whole = captions_of("captions.jsonl")
    assert list(whole) == [a["id"] for a in load_json(Path("coco.json"))["annotations"]] and all(whole.values())
    assert whole == captions_of("parts.jsonl") == captions_of("large.jsonl") == captions_of("python.jsonl")
    assert list(captions_of("folder.jsonl").values()) == [whole[k] for k in sorted(whole)]
    assert all(text.endswith(" pixels") for text in captions_of("served.jsonl").values())
    labelme, yolo, named, label_map = (r.stdout for r in ran if "--regions" in r.command and "coco" not in r.command)
    assert labelme == yolo == named and len(labelme.splitlines()) == 6
    assert [line.split("  ")[1] for line in label_map.splitlines()] == [whole[k] for k in whole if k // 10 == 1]
    corrected = [region for row in read_rows(Path("corrected.jsonl")) for region in row["regions"]]
    assert [region["caption"] for region in corrected] == list(whole.values())
    for name in ("report.html", "sheet.png", "drawn.png", "steps.html", "steps.gif", "captions.coco.json"):
        assert (here / name).stat().st_size > 1000, name
