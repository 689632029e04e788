"""Find the regions of an image: everything, or what is named."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ...errors_pdlm import SettingError
from ..rle import encode
from .selection import FoundRegion, SelectionSettings, parse_selection, select_regions


class Proposer(Protocol):
    """A model that proposes regions: a segmenter or a detector.

    Attributes:
        min_score (`float`): lowest score of what is kept, where the settings name none.
    """

    min_score: float

    def propose(
        self, image: Image.Image, names: Sequence[str] | None, settings: SelectionSettings
    ) -> list[FoundRegion]:
        """Propose regions of an RGB image, more than will be kept.

        Args:
            image (`PIL.Image.Image`): RGB.
            names: words for what to find, or None for everything.
            settings ([`SelectionSettings`]): proposals that they would drop may be left out.

        Raises:
            SettingError: this model takes no words, or needs some, or does not know one.
        """


class Refiner(Protocol):
    """A segmenter that makes masks of boxes."""

    def masks(self, image: Image.Image, boxes: list[list[float]]) -> np.ndarray:
        """Masks bool `(boxes, H, W)`, possibly empty, of boxes with corners x0, y0, x1, y1 in pixels."""


class RegionFinder:
    """Finds the regions of images.

    Args:
        proposer ([`Proposer`]): the segmenter or detector.
        names (`list[str]`, *optional*): words for what to find; default: everything.
        settings (*optional*): see [`SelectionSettings`].
        refiner ([`Refiner`], *optional*): a segmenter that makes masks of a detector's boxes.

    Raises:
        SettingError: there are names, and none says anything; or a setting is out of range.
    """

    def __init__(
        self,
        proposer: Proposer,
        names: Sequence[str] | None = None,
        settings: SelectionSettings | dict[str, Any] | None = None,
        refiner: Refiner | None = None,
    ):
        self.proposer, self.refiner, self.names = proposer, refiner, parse_names(names)
        chosen = parse_selection(settings)
        if chosen.min_score is None:
            chosen = chosen.model_copy(update={"min_score": proposer.min_score})
        self.settings = chosen

    def __call__(self, image: Image.Image) -> list[FoundRegion]:
        """Find the regions of an RGB image, from large to small.

        Raises:
            SettingError: see [`Proposer`].
        """
        found = self.proposer.propose(image, self.names, self.settings)
        if self.refiner is not None:
            found = _refined(self.refiner, image, [r for r in found if r.score >= (self.settings.min_score or 0)])
        return select_regions(found, self.settings)


def parse_names(names: Sequence[str] | None) -> list[str] | None:
    """The words of a search, each once; None for everything. Raises: SettingError: none says anything."""
    if names is None:
        return None
    listed = [names] if isinstance(names, str) else list(names)
    if not listed or not all(isinstance(name, str) and name.strip() for name in listed):
        raise SettingError(f'Names of what to find are words, for example ["dog", "red car"], got {listed!r:.60}.')
    return list(dict.fromkeys(name.strip() for name in listed))


def _refined(refiner: Refiner, image: Image.Image, found: list[FoundRegion]) -> list[FoundRegion]:
    """The regions with the masks of their boxes; a box whose mask is empty stays a box."""
    found = [region for region in found if region.area]
    if not found:
        return []
    boxes = [region.as_region(None).bbox for region in found]
    masks = refiner.masks(image, [[float(side) for side in (x, y, x + w, y + h)] for x, y, w, h in boxes])
    return [
        replace(region, segmentation=encode(mask)) if mask.any() else region
        for region, mask in zip(found, masks, strict=True)
    ]
