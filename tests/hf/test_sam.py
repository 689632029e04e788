"""Masks by SAM 2 and by the SAM models that come with a processor."""

import numpy as np
import pytest
import torch
from drawn import tiny_sam as tiny_first_sam
from PIL import Image
from tiny import make_image, tiny_sam
from transformers import SamModel, SamProcessor

from pdlm_hf.errors_pdlm import CheckpointError, SettingError
from pdlm_hf.regions import SelectionSettings
from pdlm_hf.regions.sam import Segmenter

BOXES = [[10.0, 20.0, 60.0, 70.0], [0.0, 0.0, 100.0, 30.0], [50.0, 40.0, 90.0, 79.0]]


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(make_image(0, 100, 80)[0])


@pytest.fixture(scope="module")
def first_sam(tmp_path_factory):
    """A folder with the first SAM, with random weights, and its processor."""
    return tiny_first_sam(tmp_path_factory.mktemp("sam"))


def grown(low, size):
    return (torch.nn.functional.interpolate(low, size, mode="bilinear", align_corners=False) > 0).numpy()


def pixels_of(image):
    pixels = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR), np.float32) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]


def test_boxes_of_sam_2(image, tmp_path):
    sam = tiny_sam()
    sam.save_pretrained(tmp_path)
    found = Segmenter.from_pretrained(str(tmp_path), "cpu").masks(image, BOXES)
    assert found.shape == (3, 80, 100) and found.dtype == bool
    boxes = torch.tensor(BOXES) * torch.tensor([0.64, 0.8, 0.64, 0.8])
    with torch.no_grad():
        out = sam(pixel_values=pixels_of(image), input_boxes=boxes[None], multimask_output=False)
    assert np.array_equal(found, grown(out.pred_masks[0], (80, 100))[:, 0])


def test_boxes_and_clicks_of_the_first_sam(image, first_sam):
    segmenter = Segmenter.from_pretrained(str(first_sam), "cpu")
    found = segmenter.masks(image, BOXES)
    assert found.shape == (3, 80, 100) and found.dtype == bool
    processor, model = SamProcessor.from_pretrained(first_sam), SamModel.from_pretrained(first_sam).eval()

    def masks_and_scores(**prompts):
        inputs = processor(images=image, return_tensors="pt", **prompts)
        with torch.no_grad():
            out = model(**inputs, multimask_output="input_points" in prompts)
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        return processor.image_processor.post_process_masks(out.pred_masks, *sizes)[0].numpy(), out.iou_scores

    assert np.array_equal(found, masks_and_scores(input_boxes=[BOXES])[0][:, 0])
    masks, scores = masks_and_scores(input_points=[[[20.5, 24.5]]])
    best = masks[0, scores[0, 0].argmax()]
    assert best.any() and np.array_equal(segmenter.mask(image, 20, 24), best)


def test_other_checkpoints_are_refused(tiny_checkpoint, tmp_path):
    for path in (tiny_checkpoint, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="cannot be loaded as a SAM model, for example facebook/sam2.1"):
            Segmenter.from_pretrained(str(path))


@pytest.mark.parametrize("version", ["2", "1"])
def test_everything(image, first_sam, tmp_path, version):
    """Three masks at each point of a grid, those kept that score well, with transformers' own processing of them."""
    if version == "2":
        tiny_sam().save_pretrained(tmp_path)
    segmenter = Segmenter.from_pretrained(str(tmp_path if version == "2" else first_sam), "cpu")
    segmenter.points_per_side, segmenter.points_per_batch = 3, 4
    everything = segmenter.propose(image, None, SelectionSettings(min_score=0, min_stability=0))
    assert len(everything) == 27
    places = [(x, y) for y in (40 / 3, 40, 200 / 3) for x in (50 / 3, 50, 250 / 3)]
    for k, (x, y) in enumerate(places):
        with torch.no_grad():
            if version == "2":
                point = torch.tensor([[[[x * 0.64, y * 0.8]]]])
                out = segmenter.model(pixel_values=pixels_of(image), input_points=point)
                masks = torch.nn.functional.interpolate(out.pred_masks[0], (80, 100), mode="bilinear")
            else:
                processor = SamProcessor.from_pretrained(first_sam)
                inputs = processor(images=image, input_points=[[[x, y]]], return_tensors="pt")
                out = segmenter.model(**inputs)
                sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
                masks = processor.post_process_masks(out.pred_masks, *sizes, binarize=False)[0]
        for found, logits, score in zip(everything[3 * k : 3 * k + 3], masks[0], out.iou_scores[0, 0], strict=True):
            assert np.array_equal(found.mask, (logits > 0).numpy())
            assert found.score == pytest.approx(float(score.clamp(0, 1)), abs=1e-5)
            stability = float((logits > 1).sum() / (logits > -1).sum().clamp(min=1))
            assert found.stability == pytest.approx(stability, abs=1e-2)
    scores = sorted(found.score for found in everything)
    stabilities = sorted(found.stability for found in everything)
    settings = SelectionSettings(min_score=scores[9], min_stability=stabilities[5])
    kept = [f for f in everything if f.score >= scores[9] and f.stability >= stabilities[5]]
    assert segmenter.propose(image, None, settings) == kept


def test_words_are_refused(image):
    with pytest.raises(SettingError, match="takes no words; for words: a SAM 3, for example facebook/sam3"):
        Segmenter(tiny_sam()).propose(image, ["dog"], SelectionSettings())
