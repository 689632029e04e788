"""Every command and Python block of docs/data-sets.md runs, in the order of the page."""

import json
from pathlib import Path

import numpy as np
import pytest
from pages import Page
from PIL import Image, ImageDraw
from region_server import RegionCaptionServer

from pdlm_hf import CHECKPOINT
from pdlm_hf.regions.files import read_rows

BOXES = [[30, 20, 50, 40], [90, 70, 60, 40]]  # as in the page's Python


def write_files(folder):
    """What the page speaks of: three images of two squares."""
    for name in ("images", "masks"):
        (folder / name).mkdir()
    labels = np.zeros((120, 160), np.uint8)
    images, annotations = [], []
    for k in (1, 2, 3):
        image = Image.new("RGB", (160, 120), (120, 120, 120))
        for n, (x, y, w, h) in enumerate(BOXES):
            ImageDraw.Draw(image).rectangle([x, y, x + w - 1, y + h - 1], fill=("red", "blue")[n])
            labels[y : y + h, x : x + w] = n + 1
            annotations.append({"id": 10 * k + n, "image_id": k, "bbox": BOXES[n], "category_id": 1})
        image.save(folder / "images" / f"{k}.jpg")
        Image.fromarray(labels).save(folder / "masks" / f"{k}.png")
        images.append({"id": k, "file_name": f"{k}.jpg", "width": 160, "height": 120})
    data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}
    (folder / "coco.json").write_text(json.dumps(data))
    Image.fromarray(labels).save(folder / "labels.png")
    shapes = [{"shape_type": "rectangle", "points": [[x, y], [x + w, y + h]]} for x, y, w, h in BOXES]
    (folder / "labelme.json").write_text(json.dumps({"shapes": shapes}))
    lines = [f"0 {(x + w / 2) / 160} {(y + h / 2) / 120} {w / 160} {h / 120}\n" for x, y, w, h in BOXES]
    (folder / "yolo.txt").write_text("".join(lines))


def said_by(path):
    return {row["annotation_id"]: row["caption"] for row in read_rows(Path(path))}


def test_the_page(tmp_path, monkeypatch):
    pytest.importorskip("openai")
    pytest.importorskip("supervision")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # of Ray's processes
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # everything on 127.0.0.1
    monkeypatch.setenv("RAY_ADDRESS", "local")  # not the cluster of another test
    monkeypatch.setenv("RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES", "100000000")
    pytest.importorskip("ray")
    write_files(tmp_path)

    def change(text):
        text = text.replace("http://127.0.0.1:8000", server.url).replace("MODEL", str(CHECKPOINT))
        return text.replace("s3://bucket/photos", f"file://{tmp_path}/images")

    with RegionCaptionServer() as server:
        ran = Page("data-sets.md").run(change)
    whole = said_by("captions.jsonl")
    assert len(whole) == 6 and "red" in whole[10] and "blue" in whole[11]
    assert whole == said_by("parts.jsonl") == said_by("large.jsonl") == said_by("python.jsonl") == said_by("ray.jsonl")
    assert list(said_by("folder.jsonl").values()) == [whole[k] for k in sorted(whole)]
    assert set(said_by("served.jsonl").values()) == {"2000 pixels", "2400 pixels"}
    shown = {r.stdout for r in ran if "--regions" in r.command and "coco" not in r.command}
    assert len(shown) == 1  # the same two regions from LabelMe, YOLO and a label map
    for name in ("report.html", "sheet.png", "drawn.png", "steps.html", "steps.gif", "captions.coco.json"):
        assert (tmp_path / name).stat().st_size > 1000, name
