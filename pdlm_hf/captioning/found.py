"""Captions of regions that a model has found."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from ..processing_pdlm import RegionCaption
from ..regions.finding.selection import FoundRegion


@dataclass
class FoundCaption(RegionCaption):
    """Caption of a region that a segmenter or detector has found; see [`RegionCaption`] for the other fields.

    Args:
        name (`str`, *optional*): the word that found the region, or the detector's class.
        mask_score (`float`): how sure the segmenter or detector is of the region.
        segmentation (`dict`): the mask as COCO's compressed RLE.
    """

    name: str | None = None
    mask_score: float = 0.0
    segmentation: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, caption: RegionCaption, region: FoundRegion) -> "FoundCaption":
        """The caption of this region."""
        return cls(**vars(caption), name=region.name, mask_score=region.score, segmentation=region.segmentation)

    @property
    def mask(self) -> np.ndarray:
        """The mask, bool, `(H, W)`."""
        return coco_mask.decode(self.segmentation).astype(bool)

    def to_row(self) -> dict[str, Any]:
        """The caption as JSON has it: also `mask_score`, `segmentation`, and `name` if there is one."""
        return super().to_row() | found_fields(FoundRegion(self.segmentation, self.mask_score, name=self.name))


def found_fields(region: FoundRegion) -> dict[str, Any]:
    """What a row of JSON says about where a region comes from."""
    name = {} if region.name is None else {"name": region.name}
    return name | {"mask_score": round(region.score, 4), "segmentation": region.segmentation}
