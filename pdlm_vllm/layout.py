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

from dataclasses import dataclass
from math import ceil

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


@dataclass
class CanvasLayout:
    """Addresses of one request. An address counts rows from the start of its first page.

    Args:
        codes (`torch.LongTensor` of shape `(prompt_length,)`): [`~pdlm_hf.masking_pdlm.region_layout`] of the prompt.
        num_blocks (`int`): caption blocks; 1 in chat.
        block (`int`): rows of each.
        page (`int`): rows of a page.

    Attributes:
        pages (`torch.LongTensor` of shape `(num_blocks, n)`): which pages of the request each virtual sequence reads.
        length (`int`): keys in each virtual sequence.
        canvas (`torch.LongTensor` of shape `(num_blocks * block,)`): address of every canvas row in its private area.
        copied (`torch.LongTensor` of shape `(num_blocks, m)`): prompt rows that each private area repeats.
        copies (`torch.LongTensor` of shape `(num_blocks, m)`): their addresses there.
    """

    codes: torch.Tensor
    num_blocks: int
    block: int
    page: int

    def __post_init__(self):
        prompt, rows = len(self.codes), torch.arange(len(self.codes))
        order = (torch.arange(self.block) + 1) % self.block
        self.prompt_length = prompt
        self.natural_pages = ceil((prompt + self.num_blocks * self.block) / self.page)
        if self.num_blocks == 1:  # it sees the whole prompt: the natural area will do
            self.pages = torch.arange(self.natural_pages)[None]
            self.length = prompt + self.block
            self.canvas = prompt + order
            self.copied = self.copies = torch.empty(1, 0, dtype=torch.long)
            return
        shared = self.codes == SHARED
        first = int((~shared).nonzero()[0]) if (~shared).any() else prompt
        common = first // self.page
        behind = rows[shared & (rows >= common * self.page)]
        head, tail = behind[behind < first], behind[behind >= first]
        self.copied = torch.stack([torch.cat([head, rows[self.codes == 2 * i], tail]) for i in range(self.num_blocks)])
        private = ceil((self.copied.shape[1] + self.block) / self.page)
        start = self.natural_pages + private * torch.arange(self.num_blocks)
        self.pages = torch.cat(
            [torch.arange(common).expand(self.num_blocks, -1), start[:, None] + torch.arange(private)], 1
        )
        self.length = common * self.page + self.copied.shape[1] + self.block
        self.copies = start[:, None] * self.page + torch.arange(self.copied.shape[1])
        self.canvas = (start[:, None] * self.page + self.copied.shape[1] + order).flatten()

    @property
    def num_pages(self) -> int:
        """Pages the request needs."""
        return int(self.pages.max()) + 1


def slots(addresses: torch.Tensor, owners: torch.Tensor, table: torch.Tensor, page: int) -> torch.Tensor:
    """Addresses as slots of the key-value cache, in vLLM's sense.

    Args:
        addresses (`torch.LongTensor` of shape `(rows,)`)
        owners (`torch.LongTensor` of shape `(rows,)`): request of every row.
        table (`torch.Tensor` of shape `(requests, pages)`): the block table.
        page (`int`): rows of a page.
    """
    return table[owners, addresses // page].long() * page + addresses % page
