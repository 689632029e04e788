"""Every kernel beside what it stands for, in Triton's interpreter; and that all compile for a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import plain_kernels
import pytest
import torch
from tiny import shallow_model
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from pdlm_hf import masking_pdlm as masking
from pdlm_hf.canvas_path_pdlm import CanvasPath
from pdlm_hf.fused_pdlm import CanvasCache, FusedNetwork
from pdlm_hf.kernels_pdlm import (
    add_norm,
    add_norm_fp8,
    quantise_rows,
    region_attention,
    rotate_and_place,
    silu_gate,
    silu_gate_fp8,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16, torch.bfloat16]
# of a value: the interpreter cuts bfloat16 off where a GPU rounds, which is twice the error
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return draw


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = CLOSE[found.dtype]
    torch.testing.assert_close(found, expected.to(found.dtype), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [96, 128])
def test_norm_of_a_sum(draw, dtype, size):
    states, update, weight = draw(5, size, dtype=dtype), draw(5, size, dtype=dtype), draw(size, dtype=dtype)
    norm = LlamaRMSNorm(size, eps=1e-5).to(DEVICE, dtype)
    norm.weight.data = weight
    close(add_norm(states, None, weight, 1e-5), norm(states))
    total = states + update
    close(add_norm(states, update, weight, 1e-5), norm(total))
    close(states, total)
    if dtype == torch.float16 and DEVICE == "cpu":  # a GPU has another order of sums
        assert torch.equal(states, total) and torch.equal(add_norm(states, None, weight, 1e-5), norm(total))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [200, 1500])
def test_gate(draw, dtype, size):
    both = draw(3, 2 * size, dtype=dtype)
    close(silu_gate(both), F.silu(both[:, :size]) * both[:, size:])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [96, 128, 1504])
def test_rows_in_fp8(draw, dtype, size):
    """By themselves, of a norm and of a gate: as torchao rounds inputs."""
    states = draw(5, size, dtype=dtype) * torch.tensor([[1e-4], [1], [3], [50], [400]], device=DEVICE, dtype=dtype)
    update, weight, both = (draw(*shape, dtype=dtype) for shape in ((5, size), (size,), (5, 2 * size)))
    total = states + update
    quantise_rows_of = plain_kernels.quantise_rows
    in_fp8(quantise_rows(states), quantise_rows_of(states))
    in_fp8(add_norm_fp8(states, update, weight, 1e-5), quantise_rows_of(add_norm(total, None, weight, 1e-5)))
    close(states, total)
    in_fp8(silu_gate_fp8(both), quantise_rows_of(silu_gate(both)))


def in_fp8(found, expected) -> None:
    """The same scales and numbers, but for rounding, which the interpreter does by cutting bfloat16 off."""
    torch.testing.assert_close(found.scale, expected.scale, rtol=CLOSE[torch.bfloat16], atol=0)
    ours, theirs = found.data.float(), expected.data.float()
    torch.testing.assert_close(ours, theirs, rtol=0.15, atol=0.04)  # the next number is at most an eighth away
    assert (ours == theirs).float().mean() > 0.9


def test_rows_of_zeros_in_fp8(draw):
    rows = quantise_rows(torch.zeros(2, 32, device=DEVICE))
    assert torch.equal(rows.data.float(), torch.zeros(2, 32, device=DEVICE)) and rows.scale.isfinite().all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 4, 16), (4, 2, 24), (9, 3, 64)])
def test_rotation_and_place(draw, dtype, heads, key_heads, size):
    rows, length, room = 2, 5, 11
    states = draw(rows, length, heads + 2 * key_heads, size, dtype=dtype)
    angles = draw(rows, length, size // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    columns = torch.tensor([8, 2, 3, 10, 0], dtype=torch.int32, device=DEVICE)
    query, key, value = states.clone().transpose(1, 2).split([heads, key_heads, key_heads], 1)
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    keys, values = draw(2, rows, key_heads, room, size, dtype=dtype)
    untouched = [column for column in range(room) if column not in columns.tolist()]
    before = keys[:, :, untouched].clone(), values[:, :, untouched].clone()
    rotate_and_place(states, cos, sin, columns, keys, values)
    close(states[:, :, :heads].transpose(1, 2), query)
    close(keys[:, :, columns.long()], key)
    assert torch.equal(values[:, :, columns.long()], value)
    assert torch.equal(keys[:, :, untouched], before[0]) and torch.equal(values[:, :, untouched], before[1])


def prompts(lengths, regions, roi, block, question=3):
    """Codes `(rows, columns)` of prompts padded to the left, with the canvas behind them, and what is real."""
    width = max(lengths) + regions * (roi + 1) - 1 + question
    codes = torch.full((len(lengths), width + regions * block), masking.SHARED)
    real = torch.ones(codes.shape, dtype=torch.bool)
    for row, length in enumerate(lengths):
        real[row, : max(lengths) - length] = False
    for k in range(regions):
        first = max(lengths) + k * (roi + 1)
        codes[:, first : first + roi] = 2 * k
        if k < regions - 1:
            codes[:, first + roi] = masking.PREFIX_ONLY
        codes[:, width + k * block : width + (k + 1) * block] = 2 * k + 1
    return codes.to(DEVICE), real.to(DEVICE), width


@pytest.mark.parametrize(
    ("lengths", "regions", "roi", "block", "heads", "key_heads", "size", "dtype", "tuning"),
    [
        ((90, 90), 3, 4, 7, 4, 4, 64, torch.float32, None),
        ((90, 30), 3, 4, 7, 4, 2, 64, torch.float32, (2, 16, 32, 4, 2)),  # grouped key heads, padding
        ((130,), 1, 16, 34, 2, 1, 128, torch.float32, (4, 32, 64, 4, 2)),
        ((1, 70), 4, 5, 9, 6, 2, 24, torch.float32, (8, 16, 16, 4, 2)),  # parts without a key, a size of no power of 2
        ((90, 40), 6, 4, 10, 2, 2, 32, torch.float32, (1, 64, 64, 4, 2)),
        ((90, 30), 3, 4, 7, 4, 2, 64, torch.bfloat16, (2, 32, 32, 4, 2)),
        ((90, 30), 2, 16, 34, 2, 2, 128, torch.bfloat16, None),
        ((90, 30), 3, 4, 7, 4, 2, 64, torch.float16, (2, 32, 32, 4, 2)),
    ],
    ids=str,
)
def test_attention_is_the_region_mask(draw, lengths, regions, roi, block, heads, key_heads, size, dtype, tuning):
    codes, real, width = prompts(lengths, regions, roi, block)
    rows, room, length = len(lengths), width + 5, regions * block
    queries = draw(rows, length, heads + 1, size, dtype=dtype)[:, :, :heads]  # not contiguous
    keys, values = draw(2, rows, key_heads, room + length, size, dtype=dtype)
    shared = F.pad((codes == masking.SHARED) & real, (5, 0))[:, :room].to(torch.int8).contiguous()
    starts = (room - real[:, :width].sum(1)).int()
    firsts = [room - width + max(lengths) + k * (roi + 1) for k in range(regions)]
    rois = torch.tensor([firsts] * rows, dtype=torch.int32, device=DEVICE)

    allowed = masking.region_attention(codes, "isolated")
    place = torch.arange(codes.shape[1], device=DEVICE)
    row = torch.arange(rows, device=DEVICE)[:, None, None]
    mask = allowed(row, None, place[None, width:, None], place[None, None]) & real[:, None]
    wide = [states[:, :, room - width :].repeat_interleave(heads // key_heads, 1).float() for states in (keys, values)]
    expected = F.scaled_dot_product_attention(queries.transpose(1, 2).float(), *wide, mask[:, None], scale=0.2)
    found = region_attention(queries, keys, values, shared, starts, rois, roi, block, 0.2, tuning)
    close(found, expected.transpose(1, 2))


@pytest.fixture
def network(processor):
    return shallow_model(processor)


def test_a_pass_by_all_kernels(network):
    """A small one: two layers, 16 prompt rows, two blocks."""
    language_model = network.to(DEVICE).model.language_model
    generator, width = torch.Generator().manual_seed(0), language_model.config.hidden_size
    codes = torch.tensor(
        [[masking.SHARED] * 10 + [0, 0, masking.PREFIX_ONLY, 2, 2, masking.SHARED] + [1] * 4 + [3] * 4], device=DEVICE
    )
    embeds = torch.randn(1, 24, width, generator=generator).to(DEVICE)
    place = torch.arange(24, device=DEVICE)
    mask = masking.region_attention(codes, "isolated")(0, 0, place[:, None], place[None])
    with torch.no_grad():
        expected = language_model(inputs_embeds=embeds, attention_mask=mask[None, None]).last_hidden_state[:, 16:]
        cache = CanvasCache(language_model.config, embeds, 1, 20, 2, 4, 2)
        cache.show(codes[:, :16], torch.ones(1, 16, dtype=torch.bool, device=DEVICE))
        passes, positions = FusedNetwork(language_model), place[None]
        torch.testing.assert_close(passes(embeds, positions, cache), expected, atol=1e-5, rtol=1e-5)
        found = passes(embeds[:, 16:], positions[:, 16:], cache)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_decode_by_the_attention_kernel(network, processor, scenes, monkeypatch):
    inputs = processor(images=[scenes[0].image], segmentation_maps=[scenes[0].masks]).to(DEVICE)
    settings = {"max_new_tokens": 2, "max_denoising_steps": 2, "prefix_refresh_interval": 0}
    network = network.to(DEVICE)
    network.set_attn_implementation({"text_config": "sdpa"})
    expected = network.generate(**inputs, **settings)
    monkeypatch.setattr("pdlm_hf.canvas_pdlm.choose_path", lambda case: CanvasPath(True, True, "a test"))
    plain_kernels.use(monkeypatch)
    monkeypatch.setattr("pdlm_hf.fused_pdlm.region_attention", region_attention)
    output = network.generate(**inputs, **settings)
    assert torch.equal(output.region_tokens, expected.region_tokens)
    torch.testing.assert_close(output.region_scores, expected.region_scores, atol=1e-5, rtol=1e-4)


def test_kernels_compile_for_gpus():
    """For the sizes of the 8B on an H100, and the largest heads on a GPU with 99 KB of shared memory a program.

    Without a GPU, and in another process, because this one interprets.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    small = [found.pop(name) for name in list(found) if name.startswith("small GPU")]
    plain = {"_norm", "_gate", "_place", "_attend", "_join"}
    assert set(found) == plain | {"_norm, FP8", "_gate, FP8", "_quantise"} and len(small) == 3
    assert {name for name, kernel in found.items() if kernel["tensor_cores"]} == {"_attend"}
    assert all(kernel["shared_bytes"] <= 227 * 1024 for kernel in found.values())
    assert all(kernel["shared_bytes"] <= 99 * 1024 for kernel in small)
