"""Files that the formats' own tools have written (`write.py`) give the regions of `scene.py`.

Those in `files` are read by every run; the slow test lets the tools write them again.
"""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from scene import BOXES, CLASSES, HEIGHT, LABELS, MASKS, NAME, SCORE, SLANTED, UPLOADED, WIDTH, block

from pdlm_hf.errors_pdlm import RegionError
from pdlm_hf.regions.readers import read_region_file
from pdlm_hf.regions.region import parse_regions

ROOT = Path(__file__).parents[2]
WRITTEN = Path(__file__).parent / "files"
TOOLS = ROOT / ".venv-formats" / "bin" / "python"
FILES = sorted(path.relative_to(WRITTEN) for path in WRITTEN.glob("*/*") if path.is_file())
# What the content of a file does not show.
OPTIONS = {("globox", "voc-boxes.xml"): {"format": "voc-corners"}}  # integers, and no source
REFUSED = {("ultralytics", "yolo-keypoints-boxes.txt"): {"format": "yolo-keypoints"}}
# Label Studio's converter cuts the fractions off: 4 / 71 * 100 / 100 * 71 is 3.99...
CUT = {("label-studio-sdk", "voc-boxes.xml"): [[5, 3, 30, 22], BOXES[1], [63, 33, 33, 38]]}
NO_SIZE = [("globox", "via-boxes.json"), ("datumaro", "voc-boxes.xml")]
UPLOADS = ("coco", "voc")  # exports of Label Studio that have the name of the upload; the others were tried with both


def check(path: Path, tool: str) -> None:
    """Read a file, and compare what it says with the scene."""
    own = (tool, path.name)
    uploaded = tool == "label-studio-sdk" and path.name.startswith(UPLOADS)
    image = UPLOADED if uploaded else NAME
    if own in REFUSED:
        with pytest.raises(RegionError, match=f"--format {REFUSED[own]['format']}"):
            read_region_file(path, image, WIDTH, HEIGHT)
    found = read_region_file(path, image, WIDTH, HEIGHT, **OPTIONS.get(own, REFUSED.get(own, {})))
    regions = parse_regions(found, WIDTH, HEIGHT)
    if path.stem.endswith("masks"):  # formats of labels sort them by class, or by colour
        regions.sort(key=lambda region: region.bbox)
    expected = [block(*box) for box in CUT.get(own, BOXES)] if path.stem.endswith("boxes") else MASKS
    for region, mask in zip(regions, expected, strict=len(regions) != 4):
        np.testing.assert_array_equal(region.mask, mask)
    assert len(regions) == 3 + path.stem.endswith("polygons")
    if len(regions) == 4:
        np.testing.assert_allclose(found[3]["segmentation"][0], np.ravel(SLANTED), atol=0.0051)  # two digits
    if "category" in found[0] and path.suffix != ".png":
        assert [region["category"] for region in found[:3]] in (LABELS, [str(CLASSES.index(name)) for name in LABELS])
    if "scored" in path.stem:
        assert [region["score"] for region in found] == [SCORE] * 3
    if "track" in path.stem:
        assert [region["id"] for region in found] == [1, 2, 3]
    if tool == "label-studio-sdk" and path.name.startswith("json"):
        assert read_region_file(path, UPLOADED, WIDTH, HEIGHT) == found
    if own not in NO_SIZE and path.suffix != ".txt":
        with pytest.raises(RegionError, match=f"{WIDTH}"):
            parse_regions(read_region_file(path, image, WIDTH + 4, HEIGHT), WIDTH + 4, HEIGHT)


def tool_of(folder: Path) -> str:
    return folder.name.rpartition("-")[0]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_of_the_tools(path):
    check(WRITTEN / path, tool_of(path.parent))


def test_every_tool_has_its_files():
    assert sorted({tool_of(path.parent) for path in FILES}) == [
        "datumaro", "globox", "label-studio-sdk", "labelme", "supervision", "ultralytics"
    ]  # fmt: skip


@pytest.mark.slow
def test_the_tools_write_them_again(tmp_path):
    """In their own environment: `make .venv-formats/ready`."""
    assert TOOLS.exists(), "the environment of the tools is missing: make .venv-formats/ready"
    script = Path(__file__).parent / "write.py"
    subprocess.run([TOOLS, script, tmp_path / "out"], check=True, capture_output=True, timeout=600)
    written = sorted(path for path in (tmp_path / "out").glob("*/*") if path.is_file())
    names = {(tool_of(path.parent), path.name) for path in written}
    assert names == {(tool_of(path.parent), path.name) for path in FILES}
    for path in written:
        check(path, tool_of(path.parent))
