"""What is kept of proposed masks: tables of boxes on an image of 100 x 100."""

import numpy as np
import pytest

from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.regions import FoundRegion, SelectionSettings, select_regions


def box(x, y, w, h, score=0.9, stability=1.0, name=None):
    mask = np.zeros((100, 100), bool)
    mask[y : y + h, x : x + w] = True
    return FoundRegion.of_mask(mask, score, stability, name)


def boxes_of(found):
    """[x, y, width, height] of every region, in order."""
    return [region.as_region(0).bbox for region in found]


BIG, SMALL, SPECK = box(0, 0, 50, 40), box(60, 60, 20, 10), box(90, 90, 3, 3)
TABLE = {
    "nothing": ([], {}, []),
    "from large to small": ([SMALL, BIG], {}, [[0, 0, 50, 40], [60, 60, 20, 10]]),
    "same area: by score": ([box(0, 0, 9, 9, 0.8), box(50, 0, 9, 9, 0.9)], {}, [[50, 0, 9, 9], [0, 0, 9, 9]]),
    "score": ([box(0, 0, 9, 9, 0.79), box(50, 0, 9, 9, 0.8)], {"min_score": 0.8}, [[50, 0, 9, 9]]),
    "no score asked": ([box(0, 0, 9, 9, 0.0)], {}, [[0, 0, 9, 9]]),
    "stability": ([box(0, 0, 9, 9, 1, 0.949), box(50, 0, 9, 9, 1, 0.95)], {}, [[50, 0, 9, 9]]),
    "speck": ([SPECK, SMALL], {}, [[60, 60, 20, 10]]),
    "speck kept": ([SPECK], {"min_area": 0.0009}, [[90, 90, 3, 3]]),
    "empty": ([box(0, 0, 0, 0)], {"min_area": 0}, []),
    "whole image": ([box(0, 0, 100, 100), SMALL], {}, [[60, 60, 20, 10]]),
    "whole image kept": ([box(0, 0, 100, 100)], {"max_area": 1}, [[0, 0, 100, 100]]),
    # IoU of the first two 0.8
    "duplicate": ([box(0, 0, 40, 10, 0.8), box(0, 0, 50, 10, 0.9)], {}, [[0, 0, 50, 10]]),
    "smaller duplicate wins by score": ([box(0, 0, 40, 10, 0.9), box(0, 0, 50, 10, 0.8)], {}, [[0, 0, 40, 10]]),
    "duplicate at the limit": (
        [box(0, 0, 40, 10, 0.9), box(0, 0, 50, 10, 0.8)],
        {"max_overlap": 0.8, "parts": True},
        [[0, 0, 50, 10], [0, 0, 40, 10]],
    ),
    "duplicate of a duplicate": (
        [box(0, 0, 50, 10, 0.9), box(5, 0, 50, 10, 0.8), box(10, 0, 50, 10, 0.7)],
        {},
        [[0, 0, 50, 10], [10, 0, 50, 10]],
    ),
    "other names are no duplicates": (
        [box(0, 0, 50, 10, 0.8, name="dog"), box(0, 0, 50, 10, 0.9, name="animal")],
        {},
        [[0, 0, 50, 10], [0, 0, 50, 10]],
    ),
    "part": ([BIG, box(10, 10, 5, 5)], {}, [[0, 0, 50, 40]]),
    "part kept": ([BIG, box(10, 10, 5, 5)], {"parts": True}, [[0, 0, 50, 40], [10, 10, 5, 5]]),
    "part sticks out and widens its whole": ([BIG, box(33, 0, 20, 10)], {}, [[0, 0, 53, 40]]),
    "no part": ([BIG, box(34, 0, 20, 10)], {}, [[0, 0, 50, 40], [34, 0, 20, 10]]),
    "a named one is no part": (
        [box(0, 0, 50, 40, name="car"), box(10, 10, 5, 5, name="car")],
        {},
        [[0, 0, 50, 40], [10, 10, 5, 5]],
    ),
    "part of a part": ([BIG, box(5, 5, 20, 20), box(10, 10, 5, 5)], {}, [[0, 0, 50, 40]]),
    # the small box lies in both others: it goes with the smaller, whose area it does not change
    "part of the smaller whole": (
        [box(0, 0, 90, 20), box(80, 0, 15, 60), box(82, 2, 8, 8)],
        {},
        [[0, 0, 90, 20], [80, 0, 15, 60]],
    ),
    "at most": ([SMALL, BIG, box(0, 50, 30, 30)], {"max_regions": 2}, [[0, 0, 50, 40], [0, 50, 30, 30]]),
    "at most, after merging": (
        [BIG, box(1, 1, 30, 30), SMALL],
        {"max_regions": 2},
        [[0, 0, 50, 40], [60, 60, 20, 10]],
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_selection(case):
    found, settings, expected = TABLE[case]
    assert boxes_of(select_regions(found, settings)) == expected
    assert boxes_of(select_regions(found[::-1], settings)) == expected  # the order of proposals says nothing


def test_scores_and_names_stay():
    whole, part = box(0, 0, 50, 40, 0.7, 0.96), box(44, 0, 7, 6, 0.95, 0.99)
    found, dog = select_regions([part, box(60, 60, 20, 20, name="dog"), whole], SelectionSettings())
    assert (found.score, found.stability, found.name, dog.name) == (0.7, 0.96, None, "dog")
    assert found.area == 50 * 40 + 6 and found.mask[0, 50] and not found.mask[6, 50]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"min_score": 1.5}, "min_score: Input should be less than or equal to 1, got 1.5"),
        ({"max_regions": 0}, "max_regions: Input should be greater than or equal to 1, got 0"),
        ({"iou": 0.5}, "iou: there is no such setting of found regions, only min_score, min_stability"),
        ({"min_area": 0.5, "max_area": 0.1}, "min_area 0.5 is more than max_area 0.1: nothing is kept"),
        ([0.5], r"are SelectionSettings or a dict of them, got \[0.5\]"),
        ({"min_area": "big"}, "min_area: Input should be a valid number.* got 'big'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(SettingError, match=message):
        select_regions([], settings)
