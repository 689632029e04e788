"""The prefix cache: keys and values of the prompts, as one cache or sorted for the attention in two calls."""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from .errors_pdlm import SettingError
from .masking_pdlm import SHARED


class PrefixCache(DynamicCache):
    """Keys and values of the prompts, which stay while canvases come and go.

    The first forward pass fills it with prompt and canvas. Once frozen at the prompts' width, a canvas is written
    behind them in place of the last one, and nothing of the prompts is copied.
    """

    layers: list[Any]  # transformers' type has kinds of layers without keys and values
    prefix_length: int | None = None

    def freeze(self, prefix_length: int) -> None:
        """Keep the first `prefix_length` columns from now on."""
        self.prefix_length = prefix_length

    def make_room(self, columns: int) -> None:
        """Let a canvas of so many columns fit behind the prompts, if it is wider than the first one."""
        for layer in self.layers:
            if (missing := (self.prefix_length or 0) + columns - layer.keys.shape[2]) > 0:
                layer.keys, layer.values = (F.pad(states, (0, 0, 0, missing)) for states in (layer.keys, layer.values))

    def select(self, rows: torch.Tensor) -> None:
        """Keep only these rows of the batch."""
        for layer in self.layers:
            layer.keys, layer.values = (states[rows.to(states.device)] for states in (layer.keys, layer.values))

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Keys and values of prompts and canvas."""
        if self.prefix_length is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        end = self.prefix_length + key_states.shape[-2]
        layer.keys[:, :, self.prefix_length : end] = key_states
        layer.values[:, :, self.prefix_length : end] = value_states
        return layer.keys[:, :, :end], layer.values[:, :, :end]

    def get_seq_length(self, *args, **kwargs) -> int:
        """Width of the prompts, once frozen."""
        return super().get_seq_length(*args, **kwargs) if self.prefix_length is None else self.prefix_length

    def get_mask_sizes(self, query_length, *args, **kwargs) -> tuple[int, int]:
        """Keys a query of this length sees, and their offset."""
        return self.get_seq_length() + int(query_length), 0


class SplitCache:
    """Keys and values of the prompts, sorted for `split_attention`; stands in for [`PrefixCache`].

    Args:
        layers (`list`): for each layer the keys and values `(rows, heads, length, head_size)` whose first columns are
            the prompts.
        layout (`torch.LongTensor` of shape `(rows, prompt_length)`): see [`masking_pdlm.region_layout`].
        real (`torch.BoolTensor` of the same shape): False on padding.
        num_regions (`int`): regions of the row that has most.
        num_roi_tokens (`int`): RoI tokens of each.
        block (`int`): rows of a caption block.
        multiple (`int`): room for shared rows is a multiple of this, so that few shapes occur.
    """

    def __init__(self, layers, layout, real, num_regions: int, num_roi_tokens: int, block: int, multiple: int = 1):
        if len({keys.device for keys, _ in layers}) > 1:
            raise SettingError(
                'attn_implementation "region_split" needs the language model on one device; use "sdpa".'
            )
        shared = (layout == SHARED) & real
        self.lengths = shared.sum(1).int()
        room = multiple * -(-int(self.lengths.max()) // multiple)
        common = (~shared).int().argsort(dim=1, stable=True)
        common = common[:, torch.arange(room, device=layout.device).clamp_max(layout.shape[1] - 1)]
        region = torch.arange(num_regions, device=layout.device)
        roi = (layout[:, None] != 2 * region[:, None]).int().argsort(dim=2, stable=True)[..., :num_roi_tokens]
        self.block, self.num_roi_tokens = block, num_roi_tokens
        self.common = [(_columns(keys, common), _columns(values, common)) for keys, values in layers]
        self.roi: list[tuple[torch.Tensor, ...]] = [
            tuple(_columns(states, roi.flatten(1)).unflatten(1, roi.shape[1:]) for states in layer) for layer in layers
        ]
        # (regions of the view, RoI tokens + block, heads, size)
        self.own: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.own_lengths = self.lengths

    def select(self, rows: torch.Tensor) -> None:
        """Keep only these rows of the batch."""
        self.lengths = self.lengths[rows]
        self.common = [(keys[rows], values[rows]) for keys, values in self.common]
        self.roi = [tuple(states[rows] for states in layer) for layer in self.roi]

    def show(self, regions: torch.Tensor) -> None:
        """Make room for the blocks of these regions.

        Args:
            regions (`torch.LongTensor` of shape `(rows, blocks)`): index of the region of every block.
        """
        rows = torch.arange(len(regions), device=regions.device)[:, None]
        length = self.num_roi_tokens + self.block

        def room(states: torch.Tensor) -> torch.Tensor:
            own = states.new_empty(regions.numel(), length, *states.shape[3:])
            own[:, : self.num_roi_tokens] = states[rows, regions].flatten(0, 1)
            return own

        self.own = [(room(keys), room(values)) for keys, values in self.roi]
        self.own_lengths = torch.full((regions.numel(),), length, dtype=torch.int32, device=regions.device)

    def copy_(self, other: "SplitCache") -> None:
        """Take over the contents of a cache of the same shapes, in place, for images that are shown alike."""
        self.lengths.copy_(other.lengths)
        for mine, theirs in ((self.common, other.common), (self.own, other.own)):
            for layer, new in zip(mine, theirs, strict=True):
                for states, values in zip(layer, new, strict=True):
                    states.copy_(values)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Write keys and values of the blocks behind their RoI tokens."""
        for room, states in zip(self.own[layer_idx], (key_states, value_states), strict=True):
            room[:, self.num_roi_tokens :] = states.transpose(1, 2).reshape(-1, self.block, *room.shape[2:])
        return key_states, value_states

    def get_seq_length(self, *args, **kwargs) -> int:
        """Rows of the longest prompt that all captions see."""
        return self.common[0][0].shape[1]


def _columns(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Columns of `(rows, heads, length, head_size)` as contiguous `(rows, columns, heads, head_size)`."""
    index = index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index).transpose(1, 2).contiguous()
