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
CHOICES = ["small", "middle-sized", "größer", "large & wide"]
EXPORTED = {"label_studio": "label-studio.json", "cvat": "cvat.xml", "fiftyone": "fiftyone.json"}


def written(folder, attributes):
    """Images and the files of every tool, with captions, or with these values of two attributes."""
    images, rows = folder / "cvat" / "images", folder / "captions.jsonl"
    for number, name in enumerate(NAMES):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), "grey").save(images / name)
        for k, (mask, text) in enumerate(zip(MASKS, TEXTS, strict=True)):
            region = Region(k, mask)
            row = {"image_id": number, "annotation_id": k, "file_name": name, "caption": text, "score": 0.5}
            if attributes:
                read = {"value": attributes[k], "probability": 0.5, "probabilities": dict.fromkeys(CHOICES, 0.25)}
                row["attributes"] = {"how big": read, "note": {"value": text.split()[0], "probability": 0.5}}
            append_rows(rows, [row | {"bbox": region.bbox, "segmentation": region.segmentation}])
    export_captions(rows, folder / "tasks.json", "label-studio")
    export_captions(rows, folder / "cvat" / "images.xml", "cvat")
    export_captions(rows, folder / "dataset", "fiftyone")
    return images


@pytest.mark.slow
@pytest.mark.parametrize("given", [(), ("how big", "large & wide")])
def test_the_tools_import_correct_and_export(tmp_path, given):
    """In their own environment: `make .venv-formats/ready`."""
    assert TOOLS.exists(), "the environment of the tools is missing: make .venv-formats/ready"
    values = CHOICES[:3] if given else TEXTS
    images = written(tmp_path, values if given else None)
    script = Path(__file__).parent / "correct.py"
    subprocess.run([TOOLS, script, tmp_path, *given], check=True, capture_output=True, timeout=600)
    for tool, name in EXPORTED.items():
        read = np.load(tmp_path / f"{tool}.npz")
        for image in NAMES:
            for k, (mask, text) in enumerate(zip(MASKS, values, strict=True)):
                np.testing.assert_array_equal(read[f"{image} {k} mask"], mask)
                assert read[f"{image} {k} caption"] == text
        assert len(read.files) == 2 * 2 * len(MASKS)
        convert(tmp_path / name, tmp_path / f"{tool}.jsonl", tool.replace("_", "-"), images)
        for row in RegionDataset(tmp_path / f"{tool}.jsonl", images):
            if given:
                expected = [CHOICES[3], *values[1:]]
                assert [region["attributes"]["how big"] for region in row["regions"]] == expected
                assert [region["attributes"]["note"] for region in row["regions"]] == [t.split()[0] for t in TEXTS]
                assert {region["caption"] for region in row["regions"]} == {None}
            else:
                expected = [CORRECTED, *(" ".join(text.split()) for text in TEXTS[1:])]
                assert [region["caption"] for region in row["regions"]] == expected
            for region, mask in zip(row["regions"], MASKS, strict=True):
                np.testing.assert_array_equal(region["mask"], mask)
