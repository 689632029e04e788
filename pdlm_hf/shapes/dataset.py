"""Synthetic scenes with captions, as a training set."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..training.collator import region_rows
from .scenes import SHAPES_DOMAIN, Domain, describe, draw_scene

TRAINING, HELD_OUT = 0, 1  # first part of the seed of every image, so that the two sets are disjoint


class ShapesDataset(Dataset):
    """Synthetic scenes with captions, drawn on demand from (seed, index).

    Args:
        seed (`int`): seed of the set.
        length (`int`): number of images.
        group (`int`): so many images in a row have the same number of regions and the same grid of tiles, so that a
            batch of them needs little padding.
        easy (`bool`): one tile, one or two figures, one wording. With such images the model learns in minutes to use
            its region at all; with the whole domain it long writes well-formed sentences that ignore the image.
        domain (`Domain`): the figures and words.
    """

    in_order = True  # the images are random, and their order makes the groups

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
