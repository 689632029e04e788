"""What kernels compute, in torch: on a CPU a thousand programs a pass take Triton's interpreter a minute."""

import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def use(monkeypatch) -> None:
    """Let forward passes call these, unless there is a GPU."""
    if not torch.cuda.is_available():
        for function in (add_norm, silu_gate, rotate_and_place, region_attention):
            monkeypatch.setattr(f"pdlm_hf.fused_pdlm.{function.__name__}", function)


def add_norm(states, update, weight, eps):
    if update is not None:
        states += update
    return F.rms_norm(states, (states.shape[-1],), weight, eps)


def silu_gate(both):
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def rotate_and_place(states, cos, sin, columns, keys, values):
    key_heads = keys.shape[1]
    heads = states.shape[2] - 2 * key_heads
    turned = apply_rotary_pos_emb(states[:, :, : heads + key_heads], states[:, :, :0], cos, sin, 2)[0]
    states[:, :, : heads + key_heads] = turned
    keys[:, :, columns.long()] = turned[:, :, heads:].transpose(1, 2)
    values[:, :, columns.long()] = states[:, :, heads + key_heads :].transpose(1, 2)


def region_attention(queries, keys, values, shared, starts, rois, roi, block, scale):
    rows, length = queries.shape[:2]
    column, place = torch.arange(keys.shape[2]), torch.arange(length)
    room = shared.shape[1]
    common = F.pad(shared.bool(), (0, length)) & (column >= starts[:, None])
    first = rois.repeat_interleave(block, 1)[..., None]
    replayed = (column >= first) & (column < first + roi)
    own = (column >= room) & ((column[None] - room) // block == place[:, None] // block)
    mask = common[:, None] | replayed | own
    found = F.scaled_dot_product_attention(
        queries.transpose(1, 2), keys, values, mask[:, None], scale=scale, enable_gqa=True
    )
    return found.transpose(1, 2)
