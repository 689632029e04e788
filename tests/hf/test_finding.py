"""Segmenters by words and detectors of transformers, with random weights; and what is said where one is missing."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_image, tiny_detector, tiny_sam, tiny_sam3, tiny_word_detector
from transformers import AutoTokenizer, pipeline
from transformers.models.sam3.modeling_sam3 import Sam3Model

from pdlm_hf.errors_pdlm import CheckpointError, SettingError
from pdlm_hf.regions import FoundRegion, RegionFinder, Segmenter, SelectionSettings, load_finder, load_segmenter

ALL = SelectionSettings(min_score=0, min_stability=0, max_overlap=1, min_area=0, max_area=1)


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(make_image(0, 100, 80)[0])


@pytest.fixture(scope="module")
def sam3(tmp_path_factory):
    return tiny_sam3(tmp_path_factory.mktemp("sam3"))


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return tiny_detector(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def word_detector(tmp_path_factory):
    return tiny_word_detector(tmp_path_factory.mktemp("words"))


def test_words_by_sam_3(image, sam3):
    found = load_segmenter(str(sam3), "cpu", words=True).propose(image, ["dog", "red car"], ALL)
    model, tokenizer = Sam3Model.from_pretrained(sam3).eval(), AutoTokenizer.from_pretrained(sam3)
    pixels = np.asarray(image.resize((56, 56), Image.Resampling.BILINEAR), np.float32) / 127.5 - 1
    expected = []
    for name in ("dog", "red car"):
        words = tokenizer(name, padding="max_length", max_length=32, return_tensors="pt")
        with torch.no_grad():
            out = model(pixel_values=torch.tensor(pixels).permute(2, 0, 1)[None], **words)
        scores = (out.pred_logits.sigmoid() * out.presence_logits.sigmoid())[0]
        shares = torch.nn.functional.interpolate(out.pred_masks.sigmoid(), (80, 100), mode="bilinear")[0]
        expected += [(name, float(score), (mask > 0.5).numpy()) for mask, score in zip(shares, scores, strict=True)]
    assert [region.name for region in found] == ["dog"] * 6 + ["red car"] * 6
    for region, (_, score, mask) in zip(found, expected, strict=True):
        assert region.score == pytest.approx(score, abs=1e-5)
        assert (region.mask != mask).sum() <= 2
    middle = sorted(region.score for region in found)[6]
    kept = load_segmenter(str(sam3), "cpu", words=True).propose(
        image, ["dog", "red car"], ALL.model_copy(update={"min_score": middle})
    )
    assert kept == [region for region in found if region.score >= middle]


def test_boxes_of_fixed_classes(image, detector):
    raw = pipeline("object-detection", model=str(detector), device="cpu")(image, threshold=0.0)
    finder = load_finder(detector=str(detector), settings=ALL, device="cpu")
    found = finder.proposer.propose(image, None, ALL)
    assert [(r.name, r.score) for r in found] == [(box["label"], box["score"]) for box in raw] and len(found) == 5
    for region, box in zip(found, (row["box"] for row in raw), strict=True):
        mask = np.zeros((80, 100), bool)
        mask[max(0, box["ymin"]) : max(0, box["ymax"]), max(0, box["xmin"]) : max(0, box["xmax"])] = True
        assert np.array_equal(region.mask, mask)
    assert {r.name for r in finder.proposer.propose(image, ["Dog"], ALL)} == {"Dog"}
    # by default those it is sure of
    assert [
        r.score
        for r in load_finder(detector=str(detector), device="cpu").proposer.propose(image, None, SelectionSettings())
    ] == [row["score"] for row in raw if row["score"] > 0.5]
    with pytest.raises(SettingError, match="does not know 'bird'. Its classes: cat, dog, car. One of words"):
        finder.proposer.propose(image, ["dog", "bird"], ALL)


def test_boxes_of_words(image, word_detector):
    raw = pipeline("zero-shot-object-detection", model=str(word_detector), device="cpu")(
        image, candidate_labels=["red car", "dog"], threshold=0.0
    )
    finder = load_finder(["red car", "dog"], detector=str(word_detector), settings=ALL, device="cpu")
    found = finder.proposer.propose(image, finder.names, ALL)
    assert [(r.name, r.score) for r in found] == [(box["label"], box["score"]) for box in raw]
    assert {r.name for r in found} == {"red car", "dog"}
    with pytest.raises(SettingError, match="This detector finds what words name: pass some"):
        finder.proposer.propose(image, None, ALL)


def test_boxes_become_masks(image, detector, tmp_path):
    tiny_sam().save_pretrained(tmp_path)
    boxes = load_finder(detector=str(detector), settings=ALL, device="cpu")(image)
    finder = load_finder(segmenter=str(tmp_path), detector=str(detector), settings=ALL, device="cpu")
    found = finder(image)
    assert isinstance(finder.refiner, Segmenter) and len(found) == len(boxes) == 5
    corners = [[float(k) for k in (x, y, x + w, y + h)] for x, y, w, h in (r.as_region(0).bbox for r in boxes)]
    masks = finder.refiner.masks(image, corners)
    by_score = {region.score: region for region in found}
    for box, mask in zip(boxes, masks, strict=True):
        refined = by_score[box.score]
        assert refined.name == box.name
        assert np.array_equal(refined.mask, mask if mask.any() else box.mask)
    assert any(not np.array_equal(by_score[box.score].mask, box.mask) for box in boxes)


class Fixed:
    """Proposes what it was given."""

    min_score = 0.6

    def __init__(self, found):
        self.found = found

    def propose(self, image, names, settings):
        self.seen = names, settings.min_score
        return self.found


def half(score, name=None):
    mask = np.zeros((80, 100), bool)
    mask[:40] = True
    return FoundRegion.of_mask(mask, score, name=name)


def test_the_score_of_the_kind_of_model(image):
    source = Fixed([half(0.59)])
    assert RegionFinder(source)(image) == [] and source.seen == (None, 0.6)
    assert RegionFinder(source, settings={"min_score": 0.5})(image) == source.found
    assert RegionFinder(source, [" dog ", "dog", "cat"], {"min_score": 0})(image) == source.found
    assert source.seen == (["dog", "cat"], 0)


@pytest.mark.parametrize("names", [[], [""], ["dog", " "], [3], ""])
def test_names_without_words(names):
    with pytest.raises(SettingError, match="Names of what to find are words, for example"):
        RegionFinder(Fixed([]), names)


def test_an_empty_box_is_no_fault_where_boxes_become_masks(image):
    nothing = FoundRegion.of_mask(np.zeros((80, 100), bool), 0.9)
    assert len(RegionFinder(Fixed([nothing, half(0.9)]), refiner=Segmenter(tiny_sam()))(image)) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {},
            "facebook/sam2.1-hiera-large: the segmenter cannot be .* Hugging Face hub, about 0.9 GB. Without it",
        ),
        ({"names": ["dog"]}, "facebook/sam3: the segmenter .* about 3.4 GB; accept its licence there"),
        ({"detector": "facebook/detr-resnet-50"}, "facebook/detr-resnet-50: the detector cannot .* about 0.17 GB"),
        ({"segmenter": "./none"}, "./none: there is no such folder. A segmenter is a folder or a hub id."),
        ({"segmenter": ""}, "'': there is no such folder"),
        ({"detector": __file__}, "test_finding.py: there is no such folder. A detector is a folder or a hub id."),
        ({"segmenter": "somebody/sam"}, r"somebody/sam: .* Hugging Face hub. Without it: your own regions \(--mask"),
    ],
)
def test_a_model_that_is_not_here(arguments, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=message):
        load_finder(**arguments)


def test_other_models_are_refused(tiny_checkpoint, detector, sam3, tmp_path):
    with pytest.raises(CheckpointError, match="wanted from this folder. Without it"):
        load_segmenter(str(tmp_path))
    with pytest.raises(CheckpointError, match="a yolos takes no words; for words: --segmenter facebook/sam3"):
        load_segmenter(str(detector), words=True)
    with pytest.raises(CheckpointError, match="cannot be loaded as a SAM model"):
        load_segmenter(str(tiny_checkpoint))
    with pytest.raises(CheckpointError, match="the detector cannot be loaded"):
        load_finder(detector=str(sam3))
    with pytest.raises(SettingError, match="SAM 3 masks what words name"):
        load_segmenter(str(sam3), words=True).propose(Image.new("RGB", (8, 8)), None, ALL)
