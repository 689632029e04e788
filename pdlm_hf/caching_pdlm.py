"""The prefix cache: keys and values of the prompts."""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache


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
