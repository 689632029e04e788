"""The canvas of regions: all caption blocks of a batch, and the forward passes that fill them.

A row is an image with as many of its regions as the model has prompts for. Its sequence is prompt + canvas, the canvas
being all its caption blocks. Prompts stand left-padded in the first columns and canvases behind them, so that the keys
and values of all prompts can be cached while only the canvases run through the model (`prefix_refresh_interval`).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.masking_utils import create_bidirectional_mask

from .batching_pdlm import pad_embeds, pad_rows
from .caching_pdlm import PrefixCache
from .canvas_path_pdlm import case_of, choose_path, confirm, log_path
from .graphs_pdlm import FusedPasses
from .masking_pdlm import region_attention
from .versions_pdlm import CACHE


def as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of booleans as what attention adds to its scores, in memory rows of a multiple of 8.

    That is the form kernels of scaled_dot_product_attention want; from anything else they make it at every layer.

    Args:
        mask (`torch.BoolTensor` of shape `(..., keys)`): True where a query sees a key.
        dtype (`torch.dtype`): of the scores.
    """
    keys = mask.shape[-1]
    bias = torch.zeros(*mask.shape[:-1], -(-keys // 8) * 8, dtype=dtype, device=mask.device)[..., :keys]
    return bias.masked_fill_(~mask, -torch.inf)


@dataclass
class CanvasView:
    """What takes part in a forward pass: of some rows, the blocks of some regions, packed to the left.

    Args:
        rows: numbers of the rows, `(R,)`.
        blocks: regions of each row, `(R, K)`, packed to the left.
        columns: column of the canvas in each place, `(R, W)`, the canvas being the blocks of all regions in a row.
        present: places that are in use, `(R, W)`.
        slots: places of the token positions, `(R, S)`, packed to the left.
        counts: token positions of each row, in Python.
        place: indices of the token positions that are in use, in `(R * S,)`.
        where: row and region in the batch, and position in the caption, of each of them.
        masks: attention mask of a forward pass over prompts and canvas (True) and over the canvas alone (False), once
            built.
    """

    rows: torch.Tensor
    blocks: torch.Tensor
    columns: torch.Tensor
    present: torch.Tensor
    slots: torch.Tensor
    counts: list[int]
    place: torch.Tensor
    where: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    masks: dict[bool, Any] = field(default_factory=dict)


def packed(wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns that are wanted, packed to the left.

    Args:
        wanted (`torch.BoolTensor` of shape `(rows, columns)`)

    Returns:
        columns `(rows, most wanted in a row)`, and where they are real; behind them are columns that are not wanted.
    """
    counts = wanted.sum(1)
    columns = (~wanted).int().argsort(dim=1, stable=True)[:, : int(counts.max())]
    return columns, torch.arange(columns.shape[1], device=wanted.device) < counts[:, None]


class RegionCanvas:
    """All caption blocks of a batch, and the forward passes that fill them.

    Args:
        task (`denoising_pdlm.GenerationTask`)
        prompt (`torch.FloatTensor` of shape `(rows, prompt_length, hidden_size)`): embedded prompts.
        counts (`list[int]`): regions of every row.
        num_slots (`int`): tokens to write per caption.
    """

    def __init__(self, task, prompt: torch.Tensor, counts: list[int], num_slots: int):
        self.task, self.model, self.counts, self.num_slots = task, task.model, counts, num_slots
        config, device = task.config, task.device
        self.mask_id, self.end = config.mask_token_id, config.eot_token_id
        real = task.attention_mask
        ids = [row[keep] for row, keep in zip(task.input_ids, real, strict=True)]
        self.prompt_ids = pad_rows(ids, self.end, "left")
        self.prompt = pad_embeds([row[keep] for row, keep in zip(prompt, real, strict=True)])
        self.lengths = real.sum(1)
        width = self.prompt.shape[1]
        self.prompt_mask = torch.arange(width, device=device) >= width - self.lengths[:, None]

        rows, most = len(counts), max(counts)
        region = torch.arange(most, device=device)
        self.exists = region < torch.tensor(counts, device=device)[:, None]  # (rows, regions)
        self.tokens = torch.full((rows, most, num_slots), self.mask_id, device=device)
        self.masked = self.exists[..., None].expand(-1, -1, num_slots).clone()
        self.written = torch.full(self.tokens.shape, -torch.inf, device=device)  # log odds when it was written
        self.steps = torch.zeros(self.exists.shape, dtype=torch.long, device=device)

        self.opening = torch.tensor(config.caption_token_ids, device=device)[:most].expand(rows, -1)
        last = region == torch.tensor(counts, device=device)[:, None] - 1
        self.closing = torch.where(last, self.end, config.newline_token_id)
        sequence = torch.cat([self.prompt_ids, self.blocks(self.tokens).flatten(1)], 1)
        layout = self.model.model.region_layout(sequence)
        self.prompt_layout = layout[:, :width]
        self.block_layout = layout[:, width:].view(rows, most, num_slots + 2)
        self.cache: PrefixCache  # of the forward pass that filled it, and the rows it has
        self.cached_rows: torch.Tensor
        # By fused kernels: views have all regions of their rows, and stay until the prompts are computed again.
        self.fused = self.captured = False
        self.passes: FusedPasses | None = None  # of the forward pass that computed the prompts
        self.ragged = len(set(counts)) > 1 or not bool(self.prompt_mask.all())

    def choose_path(self, caching: bool) -> None:
        """Choose how forward passes over the canvas are computed, and log it.

        Args:
            caching (`bool`): whether some of them run on cached prompts.
        """
        graphs, network = self.task.settings.cuda_graphs, self.model.model.language_model
        case = case_of(network, self.prompt.dtype, caching, graphs)
        path = confirm(choose_path(case), type(network), case.dtype, case.head_size, self.prompt.device)
        log_path(path, graphs)
        self.fused, self.captured = path.fused, path.graphs

    def blocks(self, tokens: torch.Tensor) -> torch.Tensor:
        """Caption token, slots and closing newline (or end of turn) of every region, `(rows, regions, slots + 2)`."""
        return torch.cat([self.opening[..., None], tokens, self.closing[..., None]], -1)

    def ended(self) -> torch.Tensor:
        """Token positions that are final and end their caption, `(rows, regions, slots)`."""
        return (self.tokens == self.end) & ~self.masked

    def view(self, active: torch.Tensor, trimmed: bool = False) -> CanvasView:
        """The blocks of the regions where `active` `(rows, regions)` is true.

        With `trimmed`, without the token positions behind the end of a caption.
        """
        rows, size = active.any(1).nonzero()[:, 0], self.num_slots + 2
        wanted = active[rows, :, None].expand(-1, -1, size)
        if trimmed:
            ends = self.ended()[rows]
            wanted = wanted.clone()
            wanted[..., 1:-1] &= ends.cumsum(-1) - ends.long() == 0
        columns, present = packed(wanted.flatten(1))
        offset = columns % size
        slots, real = packed(present & (offset > 0) & (offset <= self.num_slots))
        row, slot = real.nonzero(as_tuple=True)
        column = columns[row, slots[row, slot]]
        return CanvasView(
            rows,
            packed(active[rows])[0],
            columns,
            present,
            slots,
            real.sum(1).tolist(),
            row * slots.shape[1] + slot,
            (rows[row], column // size, column % size - 1),
        )

    def forward(self, view: CanvasView, whole: bool, keep: bool = False) -> torch.Tensor:
        """One forward pass; hidden states of the token positions, `(R, S, hidden_size)`.

        Args:
            view (`CanvasView`): blocks that take part.
            whole (`bool`): prompts and canvas; else the canvas alone, on the cached prompts.
            keep (`bool`): with `whole`: cache the prompts' keys and values.
        """
        self.task.num_forwards += 1
        rows = view.rows
        shown = torch.where(self.masked, self.mask_id, self.tokens)
        ids = self.blocks(shown).flatten(1)[rows[:, None], view.columns]
        embeds = self.model.get_input_embeddings()(ids).to(self.prompt.dtype)
        positions = self.lengths[rows, None] + view.columns
        if whole:
            prompt_positions = (self.prompt_mask[rows].cumsum(1) - 1).clamp_min(0)
            embeds = torch.cat([self.prompt[rows], embeds], 1)
            positions = torch.cat([prompt_positions, positions], 1)
        if self.fused:
            return _places(self._fused_pass(view, embeds, positions, whole), view.slots)
        cache = (PrefixCache() if keep else None) if whole else self._cache_of(rows)
        if whole not in view.masks:
            view.masks[whole] = self._mask(view, embeds, cache)
        hidden = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=view.masks[whole],
            position_ids=positions,
            use_cache=cache is not None,
            **{CACHE: cache},
        ).last_hidden_state
        if whole and cache is not None:
            cache.freeze(self.prompt.shape[1])
            self.cache, self.cached_rows = cache, rows
        if whole:
            hidden = hidden[:, self.prompt.shape[1] :]
        return _places(hidden, view.slots)

    def _fused_pass(self, view: CanvasView, embeds: torch.Tensor, positions: torch.Tensor, whole: bool):
        """A forward pass without a mask; over the canvas alone replayed from a CUDA graph, if asked for."""
        rows, blocks, size = view.rows, view.blocks.shape[1], self.num_slots + 2
        if self.passes is None or len(self.passes.cache.starts) != len(rows):
            self.release()
            sizes = (len(rows), self.prompt.shape[1], blocks, size, self.model.config.num_roi_tokens)
            self.passes = self.model.canvas_graphs().take(embeds, *sizes)
            self.passes.cache.show(self.prompt_layout[rows], self.prompt_mask[rows])
        if not whole:
            return self.passes.canvas(embeds, positions, self.captured)
        known = torch.cat([self.prompt_mask[rows], view.present], 1) if self.ragged else None
        return self.passes.whole(embeds, positions, self.task.config.prefix_attention == "isolated", known)

    def release(self) -> None:
        """Let others use the memory of fused passes."""
        if self.passes is not None:
            self.model.canvas_graphs().give_back(self.passes)
            self.passes = None

    def _mask(self, view: CanvasView, embeds: torch.Tensor, cache: PrefixCache | None) -> Any:
        """Attention of this view's queries over the prompts and its own blocks."""
        rows = view.rows
        canvas = self.block_layout.flatten(1)[rows[:, None], view.columns]
        layout = torch.cat([self.prompt_layout[rows], canvas], 1)
        mask = create_bidirectional_mask(
            config=self.model.model.language_model.config,
            inputs_embeds=embeds,
            attention_mask=torch.cat([self.prompt_mask[rows], view.present], 1).long(),
            and_mask_function=region_attention(layout, self.task.config.prefix_attention),
            **{CACHE: cache if cache is not None and cache.prefix_length is not None else None},
        )
        return as_bias(mask, embeds.dtype) if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool else mask

    def _cache_of(self, rows: torch.Tensor) -> PrefixCache:
        """The cache, cut down to these rows once others have finished; frees their memory."""
        if len(rows) != len(self.cached_rows):
            self.cache.select(torch.searchsorted(self.cached_rows, rows))
            self.cached_rows = rows
        return self.cache


def _places(hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Hidden states `(R, W, hidden_size)` in these places `(R, S)`."""
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
