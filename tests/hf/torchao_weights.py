"""Captions of the embedded checkpoint with torchao's weights beside those in float32, as one line of JSON.

In a process of its own, because PEFT and torch print warnings where torchao is installed.
"""

import json
import sys

import plain_kernels
import pytest
import torch
from torch import nn
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import Float8Tensor, Int8WeightOnlyConfig, PerRow
from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs
from transformers import AutoModelForImageTextToText, AutoProcessor, TorchAoConfig

from pdlm_hf.canvas_path_pdlm import CanvasPath
from pdlm_hf.captioning.checkpoints import CHECKPOINT
from pdlm_hf.linear_pdlm import Together
from pdlm_hf.shapes.evaluate import held_out

SCENES = list(held_out(5, 12))


def captions(model) -> list[str]:
    """Of all regions of all images."""
    batch = processor(images=[s.image for s in SCENES], segmentation_maps=[s.masks for s in SCENES])
    found = processor.post_process_region_captions(model.generate(**batch))
    return [caption.text for of in found for caption in of]


def same(found: list[str], expected: list[str]) -> float:
    return sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected)


def to_fp8(network: nn.Module) -> None:
    """What `Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())` does on a GPU; it refuses a CPU."""
    products = Float8MMConfig(use_fast_accum=True)
    inputs = QuantizeTensorToFloat8Kwargs(granularity=PerRow(), mm_config=products)
    for module in network.modules():
        if type(module) is nn.Linear:
            weight = Float8Tensor.from_hp(
                module.weight.detach(), granularity=PerRow(), mm_config=products, act_quant_kwargs=inputs
            )
            module.weight = nn.Parameter(weight, requires_grad=False)


processor = AutoProcessor.from_pretrained(CHECKPOINT)
plain = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
expected = captions(plain)
config = TorchAoConfig(Int8WeightOnlyConfig())
int8 = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, quantization_config=config, dtype="float32")
row = {"captions": len(expected), "int8": same(captions(int8), expected)}

language_model = plain.model.language_model
to_fp8(language_model)
called = captions(plain)
mlp = language_model.layers[0].mlp
states = torch.randn(9, mlp.gate_proj.in_features)
apart = torch.cat([mlp.gate_proj(states), mlp.up_proj(states)], -1)
row["one product"] = torch.equal(Together(mlp.gate_proj, mlp.up_proj)(plain_kernels.quantise_rows(states)), apart)
with pytest.MonkeyPatch.context() as patch:
    patch.setattr("pdlm_hf.canvas_pdlm.choose_path", lambda case: CanvasPath(True, False, "a test"))
    plain_kernels.use(patch)
    fused = captions(plain)
row |= {"FP8": same(called, expected), "FP8 by kernels": same(fused, called)}
sys.stdout.write(json.dumps(row) + "\n")
