"""Drawn images with captions, as a data set to train on."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..training.collator import region_rows
from .scenes import SHAPES_DOMAIN, Domain, describe, draw_scene

TRAINING, HELD_OUT = 0, 1  # first part of every image's seed: the two never meet


class ShapesDataset(Dataset):
    """Drawn images with captions, made on demand from (seed, index).

    Args:
        seed (`int`)
        length (`int`): number of images.
        group (`int`): images of one batch share the number of regions and the grid, so that little is padded.
        easy (`bool`): one tile, one or two figures, one wording. On those the model learns in minutes to look at its
            region at all; on the whole domain it first writes well-formed sentences about nothing for very long.
        domain (`Domain`): what there is to draw.
    """

    in_order = True  # drawn at random already; the order makes the groups

    def __init__(self, seed: int, length: int, group: int, easy: bool = False, domain: Domain = SHAPES_DOMAIN):
        self.seed, self.length, self.group, self.easy, self.domain = seed, length, group, easy, domain

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.length:
            raise IndexError(index)
        rng = np.random.default_rng((TRAINING, self.seed, index))
        layout = np.random.default_rng((TRAINING, self.seed, 2**40 + index // self.group))
        scene = draw_scene(rng, layout, self.easy, self.domain)
        captions = [describe(figure, rng, self.easy, self.domain) for figure in scene.figures]
        return region_rows(scene.image, scene.masks, captions) | {"seed": self.seed * 2**40 + index}
