"""From an image to captions without a mask: `captioner.everything`, `captioner.find`, and their options of `pdlm`."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from tiny import make_image, tiny_detector, tiny_sam, tiny_sam3
from typer.testing import CliRunner

from pdlm_hf import RegionCaptioner
from pdlm_hf.captioning import FoundCaption
from pdlm_hf.cli.main import app
from pdlm_hf.errors_pdlm import CheckpointError, SettingError
from pdlm_hf.regions import FoundRegion, Segmenter
from pdlm_hf.shapes.scenes import read

SHAPES = Path(__file__).parents[2] / "examples" / "shapes.png"
SOME = {
    "min_score": 0,
    "min_stability": 0,
    "min_area": 0,
    "max_area": 1,
    "max_overlap": 1,
    "parts": True,
    "max_regions": 8,
}
FAST = {"max_new_tokens": 4, "max_denoising_steps": 2}
SELECT = [f"--select={name}={value}" for name, value in SOME.items() if name not in ("parts", "max_regions")]


@pytest.fixture(scope="module")
def captioner(tiny_checkpoint):
    return RegionCaptioner.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(make_image(0, 100, 80)[0])


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam2")
    tiny_sam().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def small_grid(monkeypatch):
    monkeypatch.setattr(Segmenter, "points_per_side", 4)


def test_everything_in_several_passes(captioner, image, sam, monkeypatch):
    """Eight regions are more than a pass holds; their captions are those of the same masks given."""
    assert captioner.model.config.num_region_prompts == 6
    found = captioner.everything(image, sam, settings=SOME, **FAST)
    assert len(found) == 8 and all(isinstance(caption, FoundCaption) for caption in found)
    areas = [int(caption.mask.sum()) for caption in found]
    assert areas == sorted(areas, reverse=True)
    given = captioner.caption(image, [caption.mask for caption in found], **FAST)
    assert [(c.text, c.score, c.id, c.bbox) for c in found] == [(c.text, c.score, c.id, c.bbox) for c in given]
    row = found[0].to_row()
    assert np.array_equal(coco_mask.decode(row["segmentation"]).astype(bool), found[0].mask)
    assert row["mask_score"] == round(found[0].mask_score, 4) and "name" not in row
    assert "<svg" in found._repr_html_() or "<img" in found._repr_html_()
    # pass by pass, with fewer masks in memory
    monkeypatch.setattr("pdlm_hf.captioning.captioner.MASK_PIXELS", 1)
    again = captioner.everything(image, sam, settings=SOME, **FAST)
    assert [(c.text, c.id) for c in again] == [(c.text, c.id) for c in found]
    # the segmenter stays loaded
    assert captioner.finder(segmenter=sam).proposer is captioner.finder(segmenter=sam, settings=SOME).proposer


def test_names(captioner, image, tmp_path):
    sam3 = tiny_sam3(tmp_path)
    found = captioner.find(image, ["dog", "red car"], sam3, settings=SOME | {"max_regions": 5}, **FAST)
    assert len(found) == 5 and {caption.name for caption in found} == {"dog", "red car"}
    assert {caption.to_row()["name"] for caption in found} == {"dog", "red car"}
    with pytest.raises(SettingError, match="Names of what to find are words"):
        captioner.find(image, [], sam3)


def test_a_detector_and_its_boxes_as_masks(captioner, image, sam, tmp_path):
    detector = tiny_detector(tmp_path)
    boxes = captioner.everything(image, detector=detector, settings=SOME, **FAST)
    assert {caption.name for caption in boxes} <= {"cat", "dog", "car"} and len(boxes) == 5
    for caption in boxes:
        x, y, w, h = caption.bbox
        assert caption.mask.sum() == w * h
    masks = captioner.everything(image, sam, detector, SOME, **FAST)
    assert {c.mask_score for c in masks} == {c.mask_score for c in boxes}
    assert [c.mask.sum() for c in masks] != [c.mask.sum() for c in boxes]


def test_nothing_is_found(captioner, image):
    class Nothing:
        min_score = 0.5

        def propose(self, image, names, settings):
            return [FoundRegion.of_mask(np.zeros((image.height, image.width), bool))]

    assert captioner.everything(image, Nothing()) == [] and captioner.find(image, ["dog"], Nothing()) == []


def test_the_default_is_not_here(captioner, image, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="facebook/sam2.1-hiera-large: the segmenter cannot be loaded"):
        captioner.everything(image)
    with pytest.raises(SettingError, match="min_score: Input should be less"):  # before anything is loaded
        captioner.everything(image, settings={"min_score": 2})


def pdlm(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_offline():
    """The embedded checkpoint and the stand-in: a drawing, no masks, everything described."""
    result = pdlm("caption", SHAPES, "--everything")
    assert result.exit_code == 0, result.output
    assert "regions are found by the stand-in, which knows drawn shapes only" in result.stderr
    captions = [line.split("  ")[1] for line in result.stdout.splitlines()]
    figures = [read(caption) for caption in captions]
    assert [(f.colour, f.shape) for f in figures] == [
        ("orange", "circle"),
        ("blue", "cross"),
        ("green", "square"),
        ("black", "square"),
        ("white", "square"),
        ("white", "triangle"),
    ]
    found = json.loads(pdlm("caption", SHAPES, "--find", "blue cross", "--find", "square", "--json").stdout)["regions"]
    assert [(row["name"], row["bbox"][:2]) for row in found][:2] == [("blue cross", [66, 93]), ("square", [101, 12])]
    assert len(found) == 4 and all(row["segmentation"]["size"] == [151, 161] for row in found)
    named = pdlm("caption", SHAPES, "--find", "blue cross")
    assert named.stdout == "1  blue cross: One spotted cross, big and blue.  (1.00)\n"
    assert len(pdlm("caption", SHAPES, "--everything", "--max-regions", 2).stdout.splitlines()) == 2


def test_command_with_models(tiny_checkpoint, image, sam, tmp_path):
    image.save(tmp_path / "a.png")
    rest = [
        "--model",
        tiny_checkpoint,
        "--max-new-tokens",
        4,
        "--steps",
        2,
        "--max-regions",
        3,
        "--parts",
        "--json",
        *SELECT,
    ]
    result = pdlm("caption", tmp_path / "a.png", "--everything", "--segmenter", sam, *rest)
    assert result.exit_code in (0, 1), result.output
    assert len(json.loads(result.stdout)["regions"]) == 3 and "stand-in" not in result.stderr
    detector = tiny_detector(tmp_path / "detector")
    rest += ["--draw", tmp_path / "drawn.png", "--segmenter-device", "cpu"]
    result = pdlm("caption", tmp_path / "a.png", "--detector", detector, "--find", "dog", *rest)
    assert {row["name"] for row in json.loads(result.stdout)["regions"]} == {"dog"}
    assert (tmp_path / "drawn.png").stat().st_size > 100


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--everything", "--find", "dog"], "--everything and --find exclude each other"),
        (["--parts"], "--parts is for --everything, --find or --detector; give one of these too"),
        (["--select", "min_area=0.1"], "--select is for --everything"),
        (["--everything", "--box", "1,1,5,5"], "Regions are found, or given: leave out --mask, --box and --regions"),
        (["--everything", "--select", "min_area"], "--select min_area: expected NAME=VALUE"),
        (["--everything", "--select", "area=1"], "area: there is no such setting of found regions, only min_score"),
        (["--everything", "--max-regions", "0"], "max_regions: Input should be greater than or equal to 1, got 0"),
        (["--everything", "--mask", "none.png", "--segmenter", "no/such"], "Regions are found, or given"),
        (["--everything", "--model", "./none", "--segmenter", "no/such"], "./none: there is no such folder"),
        (["--find", "dog"], "knows the colours red, green, .* not 'dog'"),
        (["--everything", "--segmenter", "no/such"], "no/such: the segmenter cannot be loaded"),
    ],
)
def test_wrong_calls(arguments, message, monkeypatch):

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(RegionCaptioner, "from_pretrained", None)  # all is said before the captioner is loaded
    result = pdlm("caption", SHAPES, *arguments)
    assert result.exit_code == 2 and re.search(message, result.stderr), result.output
    missing = pdlm("caption", "none.png", "--everything", "--segmenter", "no/such")  # cheap, so it comes first
    assert missing.exit_code == 2 and "none.png: no such file" in missing.stderr


def test_nothing_found_is_said():
    result = pdlm("caption", SHAPES, "--find", "yellow star")
    assert result.exit_code == 1
    assert f"nothing named yellow star was found in {SHAPES} with a score of 0.5 or more" in result.stderr
    assert "lower them: --select min_score=0.2 --select min_area=0.0001" in result.stderr
