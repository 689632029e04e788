"""Annotation tools import captions and export them corrected, with the same masks: by their own code."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from correct import CORRECTED
from PIL import Image
from scene import HEIGHT, MASKS, WIDTH
from test_formats import TOOLS

from pdlm_hf.regions.exports import export_captions
from pdlm_hf.regions.files import append_rows
from pdlm_hf.regions.region import Region
from pdlm_peft.conversion import convert
from pdlm_peft.data import RegionDataset

NAMES = ["a street/1.png", "b.png"]
TEXTS = ["a red kite", 'two\nlines & <b> "quoted"', "eine Übung 中文"]
EXPORTED = {"label_studio": "label-studio.json", "cvat": "cvat.xml", "fiftyone": "fiftyone.json"}


@pytest.mark.slow
def test_the_tools_import_correct_and_export(tmp_path):
    """In their own environment: `make .venv-formats/ready`."""
    assert TOOLS.exists(), "the environment of the tools is missing: make .venv-formats/ready"
    images, rows = tmp_path / "cvat" / "images", tmp_path / "captions.jsonl"
    for number, name in enumerate(NAMES):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), "grey").save(images / name)
        regions = [Region(k, mask) for k, mask in enumerate(MASKS)]
        append_rows(
            rows,
            [
                {"image_id": number, "annotation_id": region.id, "file_name": name, "caption": text, "score": 0.5}
                | {"bbox": region.bbox, "segmentation": region.segmentation}
                for region, text in zip(regions, TEXTS, strict=True)
            ],
        )
    export_captions(rows, tmp_path / "tasks.json", "label-studio")
    export_captions(rows, tmp_path / "cvat" / "images.xml", "cvat")
    export_captions(rows, tmp_path / "dataset", "fiftyone")
    script = Path(__file__).parent / "correct.py"
    subprocess.run([TOOLS, script, tmp_path], check=True, capture_output=True, timeout=600)
    for tool, name in EXPORTED.items():
        read = np.load(tmp_path / f"{tool}.npz")
        for image in NAMES:
            for k, (mask, text) in enumerate(zip(MASKS, TEXTS, strict=True)):
                np.testing.assert_array_equal(read[f"{image} {k} mask"], mask)
                assert read[f"{image} {k} caption"] == text
        assert len(read.files) == 2 * 2 * len(MASKS)
        convert(tmp_path / name, tmp_path / f"{tool}.jsonl", tool.replace("_", "-"), images)
        for row in RegionDataset(tmp_path / f"{tool}.jsonl", images):
            assert [region["caption"] for region in row["regions"]] == [
                CORRECTED,
                *(" ".join(t.split()) for t in TEXTS[1:]),
            ]
            for region, mask in zip(row["regions"], MASKS, strict=True):
                np.testing.assert_array_equal(region["mask"], mask)
