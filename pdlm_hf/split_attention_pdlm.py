"""Attention of caption blocks in two calls without a mask: over the shared prompt rows, and over a region's own rows.

A row of caption block i sees the shared rows of its image's prompt, the RoI tokens of region i and its own block
([`masking_pdlm.region_attention`]). With the prompt's keys and values at hand that is two plain attentions whose
results are merged by their log-sum-exp: one over keys that all blocks of an image share and one over some fifty keys
a region. On a GPU both run as variable-length flash attention, which takes no mask; the dense mask over thousands of
prompt rows is not needed. Anywhere else the same is computed by matrix products.

Asked for by `attn_implementation={"text_config": "region_split"}`, or chosen by `generate` where none is given
([`canvas_path_pdlm.choose_path`]). Forward passes that also compute the prompt use sdpa under this name.
"""

import inspect
from functools import cache, partial

import torch
from torch.nn.attention import varlen
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .caching_pdlm import SplitCache
from .versions_pdlm import CACHE

NAME = "region_split"
# Both names of the same kernel; torch 2.11 has the public one without what is needed here.
HAS_VARLEN = {"seqused_k", "enable_gqa", "return_aux"} <= inspect.signature(varlen.varlen_attn).parameters.keys()
HAS_ATEN = "seqused_k" in str(torch.ops.aten._flash_attention_forward.default._schema)


@cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU; None for any other device."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(device)


def attention_kind(
    device: str,
    dtype: torch.dtype,
    head_size: int,
    capability: tuple[int, int] | None = (8, 0),
    has_varlen: bool = HAS_VARLEN,
    has_aten: bool = HAS_ATEN,
) -> str:
    """How [`attend`] computes.

    Args:
        device (`str`): type of the device.
        dtype (`torch.dtype`), head_size (`int`): of the queries.
        capability (`tuple[int, int]`, *optional*): of the GPU, see [`capability_of`]; flash attention begins at 8.0.
        has_varlen, has_aten (`bool`): whether the installed torch has the function.

    Returns:
        "varlen": torch's variable-length attention; "aten": its kernel, called directly; "products": matrix products.
    """
    if device != "cuda" or capability is None or capability < (8, 0):
        return "products"
    if dtype not in (torch.bfloat16, torch.float16) or head_size % 8 or head_size > 256:
        return "products"
    return "varlen" if has_varlen else "aten" if has_aten else "products"


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    kind: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention with its log-sum-exp.

    Args:
        query (`torch.Tensor` of shape `(n, queries, heads, head_size)`)
        key, value (`torch.Tensor` of shape `(n, keys, key_heads, head_size)`): contiguous.
        lengths (`torch.IntTensor` of shape `(n,)`): keys of each that count, from the left; at least one.
        scale (`float`): factor for the scores.
        kind (`str`, *optional*): default: [`attention_kind`].

    Returns:
        values of the shape of `query`, and float32 log-sum-exp of the scores `(n, queries, heads)`.
    """
    device = query.device
    kind = kind or attention_kind(device.type, query.dtype, query.shape[-1], capability_of(device))
    return (_products if kind == "products" else partial(_flash, kind))(query, key, value, lengths, scale)


def _flash(kind, query, key, value, lengths, scale):
    """By the flash kernel for sequences of different lengths, under either of its names."""
    n, queries, heads, _ = query.shape
    keys = key.shape[1]
    row = torch.arange(n + 1, dtype=torch.int32, device=query.device)
    flat = (query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), row * queries, row * keys, queries, keys)
    used = lengths.to(torch.int32)
    if kind == "varlen":
        grouped, wanted = key.shape[2] != heads, varlen.AuxRequest(lse=True)
        out, lse = varlen.varlen_attn(*flat, scale=scale, enable_gqa=grouped, seqused_k=used, return_aux=wanted)
    else:
        dropout, causal, debug = 0.0, False, False
        kernel = torch.ops.aten._flash_attention_forward
        out, lse, *_ = kernel(*flat, dropout, causal, debug, scale=scale, seqused_k=used)
    return out.reshape(query.shape), lse.view(heads, n, queries).permute(1, 2, 0)


def _products(query, key, value, lengths, scale):
    """By matrix products, anywhere; in float32, under autocast too."""
    with torch.autocast(query.device.type, enabled=False):
        return _float_products(query, key, value, lengths, scale)


def _float_products(query, key, value, lengths, scale):
    repeats = query.shape[2] // key.shape[2]
    key, value = (repeat_kv(states.transpose(1, 2), repeats) for states in (key, value))  # (n, heads, keys, head_size)
    scores = query.transpose(1, 2).float() @ key.float().transpose(2, 3) * scale
    counted = torch.arange(key.shape[2], device=query.device) < lengths[:, None]
    scores = scores.masked_fill(~counted[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ value.float()
    return out.transpose(1, 2).to(query.dtype), lse.transpose(1, 2)


def merge(
    first: torch.Tensor, first_lse: torch.Tensor, second: torch.Tensor, second_lse: torch.Tensor
) -> torch.Tensor:
    """Attention over the union of two sets of keys, from the attention over each; in float32.

    Args:
        first, second (`torch.Tensor` of shape `(..., heads, head_size)`)
        first_lse, second_lse (`torch.FloatTensor` of shape `(..., heads)`)
    """
    share = torch.sigmoid(second_lse - first_lse)[..., None]
    return torch.lerp(first.float(), second.float(), share).to(first.dtype)


def split_attention(
    module, query, key, value, attention_mask, scaling=None, split: SplitCache | None = None, **kwargs
):
    """Attention function of transformers; without `split` it is sdpa.

    Args:
        module, query, key, value, attention_mask, scaling: as for every attention function.
        split (`SplitCache`, *optional*): prompts and own rows; `key` and `value` are already in it, `attention_mask`
            is not read.

    Returns:
        `(rows, length, heads, head_size)`, and None.
    """
    if split is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query = query.transpose(1, 2).contiguous()
    layer: int = module.layer_idx
    shared = attend(query, *split.common[layer], split.lengths, scaling)
    blocks = query.view(-1, split.block, *query.shape[2:])
    own, own_lse = attend(blocks, *split.own[layer], split.own_lengths, scaling)
    return merge(*shared, own.reshape(query.shape), own_lse.reshape(shared[1].shape)), None


def split_pass(language_model, embeds: torch.Tensor, positions: torch.Tensor, cache: SplitCache) -> torch.Tensor:
    """Hidden states of the canvas `(rows, length, hidden_size)` by [`split_attention`]."""
    unread = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)  # so that no mask is built
    return language_model(
        inputs_embeds=embeds,
        attention_mask=unread,
        position_ids=positions,
        use_cache=True,
        split=cache,
        **{CACHE: cache},
    ).last_hidden_state


AttentionInterface.register(NAME, split_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
