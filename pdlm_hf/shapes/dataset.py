"""Synthetic scenes with captions, as a training set."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..training.collator import region_rows
from .scenes import SHAPES_DOMAIN, Domain, Figure, Scene, describe, draw_scene

TRAINING, HELD_OUT = 0, 1  # first part of the seed of every image, so that the two sets are disjoint

# The wording that the checkpoint of `tools.shapes.train --lesson captions` writes most often, word by word.
COMMITTED = "One {texture} {shape}, {size} and {colour}."
COMMITTED_WORDS = {"small": "little", "large": "big", "dotted": "spotted", "square": "box"}


def committed(figure: Figure) -> str:
    """Write the caption of a figure in the one wording that a checkpoint which commits early writes by itself."""
    return COMMITTED.format(**{name: COMMITTED_WORDS.get(value, value) for name, value in vars(figure).items()})


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

    def _scene(self, index: int) -> tuple[np.random.Generator, Scene]:
        """The scene of a row, and the random numbers for its words. Raises: IndexError."""
        if index >= self.length:
            raise IndexError(index)
        rng = np.random.default_rng((TRAINING, self.seed, index))
        layout = np.random.default_rng((TRAINING, self.seed, 2**40 + index // self.group))
        return rng, draw_scene(rng, layout, self.easy, self.domain)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng, scene = self._scene(index)
        captions = [describe(figure, rng, self.easy, self.domain) for figure in scene.figures]
        return region_rows(scene.image, scene.masks, captions) | {"seed": self.seed * 2**40 + index}


class CommitDataset(ShapesDataset):
    """Synthetic scenes that teach to fill a caption in very few passes.

    An empty canvas, and part of the half-filled ones, get the one wording of [`committed`], so that the words of a
    caption no longer depend on which sentence is written. The other half-filled ones have random words: where a
    sentence has begun, as in a template, the model still goes on in its words. Half of the groups have short captions
    of the one wording only, which cost little.
    """

    EMPTY, OWN = 0.7, 0.3  # shares: empty canvases of the one wording, half-filled canvases of the one wording

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng, scene = self._scene(index)
        # another stream than the layout's, of which drawing uses a part
        short = np.random.default_rng((TRAINING, self.seed, 2**41 + index // self.group)).random() < 0.5
        slots = int(rng.integers(9, 15) if short else rng.integers(20, 33))
        empty = rng.random() < (self.EMPTY if short else 0.4)
        own = empty or short or rng.random() < self.OWN
        captions = [committed(f) if own else describe(f, rng, domain=self.domain) for f in scene.figures]
        level = 1.0 if empty else rng.uniform(0.1, 1.0 if own else 0.9)
        row = region_rows(scene.image, scene.masks, captions)
        return row | {"seed": self.seed * 2**40 + index, "mask_probability": float(level), "num_slots": slots}
