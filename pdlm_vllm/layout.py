"""Where the keys and values of a request lie, so that block tables alone express the region mask.

A caption block sees the shared rows of the prompt, the RoI tokens of its region and itself. A paged attention call
sees whole pages, of which only the last may be partly filled, and knows one sequence per query. So every block becomes
a sequence of its own ("virtual"): the full pages of the shared rows at the start of the prompt, which all blocks have
in common, and behind them a private area with the block's remaining keys:

    natural area   [ prompt rows | all caption blocks ]
    private area i [ shared rows past the last full page | RoI tokens of region i | question, header | block i ]

Rotary embedding is applied before keys are written, so their order in the pages is free. Rows that several areas need
run through the model once for each. Of a block the row that closes it comes first, so that token positions at its end
are hidden by a smaller number of keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch

from pdlm_hf.masking_pdlm import SHARED


def private_pages(page: int, roi_tokens: int, tail: int, block: int) -> int:
    """Pages a private area may need.

    Args:
        page (`int`): rows of a page.
        roi_tokens (`int`): RoI tokens of a region.
        tail (`int`): shared rows behind the RoI tokens (question, header of the answer), at most.
        block (`int`): rows of a caption block.
    """
    return ceil((page - 1 + roi_tokens + tail + block) / page)


class PrivateRows:
    """Prompt rows that a private area repeats.

    Args:
        codes (`torch.LongTensor` of shape `(prompt_length,)`): [`~pdlm_hf.masking_pdlm.region_layout`] of the prompt.
        page (`int`): rows of a page.

    Attributes:
        common (`int`): pages at the start of the prompt that every block reads.
    """

    def __init__(self, codes: torch.Tensor, page: int):
        self.codes, self.rows = codes, torch.arange(len(codes))
        shared = codes == SHARED
        first = int((~shared).nonzero()[0]) if (~shared).any() else len(codes)
        self.common = first // page
        behind = self.rows[shared & (self.rows >= self.common * page)]
        self.head, self.tail = behind[behind < first], behind[behind >= first]

    def of(self, region: int) -> torch.Tensor:
        """Rows that a block of this region sees behind the common pages, in the order of the prompt."""
        return torch.cat([self.head, self.rows[self.codes == 2 * region], self.tail])

    def sees_all(self, region: int) -> bool:
        """Whether a block of this region sees the whole prompt."""
        return bool(((self.codes == SHARED) | (self.codes == 2 * region)).all())


@dataclass
class CanvasLayout:
    """Addresses of one request. An address counts rows from the start of its first page.

    Args:
        codes (`torch.LongTensor` of shape `(prompt_length,)`): [`~pdlm_hf.masking_pdlm.region_layout`] of the prompt.
        regions (`Sequence[int]`): region of every block; in chat there is one block, of region 0.
        sizes (`Sequence[int]`): rows of every block.
        page (`int`): rows of a page.
        seen (`int`): rows at the start of the canvas that prompt rows see, if they see any of it.

    Attributes:
        pages (`list[np.ndarray]`): which pages of the request each virtual sequence reads.
        lengths (`list[int]`): keys in each virtual sequence.
        canvas (`np.ndarray` of shape `(sum(sizes),)`): address of every canvas row in its private area.
        copied, copies (`np.ndarray`): prompt rows that the private areas repeat, and their addresses there.
    """

    codes: torch.Tensor
    regions: Sequence[int]
    sizes: Sequence[int]
    page: int
    seen: int

    def __post_init__(self):
        prompt, private = len(self.codes), PrivateRows(self.codes, self.page)
        self.prompt_length = prompt
        if len(self.sizes) == 1 and private.sees_all(self.regions[0]):  # the natural area will do
            self.natural_pages = ceil((prompt + self.sizes[0]) / self.page)
            self.pages, self.lengths = [np.arange(self.natural_pages)], [prompt + self.sizes[0]]
            self.canvas = prompt + _closing_first(self.sizes[0])
            self.copied = self.copies = np.empty(0, dtype=np.int64)
            return
        start = self.natural_pages = ceil((prompt + self.seen) / self.page)
        self.pages, self.lengths = [], []
        canvas, copied, copies = [], [], []
        for region, size in zip(self.regions, self.sizes, strict=True):
            rows = private.of(region).numpy()
            pages = ceil((len(rows) + size) / self.page)
            self.pages.append(np.concatenate([np.arange(private.common), np.arange(start, start + pages)]))
            self.lengths.append(private.common * self.page + len(rows) + size)
            copied.append(rows)
            copies.append(start * self.page + np.arange(len(rows)))
            canvas.append(start * self.page + len(rows) + _closing_first(size))
            start += pages
        self.canvas, self.copied, self.copies = (np.concatenate(parts) for parts in (canvas, copied, copies))

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First row of every block in the canvas, and one past its last."""
        ends = np.cumsum(self.sizes).tolist()
        return list(zip([0, *ends], ends, strict=False))

    @property
    def num_pages(self) -> int:
        """Pages the request needs."""
        return 1 + int(max(pages.max() for pages in self.pages))


def _closing_first(size: int) -> np.ndarray:
    """Order of a block's rows in its area."""
    return (np.arange(size) + 1) % size


def slots(addresses: torch.Tensor, owners: torch.Tensor, table: torch.Tensor, page: int) -> torch.Tensor:
    """Addresses as slots of the key-value cache, in vLLM's sense.

    Args:
        addresses (`torch.LongTensor` of shape `(rows,)`)
        owners (`torch.LongTensor` of shape `(rows,)`): request of every row.
        table (`torch.Tensor` of shape `(requests, pages)`): the block table.
        page (`int`): rows of a page.
    """
    return table[owners, addresses // page].long() * page + addresses % page
