"""The region of each row of the sequence, and the attention mask between them.

The sequence of one image with N regions is

    system, user header, <img> image tokens </img> | RoI_0 \\n RoI_1 \\n ... RoI_N-1 | \\n question, assistant header
    | Mask_Cap_0 slots \\n | Mask_Cap_1 slots \\n | ... | Mask_Cap_N-1 slots <|eot_id|>

Every row gets one code; the attention mask is a function of two codes, so that one function serves eager, sdpa and
flex_attention, and a cache. Source: paper, section 3.2 (structured attention); docs/quirks.md#q15.
"""

from collections.abc import Callable, Sequence

import torch

SHARED = -1  # every caption sees it: system prompt, image, question
PREFIX_ONLY = -2  # no caption sees it: the newlines between RoI groups
# 2 * i: RoI tokens of region i.   2 * i + 1: caption block of region i.


def region_layout(
    input_ids: torch.Tensor,
    region_token_ids: Sequence[int],
    caption_token_ids: Sequence[int],
    replayed: bool = True,
) -> torch.Tensor:
    """Code of every row: `SHARED`, `PREFIX_ONLY`, 2 * i (RoI tokens of region i) or 2 * i + 1 (its caption block).

    A caption block begins at the first `Mask_Cap_i` and ends before the first caption token of a later index, so the
    newline after a caption belongs to it, and the closing <|eot_id|> to the last one.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): clean ids, RoI placeholders expanded.
        region_token_ids (`Sequence[int]`): id of `<|reserved_token_i|>` for each i.
        caption_token_ids (`Sequence[int]`): id of `<|Mask_Cap_i|>` for each i.
        replayed (`bool`): whether RoI features stand in the placeholders. If not (text only), all rows before the
            captions are shared, as in the reference.

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length)`.
    """
    length = input_ids.shape[1]
    position = torch.arange(length, device=input_ids.device)
    regions = torch.as_tensor(region_token_ids, device=input_ids.device)
    captions = torch.as_tensor(caption_token_ids, device=input_ids.device)
    is_region = input_ids[..., None] == regions  # (batch_size, sequence_length, P)
    is_caption = input_ids[..., None] == captions

    layout = torch.full_like(input_ids, SHARED)
    if replayed:
        placeholder = is_region.any(-1)
        first = torch.where(placeholder, position, length).amin(1, keepdim=True)
        last = torch.where(placeholder, position, -1).amax(1, keepdim=True)
        layout = torch.where((position > first) & (position < last), PREFIX_ONLY, layout)
        layout = torch.where(placeholder, 2 * is_region.int().argmax(-1), layout)

    start = torch.where(is_caption, position[:, None], length).amin(1)  # (batch_size, P), `length` where absent
    for i in range(len(caption_token_ids)):
        end = start[:, i + 1 :].amin(1) if i + 1 < start.shape[1] else torch.full_like(start[:, 0], length)
        block = (position >= start[:, i, None]) & (position < end[:, None])
        layout = torch.where(block, 2 * i + 1, layout)
    return layout


def region_attention(layout: torch.Tensor, prefix_attention: str) -> Callable[..., torch.Tensor]:
    """The region mask, as a mask function of transformers: `f(batch, head, query, key) -> bool` tensor.

    A caption row sees the shared rows, the RoI tokens of its region and its own block. A prompt row sees everything
    ("full", the reference) or everything but captions ("isolated").

    Args:
        layout (`torch.LongTensor` of shape `(batch_size, key_length)`): see [`region_layout`].
        prefix_attention (`str`): "full" or "isolated".
    """
    isolated = prefix_attention == "isolated"

    def allowed(batch_idx, head_idx, q_idx, kv_idx):
        query, key = layout[batch_idx, q_idx], layout[batch_idx, kv_idx]
        own = (key >= 0) & (key // 2 == query // 2)
        key_is_caption = (key >= 0) & (key % 2 == 1)
        query_is_caption = (query >= 0) & (query % 2 == 1)
        prefix_row = ~key_is_caption if isolated else torch.ones_like(key_is_caption)
        return torch.where(query_is_caption, (key == SHARED) | own, prefix_row)

    return allowed


def caption_canvas(
    num_regions: int,
    num_slots: int,
    caption_token_ids: Sequence[int],
    mask_token_id: int,
    newline_id: int,
    end_id: int,
) -> list[int]:
    """Ids of N empty caption blocks: `Mask_Cap_i`, the slots, a newline; <|eot_id|> after the last one.

    Args:
        num_regions (`int`): N, at most `len(caption_token_ids)`.
        num_slots (`int`): tokens to write per caption.
        caption_token_ids, mask_token_id, newline_id, end_id: ids of the tokens involved.

    Returns:
        `list[int]` of length N * (num_slots + 2). Slot j of region i is at i * (num_slots + 2) + 1 + j.
    """
    canvas = []
    for i in range(num_regions):
        last = i == num_regions - 1
        canvas += [caption_token_ids[i], *[mask_token_id] * num_slots, end_id if last else newline_id]
    return canvas
