"""Everything on docs/fine-tuning-data.md runs, in the order of the page."""

import json
import re
from pathlib import Path

import numpy as np
from drawn import as_coco, drawn_rows, read_jsonl, tiny_sam, write_jsonl
from judge_server import JudgeServer, text_of
from pages import Page
from PIL import Image


def write_files(folder):
    """The files the page speaks of, from drawn images."""
    rows, images = drawn_rows(folder / "images", 3)
    data = as_coco(rows, images)
    write_jsonl(folder / "regions.jsonl", rows)
    masks = []
    for row, image in zip(rows, images, strict=True):
        found = zip(row["regions"], image.figures, strict=True)
        regions = [{"id": r["id"], "segmentation": r["segmentation"], "category": f.shape} for r, f in found]
        masks.append({**row, "regions": regions})
    write_jsonl(folder / "masks.jsonl", masks)
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A box"}]
    write_jsonl(folder / "chat.jsonl", [{"image": row["image"], "conversations": talk} for row in rows])
    (folder / "instances.json").write_text(json.dumps(data))
    lines = [f'{a["id"]},"{a["caption"]}"' for a in data["annotations"]]
    (folder / "captions.csv").write_text("\n".join(["id,caption", *lines]))
    for name in ("out", "panoptic", "dam"):
        (folder / name).mkdir()
    annotations, dam, gar, reference = [], {}, [], []
    for k, (row, image) in enumerate(zip(rows, images, strict=True)):
        ids = np.zeros(image.masks[0].shape, np.uint8)
        for n, mask in enumerate(image.masks):
            ids[mask] = n + 1
        Image.fromarray(np.stack([ids, ids * 0, ids * 0], -1)).save(folder / "panoptic" / f"{k}.png")
        segments = [{"id": n + 1, "category_id": 0} for n in range(len(image.masks))]
        annotations.append({"image_id": k + 1, "file_name": f"{k}.png", "segments_info": segments})
        masks, captions = ([r[name] for r in row["regions"]] for name in ("segmentation", "caption"))
        pairs = enumerate(zip(masks, captions, strict=True))
        dam[str(k)] = [{"ann_id": n, "image": row["image"], "mask_rle": m, "caption": c} for n, (m, c) in pairs]
        turns = [{"from": "gpt", "value": caption} for caption in captions]
        gar.append({"image": row["image"], "mask_rle": masks, "conversations": turns})
        reference.append({"image": row["image"], "mask_rles": masks, "captions": captions})
    (folder / "panoptic.json").write_text(json.dumps({**data, "annotations": annotations}))
    (folder / "dam" / "annotations.json").write_text(json.dumps(dam))
    (folder / "gar.json").write_text(json.dumps(gar))
    (folder / "reference.json").write_text(json.dumps(reference))
    return rows


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    rows = write_files(tmp_path)
    tiny_sam(tmp_path / "sam")
    with JudgeServer(lambda body: "Yes" if "annotated" in text_of(body) else "A figure on grey ground.") as server:

        def change(text):  # random weights find nothing, so the remasking accepts everything
            text = re.sub(r"http://127.0.0.1:\d+/v1", server.url, text).replace("facebook/sam-vit-huge", "sam")
            return text.replace("--min-iou 0.5", "--min-iou 0")

        Page("fine-tuning-data.md").run(change)
    regions = [region for row in rows for region in row["regions"]]
    for name in ("instances", "names", "panoptic", "dam", "gar", "reference"):
        assert len([r for row in read_jsonl(tmp_path / "out" / f"{name}.jsonl") for r in row["regions"]]) == len(
            regions
        )
    clean = [r for row in read_jsonl(tmp_path / "clean.jsonl") for r in row["regions"]]
    assert {r["caption"] for r in clean} == {"A figure on grey ground."} and len(clean) == len(regions)
    assert (tmp_path / "samples.png").exists() and len(read_jsonl(tmp_path / "held_out.jsonl")) == 1


def test_the_quoted_time_is_the_measured_one():
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "validate_rows.json"
    found = json.loads(results.read_text())
    said = f"{found['rows']:,} rows with {found['regions']:,} regions in {found['seconds']:.0f} s"
    page = (Path(__file__).parents[2] / "docs" / "fine-tuning-data.md").read_text(encoding="utf-8")
    assert said in " ".join(page.split())
