"""What kernels compute, in torch: on a CPU a thousand programs a pass take Triton's interpreter a minute."""

import torch
from float8 import quantised
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pdlm_hf.kernels_pdlm import Fp8Rows


def use(monkeypatch) -> None:
    """Let forward passes call these."""
    for function in (
        add_norm, add_norm_fp8, silu_gate, silu_gate_fp8, quantise_rows, rotate_and_place, region_attention,
    ):  # fmt: skip
        monkeypatch.setattr(f"pdlm_hf.fused_pdlm.{function.__name__}", function)


def add_norm(states, update, weight, eps):
    if update is not None:
        states += update
    return F.rms_norm(states, (states.shape[-1],), weight, eps)


def silu_gate(both):
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def quantise_rows(states):
    return Fp8Rows(*quantised(states))


def add_norm_fp8(states, update, weight, eps):
    return quantise_rows(add_norm(states, update, weight, eps))


def silu_gate_fp8(both):
    return quantise_rows(silu_gate(both))


def rotate_and_place(states, cos, sin, columns, keys, values):
    key_heads = keys.shape[1]
    heads = states.shape[2] - 2 * key_heads
    turned = apply_rotary_pos_emb(states[:, :, : heads + key_heads], states[:, :, :0], cos, sin, 2)[0]
    states[:, :, : heads + key_heads] = turned
    keys[:, :, columns.long()] = turned[:, :, heads:].transpose(1, 2)
    values[:, :, columns.long()] = states[:, :, heads + key_heads :].transpose(1, 2)


def region_attention(queries, keys, values, shared, starts, rois, roi, block, scale):
    rows, length = queries.shape[:2]
    column, place = (torch.arange(n, device=keys.device) for n in (keys.shape[2], length))
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
