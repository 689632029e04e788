"""The rival of the decode benchmark: an autoregressive model of the same shape, all regions behind a shared prefix.

What a user would otherwise run: the prompt of an image is computed once, and the captions of its regions are a batch
behind it, one token of each per forward pass. The model is that of the benchmark with a causal mask.
"""

from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .model import Bench


class SharedPrefixCache:
    """Keys and values of one layer: the prompts, once per image, and behind them the captions of their regions.

    Args:
        num_regions (`int`): captions of an image.
        length (`int`): tokens of a caption, which there is room for.
    """

    prefix: tuple[torch.Tensor, torch.Tensor]  # (images, heads, prompt_length, head_size)
    tail: tuple[torch.Tensor, torch.Tensor]  # (images, heads, regions, length, head_size)

    def __init__(self, num_regions: int, length: int):
        self.num_regions, self.length, self.written = num_regions, length, 0

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention; the first call has the prompts in front of the captions' first rows, later ones have none.

        Args:
            query, key, value (`torch.FloatTensor` of shape `(images, heads, prompt_length + regions, head_size)`)

        Returns:
            of the shape of `query`.
        """
        width = query.shape[2] - self.num_regions
        own_query, own_key, own_value = (states[:, :, width:] for states in (query, key, value))
        done = own_query[:, :, :0]
        if width:
            query, key, value = (states[:, :, :width].contiguous() for states in (query, key, value))
            done = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            room = (*key.shape[:2], self.num_regions, self.length, key.shape[3])
            self.prefix, self.tail = (key, value), (key.new_empty(room), value.new_empty(room))
        for states, new in zip(self.tail, (own_key, own_value), strict=True):
            states[:, :, :, self.written] = new
        self.written += 1
        return torch.cat([done, self._captions(own_query)], 2)

    def _captions(self, query: torch.Tensor) -> torch.Tensor:
        """Attention of the captions' last rows over the prompts, not copied per region, and over their own rows."""
        (keys, values), width = self.prefix, self.prefix[0].shape[2]
        own_keys, own_values = (states[:, :, :, : self.written] for states in self.tail)
        query = query * query.shape[-1] ** -0.5
        scores = [query @ keys.transpose(2, 3), (own_keys @ query[..., None])[..., 0]]
        weights = torch.cat(scores, -1).softmax(-1, dtype=torch.float32).to(values.dtype)
        return weights[..., :width] @ values + (weights[..., None, width:] @ own_values)[..., 0, :]


def _layer(layer: Any, states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], cache: SharedPrefixCache):
    """One layer of the language model, `(images, rows, hidden_size)`."""
    attention, normed = layer.self_attn, layer.input_layernorm(states)
    query, key, value = (
        project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    states = states + attention.o_proj(cache.attend(query, key, value).transpose(1, 2).flatten(2))
    return states + layer.mlp(layer.post_attention_layernorm(states))


def autoregressive(bench: Bench, num_regions: int, batch: int, length: int) -> torch.Tensor:
    """Decode greedily, token by token: every caption begins behind the prompt of its image with its caption token.

    The first forward pass has the prompts and all caption tokens, so that `length` passes write `length` tokens.

    Args:
        bench (`Bench`): model and prompts.
        num_regions, batch (`int`): regions of an image, images.
        length (`int`): tokens of a caption.

    Returns:
        tokens `(batch, regions, length)`.
    """
    model, text = bench.model, bench.model.model.language_model
    embed = model.get_input_embeddings()
    ids, prompt = bench.prompts(num_regions, batch)
    width = ids.shape[1]
    opening = torch.tensor(model.config.caption_token_ids[:num_regions], device=bench.device).expand(batch, -1)
    states = torch.cat([prompt, embed(opening)], 1)
    positions = torch.arange(width + num_regions, device=bench.device).clamp_max(width).expand(batch, -1)
    caches = [SharedPrefixCache(num_regions, length) for _ in text.layers]
    tokens = []
    for _ in range(length):
        rotary = text.rotary_emb(states, positions)
        for layer, cache in zip(text.layers, caches, strict=True):
            states = _layer(layer, states, rotary, cache)
        last = text.norm(states[:, -num_regions:]).flatten(0, 1)
        # a CPU multiplies few rows in this order twice as fast as `lm_head` does
        tokens.append((model.lm_head.weight @ last.T).argmax(0).view(batch, num_regions))
        states, positions = embed(tokens[-1]), positions[:, -num_regions:] + 1
    return torch.stack(tokens, -1)
