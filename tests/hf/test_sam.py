"""Masks by SAM 2 and by the SAM models that come with a processor."""

import numpy as np
import pytest
import torch
from drawn import tiny_sam as tiny_first_sam
from PIL import Image
from tiny import make_image, tiny_sam
from transformers import SamModel, SamProcessor

from pdlm_hf.errors_pdlm import CheckpointError
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
