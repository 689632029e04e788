"""Synthetic scenes with captions, as a training set."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..prompts_pdlm import END_OF_TURN
from ..templates_pdlm import Template
from ..training.collator import region_rows
from .scenes import SHAPES_DOMAIN, WORDS, Domain, Figure, Scene, describe, draw_scene
from .templates import DARK_DOMAIN, PAIRS, random_template, random_words

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

    def _scene(self, index: int, domain: Domain | None = None) -> tuple[np.random.Generator, Scene]:
        """The scene of a row, and the random numbers for its words. Raises: IndexError."""
        if index >= self.length:
            raise IndexError(index)
        rng = np.random.default_rng((TRAINING, self.seed, index))
        layout = np.random.default_rng((TRAINING, self.seed, 2**40 + index // self.group))
        return rng, draw_scene(rng, layout, self.easy, domain or self.domain)

    def _row(self, scene: Scene, captions: list[str]) -> dict[str, Any]:
        """The row of a scene, without its seed."""
        return region_rows(scene.image, scene.masks, captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng, scene = self._scene(index)
        captions = [describe(figure, rng, self.easy, self.domain) for figure in scene.figures]
        return self._row(scene, captions) | {"seed": self.seed * 2**40 + index}


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
        row = self._row(scene, captions)
        return row | {"seed": self.seed * 2**40 + index, "mask_probability": float(level), "num_slots": slots}


class TemplateDataset(CommitDataset):
    """Synthetic scenes that teach to fill the places of templates in one pass, beside captions as [`CommitDataset`].

    Half of the templates show all of their text, with one token in each place. In the others one place has a value of
    several tokens, two attributes or a dark colour, and everything behind its begin is open. Small figures, which are
    harder to tell apart, are frequent.

    Args:
        tokenizer: of the checkpoint.
        mask_id (`int`): its mask token.
        seed, length, group: see [`ShapesDataset`].
    """

    CAPTIONS, OPEN, FALSE = 0.35, 0.4, 0.1  # shares: captions, open ends, colours that are falsely called dark
    LARGE = 0.3
    OFTEN: tuple[str, ...] = ()

    def __init__(self, tokenizer: Any, mask_id: int, seed: int, length: int, group: int):
        super().__init__(seed, length, group, domain=replace(SHAPES_DOMAIN, large=self.LARGE, often=self.OFTEN))
        self.dark_domain = replace(DARK_DOMAIN, large=self.LARGE, often=self.OFTEN)
        # the regions of an image share a template, and there are few words
        self.encode = lru_cache(4096)(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        self.mask_id, self.end = mask_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)

    def __getitem__(self, index: int) -> dict[str, Any]:
        kind = np.random.default_rng((TRAINING, self.seed, 2**42 + index // self.group)).random()
        if kind < self.CAPTIONS:
            return super().__getitem__(index)
        is_open = kind > 1 - self.OPEN * (1 - self.CAPTIONS)
        rng, scene = self._scene(index, self.dark_domain if is_open and index % 2 else None)
        values = [random_words(figure, rng) for figure in scene.figures]
        write = self._open_blocks if is_open else self._blocks
        blocks = write(rng, values)
        slots = max(len(tokens) for tokens, _ in blocks) + int(rng.integers(0, 8))
        row = self._row(scene, [""] * len(blocks))
        for region, (tokens, labels) in zip(row["regions"], blocks, strict=True):
            fill = self.mask_id if is_open else self.end
            padding = slots - len(tokens)
            region["block"] = tokens + [fill] * padding, labels + [-100] * padding
        level = 1.0 if rng.random() < 0.6 else rng.uniform(0.25, 1.0)
        return row | {"seed": self.seed * 2**40 + index, "mask_probability": float(level), "num_slots": slots}

    def _blocks(self, rng: np.random.Generator, values: list[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Tokens and labels of a template whose places have one token each."""
        names = [name for name in WORDS if rng.random() < 0.85] or list(WORDS)
        template = Template(random_template(rng, names))
        blocks = []
        for words in values:
            tokens, spans = template.block(self.encode, words)
            labels = [-100] * len(tokens)
            for start, stop in spans.values():
                labels[start:stop] = tokens[start:stop]
            blocks.append((tokens, labels))
        return blocks

    def _open_blocks(
        self, rng: np.random.Generator, values: list[dict[str, str]]
    ) -> list[tuple[list[int], list[int]]]:
        """The same up to a value of several tokens, and the token behind it; what follows is open.

        Where a colour is falsely called dark, "dark" is shown without a label: the model learns to go on behind a
        choice that is wrong, which is read too, and not to write it.
        """
        pair = PAIRS[rng.integers(len(PAIRS))] if rng.random() < 0.5 else ("colour",)
        long = " ".join(pair)
        names = [name for name in WORDS if name not in pair and rng.random() < 0.6]
        template = Template(random_template(rng, [*names, long]))
        dark, blocks = self.encode(" dark"), []
        for words in values:
            is_false = "dark" not in words["colour"] and rng.random() < self.FALSE
            if is_false:
                words = words | {"colour": f"dark {words['colour']}"}
            tokens, spans = template.block(self.encode, words | {long: " ".join(words[name] for name in pair)})
            stop = spans[long][1]
            labels = [-100] * stop
            for name in [n for n in template.names if spans[n][1] <= stop]:
                first, last = spans[name]
                labels[first:last] = tokens[first:last]
            for at in range(stop - len(dark) if is_false else 0):
                if tokens[at : at + len(dark)] == dark:
                    labels[at : at + len(dark)] = [-100] * len(dark)
            behind = (tokens + [self.end])[stop]
            blocks.append((tokens[:stop] + [behind], labels + [behind]))
        return blocks


class JointDataset(TemplateDataset):
    """Rows of [`TemplateDataset`] for a lesson of templates and of vision: every region has its "attributes" too.

    What the vision tower takes for something else is frequent: small figures are, but less so than in the parent
    class, after which large ones were called small, and half of the figures are dotted.
    """

    LARGE, OFTEN = 0.42, ("dotted",)

    def _row(self, scene: Scene, captions: list[str]) -> dict[str, Any]:
        row = super()._row(scene, captions)
        for region, figure in zip(row["regions"], scene.figures, strict=True):
            region["attributes"] = vars(figure)
        return row
