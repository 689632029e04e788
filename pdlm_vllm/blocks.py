"""Requests that read attributes: one forward pass over blocks whose tokens are known, and what is read in them.

Such a request has a canvas of any number of blocks for a region, see [`~pdlm_hf.readings_pdlm.Question`]. They travel
to the engine as an extra argument, and the log-probabilities that are wanted come back in its report.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

import numpy as np
import torch

from pdlm_hf import PdlmConfig
from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.masking_pdlm import region_layout
from pdlm_hf.readings_pdlm import PlacedBlock, Question, frame_block

from .layout import CanvasLayout, PrivateRows

BLOCKS = "pdlm_blocks"  # extra argument: the blocks, as [`FramedBlock.to_list`]; the first `SEEN` of them prompts see
SEEN = "pdlm_seen"
MAX_BLOCKS = 64  # of an engine request

Wanted = tuple[int, list[int] | None]  # row of a block, tokens


@dataclass(frozen=True)
class FramedBlock:
    """A block as it stands in the canvas.

    Args:
        region (`int`): of the prompt; its number of region prompts for a block that sees none of them.
        start (`int`): position of its first row, behind the prompt.
        tokens (`list[int]`): of its rows.
        wanted (`list`): rows to read, and tokens whose log-probabilities are wanted; None: the most probable token's.
    """

    region: int
    start: int
    tokens: list[int]
    wanted: list[Wanted]

    def to_list(self) -> list[Any]:
        """The block as an extra argument has it."""
        return [self.region, self.start, self.tokens, self.wanted]

    def fits(self, vocabulary: int, regions: int, positions: int) -> bool:
        """Whether the engine can compute it: what comes by other doors must not stop it.

        Args:
            vocabulary, regions (`int`): tokens and region prompts of the checkpoint.
            positions (`int`): that are left behind the prompt.
        """
        numbers = [(self.region, regions + 1), (self.start, positions - len(self.tokens) + 1)]
        numbers += [(token, vocabulary) for token in self.tokens]
        for row, tokens in self.wanted:
            numbers += [(row, len(self.tokens))]
            numbers += [(token, vocabulary) for token in ([0] if tokens is None else tokens or [-1])]
        return all(type(number) is int and 0 <= number < stop for number, stop in numbers)


@dataclass(frozen=True)
class BlockPlan:
    """One forward pass over given blocks, in the place of a [`~plan.Plan`].

    Args:
        num_regions (`int`): of the prompt.
        framed (`tuple[FramedBlock, ...]`)
        joint (`bool`): prompt rows see the first blocks, so that the prompt is computed with them.
        seen_blocks (`int`): how many of the blocks that are.
    """

    num_regions: int
    framed: tuple[FramedBlock, ...]
    joint: bool
    seen_blocks: int = 0

    num_tokens = 0  # of a caption
    steps, in_blocks, trim, threshold = 1, False, False, None

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.framed)

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of every block."""
        return [len(block.tokens) for block in self.framed]

    @property
    def width(self) -> int:
        """Rows of the canvas."""
        return sum(self.sizes)

    @property
    def seen(self) -> int:
        """Rows of the canvas that prompt rows see."""
        return sum(self.sizes[: self.seen_blocks])

    @cached_property
    def offsets(self) -> np.ndarray:
        """Positions of the canvas rows behind the prompt."""
        return np.concatenate([block.start + np.arange(len(block.tokens)) for block in self.framed])

    def layout(self, codes: torch.Tensor, page: int) -> CanvasLayout:
        """Where its keys and values lie."""
        return CanvasLayout(codes, [block.region for block in self.framed], self.sizes, page, self.seen)

    def refreshes(self, step: int) -> bool:
        """Whether transformers would compute prompt and canvas together: always, there is one step."""
        return True

    def whole(self, step: int) -> bool:
        """Whether the step also computes the prompt."""
        return self.joint

    def canvas(self, config) -> list[int]:
        """Token ids of the canvas."""
        return [token for block in self.framed for token in block.tokens]

    @cached_property
    def wanted(self) -> list[Wanted]:
        """Rows of the canvas to read, and of which tokens."""
        starts = np.cumsum([0, *self.sizes]).tolist()
        pairs = zip(starts, self.framed, strict=False)
        return [(start + row, tokens) for start, block in pairs for row, tokens in block.wanted]

    @property
    def num_values(self) -> int:
        """Log-probabilities that are wanted."""
        return sum(1 if tokens is None else len(tokens) for _, tokens in self.wanted)


@dataclass(frozen=True)
class Room:
    """What a server keeps for an engine request.

    Args:
        canvas (`int`): rows of its canvas.
        page (`int`): rows of a page.
        lookahead (`int`): rows behind the prompt in the cache, for the canvas and the private areas together.
        copies (`int`): prompt rows that private areas may repeat.
    """

    canvas: int
    page: int
    lookahead: int
    copies: int

    def costs(self, framed: Sequence[FramedBlock], private: PrivateRows) -> np.ndarray:
        """What every block takes `(blocks, 4)`: itself, rows, pages of its private area, rows repeated there."""
        repeated = {region: len(private.of(region)) for region in {block.region for block in framed}}
        rows = np.array([len(block.tokens) for block in framed])
        copies = np.array([repeated[block.region] for block in framed])
        return np.stack([np.ones_like(rows), rows, -(-(copies + rows) // self.page), copies], 1)

    def most(self, prompt: int, seen: int) -> np.ndarray:
        """The same for all blocks together `(4,)`, with a prompt of this many rows that see some of the canvas."""
        pages = (prompt + self.lookahead) // self.page - ceil((prompt + seen) / self.page)
        return np.array([MAX_BLOCKS, self.canvas, pages, self.copies])


def block_plan(
    config: PdlmConfig, extra: dict[str, Any], prompt: list[int], num_regions: int, room: Room
) -> BlockPlan | None:
    """The plan of an engine request that reads attributes; None if it is none, or cannot be computed.

    Args:
        config (`PdlmConfig`), extra (`dict`), prompt (`list[int]`): as of [`~plan.make_plan`].
        num_regions (`int`): of the prompt.
        room (`Room`): of the server.
    """
    given, seen = extra.get(BLOCKS), extra.get(SEEN, 0)
    if not num_regions or not isinstance(given, list) or not 0 < len(given) <= MAX_BLOCKS:
        return None
    try:
        framed = [
            FramedBlock(region, start, list(tokens), [(row, tokens) for row, tokens in wanted])
            for region, start, tokens, wanted in given
        ]
        text = config.text_config
        positions = max(text.max_position_embeddings, getattr(config, "served_length", 0)) - len(prompt)
        fits = all(block.fits(text.vocab_size, config.num_region_prompts, positions) for block in framed)
    except (TypeError, ValueError):
        return None
    plan = BlockPlan(num_regions, tuple(framed), config.prefix_attention == "full", seen)
    if not fits or type(seen) is not int or not 0 <= seen <= len(framed) or not plan.num_values or not min(plan.sizes):
        return None
    codes = region_layout(torch.tensor([prompt]), config.region_token_ids, config.caption_token_ids)[0]
    total = room.costs(framed, PrivateRows(codes, room.page)).sum(0)
    return plan if (total <= room.most(len(prompt), plan.seen)).all() else None


@dataclass
class Part:
    """Blocks of a question that one engine request computes.

    Args:
        framed (`list[FramedBlock]`)
        seen (`int`): how many of them prompt rows see.
        places (`list[int]`): numbers of the question's places, in the order in which they are answered.
    """

    framed: list[FramedBlock]
    seen: int
    places: list[int]

    @property
    def extra(self) -> dict[str, Any]:
        """Extra arguments of the engine request."""
        return {BLOCKS: [block.to_list() for block in self.framed], SEEN: self.seen}

    def answers(self, tokens: list[int], logprobs: list[float], asked: Question) -> Iterator[tuple[int, Any]]:
        """Numbers of places and their answers, see [`~pdlm_hf.readings_pdlm.Answer`], from an engine's report."""
        first = 0
        for number in self.places:
            wanted = asked.places[number].tokens
            if wanted is None:
                yield number, (logprobs[first], tokens[first])
                first += 1
            else:
                yield number, torch.tensor(logprobs[first : first + len(wanted)])
                first += len(wanted)


def split_question(asked: Question, codes: torch.Tensor, count: int, config: PdlmConfig, room: Room) -> list[Part]:
    """The blocks of a question, as many at a time as an engine request may have.

    Where prompt rows see the canvas, they see the first block of every region, as transformers has it: these are part
    of every request.

    Args:
        asked (`Question`): of one row.
        codes (`torch.LongTensor` of shape `(prompt_length,)`): [`~pdlm_hf.masking_pdlm.region_layout`] of the prompt.
        count (`int`): its regions.
        config (`PdlmConfig`), room (`Room`)

    Raises:
        SettingError: a block, or the first blocks together, are larger than the room.
    """
    framed = [_framed(config, placed, count) for placed in asked.blocks]
    numbers: list[list[int]] = [[] for _ in framed]
    for number, place in enumerate(asked.places):
        framed[place.block].wanted.append((place.position + 1, place.tokens))
        numbers[place.block].append(number)
    firsts: list[int] = []
    if config.prefix_attention == "full":
        regions = [block.region for block in framed]
        firsts = [regions.index(region) for region in dict.fromkeys(regions)]
    parts = []
    for own in _chunks(framed, firsts, PrivateRows(codes, room.page), room):
        seen = [framed[k] if k in own else replace(framed[k], wanted=[]) for k in firsts]
        blocks = seen + [framed[k] for k in own if k not in firsts]
        parts.append(Part(blocks, len(firsts), [number for k in own for number in numbers[k]]))
    return parts


def _framed(config: PdlmConfig, placed: PlacedBlock, count: int) -> FramedBlock:
    tokens, start = frame_block(config, placed, count)
    return FramedBlock(config.num_region_prompts if placed.region is None else placed.region, start, tokens, [])


def _chunks(framed: list[FramedBlock], firsts: list[int], private: PrivateRows, room: Room) -> list[list[int]]:
    """Numbers of the blocks of every engine request, the firsts in the first. Raises: SettingError."""
    costs = room.costs(framed, private)
    most = room.most(len(private.codes), sum(len(framed[k].tokens) for k in firsts))
    base = costs[firsts].sum(0)
    chunks, used = [list(firsts)], base
    for k in sorted(set(range(len(framed))) - set(firsts)):
        if (base + costs[k] > most).any():
            raise SettingError(_too_large(base[1] + costs[k][1], room))
        if (used + costs[k] > most).any():
            chunks.append([])
            used = base
        chunks[-1].append(k)
        used = used + costs[k]
    if (base > most).any():
        raise SettingError(_too_large(base[1], room))
    return [chunk for chunk in chunks if chunk]


def _too_large(rows: int, room: Room) -> str:
    return (
        f"With this question the schema needs a canvas of {rows} rows, more than there is room for in this server's "
        f"of {room.canvas}. Shorten the question, the template and the choices, send fewer regions at a time, or "
        "start the server with a larger --diffusion-config canvas_length."
    )
