"""The stand-in segmenter: it finds the figures of drawn scenes, and their captions are those with the drawn masks."""

from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pdlm_hf import RegionCaptioner
from pdlm_hf.errors_pdlm import ImageError, SettingError
from pdlm_hf.regions import RegionFinder
from pdlm_hf.shapes import ShapesSegmenter
from pdlm_hf.shapes.scenes import SHAPES_DOMAIN, paint

SCENES = 20


def scene(seed):
    """A scene all of whose figures are described: one to six of them on one to six tiles. Figures touch and overlap,
    but not those of one colour."""
    rng = np.random.default_rng((3, seed))
    count = 1 + seed % 6
    columns, rows = [(1, 1), (2, 1), (2, 2), (2, 2), (3, 2), (2, 3)][seed % 6]
    while True:
        scale = rng.uniform(0.9, 1.35)
        drawn = paint(rng, round(64 * columns * scale), round(64 * rows * scale), scale, count)
        pairs = combinations(zip(drawn.figures, map(dilated, drawn.masks), strict=True), 2)
        if not any(a.colour == b.colour and (one & other).any() for (a, one), (b, other) in pairs):
            return drawn


def dilated(mask):
    """The mask, one pixel wider on each side."""
    return np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(3))) > 0


@pytest.fixture(scope="module")
def captioner():
    return RegionCaptioner.from_pretrained()


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


@pytest.mark.parametrize("seed", range(SCENES))
def test_every_figure_is_found_and_described(captioner, seed):
    drawn = scene(seed)
    assert len(drawn.masks) == 1 + seed % 6
    found = captioner.everything(drawn.image)
    assert len(found) == len(drawn.masks)
    assert [caption.mask.sum() for caption in found] == sorted((c.mask.sum() for c in found), reverse=True)
    with_masks = captioner.caption(drawn.image, drawn.masks)
    for mask, given in zip(drawn.masks, with_masks, strict=True):
        overlaps = [iou(mask, caption.mask) for caption in found]
        assert max(overlaps) > 0.95, (seed, given)
        assert found[int(np.argmax(overlaps))].text == given.text
    # a word for the form and one for the colour find the same
    names = [f"{figure.colour} {figure.shape}" for figure in drawn.figures]
    named = RegionFinder(ShapesSegmenter(), names)(drawn.image)
    for name, mask in zip(names, drawn.masks, strict=True):
        assert max(iou(mask, region.mask) for region in named if region.name == name) > 0.95


def test_a_figure_in_a_box():
    drawn = scene(3)
    boxes = [[float(x), float(y), float(x + w), float(y + h)] for x, y, w, h in map(bbox, drawn.masks)]
    masks = ShapesSegmenter().masks(drawn.image, [*boxes, [0.0, 0.0, 1.0, 1.0]])
    assert all(iou(mask, found) > 0.95 for mask, found in zip(drawn.masks, masks, strict=False))
    assert masks.shape == (5, drawn.image.height, drawn.image.width) and not masks[4].any()


def bbox(mask):
    y, x = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return x[0], y[0], x[-1] - x[0] + 1, y[-1] - y[0] + 1


def test_a_large_drawing():
    drawn = scene(3)
    size = drawn.image.width * 7, drawn.image.height * 7
    found = RegionFinder(ShapesSegmenter())(drawn.image.resize(size, Image.Resampling.NEAREST))
    assert len(found) == len(drawn.masks)
    for mask in drawn.masks:
        large = np.kron(mask, np.ones((7, 7), bool))
        assert max(iou(large, region.mask) for region in found) > 0.8


def test_words():
    drawn = scene(5)
    finder = RegionFinder(ShapesSegmenter(), list(SHAPES_DOMAIN.colours))
    found = finder(drawn.image)
    assert sorted(r.name for r in found) == sorted(figure.colour for figure in drawn.figures)
    assert len(RegionFinder(ShapesSegmenter(), ["the figures"])(drawn.image)) == len(drawn.figures)
    with pytest.raises(
        SettingError, match="'red dog': the stand-in segmenter knows the colours red, green.* not 'dog'"
    ):
        RegionFinder(ShapesSegmenter(), ["circle", "red dog"])(drawn.image)


def test_an_empty_drawing_and_a_photograph():
    grey = np.full((64, 64, 3), 128.0) + np.random.default_rng(0).normal(0, 4, (64, 64, 1))
    assert RegionFinder(ShapesSegmenter())(Image.fromarray(grey.astype(np.uint8))) == []
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with pytest.raises(ImageError, match="figures drawn on a plain background, and this image has none"):
        RegionFinder(ShapesSegmenter())(Image.fromarray(noise))
