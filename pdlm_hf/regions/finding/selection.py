"""Select among the masks that a model proposes: thresholds, suppression of duplicates, parts, areas, order."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...errors_pdlm import SettingError
from ..region import Region
from ..rle import encode


@dataclass(frozen=True)
class FoundRegion:
    """A region that a model has found.

    Args:
        segmentation (`dict`): COCO's compressed RLE, which takes little memory for any number of proposals.
        score (`float`): how sure the model is of the mask or box, 0 to 1.
        stability (`float`): IoU of the mask at a higher and at a lower threshold, 0 to 1; 1 where there is none.
        name (`str`, *optional*): the word that found it, or the detector's class.
    """

    segmentation: dict[str, Any]
    score: float = 1.0
    stability: float = 1.0
    name: str | None = None

    @classmethod
    def of_mask(cls, mask: np.ndarray, *args: Any, **kwargs: Any) -> "FoundRegion":
        """Make one of a mask `(H, W)`, bool; the other arguments are those of the class."""
        return cls(encode(mask), *args, **kwargs)

    @property
    def mask(self) -> np.ndarray:
        """The mask, bool, `(H, W)`."""
        return coco_mask.decode(self.segmentation).astype(bool)

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(coco_mask.area(self.segmentation))

    def as_region(self, own: Any) -> Region:
        """The region with this id, for a captioner."""
        return Region(own, self.mask)


class SelectionSettings(BaseModel):
    """What to keep of the masks that a model proposes. Areas are shares of the image.

    Args:
        min_score (`float`, *optional*): lowest score. Default: that of the kind of model, 0.8 for masks at a grid of
            points (SAM), 0.5 for masks by words (SAM 3) and for a detector of fixed classes, 0.1 for a detector by
            words, whose scores are low.
        min_stability (`float`): lowest stability. A mask that changes with the threshold follows no outline.
        max_overlap (`float`): of two masks whose IoU is higher, the one with the lower score is a duplicate. Higher
            values keep more near-duplicates, lower ones lose objects behind others.
        min_area (`float`): smaller masks are specks. The model sees a region through a grid of a few hundred patches
            a tile, in which a thousandth is about one.
        max_area (`float`): larger masks are the whole image or its background, and would swallow all others as parts.
        parts (`bool`): keep a part beside its whole. By default it is merged into it: one region for a car, not one
            more for each wheel. Regions with a name are whole objects, and never merged.
        part_share (`float`): a mask is a part if so much of it lies in a larger mask.
        max_regions (`int`): the largest ones are kept; each takes a share of a pass of the captioner.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_score: float | None = Field(None, ge=0, le=1)
    min_stability: float = Field(0.95, ge=0, le=1)
    max_overlap: float = Field(0.7, ge=0, le=1)
    min_area: float = Field(0.001, ge=0, le=1)
    max_area: float = Field(0.95, ge=0, le=1)
    parts: bool = False
    part_share: float = Field(0.85, gt=0, le=1)
    max_regions: int = Field(64, ge=1, le=999)

    @model_validator(mode="after")
    def _check_areas(self) -> "SelectionSettings":
        if self.min_area > self.max_area:
            raise ValueError(f"min_area {self.min_area:g} is more than max_area {self.max_area:g}: nothing is kept")
        return self


def parse_selection(settings: SelectionSettings | dict[str, Any] | None) -> SelectionSettings:
    """Check the settings of a selection.

    Args:
        settings: a [`SelectionSettings`], a dict of its fields, or None for the defaults.

    Raises:
        SettingError: a field is unknown or out of range.
    """
    if isinstance(settings, SelectionSettings):
        return settings
    if not isinstance(settings, dict | None):
        raise SettingError(f"Settings of found regions are SelectionSettings or a dict of them, got {settings!r:.60}.")
    try:
        return SelectionSettings(**(settings or {}))
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            fields = ", ".join(SelectionSettings.model_fields)
            raise SettingError(
                f"{first['loc'][0]}: there is no such setting of found regions, only {fields}."
            ) from None
        if not first["loc"]:  # of several settings
            raise SettingError(f"{first['msg'].removeprefix('Value error, ')}.") from None
        raise SettingError(f"{first['loc'][0]}: {first['msg']}, got {first['input']!r:.60}.") from None


def select_regions(
    found: Sequence[FoundRegion], settings: SelectionSettings | dict[str, Any] | None = None
) -> list[FoundRegion]:
    """Select regions of one image. Duplicates are looked for among those of one name, parts among those without.

    Args:
        found (`list[FoundRegion]`): what a model proposes, in any order.
        settings: see [`SelectionSettings`].

    Returns:
        `list[FoundRegion]`: from large to small; regions of the same area in the order of their scores.

    Raises:
        SettingError: see [`parse_selection`].
    """
    chosen = parse_selection(settings)
    kept = [r for r in found if r.score >= (chosen.min_score or 0) and r.stability >= chosen.min_stability]
    kept = [r for r in kept if r.area and chosen.min_area <= _share(r) <= chosen.max_area]
    kept = _without_duplicates(kept, chosen.max_overlap)
    if not chosen.parts:
        kept = _merged(kept, chosen)
    return sorted(kept, key=_by_area)[: chosen.max_regions]


def _share(region: FoundRegion) -> float:
    height, width = region.segmentation["size"]
    return region.area / (height * width)


def _by_area(region: FoundRegion) -> tuple[int, float]:
    return -region.area, -region.score


def _without_duplicates(found: list[FoundRegion], most: float) -> list[FoundRegion]:
    """Non-maximum suppression by the IoU of the masks, exact as no IoU of boxes is."""
    order = sorted(found, key=lambda region: -region.score)
    overlaps = _overlaps(order, parts=False)
    kept: list[int] = []
    for k, region in enumerate(order):
        if not any(overlaps[k, j] > most and order[j].name == region.name for j in kept):
            kept.append(k)
    return [order[k] for k in kept]


def _merged(found: list[FoundRegion], settings: SelectionSettings) -> list[FoundRegion]:
    """Wholes with their parts. From small to large: a part joins the smallest larger mask that holds it, so that a
    wheel of a toy car goes with the car, not with the shelf it stands on."""
    order = sorted(found, key=_by_area)
    shares = _overlaps(order, parts=True)
    joined: list[list[int]] = [[k] for k in range(len(order))]
    unnamed = [k for k, region in enumerate(order) if region.name is None]
    for k in reversed(unnamed):
        wholes = (j for j in reversed(unnamed) if j < k)
        whole = next((j for j in wholes if shares[k, j] >= settings.part_share), None)
        if whole is not None:
            joined[whole] += joined[k]
            joined[k] = []
    return [_union([order[k] for k in members]) for members in joined if members]


def _union(members: list[FoundRegion]) -> FoundRegion:
    """The first region, which is the whole, with the pixels of the others."""
    if len(members) == 1:
        return members[0]
    whole = coco_mask.merge([region.segmentation for region in members])
    return replace(members[0], segmentation={**whole, "counts": whole["counts"].decode()})


def _overlaps(found: list[FoundRegion], parts: bool) -> np.ndarray:
    """IoU of every two masks; with `parts` the share of mask k, by row, that lies in mask j."""
    shapes = [region.segmentation for region in found]
    return np.asarray(coco_mask.iou(shapes, shapes, [int(parts)] * len(shapes))).reshape(len(shapes), len(shapes))
