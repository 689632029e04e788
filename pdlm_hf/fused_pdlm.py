"""Forward passes over prompts and canvas by fused kernels, on a cache that is written once.

A layer is its matrix products and five kernels (`kernels_pdlm.py`); there is no attention mask. Prompt rows go through
torch's attention over the prompts ("isolated") or over everything ("full"), caption rows through one kernel that reads
the shared prompt rows, the RoI tokens of their region and their own block. Every layer's keys and values are written
to their final place, and stay there for the passes over the canvas alone.
"""

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from .kernels_pdlm import (
    Fp8Rows,
    add_norm,
    add_norm_fp8,
    quantise_rows,
    region_attention,
    rotate_and_place,
    silu_gate,
    silu_gate_fp8,
)
from .linear_pdlm import Together
from .masking_pdlm import SHARED

# An `attn_implementation` that asks for the kernels; where they cannot be used it is sdpa.
NAME = "region_split"
AttentionInterface.register(NAME, sdpa_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


@cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU; None for any other device."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(device)


def why_not(network) -> str | None:
    """Why the layers of a language model cannot be called kernel by kernel; None where they can.

    Linear layers may be anything (adapters, quantised weights); the modules around them have to be transformers' own,
    and nobody may be listening to them.

    Args:
        network (`PdlmTextModel`)
    """
    if network.config.hidden_act not in ("silu", "swish"):
        return f"no kernel for the activation {network.config.hidden_act}"
    device = next(network.parameters()).device.type
    if torch.is_autocast_enabled(device):
        return "autocast is on"
    for layer in network.layers:
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        parts: list[tuple[type, nn.Module]] = [(LlamaRMSNorm, norm) for norm in (*norms, network.norm)]
        parts += [(LlamaDecoderLayer, layer), (LlamaAttention, layer.self_attn), (LlamaMLP, layer.mlp)]
        for kind, module in parts:
            if type(module) is not kind:
                return f"a layer has {type(module).__name__} for {kind.__name__}"
            if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
                return f"{kind.__name__} has hooks"
    return None


class CanvasCache:
    """Keys and values of prompts and canvases, and which of them a caption row sees.

    Prompts end at column `room`, where the canvas begins.

    Args:
        config (`PdlmTextConfig`)
        like (`torch.Tensor`): type and device.
        rows (`int`): images.
        room (`int`): columns for prompts.
        blocks, block, num_roi_tokens (`int`): caption blocks of an image, rows of one, RoI tokens of its region.
    """

    def __init__(self, config, like: torch.Tensor, rows: int, room: int, blocks: int, block: int, num_roi_tokens: int):
        self.room, self.blocks, self.block, self.num_roi_tokens = room, blocks, block, num_roi_tokens
        self.width = blocks * block
        shape = (2, rows, config.num_key_value_heads, room + self.width, config.head_dim)
        self.layers = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.shared = torch.zeros(rows, room, dtype=torch.int8, device=like.device)
        self.starts = torch.zeros(rows, dtype=torch.int32, device=like.device)
        self.rois = torch.zeros(rows, blocks, dtype=torch.int32, device=like.device)
        self.places = torch.arange(room + self.width, dtype=torch.int32, device=like.device)

    def show(self, layout: torch.Tensor, real: torch.Tensor) -> None:
        """Take the prompts of other images.

        Args:
            layout (`torch.LongTensor` of shape `(rows, prompt_length)`): see [`masking_pdlm.region_layout`].
            real (`torch.BoolTensor` of that shape): False on padding, which is on the left.
        """
        shift = self.room - layout.shape[1]
        region = torch.arange(self.blocks, device=layout.device)
        self.shared.copy_(F.pad((layout == SHARED) & real, (shift, 0)))
        self.starts.copy_(self.room - real.sum(1))
        self.rois.copy_((layout[:, None] == 2 * region[:, None]).int().argmax(-1) + shift)


class FusedNetwork:
    """The layers of a language model, called kernel by kernel.

    Args:
        network (`PdlmTextModel`)
    """

    def __init__(self, network):
        self.network = network
        self.layers = [
            (
                layer,
                Together(*(getattr(layer.self_attn, f"{name}_proj") for name in "qkv")),
                Together(layer.self_attn.o_proj),
                Together(layer.mlp.gate_proj, layer.mlp.up_proj),
                Together(layer.mlp.down_proj),
            )
            for layer in network.layers
        ]

    def __call__(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        cache: CanvasCache,
        isolated: bool = True,
        real: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of the canvas, computed on the device of the embeddings.

        Args:
            embeds (`torch.Tensor` of shape `(rows, length, hidden_size)`): of the canvas, or of prompts and canvas.
            positions (`torch.LongTensor` of shape `(rows, length)`)
            cache (`CanvasCache`): read, and written.
            isolated (`bool`): prompt rows do not see the canvas.
            real (`torch.BoolTensor` of shape `(rows, length)`, *optional*): False on padding of prompts and canvas.

        Returns:
            `torch.Tensor` of shape `(rows, canvas_length, hidden_size)`.
        """
        with torch.cuda.device_of(embeds):  # Triton launches kernels on the current one
            return self._compute(embeds, positions, cache, isolated, real)

    def _compute(self, embeds, positions, cache: CanvasCache, isolated: bool, real) -> torch.Tensor:
        rows, length, hidden_size = embeds.shape
        prompt = length - cache.width
        places = cache.places[cache.room - prompt :]
        cos, sin = (angles.expand(rows, -1, -1).contiguous() for angles in self.network.rotary_emb(embeds, positions))
        states, update = embeds.reshape(rows * length, hidden_size).clone(), None
        for number, (layer, inputs, outputs, gates, down) in enumerate(self.layers):
            hidden = _norm_for(inputs, layer.input_layernorm, states, update)
            heads = inputs(hidden).view(rows, length, -1, cos.shape[-1])
            rotate_and_place(heads, cos, sin, places, *cache.layers[number])
            last = number == len(self.layers) - 1
            out = self._attend(layer.self_attn, heads, cache, prompt, isolated, real, last)
            if last and prompt:  # only the canvas goes on
                states = states.view(rows, length, hidden_size)[:, prompt:].reshape(-1, hidden_size)
            out = out.view(len(states), -1)
            update = outputs(out if outputs.fp8 is None else quantise_rows(out))
            hidden = _norm_for(gates, layer.post_attention_layernorm, states, update)
            gate = silu_gate if down.fp8 is None else silu_gate_fp8
            update = down(gate(gates(hidden)))
        norm = self.network.norm
        return add_norm(states, update, norm.weight, norm.variance_epsilon).view(rows, -1, hidden_size)

    def _attend(self, attention, heads, cache: CanvasCache, prompt: int, isolated: bool, real, last: bool):
        """Attention of the canvas, behind that of the prompts but for the last layer."""
        queries = heads[:, :, : self.network.config.num_attention_heads]
        keys, values = cache.layers[attention.layer_idx]
        out = region_attention(
            queries[:, prompt:], keys, values, cache.shared, cache.starts, cache.rois, cache.num_roi_tokens,
            cache.block, attention.scaling,
        )  # fmt: skip
        if last or not prompt:
            return out
        seen = slice(cache.room - prompt, cache.room if isolated else None)
        mask = None if real is None else real[:, None, None, : prompt if isolated else None]
        grouped = keys.shape[1] != queries.shape[2]
        first = F.scaled_dot_product_attention(
            queries[:, :prompt].transpose(1, 2), keys[:, :, seen], values[:, :, seen], mask,
            scale=attention.scaling, enable_gqa=grouped,
        )  # fmt: skip
        return torch.cat([first.transpose(1, 2), out], 1)


def _norm_for(product: Together, norm, states: torch.Tensor, update: torch.Tensor | None) -> torch.Tensor | Fp8Rows:
    """The input of a product."""
    add = add_norm if product.fp8 is None else add_norm_fp8
    return add(states, update, norm.weight, norm.variance_epsilon)
