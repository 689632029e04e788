"""The rows of one step: put together on the host, request by request, and copied into buffers that never move.

Everything the forward pass reads lies in [`StepBuffers`], at the same addresses in every step, so that a CUDA graph
that was captured from them can be replayed. The host sends each step's numbers in one copy per kind; what depends on
block tables is looked up on the device.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from .layout import slots

PAD_SLOT = -1  # keys and values of such a row are not written


@dataclass
class Rows:
    """Rows of one forward pass.

    Attributes:
        queries, lengths, owners, pages: of each virtual sequence: its rows, its keys, the place of its request in the
            batch, and which pages of that request it reads.
        source: for every row the scheduled row it repeats, or -1 - n for row n of the embedded prompts.
        positions, addresses: of every row: its position, and where in its request's area its keys go.
        scheduled: for every scheduled row where it is; any row for one that is left out.
        hides: of each virtual sequence, where the device keeps the number of keys it hides; -1 for none.
        prompts: embedded prompts that are computed again.
    """

    queries: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    pages: list[np.ndarray] = field(default_factory=list)
    source: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    addresses: list[np.ndarray] = field(default_factory=list)
    scheduled: list[np.ndarray] = field(default_factory=list)
    hides: list[int] = field(default_factory=list)
    prompts: list[torch.Tensor] = field(default_factory=list)
    count: int = 0
    kept: int = 0

    def sequence(
        self,
        owner: int,
        source: np.ndarray,
        positions: np.ndarray,
        addresses: np.ndarray,
        keys: int,
        pages: np.ndarray,
        asked: np.ndarray,
        hides: int = -1,
    ) -> None:
        """Rows that see the same keys, and of each row vLLM asked for where it is among them."""
        self.queries.append(len(source))
        self.lengths.append(keys)
        self.owners.append(owner)
        self.pages.append(pages)
        self.source.append(source)
        self.positions.append(positions)
        self.addresses.append(addresses)
        self.scheduled.append(self.count + asked)
        self.hides.append(hides)
        self.count += len(source)

    def leave_out(self, asked: int) -> None:
        """Rows that vLLM asked for and nobody reads."""
        self.scheduled.append(np.zeros(asked, dtype=np.int64))

    def keep(self, prompt: torch.Tensor) -> np.ndarray:
        """Sources of the rows of an embedded prompt."""
        self.prompts.append(prompt)
        self.kept += len(prompt)
        return -1 - np.arange(self.kept - len(prompt), self.kept)


class StepBuffers:
    """What a forward pass reads, allocated once.

    Args:
        rows, sequences, pages (`int`): of the largest step: rows, virtual sequences, pages of a request.
        page (`int`): rows of a page.
        embeds (`torch.Tensor` of shape `(rows, hidden_size)`): for the embeddings.
    """

    def __init__(self, rows: int, sequences: int, pages: int, page: int, embeds: torch.Tensor):
        device = embeds.device
        self.page, self.embeds = page, embeds
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slots = torch.full((rows,), PAD_SLOT, dtype=torch.int64, device=device)
        self.scheduled = torch.zeros(rows, dtype=torch.int64, device=device)
        self.starts = torch.zeros(sequences + 1, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(sequences, dtype=torch.int32, device=device)
        self.tables = torch.zeros(sequences, pages, dtype=torch.int32, device=device)
        self.source = torch.zeros(0, dtype=torch.int64, device=device)  # of this step's rows, for [`embed`]

    def place(self, rows: Rows, table: torch.Tensor, count: int, sequences: int, hidden: torch.Tensor) -> torch.Tensor:
        """Copy the numbers of a step.

        Args:
            rows (`Rows`)
            table (`torch.Tensor` of shape `(requests, pages)`): vLLM's block table.
            count, sequences (`int`): rows and sequences after padding; a padding row writes no keys, a padding
                sequence has no rows.
            hidden (`torch.IntTensor`): keys at the end of sequences that nobody sees, see [`Rows`]; the last is 0.

        Returns:
            `torch.IntTensor` of shape `(sequences + 1,)`: starts of the sequences, on the host.
        """
        used = len(rows.queries)
        pages = np.zeros((used, self.tables.shape[1]), dtype=np.int64)
        for line, found in zip(pages, rows.pages, strict=True):
            line[: len(found)] = found
        owners = np.repeat(rows.owners, rows.queries)
        addresses = self._send(np.stack([owners, np.concatenate(rows.addresses)]))
        self.slots[: rows.count] = slots(addresses[1], addresses[0], table, self.page)
        self.slots[rows.count : count] = PAD_SLOT
        self.tables[:used] = table[self._send(np.asarray(rows.owners))].gather(1, self._send(pages))
        self._put(self.positions, np.pad(np.concatenate(rows.positions), (0, count - rows.count)))
        # a padding row stands behind the scheduled ones, as vLLM pads them
        scheduled = np.concatenate(rows.scheduled)
        padding = np.arange(rows.count, count)
        self._put(self.scheduled, np.concatenate([scheduled, padding]))
        starts = np.full(sequences + 1, rows.count)
        starts[: used + 1] = np.concatenate([[0], np.cumsum(rows.queries)])
        self._put(self.starts, starts)
        self._put(self.lengths, np.pad(rows.lengths, (0, sequences - used)))
        if max(rows.hides) >= 0:
            self.lengths[:used] -= hidden[self._send(np.asarray(rows.hides))]
        source = np.concatenate(rows.source)
        self.source = self._send(source)
        return torch.from_numpy(starts.astype(np.int32))

    def embed(self, embeds: torch.Tensor, prompts: list[torch.Tensor]) -> None:
        """Copy the embeddings of the scheduled rows, and of prompts that are computed again, into the buffer."""
        every = torch.cat([embeds, *prompts]) if prompts else embeds
        source = torch.where(self.source < 0, len(embeds) - 1 - self.source, self.source)
        torch.index_select(every, 0, source, out=self.embeds[: len(source)])

    def inputs(self, count: int, asked: int) -> dict[str, torch.Tensor | None]:
        """Arguments of the model's `forward`: the first `count` rows, of which `asked` are wanted."""
        return {
            "input_ids": None,
            "inputs_embeds": self.embeds[:count],
            "positions": self.positions[:count],
            "slot_mapping": self.slots[:count],
            "scheduled": self.scheduled[:asked],
        }

    def _send(self, values: np.ndarray) -> torch.Tensor:
        return async_tensor_h2d(values, device=self.embeds.device)

    def _put(self, buffer: torch.Tensor, values: np.ndarray) -> None:
        async_tensor_h2d(values, out=buffer[: len(values)])
